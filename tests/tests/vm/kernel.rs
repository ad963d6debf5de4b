//! Promises about what the monitor knows of a kernel: it is what the kernel itself says, for
//! both generations; and patches in the kernel's own terms leave what the kernel itself would.

use anyhow::{Context, Result, ensure};
use guest::kallsyms;
use patcher::kernel::KernelImage;
use tests::lab::Lab;
use tests::oracle::{lock_prefixes, twins};
use tests::spinlocks;
use tests::targets::{both_kernels, dry_run, random};
use tests::vm::{Setup, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("kernel::symbols_and_counts_are_the_guests_own", same_symbols),
    ("kernel::every_key_and_call_resolves_or_says_why", dry_run),
    ("kernel::a_change_from_outside_is_the_guests_own", twins),
    ("kernel::lock_prefixes_off_and_on", lock_prefixes),
    ("kernel::random_keys_and_calls_on_a_loaded_guest", |lab| random(lab, 100)),
    ("kernel::spinlocks_switched_under_contention", switched_spinlocks),
];

fn image(setup: &Setup) -> Result<KernelImage> {
    let path = setup.kernel.as_ref().context("a kernel")?;
    Ok(KernelImage::parse(&std::fs::read(path)?)?)
}

fn same_symbols(lab: &Lab) -> Result<()> {
    for setup in both_kernels(lab, 2) {
        let mut vm = Vm::start(lab, &setup)?;
        let image = image(&setup)?;
        let own = image.symbols().iter().map(|(at, kind, name)| (at.0, char::from(kind), name));
        let (count, digest) = kallsyms::digest(own);
        let (_, said) = vm.ask("kallsyms")?;
        ensure!(
            said == format!("count={count} digest={digest:016x}"),
            "{}: {said}, {count} {digest:016x}",
            image.release()
        );

        let tables = image.tables();
        let len = |table: Option<usize>| table.unwrap_or(0);
        for (start, stop, size, count) in [
            (
                "__start___jump_table",
                "__stop___jump_table",
                16,
                len(tables.jump_entries.as_ref().map(Vec::len)),
            ),
            (
                "__start_static_call_sites",
                "__stop_static_call_sites",
                8,
                len(tables.static_call_sites.as_ref().map(Vec::len)),
            ),
            ("__smp_locks", "__smp_locks_end", 4, len(tables.smp_locks.as_ref().map(Vec::len))),
            (
                "__parainstructions",
                "__parainstructions_end",
                16,
                len(tables.paravirt_sites.as_ref().map(Vec::len)),
            ),
            ("__start_mcount_loc", "__stop_mcount_loc", 8, len(tables.mcount_locations)),
            ("__start_orc_unwind_ip", "__stop_orc_unwind_ip", 4, len(tables.orc_entries)),
            ("__start___ex_table", "__stop___ex_table", 12, len(tables.exceptions.as_ref().map(Vec::len))),
        ] {
            let bytes = span(&mut vm, start, stop)?;
            ensure!(bytes == size * count as u64, "{start}: {bytes} bytes, {count} entries");
        }
        let bytes = span(&mut vm, "__alt_instructions", "__alt_instructions_end")?;
        let count = len(tables.alternatives.as_ref().map(Vec::len)) as u64;
        ensure!([12, 14].map(|size| size * count).contains(&bytes), "{bytes} bytes, {count} alternatives");
        vm.power_off()?;
    }
    Ok(())
}

/// How many bytes lie between two symbols, as the guest says; none if it has no such symbols.
fn span(vm: &mut Vm, start: &str, stop: &str) -> Result<u64> {
    let (lines, _) = vm.ask(&format!("symbols {start} {stop}"))?;
    let place = |name: &str| {
        let line = lines
            .iter()
            .find_map(|line| line.strip_prefix("@symbol ")?.strip_prefix(name)?.strip_prefix(" 0x"));
        line.and_then(|text| u64::from_str_radix(text, 16).ok())
    };
    Ok(place(stop).zip(place(start)).map_or(0, |(stop, start)| stop - start))
}

fn switched_spinlocks(lab: &Lab) -> Result<()> {
    both_kernels(lab, 8).iter().try_for_each(|setup| spinlocks::switch(lab, setup, 10))
}
