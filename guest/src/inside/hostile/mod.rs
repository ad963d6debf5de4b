//! A guest that is the enemy: attacks on the monitor from ring 3 as root, and through a module
//! from ring 0 (`guest/hostile`). Each attack is a process of this program that goes on until its
//! standard input is closed; it then tells how often it was done, and how often the processor
//! seemed to do what no processor does.

mod noise;
mod probes;
mod races;
mod ring0;
mod signals;
mod stack;
mod stage;
mod stores;
mod traps;

use std::io::{self, Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread;

pub use self::probes::run_garbage;
use self::stage::Stage;

/// The first argument of a process that is an attack.
pub const ARGUMENT: &str = "hostile";

type Attack = fn(&Arc<Stage>) -> io::Result<()>;

/// Attacks by name.
const ATTACKS: &[(&str, Attack)] = &[
    ("stores", stores::run),
    ("stack", stack::run),
    ("protection", races::protection),
    ("straddle", races::straddle),
    ("swap", races::swap),
    ("remap", races::remap),
    ("breakpoints", traps::breakpoints),
    ("steps", traps::steps),
    ("shadows", traps::shadows),
    ("names", noise::names),
    ("flood", noise::flood),
    ("nested", probes::nested),
    ("ports", probes::ports),
    ("kexec", probes::kexec),
    ("ring0-stores", |stage| ring0::run(stage, "stores")),
    ("ring0-stack", |stage| ring0::run(stage, "stack")),
    ("ring0-shadows", |stage| ring0::run(stage, "shadows")),
    ("ring0-steps", |stage| ring0::run(stage, "steps")),
    ("ring0-alias", |stage| ring0::run(stage, "alias")),
    ("ring0-lists", |stage| ring0::run(stage, "lists")),
    ("ring0-nested", |stage| ring0::run(stage, "nested")),
];

/// Their names.
pub const NAMES: &[&str] = &{
    let mut names = [""; ATTACKS.len()];
    let mut number = 0;
    while number < names.len() {
        names[number] = ATTACKS[number].0;
        number += 1;
    }
    names
};

/// What the process of one attack does; its arguments are behind [`ARGUMENT`].
#[must_use]
pub fn main(arguments: &[String]) -> ExitCode {
    match attack(arguments) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("error {error}");
            ExitCode::FAILURE
        }
    }
}

fn attack(arguments: &[String]) -> io::Result<String> {
    let [name, target] = arguments else { return Err(io::Error::other("a name and an address")) };
    let known = ATTACKS.iter().find(|(known, _)| known == name);
    let (_, run) = known.ok_or_else(|| io::Error::other(format!("no attack {name}")))?;
    let target = u64::from_str_radix(target.trim_start_matches("0x"), 16).map_err(io::Error::other)?;
    let stage = Arc::new(Stage::new(target)?);
    let stop = stage.clone();
    thread::spawn(move || {
        let _ = io::stdin().read(&mut [0]);
        stop.stop();
    });
    run(&stage)?;
    Ok(stage.line())
}

/// Attacks that are going on.
#[derive(Default)]
pub struct Attacks(Vec<(String, Child)>);

impl Attacks {
    /// Starts some attacks, or all, on the text at `target`.
    ///
    /// # Errors
    /// What the system said.
    pub fn start(target: &str, names: &[&str]) -> io::Result<Self> {
        let mut attacks = Self::default();
        for name in if names.is_empty() { NAMES } else { names } {
            let child = Command::new("/proc/self/exe")
                .args([ARGUMENT, name, target])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            attacks.0.push(((*name).to_owned(), child));
        }
        Ok(attacks)
    }

    /// Ends them; returns a line for each.
    ///
    /// # Errors
    /// What the system said.
    pub fn end(mut self) -> io::Result<Vec<String>> {
        for (_, child) in &mut self.0 {
            drop(child.stdin.take());
        }
        let last = |(name, child): (String, Child)| {
            let output = child.wait_with_output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            Ok(format!("{name} {} {}", output.status.to_string().replace(' ', "-"), text.trim()))
        };
        self.0.into_iter().map(last).collect()
    }
}

/// Writes a whole line at once, so that lines of several writers do not mix.
///
/// # Errors
/// What the system said.
pub fn write_line(to: &mut impl Write, line: &str) -> io::Result<()> {
    to.write_all(format!("{line}\n").as_bytes())
}
