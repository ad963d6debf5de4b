//! The guest's tasks: a table, or each with its stack.

use crate::api::tasks::{StackState, TaskFrame, TaskLine, TaskList, TaskStack};
use crate::cli::render::Render;
use crate::cli::render::page::{Page, Span, bold, plain, red};

impl Render for TaskList {
    fn render(&self, page: &mut Page) {
        if self.tasks.is_empty() {
            return page.line([plain("no such task")]);
        }
        if self.tasks.iter().all(|task| task.stack.is_none()) {
            let heading = ["pid", "tgid", "name", "state", "cpu"].map(plain);
            return page.table([heading].into_iter().chain(self.tasks.iter().map(row)));
        }
        for task in &self.tasks {
            let [pid, tgid, name, state, cpu] = row(task);
            page.line([pid, plain(" of "), tgid, plain("  "), name, plain("  "), state, plain("  "), cpu]);
            if let Some(stack) = &task.stack {
                show(page, stack);
            }
        }
    }
}

fn row(task: &TaskLine) -> [Span; 5] {
    let TaskLine { pid, tgid, comm, state, cpu, running, .. } = task;
    let cpu = if *running { plain(format_args!("runs on {cpu}")) } else { plain(cpu) };
    [plain(pid), plain(tgid), bold(comm), plain(state), cpu]
}

fn show(page: &mut Page, stack: &TaskStack) {
    for TaskFrame { address, symbol, module, reliable } in &stack.frames {
        let mark = if *reliable { "    " } else { "  ? " };
        let module = module.as_ref().map(|module| format!(" [{module}]")).unwrap_or_default();
        let symbol = symbol.as_ref().map_or_else(|| plain(address), plain);
        page.line([plain(mark), symbol, plain(module)]);
    }
    let why = match stack.state {
        StackState::Complete | StackState::Running => return,
        StackState::Partial => stack.why.as_deref().unwrap_or("unwinding did not come to the end"),
        StackState::Moving => "it ran while its stack was read",
        StackState::None => "it has ended and has no stack",
        StackState::Unreadable => "its stack pointer does not lead into its stack",
    };
    page.line([plain("    "), red(why)]);
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;

    use super::*;

    fn task(stack: Option<TaskStack>) -> TaskLine {
        let comm = "a\x1b[2J".to_owned();
        TaskLine { pid: 12, tgid: 1, comm, state: 'S', cpu: 3, running: false, kernel_thread: false, stack }
    }

    #[test]
    fn a_table_without_stacks_and_each_task_with_its_own() {
        let list = TaskList { tasks: vec![task(None), TaskLine { running: true, state: 'R', ..task(None) }] };
        let lines = [
            "pid  tgid  name      state  cpu",
            "12   1     a\\x1b[2J  S      3",
            "12   1     a\\x1b[2J  R      runs on 3",
        ];
        assert_eq!(list.page().text(), lines.map(|line| format!("{line}\n")).concat());
        let frame = |symbol: &str, reliable: bool| TaskFrame {
            address: Gva(1),
            symbol: Some(symbol.to_owned()),
            module: (!reliable).then(|| "kvm".to_owned()),
            reliable,
        };
        let frames = vec![frame("schedule+0x1/0x2", true), frame("f+0x3/0x4", false)];
        let stack = TaskStack { state: StackState::Partial, why: Some("no ORC".to_owned()), frames };
        let expected = "12 of 1  a\\x1b[2J  S  3\n    schedule+0x1/0x2\n  ? f+0x3/0x4 [kvm]\n    no ORC\n";
        assert_eq!(TaskList { tasks: vec![task(Some(stack))] }.page().text(), expected);
    }
}
