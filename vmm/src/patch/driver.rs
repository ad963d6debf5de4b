//! Who drives a program: the seam at which a program that is built around this library may put
//! something between a session and the executor. Tests put faults there.

use patcher::program::session::End;
use patcher::program::step::Program;
use patcher::program::target::{self, Target};

/// Runs programs on targets.
pub trait Driver: Send {
    /// Runs a program on a target to its end.
    fn drive(&mut self, program: &Program, target: &mut dyn Target) -> End;
}

/// Runs them as they are.
#[derive(Debug, Clone, Copy)]
pub struct Direct;

impl Driver for Direct {
    fn drive(&mut self, program: &Program, target: &mut dyn Target) -> End {
        target::drive(program, target)
    }
}
