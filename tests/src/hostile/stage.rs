//! The text that is attacked: a function of the kernel that nothing uses, filled with no-operations.

use anyhow::{Context, Result, ensure};
use guest::provision::livepatch::HOSTILE;
use patcher::addr::Gva;

use crate::oracle::Places;
use crate::test_function::{self, BEGIN, FUNCTION};
use crate::vm::{Setup, Vm};

/// Bytes that attacks have for themselves, and one more slot for a plan's site
/// (`guest/hostile/hostile.h`).
const SLOT: u64 = 64;
const SLOTS: u64 = 8;
const PAGE: u64 = 4096;
const NOP: u8 = 0x90;
const RET: u8 = 0xc3;

pub(super) struct Stage {
    pub(super) release: String,
    /// Where the slots begin in the kernel. They lie on one page.
    pub(super) target: u64,
    /// A site of no-operations among them.
    pub(super) site: String,
    places: Places,
}

impl Stage {
    /// Loads the module and tells it where things are.
    pub(super) fn prepare(vm: &mut Vm, setup: &Setup) -> Result<Self> {
        let release = vm.greeting.split(' ').find_map(|word| word.strip_prefix("release="));
        let release = release.context("a release")?.to_owned();
        let (mut function, mut target) = (0, 0);
        test_function::replace(vm, |start, room| {
            function = start;
            let end = start + (BEGIN + room) as u64;
            target = (start + BEGIN as u64).next_multiple_of(SLOT);
            if target / PAGE != (target + SLOTS * SLOT - 1) / PAGE {
                // The first bytes of the page are those of the attack that stores across pages.
                target = target.next_multiple_of(PAGE) + SLOT;
            }
            ensure!(target + SLOTS * SLOT <= end, "{FUNCTION} has no room");
            Ok([vec![NOP; room - 1], vec![RET]].concat())
        })?;
        let site = format!("{FUNCTION}+{:#x}", target + (SLOTS - 1) * SLOT - function);
        let (lines, _) = vm.ask("symbols klp_ops kprobe_table")?;
        vm.ask(&format!("load /modules/{release}/{HOSTILE}.ko"))?;
        let mut parameters = vec![format!("target {target:#x}")];
        parameters.extend(lines.iter().filter_map(|line| line.strip_prefix("@symbol ").map(str::to_owned)));
        ensure!(parameters.len() == 3, "{parameters:?}");
        for parameter in parameters {
            vm.ask(&format!("write /sys/module/{HOSTILE}/parameters/{parameter}"))?;
        }
        Ok(Self { release, target, site, places: Places::new(setup)? })
    }

    /// All of the kernel's own text.
    pub(super) fn text(&self, vm: &Vm) -> Result<Vec<u8>> {
        self.places.text(vm)
    }

    /// What lies so far into it.
    pub(super) fn describe(&self, offset: usize) -> String {
        let at = Gva(self.places.start() + offset as u64);
        self.places.describe(at).unwrap_or_else(|| at.to_string())
    }
}
