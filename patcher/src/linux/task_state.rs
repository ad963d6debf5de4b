//! The letter that `/proc/PID/stat` has for a task's state (Linux fs/proc/array.c, `task_state_array`;
//! include/linux/sched.h, `__task_state_index`, the same bits from 5.10 to 7.3).

/// In the order of the states' bits, behind that of a task that can run.
const LETTERS: [char; 9] = ['R', 'S', 'D', 'T', 't', 'X', 'Z', 'P', 'I'];
/// `TASK_REPORT`.
const REPORTED: u32 = 0x7f;
/// The place of `TASK_UNINTERRUPTIBLE`.
const UNINTERRUPTIBLE: usize = 2;
/// `TASK_IDLE`: the same, and not counted as load.
const IDLE: u32 = 0x402;
/// `TASK_RTLOCK_WAIT` and `TASK_FROZEN`, which are told as uninterruptible.
const HIDDEN: u32 = 0x1000 | 0x8000;

/// The letter for `__state` and `exit_state`.
pub(super) fn letter(state: u32, exit_state: u32) -> char {
    let index = if state & HIDDEN != 0 {
        UNINTERRUPTIBLE
    } else if state & IDLE == IDLE {
        LETTERS.len() - 1
    } else {
        // The highest bit decides.
        let reported = (state | exit_state) & REPORTED;
        usize::try_from(u32::BITS - reported.leading_zeros()).unwrap_or(0)
    };
    LETTERS[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_letters_of_proc() {
        for (state, exit_state, expected) in [
            (0, 0, 'R'),
            (1, 0, 'S'),
            (0x2001, 0, 'S'),
            (2, 0, 'D'),
            (0x102, 0, 'D'),
            (0x402, 0, 'I'),
            (4, 0, 'T'),
            (8, 0, 't'),
            (0x80, 0x20, 'Z'),
            (0x80, 0x10, 'X'),
            (0x40, 0, 'P'),
            (0x800, 0, 'R'),
            (0x1000, 0, 'D'),
            (0x8000, 0, 'D'),
            (u32::MAX, u32::MAX, 'D'),
        ] {
            assert_eq!(letter(state, exit_state), expected, "{state:#x} {exit_state:#x}");
        }
    }
}
