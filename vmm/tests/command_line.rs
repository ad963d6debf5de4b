//! The shipped command line has no switches for tests; those are `vmm-lab`'s.

use std::process::{Command, Output};

use clap::CommandFactory;
use vmm::cli::args::Cli;

fn vmm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmm")).args(arguments).output().expect("it runs")
}

#[test]
fn switches_for_tests_are_unknown() {
    for switch in [&["--fail-programs"][..], &["--linger-ms", "1"], &["--breakpoints", "always"]] {
        let output = vmm(&[&["--kernel", "/dev/null"], switch].concat());
        let says = String::from_utf8_lossy(&output.stderr);
        let unknown = format!("unexpected argument '{}'", switch[0]);
        assert!(output.status.code() == Some(2) && says.contains(&unknown), "{switch:?}: {says}");
        let help = vmm(&["--help"]);
        assert!(help.status.success() && !String::from_utf8_lossy(&help.stdout).contains(switch[0]));
    }
}

#[test]
fn nothing_is_hidden() {
    fn hidden(command: &clap::Command) -> Vec<String> {
        let arguments = command.get_arguments().filter(|argument| argument.is_hide_set());
        let mine = arguments.map(|argument| format!("{} {}", command.get_name(), argument.get_id()));
        mine.chain(command.get_subcommands().flat_map(hidden)).collect()
    }
    assert_eq!(hidden(&Cli::command()), Vec::<String>::new());
}
