//! What a VM and its vCPUs are doing.

use crate::api::wire::{Done, Info, Sandbox, State, VcpuLine, VcpuRuns};
use crate::cli::render::Render;
use crate::cli::render::page::{Page, bold, green, plain, red};

impl Render for Done {
    fn render(&self, page: &mut Page) {
        page.line([plain("done")]);
    }
}

impl Render for Info {
    fn render(&self, page: &mut Page) {
        let state = match self.state {
            State::Running => green("running"),
            State::Paused => bold("paused"),
            State::Held => red("held"),
        };
        let Self { cpus, memory_mib, uptime_ms, .. } = self;
        page.line([state, plain(format_args!(", {cpus} vCPUs, {memory_mib} MiB, up {uptime_ms} ms"))]);
        if self.age_ms > 0 {
            page.line([plain(format_args!("as it was {} ms ago: the monitor is busy", self.age_ms))]);
        }
        match &self.kernel {
            None => page.line([plain(format_args!(
                "kernel {} (not started far enough to be patched)",
                self.kernel_file.display()
            ))]),
            Some(kernel) => page.line([plain(format_args!("kernel {} at {}", kernel.release, kernel.base))]),
        }
        if let Some(arena) = &self.arena {
            let (base, bytes) = (arena.base, arena.used_bytes);
            page.line([plain(format_args!("copies of instructions at {base}, {bytes} bytes"))]);
        }
        match self.sandbox {
            Sandbox::On => {}
            Sandbox::WithoutLandlock => page.line([red("the sandbox lacks Landlock")]),
            Sandbox::Off => page.line([red("no sandbox")]),
        }
        if self.console_dropped_bytes > 0 {
            let bytes = self.console_dropped_bytes;
            page.line([red(format_args!(
                "{bytes} bytes of the console were dropped: they were not read in time"
            ))]);
        }
        if self.breakpoints > 0 {
            let count = self.breakpoints;
            page.line([plain(format_args!("{count} breakpoints of its own delivered to the guest"))]);
        }
        page.line([plain(format_args!("{} patches applied; fences by {}", self.patches, self.fence))]);
        if let Some(audit) = &self.audit {
            page.line([plain(format_args!(
                "audit log of {} lines, the last is {}",
                audit.lines, audit.last
            ))]);
            if audit.failures > 0 {
                let count = audit.failures;
                page.line([red(format_args!("the audit log could not be written {count} times"))]);
            }
        }
    }
}

impl Render for Vec<VcpuLine> {
    fn render(&self, page: &mut Page) {
        page.table(self.iter().map(|line| {
            let place =
                line.symbol.as_deref().unwrap_or(if line.kernel { "kernel mode" } else { "user space" });
            let place = match line.runs {
                VcpuRuns::NotStarted => plain("not started"),
                VcpuRuns::Offline => plain(format_args!("{place}, offline")),
                VcpuRuns::Online if line.interrupts => plain(place),
                VcpuRuns::Online => plain(format_args!("{place}, interrupts off")),
            };
            [bold(format_args!("vCPU {}", line.vcpu)), plain(line.rip), place]
        }));
    }
}
