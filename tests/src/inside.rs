//! Who stands in functions of a guest's kernel, as the monitor finds them.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::vm::{Method, TRACING, Vm};

/// Who stands inside these functions, by name; and the whole answer. A tracer's trampolines leave words on
/// stacks that say nothing: who has only such is left out.
///
/// # Errors
/// It was refused.
pub fn inside(vm: &Vm, functions: &[&str]) -> Result<(Vec<String>, Value)> {
    let query: Vec<String> = functions.iter().map(|name| format!("function={name}")).collect();
    let uri = format!("/tasks/inside?{}", query.join("&"));
    let (status, answer) = vm.request(Method::GET, &uri, b"")?;
    ensure!(status == 200, "{functions:?}: {status}: {answer:#}");
    let tasks = answer["tasks"].as_array().context("tasks")?.iter().filter(|task| task["why"] == "function");
    let names = tasks.map(|task| Ok(task["comm"].as_str().context("a name")?.to_owned()));
    Ok((names.collect::<Result<_>>()?, answer))
}

/// Whether a thread that sleeps, by its name, is found in a function that it sleeps in.
///
/// # Errors
/// It is not.
pub fn is_found(vm: &Vm, thread: &str, function: &str) -> Result<()> {
    let (names, answer) = inside(vm, &[function])?;
    ensure!(names.iter().any(|name| name == thread), "{thread} is not found in {function}: {answer:#}");
    Ok(())
}

/// What hides return addresses of tasks that sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hides {
    /// The function graph tracer: those of calls of `schedule`.
    Graph,
    /// A return probe: the same.
    Probe,
}

/// Turns a tracer on. It must be before tasks call what is traced.
///
/// # Errors
/// As [`Vm::ask`].
pub fn hide(vm: &mut Vm, what: Hides) -> Result<()> {
    vm.mount_tracing()?;
    let writes: &[(&str, &str)] = match what {
        Hides::Graph => &[("set_ftrace_filter", "schedule"), ("current_tracer", "function_graph")],
        Hides::Probe => &[("kprobe_events", "r1000:own/back schedule"), ("events/own/back/enable", "1")],
    };
    writes.iter().try_for_each(|(file, text)| vm.ask(&format!("write {TRACING}/{file} {text}")).map(drop))
}
