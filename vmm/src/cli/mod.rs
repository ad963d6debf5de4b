//! The command line: arguments, answers for terminals, and the commands that need no running VM.

pub mod args;
pub mod doctor;
pub mod kernel_file;
pub mod render;
pub mod run;
