//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Fence;

/// A KVM microVM monitor that live-patches its guest's kernel from outside.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "\
Examples:
  vmm --kernel bzImage --initrd initrd --cpus 4 --memory 512 --api-socket /run/vm.sock
  vmm --kernel bzImage --initrd initrd --patch plan.json
  vmm patch apply --socket /run/vm.sock plan.json
  vmm kernel keys --kernel bzImage sched
  vmm doctor

On the console, Ctrl-A x or Ctrl-C ends the VM, Ctrl-A c sends the guest a Ctrl-C.

Exit codes of a VM: 0 powered off or stopped, 1 failure of the monitor or the host, 2 bad input,
10 the guest asked for a reset, 11 the guest crashed (triple fault)."
)]
pub struct Cli {
    /// Something else than running a VM.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The VM to run.
    #[command(flatten)]
    pub run: Option<Run>,
}

/// A VM to run.
#[derive(Debug, Args)]
pub struct Run {
    /// Kernel image (bzImage).
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM file system.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, instead of one for a serial console.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// How many vCPUs, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// How much memory.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub memory: u64,
    /// Where to put the control socket.
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// A plan to apply when the guest is about to start init.
    #[arg(long, value_name = "FILE")]
    pub patch: Option<PathBuf>,
    /// How fences are made: membarrier where the host has it (auto), or by kicking every
    /// running vCPU and waiting for it.
    #[arg(long, value_enum, default_value_t = Fence::Auto)]
    pub fence: Fence,
    /// Guard the kernel's text against writes that are not its own patcher's, from init on.
    #[arg(long)]
    pub guard: bool,
    /// Print the outcome of --patch as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What else there is.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Patch the kernel of a running VM.
    #[command(subcommand)]
    Patch(Patch),
    /// Look at a running VM, pause and resume it.
    #[command(subcommand)]
    Vm(Vm),
    /// Tell what happens between a running VM's guest and its patches: programs, traps, writes to
    /// guarded text, conflicts.
    #[command(after_help = EVENTS_EXAMPLES)]
    Events {
        /// Which VM.
        #[command(flatten)]
        at: At,
        /// Go on with those to come, until the VM ends. With --json, one object a line.
        #[arg(long)]
        follow: bool,
    },
    /// Look into a kernel image: symbols and patch sites, without a guest.
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Find out by trying whether this host can run and patch guests.
    #[command(after_help = "Exit code: 0 if guests can be run and patched here, 1 if not.")]
    Doctor {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

const EVENTS_EXAMPLES: &str = "\
Examples:
  vmm events --socket /run/vm.sock
  vmm events --socket /run/vm.sock --follow --json | jq 'select(.kind == \"conflict\")'

The newest 1024 are kept. Of each kind 64 are told at once and 40 a second; \"suppressed\" says
how many before one were not. Exit codes: 0 done, 1 no answer.";

/// Which VM, and how to print.
#[derive(Debug, Args)]
pub struct At {
    /// The VM's control socket.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 no answer, 2 bad input, 3 refused (nothing was written), 4 failed and rolled back
(every byte is as it was), 5 failed and could not be rolled back (the guest is held).";

/// `vmm patch`.
#[derive(Debug, Subcommand)]
#[command(after_help = EXIT_CODES)]
pub enum Patch {
    /// Apply a plan.
    #[command(after_help = EXIT_CODES)]
    Apply {
        /// Which VM.
        #[command(flatten)]
        at: At,
        /// The plan (JSON), or - for standard input.
        plan: PathBuf,
    },
    /// Check a plan against the running guest and show what it would change.
    #[command(after_help = EXIT_CODES)]
    Check {
        /// Which VM.
        #[command(flatten)]
        at: At,
        /// The plan (JSON), or - for standard input.
        plan: PathBuf,
    },
    /// Show every step that applying a plan would take.
    #[command(after_help = EXIT_CODES)]
    Explain {
        /// Which VM.
        #[command(flatten)]
        at: At,
        /// The plan (JSON), or - for standard input.
        plan: PathBuf,
    },
    /// List what there is to patch by name, and how it is now.
    ListTargets {
        /// Which VM.
        #[command(flatten)]
        at: At,
        /// Only names that contain this.
        pattern: Option<String>,
    },
    /// List the patches of a VM.
    List {
        /// Which VM.
        #[command(flatten)]
        at: At,
    },
    /// Show a patch.
    Show {
        /// Which VM.
        #[command(flatten)]
        at: At,
        /// Its name.
        name: String,
    },
    /// Undo a patch.
    #[command(after_help = EXIT_CODES)]
    Revert {
        /// Which VM.
        #[command(flatten)]
        at: At,
        /// Its name.
        name: String,
    },
}

/// `vmm vm`.
#[derive(Debug, Subcommand)]
pub enum Vm {
    /// Show what it is doing.
    Info {
        /// Which VM.
        #[command(flatten)]
        at: At,
    },
    /// Show where its vCPUs stand; they stop for a moment.
    Vcpus {
        /// Which VM.
        #[command(flatten)]
        at: At,
    },
    /// Keep its vCPUs out of the guest.
    Pause {
        /// Leave it to the host when it runs those that are waited for. On a busy host that takes
        /// ten times as long.
        #[arg(long)]
        no_hurry: bool,
        /// Which VM.
        #[command(flatten)]
        at: At,
    },
    /// Let them in again.
    Resume {
        /// Which VM.
        #[command(flatten)]
        at: At,
    },
    /// Take the copies that `bypass` made, and their mapping, out of the guest again.
    RemoveArena {
        /// Which VM.
        #[command(flatten)]
        at: At,
    },
}

/// Which kernel, and how to print.
#[derive(Debug, Args)]
pub struct KernelFile {
    /// The kernel image (bzImage or vmlinux).
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

const KERNEL_EXAMPLES: &str = "\
Examples:
  vmm kernel info --kernel /boot/vmlinuz
  vmm kernel keys --kernel /boot/vmlinuz sched
  vmm kernel tables --kernel /boot/vmlinuz alternatives --json

Addresses are those the kernel was linked at. Exit codes: 0 done, 2 no kernel image.";

/// `vmm kernel`.
#[derive(Debug, Subcommand)]
#[command(after_help = KERNEL_EXAMPLES)]
pub enum KernelCommand {
    /// Show its release, and how many patch sites of each kind it has.
    Info {
        /// Which kernel.
        #[command(flatten)]
        file: KernelFile,
    },
    /// List its symbols, as /proc/kallsyms does.
    Symbols {
        /// Which kernel.
        #[command(flatten)]
        file: KernelFile,
        /// Only names that contain this.
        pattern: Option<String>,
    },
    /// List a table of patch sites.
    Tables {
        /// Which kernel.
        #[command(flatten)]
        file: KernelFile,
        /// Which table.
        table: Table,
    },
    /// List the static keys.
    Keys {
        /// Which kernel.
        #[command(flatten)]
        file: KernelFile,
        /// Only names that contain this.
        pattern: Option<String>,
    },
    /// List the static calls.
    Calls {
        /// Which kernel.
        #[command(flatten)]
        file: KernelFile,
        /// Only names that contain this.
        pattern: Option<String>,
    },
    /// List the processor features that alternatives are chosen by.
    Features {
        /// Which kernel.
        #[command(flatten)]
        file: KernelFile,
        /// Only names that contain this.
        pattern: Option<String>,
    },
}

/// A table of patch sites.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Table {
    /// Jumps that static keys switch (`__jump_table`).
    JumpEntries,
    /// Calls that can be retargeted (`.static_call_sites`).
    StaticCallSites,
    /// Code chosen by processor features (`.altinstructions`).
    Alternatives,
    /// Lock prefixes (`.smp_locks`).
    SmpLocks,
    /// Calls of paravirtual operations (`.parainstructions`, up to 6.7).
    ParavirtSites,
    /// Instructions that may fault (`__ex_table`).
    Exceptions,
}
