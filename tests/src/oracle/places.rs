//! Where a kernel's text and data lie in guest memory, and whether twins have the same there.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use patcher::addr::Gva;
use patcher::image::{Found, KernelImage};

use super::runtime_consts;
use crate::memory::read_guest_memory;
use crate::vm::{Setup, Vm};

/// What is compared: where it is in guest memory.
pub(crate) struct Places {
    /// The kernel.
    pub(super) image: KernelImage,
    /// Its text when it was last compared.
    pub(super) text: Vec<u8>,
    /// What of the text is each kernel's own, from its boot.
    own: Vec<Range<usize>>,
}

/// Where a kernel is loaded without KASLR (`CONFIG_PHYSICAL_START`).
const PHYSICAL_START: u64 = 16 << 20;

impl Places {
    pub(crate) fn new(setup: &Setup) -> Result<Self> {
        let kernel = setup.kernel.as_ref().context("a kernel")?;
        let file = std::fs::read(kernel)?;
        let image = KernelImage::parse(&file)?;
        Ok(Self { own: runtime_consts::immediates(&file, &image)?, image, text: Vec::new() })
    }

    pub(crate) fn physical(&self, at: Gva) -> u64 {
        at.0 - self.image.text_base().0 + PHYSICAL_START
    }

    fn symbol(&self, name: &str) -> Result<Gva> {
        let (symbol, offset) = name.split_once("+0x").unwrap_or((name, "0"));
        match self.image.symbols().find(symbol) {
            Found::One(at) => Ok(Gva(at.0 + u64::from_str_radix(offset, 16)?)),
            other => Err(anyhow::anyhow!("{symbol}: {other:?}")),
        }
    }

    /// Where the text begins in the kernel.
    pub(crate) fn start(&self) -> u64 {
        self.image.text_base().0
    }

    /// What lies at an address.
    pub(crate) fn describe(&self, at: Gva) -> Option<String> {
        self.image.symbols().describe(at)
    }

    pub(crate) fn text(&self, vm: &Vm) -> Result<Vec<u8>> {
        let (start, end) = (self.symbol("_text")?, self.symbol("_etext")?);
        read_guest_memory(vm, self.physical(start), usize::try_from(end.0 - start.0)?)
    }

    /// Fails unless both have the same text and the same words of data. Returns how many bytes
    /// of text are not what they were when this was last asked.
    pub(super) fn compare(&mut self, twins: &[&Vm; 2], words: &[String]) -> Result<usize> {
        let [outside, mut inside] = [self.text(twins[0])?, self.text(twins[1])?];
        for own in &self.own {
            inside[own.clone()].copy_from_slice(&outside[own.clone()]);
        }
        let differ = differences(&outside, &inside);
        let places: Vec<String> = differ
            .iter()
            .take(20)
            .filter_map(|at| self.image.symbols().describe(Gva(self.image.text_base().0 + *at as u64)))
            .collect();
        ensure!(differ.is_empty(), "the twins differ in {} bytes: {places:?}", differ.len());
        for name in words {
            let at = self.physical(self.symbol(name)?);
            let [a, b] = [read_guest_memory(twins[0], at, 8)?, read_guest_memory(twins[1], at, 8)?];
            ensure!(a == b, "{name} is {a:02x?} from outside, {b:02x?} from inside");
        }
        let changed = differences(&outside, &self.text).len();
        self.text = outside;
        Ok(changed)
    }
}

/// Where two texts differ.
pub(crate) fn differences(a: &[u8], b: &[u8]) -> Vec<usize> {
    const BLOCK: usize = 4096;
    let blocks = a.chunks(BLOCK).zip(b.chunks(BLOCK)).enumerate().filter(|(_, (a, b))| a != b);
    let within = |(block, (a, b)): (usize, (&[u8], &[u8]))| -> Vec<usize> {
        (0..a.len()).filter(|at| a[*at] != b[*at]).map(|at| block * BLOCK + at).collect()
    };
    blocks.flat_map(within).collect()
}
