//! The guest's tasks, as they go over the control socket, and what a client can ask for.

use std::fmt::Write;

use patcher::addr::Gva;
use serde::{Deserialize, Serialize};

use crate::api::percent::{decoded, encoded};

/// Which tasks to list: the query of `GET /tasks`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskQuery {
    /// Only the thread or the process of this number.
    pub pid: Option<u32>,
    /// Only those whose name has this in it.
    pub name: Option<String>,
    /// Whether to read their stacks.
    pub stacks: bool,
}

impl TaskQuery {
    /// Reads a query.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(query: &str) -> Result<Self, String> {
        let mut asked = Self::default();
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let wrong =
                || format!("?{part} does not go with /tasks: there are pid=N, name=TEXT and stacks=true");
            match part.split_once('=') {
                Some(("pid", number)) => asked.pid = Some(number.parse().map_err(|_| wrong())?),
                Some(("name", text)) => asked.name = Some(decoded(text).ok_or_else(wrong)?),
                Some(("stacks", "true")) => asked.stacks = true,
                Some(("stacks", "false")) => asked.stacks = false,
                _ => return Err(wrong()),
            }
        }
        Ok(asked)
    }

    /// The path with the query.
    #[must_use]
    pub fn uri(&self) -> String {
        let mut uri = format!("/tasks?stacks={}", self.stacks);
        // Writing to a string does not fail.
        if let Some(pid) = self.pid {
            let _ = write!(uri, "&pid={pid}");
        }
        if let Some(name) = &self.name {
            uri += "&name=";
            uri += &encoded(name);
        }
        uri
    }
}

/// `GET /tasks`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskList {
    /// The tasks, by the number of their process; the idle tasks of the CPUs, which have none, first.
    pub tasks: Vec<TaskLine>,
}

/// A task: a thread of a process, or of the kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskLine {
    /// The number of the thread; 0 for the idle task of a CPU.
    pub pid: u32,
    /// The number of the process.
    pub tgid: u32,
    /// Its name.
    pub comm: String,
    /// Its state, as in `/proc`: `R`, `S`, `D`, `T`, `t`, `X`, `Z`, `P` or `I`.
    pub state: char,
    /// The guest's number of the CPU that it runs on, or ran on last.
    pub cpu: u32,
    /// Whether it runs there now.
    pub running: bool,
    /// Whether it is one of the kernel's own.
    pub kernel_thread: bool,
    /// Its stack, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stack: Option<TaskStack>,
}

/// A task's stack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskStack {
    /// What became of reading it.
    pub state: StackState,
    /// With `partial`: why unwinding did not come to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Its frames, the innermost first.
    pub frames: Vec<TaskFrame>,
}

/// What became of reading a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StackState {
    /// It was unwound to its end.
    Complete,
    /// Only its reliable frames were; the others may be left from earlier calls.
    Partial,
    /// The task runs, so its frames change.
    Running,
    /// The task ran while its stack was read, each time.
    Moving,
    /// The task has ended and has none.
    None,
    /// The stack pointer does not lead into the stack.
    Unreadable,
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskFrame {
    /// Where execution goes on in it.
    pub address: Gva,
    /// The same as `function+0xoffset/0xsize`.
    pub symbol: Option<String>,
    /// The module that has the function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// Whether the frame is one for certain.
    pub reliable: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_as_it_was_written() {
        for name in [None, Some("a b&c=%\u{fc}"), Some("")] {
            for (pid, stacks) in [(None, true), (Some(u32::MAX), false)] {
                let asked = TaskQuery { pid, name: name.map(str::to_owned), stacks };
                let uri = asked.uri();
                assert!(uri.parse::<hyper::Uri>().is_ok(), "{uri}");
                let (path, query) = uri.split_once('?').expect("a query");
                assert_eq!((path, TaskQuery::parse(query)), ("/tasks", Ok(asked)));
            }
        }
        assert_eq!(TaskQuery::parse(""), Ok(TaskQuery::default()));
        for wrong in ["pid=", "pid=-1", "pid", "name=%4", "name=%zz", "name=%ff", "stacks=1", "tid=1"] {
            assert!(TaskQuery::parse(wrong).is_err_and(|why| why.contains(wrong)), "{wrong}");
        }
    }
}
