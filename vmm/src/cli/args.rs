//! The command line.

use std::io;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing::level_filters::LevelFilter;

use crate::cli::exit_status;
use crate::config::Fence;
use crate::host::log::{self, Format};

const EXAMPLES: &str = "\
Examples:
  vmm --kernel bzImage --initrd initrd --cpus 4 --memory 512 --api-socket /run/vm.sock
  vmm --kernel bzImage --initrd initrd --patch plan.json
  vmm --kernel bzImage --initrd initrd --patch-or-stop fix.json --log-level info --log-file vm.log
  vmm patch apply --socket /run/vm.sock plan.json
  vmm kernel keys --kernel bzImage sched
  vmm doctor

On the console, Ctrl-A x or Ctrl-C ends the VM, Ctrl-A c sends the guest a Ctrl-C.";

/// A KVM microVM monitor that live-patches its guest's kernel from outside.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = format!("{EXAMPLES}\n\n{}", exit_status::OF_A_VM)
)]
pub struct Cli {
    /// The command; without one, a VM is run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The VM to run.
    #[command(flatten)]
    pub run: Option<Run>,
}

/// A VM to run.
#[derive(Debug, Args)]
pub struct Run {
    /// Kernel image: bzImage or vmlinux, which may be compressed.
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM file system.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, instead of one for a serial console.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Number of vCPUs, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Memory size in MiB, 96 to 1048576.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub memory: u64,
    /// Path of the control socket.
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Group, by name or number, whose members may read from the control socket.
    #[arg(long, value_name = "GROUP", requires = "api_socket", value_parser = group)]
    pub api_group: Option<u32>,
    /// Plan (JSON) to apply right before the guest starts init; - reads standard input.
    #[arg(long, value_name = "FILE")]
    pub patch: Option<PathBuf>,
    /// The same, but unless the plan is applied the VM ends before init, with exit code 12.
    #[arg(long, value_name = "FILE", conflicts_with = "patch")]
    pub patch_or_stop: Option<PathBuf>,
    /// How fences are made.
    #[arg(long, value_enum, default_value_t = FenceKind::Auto)]
    pub fence: FenceKind,
    /// From init on, guard the kernel's text against every writer but the kernel's own patcher.
    #[arg(long)]
    pub guard: bool,
    /// Run without the sandbox (seccomp filters, Landlock, dropped capabilities), to debug the monitor.
    #[arg(long)]
    pub no_sandbox: bool,
    /// Print the outcome of --patch or --patch-or-stop as JSON.
    #[arg(long)]
    pub json: bool,
    /// Append who changes the guest, when and how to this file, which is verified by `vmm audit verify`; what
    /// can't be told there is refused.
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    // Not a group of their own: clap takes an optional group that holds another for absent.
    /// Log entries of this level and above.
    #[arg(long, value_enum, value_name = "LEVEL", default_value_t = LogLevel::Warn)]
    pub log_level: LogLevel,
    /// How log entries are written.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Append the log to this file instead of standard error.
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
}

/// A level of the log, as an argument.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogLevel {
    /// What ended the VM or left it unprotected.
    Error,
    /// What an operator should look at.
    Warn,
    /// What became of the VM and its patches.
    Info,
    /// Every request.
    Debug,
}

/// [`Format`], as an argument.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Run {
    /// Starts the log.
    ///
    /// # Errors
    /// What the system returned.
    pub(super) fn start_log(&self) -> io::Result<()> {
        let level = match self.log_level {
            LogLevel::Error => LevelFilter::ERROR,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
        };
        let format = match self.log_format {
            LogFormat::Text => Format::Text,
            LogFormat::Json => Format::Json,
        };
        log::start(level, format, self.log_file.as_deref())
    }
}

/// The number of a group: as it is, or that of a name in `/etc/group` (group(5)).
fn group(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let groups = std::fs::read_to_string("/etc/group").map_err(|error| format!("/etc/group: {error}"))?;
    let number = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == text).then(|| fields.nth(1)?.parse().ok())?
    });
    number.ok_or_else(|| format!("/etc/group has no group {text}"))
}

/// [`Fence`], as an argument.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum FenceKind {
    /// By membarrier, or by kicking if the host lacks it.
    Auto,
    /// By kicking every vCPU that runs and waiting for it.
    Kick,
}

impl From<FenceKind> for Fence {
    fn from(kind: FenceKind) -> Self {
        match kind {
            FenceKind::Auto => Self::Auto,
            FenceKind::Kick => Self::Kick,
        }
    }
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Patch the kernel of a running VM.
    #[command(subcommand)]
    Patch(PatchCommand),
    /// Inspect, pause or resume a running VM.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Print the events of a running VM: programs, traps, writes to guarded text, conflicts.
    #[command(after_help = format!("{EVENTS_EXAMPLES} {}", exit_status::OF_EVENTS))]
    Events {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// Print new events as they occur, until the VM ends. With --json, one object a line.
        #[arg(long)]
        follow: bool,
    },
    /// List the symbols and patch sites of a kernel image, without a guest.
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Verify an audit log.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Test whether this host can run and patch guests.
    #[command(after_help = exit_status::OF_DOCTOR)]
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

The monitor keeps the newest 1024 events. It records 64 of a kind at once and 40 a second after that;
\"suppressed\" counts those it dropped before this one.";

const TASKS_EXAMPLES: &str = "\
Examples:
  vmm vm tasks --socket /run/vm.sock
  vmm vm tasks --socket /run/vm.sock --pid 1 --stacks
  vmm vm tasks --socket /run/vm.sock --name kworker --stacks --json | jq '.tasks[].stack.frames[].symbol'

A frame that begins with ? may be left from an earlier call.";

/// How `vmm vm inside` is used.
const INSIDE_EXAMPLES: &str = "\
Examples:
  vmm vm inside --socket /run/vm.sock vfs_read
  vmm vm inside --socket /run/vm.sock do_syslog kvm:kvm_vcpu_block --json | jq '.tasks[].comm'

Every word of a task's stack counts, so now and then a task is named that has left the function.";

/// The VM to ask, and how to print its answer.
#[derive(Debug, Args)]
pub struct SocketArgs {
    /// Control socket of the VM.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// A plan, or the objects that one is made of.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Plan (JSON); - reads standard input. Objects in it are named by their files, counted from the plan's folder.
    #[arg(required_unless_present = "before", conflicts_with = "before")]
    pub plan: Option<PathBuf>,
    /// Replace the functions that differ between two objects of one source file: this one, as the kernel was built
    /// with (-ffunction-sections -fdata-sections) ...
    #[arg(long, value_name = "OBJECT", requires = "after")]
    pub before: Option<PathBuf>,
    /// ... and this one, with the change.
    #[arg(long, value_name = "OBJECT", requires = "before")]
    pub after: Option<PathBuf>,
    /// Name of the patch; that of the second object's file, if absent.
    #[arg(long, requires = "before")]
    pub name: Option<String>,
    /// Time until which no task may stand in the functions any more, in milliseconds.
    #[arg(long, requires = "before")]
    pub deadline_ms: Option<u64>,
}

/// `vmm patch`.
#[derive(Debug, Subcommand)]
#[command(after_help = exit_status::OF_A_REQUEST)]
pub enum PatchCommand {
    /// Apply a plan.
    #[command(after_help = exit_status::OF_A_REQUEST)]
    Apply {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// What to apply.
        #[command(flatten)]
        plan: PlanArgs,
    },
    /// Do all of a plan that needs no stop of the guest, and keep it for `vmm patch commit`; nothing is written.
    #[command(after_help = exit_status::OF_A_REQUEST)]
    Stage {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// What to stage.
        #[command(flatten)]
        plan: PlanArgs,
    },
    /// Apply a staged plan. It is checked against the running guest once more.
    #[command(after_help = exit_status::OF_A_REQUEST)]
    Commit {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// Name of the plan.
        name: String,
    },
    /// Forget a staged plan.
    #[command(after_help = exit_status::OF_A_REQUEST)]
    Drop {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// Name of the plan.
        name: String,
    },
    /// Check a plan against the running guest and show what it would change; nothing is written.
    #[command(after_help = exit_status::OF_A_REQUEST)]
    Check {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// What to apply.
        #[command(flatten)]
        plan: PlanArgs,
    },
    /// Show every step that applying a plan would take; nothing is written.
    #[command(after_help = exit_status::OF_A_REQUEST)]
    Explain {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// What to apply.
        #[command(flatten)]
        plan: PlanArgs,
    },
    /// List the static keys, static calls, alternatives and spinlocks that a plan can name, with
    /// their present state.
    ListTargets {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// List only names that contain this.
        pattern: Option<String>,
    },
    /// List the patches of the VM.
    List {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
    },
    /// Show a patch and what its last program did.
    Show {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// Name of the patch.
        name: String,
    },
    /// Revert a patch.
    #[command(after_help = exit_status::OF_A_REQUEST)]
    Revert {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// Name of the patch.
        name: String,
    },
}

/// `vmm vm`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Show the VM's state, kernel and patches.
    Info {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
    },
    /// Show each vCPU's instruction pointer; this stops the vCPUs for a moment.
    Vcpus {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
    },
    /// List the guest's tasks, with their kernel stacks if wanted. The guest runs meanwhile.
    #[command(after_help = format!("{TASKS_EXAMPLES}\n\n{}", exit_status::OF_A_REQUEST))]
    Tasks {
        /// Only the thread or the process of this number.
        #[arg(long, value_name = "N")]
        pid: Option<u32>,
        /// Only tasks whose name has this in it.
        #[arg(long, value_name = "TEXT")]
        name: Option<String>,
        /// Show the kernel stack of each task that does not run.
        #[arg(long, overrides_with = "no_stacks")]
        stacks: bool,
        /// Show no stacks; so it is unless --stacks is given.
        #[arg(long, overrides_with = "stacks")]
        no_stacks: bool,
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
    },
    /// Find the tasks that stand in functions of the guest's kernel, asleep or running: what a replacement of
    /// these functions would wait for. This stops the vCPUs for a moment.
    #[command(after_help = format!("{INSIDE_EXAMPLES}\n\n{}", exit_status::OF_A_REQUEST))]
    Inside {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
        /// Functions, as a plan names them.
        #[arg(required = true, value_name = "FUNCTION")]
        functions: Vec<String>,
    },
    /// Stop all vCPUs.
    Pause {
        /// Do not raise the priority of the vCPUs that are waited for. On a busy host pausing then
        /// takes ten times as long.
        #[arg(long)]
        no_hurry: bool,
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
    },
    /// Run the vCPUs again.
    Resume {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
    },
    /// Remove the copies of instructions that the strategy bypass made, and their mapping, from the
    /// guest.
    RemoveArena {
        /// The VM.
        #[command(flatten)]
        at: SocketArgs,
    },
}

/// `vmm audit`.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Check that no line was edited, moved, added or taken out, and list changes without an outcome.
    ///
    /// A log that was cut at its end, or written anew as a whole, shows only with --expect-last.
    #[command(after_help = exit_status::OF_AUDIT)]
    Verify {
        /// The log.
        file: PathBuf,
        /// The digest that the last line must have, as an earlier run or `vmm vm info` printed it.
        #[arg(long, value_name = "SHA256")]
        expect_last: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// The kernel image, and how to print.
#[derive(Debug, Args)]
pub struct KernelFile {
    /// Kernel image: bzImage or vmlinux, which may be compressed.
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
  vmm kernel match --kernel /boot/vmlinuz kernel/fork.o

Addresses are those the kernel was linked at.";

const COMPARE_HELP: &str = "\
Examples:
  vmm kernel compare before/pipe.o after/pipe.o

Build both with -ffunction-sections -fdata-sections: a function that grew then does not move the others.
What only has other line numbers is unchanged.
";

const MATCH_HELP: &str = "\
Examples:
  vmm kernel match --kernel /boot/vmlinuz kernel/fork.o
  vmm kernel match --kernel /boot/vmlinuz kernel/fork.o --json | jq '.functions[] | select(.outcome != \"matches\")'

Build the object of the kernel's own source package, with its configuration unchanged and its compiler.
What does not match is listed; --json lists all.
";

/// `vmm kernel`.
#[derive(Debug, Subcommand)]
#[command(after_help = format!("{KERNEL_EXAMPLES} {}", exit_status::OF_KERNEL))]
pub enum KernelCommand {
    /// Show the release, and how many patch sites of each kind there are.
    Info {
        /// The kernel.
        #[command(flatten)]
        file: KernelFile,
    },
    /// List the symbols, as /proc/kallsyms does; as `name,N` where several have one name.
    Symbols {
        /// The kernel.
        #[command(flatten)]
        file: KernelFile,
        /// List only names that contain this.
        pattern: Option<String>,
    },
    /// List a table of patch sites.
    Tables {
        /// The kernel.
        #[command(flatten)]
        file: KernelFile,
        /// The table.
        table: Table,
    },
    /// List the static keys.
    Keys {
        /// The kernel.
        #[command(flatten)]
        file: KernelFile,
        /// List only names that contain this.
        pattern: Option<String>,
    },
    /// List the static calls.
    Calls {
        /// The kernel.
        #[command(flatten)]
        file: KernelFile,
        /// List only names that contain this.
        pattern: Option<String>,
    },
    /// List the CPU features that alternatives depend on.
    Features {
        /// The kernel.
        #[command(flatten)]
        file: KernelFile,
        /// List only names that contain this.
        pattern: Option<String>,
    },
    /// Compare an object, built of the kernel's source, with the kernel: every function, byte by byte.
    #[command(after_help = format!("{MATCH_HELP}\n{}", exit_status::OF_KERNEL))]
    Match {
        /// The kernel.
        #[command(flatten)]
        file: KernelFile,
        /// The object (.o), as the compiler made it.
        object: PathBuf,
    },
    /// Compare two objects of one source file, before and after a change of it: which functions and variables differ.
    #[command(after_help = format!("{COMPARE_HELP}\n{}", exit_status::OF_KERNEL))]
    Compare {
        /// The object before the change (.o).
        before: PathBuf,
        /// The object after it.
        after: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// A table of patch sites.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Table {
    /// Jumps that static keys switch (`__jump_table`).
    JumpEntries,
    /// Calls that static calls retarget (`.static_call_sites`).
    StaticCallSites,
    /// Code that depends on CPU features (`.altinstructions`).
    Alternatives,
    /// Lock prefixes (`.smp_locks`).
    SmpLocks,
    /// Calls of paravirtual operations (`.parainstructions`, until Linux 6.7).
    ParavirtSites,
    /// Instructions whose faults the kernel handles (`__ex_table`).
    Exceptions,
}
