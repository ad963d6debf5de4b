//! Conditions on the position of every vCPU, for programs that change code a vCPU may be in.
//!
//! A stopped vCPU has a next instruction, and its stack may hold the address of an interrupted one.
//! Linux counts interrupts, NMIs and softirqs in the preempt count (include/linux/preempt.h), some
//! instructions after the gate. Until then the interrupt flag is clear, because Linux uses interrupt
//! gates only (arch/x86/kernel/idt.c). So if interrupts are enabled and none of these counts is set,
//! there is no interrupted instruction.

use std::fmt;
use std::ops::Range;

use crate::addr::{Gva, VcpuId};
use crate::safety::old_code::Place;

/// Bits of the preempt count (Linux include/linux/preempt.h; 5.9 to 6.14 at least).
const SERVING_SOFTIRQ: u32 = 0x0000_0100;
const HARDIRQ: u32 = 0x000f_0000;
const NMI: u32 = 0x00f0_0000;
/// Inverted: set if no reschedule is needed (arch/x86/include/asm/preempt.h).
const NO_RESCHEDULE: u32 = 1 << 31;

/// The position of a stopped vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuState {
    /// The vCPU.
    pub vcpu: VcpuId,
    /// The next instruction.
    pub rip: Gva,
    /// In user mode or in the kernel.
    pub mode: Mode,
}

/// The privilege a vCPU runs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// User mode; the kernel stack is empty.
    User,
    /// The kernel has not started the CPU, or has switched it off: it holds no lock and has interrupted
    /// nothing. It goes on by a start from its first instruction, or by an NMI that returns to where it
    /// stands.
    Off,
    /// Kernel mode.
    Kernel {
        /// RFLAGS.IF.
        interrupts: bool,
        /// Linux's per-CPU preempt count, as it is in memory.
        preempt_count: u32,
        /// Whether the current task is the CPU's idle task.
        idle: bool,
    },
}

/// What must hold of every vCPU.
#[derive(Debug, Default, Clone, PartialEq, Eq, Hash)]
pub struct Condition {
    /// Ranges that may hold no vCPU's next instruction, nor an interrupted one.
    pub inside: Vec<Range<Gva>>,
    /// Functions that no vCPU may be in.
    pub outside: Vec<Range<Gva>>,
    /// Functions that no task may stand in, asleep or running: told by all stacks, not by the vCPUs alone
    /// ([`crate::safety::stack_check`]).
    pub tasks_outside: Vec<Place>,
    /// Every vCPU is in user mode, idle, or has a preempt count of zero: it holds no spinlock.
    pub preemptible: bool,
    /// As `preemptible`, and interrupts are enabled: it holds no `arch_spin_lock` either, which does
    /// not raise the count.
    pub unlocked: bool,
}

/// A vCPU that does not meet a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offender {
    /// The vCPU.
    pub vcpu: VcpuId,
    /// Its next instruction.
    pub rip: Gva,
    /// Which part of the condition fails.
    pub why: &'static str,
}

impl Condition {
    /// Whether it asks for anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inside.is_empty()
            && self.outside.is_empty()
            && self.tasks_outside.is_empty()
            && !self.preemptible
            && !self.unlocked
    }

    /// Checks one vCPU.
    ///
    /// ```
    /// use patcher::addr::{Gva, VcpuId};
    /// use patcher::safety::quiesce::{Condition, Mode, VcpuState};
    ///
    /// let condition = Condition { outside: vec![Gva(0x1000)..Gva(0x1100)], ..Condition::default() };
    /// let mode = Mode::Kernel { interrupts: true, preempt_count: 0, idle: false };
    /// assert!(condition.check(&VcpuState { vcpu: VcpuId(0), rip: Gva(0x1100), mode }).is_ok());
    /// let offender = condition.check(&VcpuState { vcpu: VcpuId(1), rip: Gva(0x10ff), mode }).unwrap_err();
    /// assert_eq!((offender.vcpu, offender.rip), (VcpuId(1), Gva(0x10ff)));
    /// ```
    ///
    /// # Errors
    /// The vCPU, if it does not meet the condition.
    pub fn check(&self, vcpu: &VcpuState) -> Result<(), Offender> {
        self.why_not(vcpu).map_or(Ok(()), |why| Err(Offender { vcpu: vcpu.vcpu, rip: vcpu.rip, why }))
    }

    fn why_not(&self, vcpu: &VcpuState) -> Option<&'static str> {
        if vcpu.mode == Mode::User {
            return None;
        }
        let stands_in = |ranges: &[Range<Gva>]| ranges.iter().any(|range| range.contains(&vcpu.rip));
        if stands_in(&self.inside) {
            return Some("stands inside a site");
        }
        if stands_in(&self.outside) {
            return Some("stands in a function that must be left");
        }
        let Mode::Kernel { interrupts, preempt_count, idle } = vcpu.mode else { return None };
        let count = preempt_count & !NO_RESCHEDULE;
        if !self.inside.is_empty() && (!interrupts || count & (SERVING_SOFTIRQ | HARDIRQ | NMI) != 0) {
            return Some("may have interrupted a site");
        }
        // An idle task runs with a preempt count of 1.
        let allowed = u32::from(idle);
        if self.unlocked && (count > allowed || !interrupts) {
            return Some("may hold a spinlock, or wait for one");
        }
        (self.preemptible && count > allowed).then_some("is not preemptible")
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("each has come out")?;
        /// More ranges are only counted.
        const LISTED: usize = 3;
        for (ranges, what) in [(&self.inside, "inside"), (&self.outside, "in")] {
            if ranges.len() > LISTED {
                write!(f, ", none {what} any of {} places", ranges.len())?;
                continue;
            }
            for range in ranges {
                write!(f, ", none {what} {} to {}", range.start, range.end)?;
            }
        }
        match &self.tasks_outside[..] {
            [] => {}
            places if places.len() > LISTED => write!(f, ", no task in any of {} functions", places.len())?,
            places => {
                let names: Vec<&str> = places.iter().map(|place| place.name.as_str()).collect();
                write!(f, ", no task in {}", names.join(" or "))?;
            }
        }
        f.write_str(if self.preemptible { ", each is preemptible" } else { "" })?;
        f.write_str(if self.unlocked { ", none may hold or want a spinlock" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(rip: u64, mode: Mode) -> VcpuState {
        VcpuState { vcpu: VcpuId(3), rip: Gva(rip), mode }
    }

    fn kernel(interrupts: bool, preempt_count: u32, idle: bool) -> Mode {
        Mode::Kernel { interrupts, preempt_count: preempt_count | NO_RESCHEDULE, idle }
    }

    #[test]
    fn inside_a_site_no_vcpu_stands_and_none_was_interrupted() {
        let condition = Condition { inside: vec![Gva(11)..Gva(15)], ..Condition::default() };
        let why = |rip, mode| condition.check(&standing(rip, mode)).err().map(|offender| offender.why);
        assert_eq!(why(10, kernel(true, 0, false)), None, "the first instruction was not begun");
        assert_eq!(why(15, kernel(true, 5, false)), None, "the site was left");
        assert_eq!(why(11, kernel(true, 0, false)), Some("stands inside a site"));
        assert_eq!(why(12, Mode::User), None, "an address of user space");
        assert_eq!(why(99, kernel(false, 0, false)), Some("may have interrupted a site"));
        for count in [0x100, 0x1_0000, 0x10_0000] {
            assert_eq!(
                why(99, kernel(true, count, false)),
                Some("may have interrupted a site"),
                "{count:#x}"
            );
        }
        assert_eq!(why(99, kernel(true, 0x200, false)), None, "softirqs are disabled, not served");
    }

    #[test]
    fn preemptible_means_user_mode_idle_or_a_count_of_zero() {
        let condition = Condition { preemptible: true, ..Condition::default() };
        let holds = |mode| condition.check(&standing(1, mode)).is_ok();
        assert!(holds(Mode::User));
        assert!(holds(kernel(false, 0, false)));
        assert!(holds(kernel(true, 1, true)));
        assert!(!holds(kernel(true, 1, false)));
        assert!(!holds(kernel(true, 0x1_0001, true)), "an interrupt on top of idle");
        assert!(!holds(kernel(true, 0x200, false)), "softirqs disabled");
    }

    #[test]
    fn unlocked_means_preemptible_and_interrupts_enabled() {
        let condition = Condition { unlocked: true, ..Condition::default() };
        let holds = |mode| condition.check(&standing(1, mode)).is_ok();
        assert!(!condition.is_empty());
        assert!(holds(Mode::User));
        assert!(holds(kernel(true, 0, false)));
        assert!(holds(kernel(true, 1, true)), "idle");
        assert!(!holds(kernel(false, 0, false)));
        assert!(!holds(kernel(false, 1, true)));
        assert!(!holds(kernel(true, 1, false)));
    }

    #[test]
    fn a_cpu_that_is_off_meets_every_condition_but_where_it_stands() {
        let all = Condition {
            inside: vec![Gva(11)..Gva(15)],
            outside: vec![Gva(20)..Gva(30)],
            tasks_outside: vec![],
            preemptible: true,
            unlocked: true,
        };
        let why = |rip| all.check(&standing(rip, Mode::Off)).err().map(|offender| offender.why);
        assert_eq!(why(10), None);
        assert_eq!(why(12), Some("stands inside a site"));
        assert_eq!(why(20), Some("stands in a function that must be left"));
        assert!(all.check(&standing(10, kernel(false, 0, true))).is_err(), "one that is not off");
    }

    #[test]
    fn functions_can_be_kept_free() {
        let condition = Condition { outside: vec![Gva(10)..Gva(20)], ..Condition::default() };
        assert!(condition.check(&standing(20, kernel(false, 7, false))).is_ok());
        let offender = condition.check(&standing(10, kernel(true, 0, false))).expect_err("inside");
        assert_eq!((offender.vcpu, offender.rip), (VcpuId(3), Gva(10)));
        assert!(!condition.is_empty() && Condition::default().is_empty());
    }
}
