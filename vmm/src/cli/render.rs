//! Answers of the control socket for a person.

use std::fmt::Write;
use std::io::IsTerminal;

use serde_json::Value;

/// Colours, if a person is looking.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// Colours if standard output is a terminal and `NO_COLOR` is not set.
    #[must_use]
    pub fn detect() -> Self {
        Self { colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn red(self, text: &str) -> String {
        self.paint("31", text)
    }

    fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }
}

fn text<'v>(value: &'v Value, field: &str) -> &'v str {
    value[field].as_str().unwrap_or("")
}

fn array<'v>(value: &'v Value, field: &str) -> &'v [Value] {
    value[field].as_array().map_or(&[], Vec::as_slice)
}

/// Renders an answer. What it is shows in its fields.
#[must_use]
pub fn answer(value: &Value, style: Style) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = match value {
        Value::Array(vcpus) if vcpus.iter().any(|line| line.get("rip").is_some()) => {
            vcpu_lines(&mut out, vcpus)
        }
        Value::Array(patches) => list(&mut out, patches),
        _ if value.get("events").is_some() => events(&mut out, array(value, "events"), style),
        _ if value.get("refusals").is_some() => refusals(&mut out, value, style),
        _ if value.get("timing").is_some() => report(&mut out, value, style),
        _ if value.get("steps").is_some() => program(&mut out, value, style),
        _ if value["state"] == "fits" => fits(&mut out, value, style),
        _ if value.get("static_keys").is_some() => targets(&mut out, value, style),
        _ if value.get("uptime_ms").is_some() => info(&mut out, value, style),
        _ if value.get("error").is_some() => writeln!(out, "{}", style.red(text(value, "error"))),
        _ => writeln!(out, "{}", text(value, "state")),
    };
    out
}

fn events(out: &mut String, events: &[Value], style: Style) -> std::fmt::Result {
    if events.is_empty() {
        return writeln!(out, "no events");
    }
    events.iter().try_for_each(|line| out.write_str(&event(line, style)))
}

/// Renders an event, or how many were missed, as a line.
#[must_use]
pub fn event(event: &Value, style: Style) -> String {
    if let Some(missed) = event["missed"].as_u64() {
        return format!("{}\n", style.red(&format!("({missed} events were missed)")));
    }
    if event.get("error").is_some() {
        return format!("{}\n", style.red(text(event, "error")));
    }
    let kind = text(event, "kind").replace('_', " ");
    let kind = format!("{kind:<16}");
    let calm = matches!(text(event, "kind"), "patch" | "trap" | "guest_write");
    let ms = event["time_ms"].as_u64().unwrap_or(0);
    let mut line = format!("{:>6}.{:03} s  ", ms / 1000, ms % 1000);
    line += &if calm { style.bold(&kind) } else { style.red(&kind) };
    for part in [event["patch"].as_str().map(|patch| format!("patch {patch}: ")), who(event)] {
        line += &part.unwrap_or_default();
    }
    line += text(event, "what");
    if let Some(count @ 1..) = event["suppressed"].as_u64() {
        let _ = write!(line, " (and {count} more before)");
    }
    line + "\n"
}

fn who(event: &Value) -> Option<String> {
    let vcpu = event["vcpu"].as_u64()?;
    let place = event["symbol"].as_str().or(event["rip"].as_str()).unwrap_or("");
    let task = event["task"].as_str().map(|task| format!(" ({task})")).unwrap_or_default();
    Some(format!("vCPU {vcpu} at {place}{task} "))
}

fn vcpu_lines(out: &mut String, vcpus: &[Value]) -> std::fmt::Result {
    for line in vcpus {
        let place = line["symbol"].as_str().unwrap_or("user space");
        let interrupts = if line["interrupts"] == true { "" } else { ", interrupts off" };
        writeln!(out, "vCPU {:<3} {:<20} {place}{interrupts}", line["vcpu"], text(line, "rip"))?;
    }
    Ok(())
}

fn list(out: &mut String, patches: &[Value]) -> std::fmt::Result {
    if patches.is_empty() {
        return writeln!(out, "no patches");
    }
    writeln!(out, "{:<32} {:<10} {:<11} {:>5}", "name", "state", "strategy", "sites")?;
    for patch in patches {
        let (name, state, strategy) = (text(patch, "name"), text(patch, "state"), text(patch, "strategy"));
        writeln!(out, "{name:<32} {state:<10} {strategy:<11} {:>5}", patch["sites"])?;
        if patch["livepatched"].as_u64().is_some_and(|count| count > 0) {
            writeln!(
                out,
                "  {} of them not executed: the guest livepatches their functions",
                patch["livepatched"]
            )?;
        }
    }
    Ok(())
}

fn refusals(out: &mut String, value: &Value, style: Style) -> std::fmt::Result {
    writeln!(out, "{}: nothing was written", style.red("refused"))?;
    for refusal in array(value, "refusals") {
        let pointer = text(refusal, "pointer");
        let pointer = if pointer.is_empty() { "the plan" } else { pointer };
        writeln!(out, "  {} at {pointer}: {}", style.bold(text(refusal, "code")), text(refusal, "message"))?;
    }
    Ok(())
}

fn sites(out: &mut String, value: &Value, style: Style) -> std::fmt::Result {
    for site in array(value, "sites") {
        writeln!(out, "  {}", style.bold(text(site, "symbol")))?;
        for line in array(site, "old_code") {
            writeln!(out, "  {}", style.red(&format!("- {}", line.as_str().unwrap_or(""))))?;
        }
        for line in array(site, "new_code") {
            writeln!(out, "  {}", style.green(&format!("+ {}", line.as_str().unwrap_or(""))))?;
        }
    }
    Ok(())
}

fn report(out: &mut String, value: &Value, style: Style) -> std::fmt::Result {
    let state = text(value, "state");
    let good = matches!(state, "applied" | "reverted" | "superseded");
    let painted = if good { style.green(state) } else { style.red(state) };
    writeln!(out, "{}: {painted}", style.bold(text(value, "name")))?;
    if let Some(failure) = value["failure"].as_str() {
        writeln!(out, "  {failure}")?;
    }
    if value["superseded"].as_u64().is_some_and(|count| count > 0) {
        writeln!(out, "  {} sites were replaced by the guest and are left to it", value["superseded"])?;
    }
    sites(out, value, style)?;
    let timing = &value["timing"];
    writeln!(out, "  strategy {} ({})", text(value, "strategy"), text(value, "reason"))?;
    writeln!(
        out,
        "  {} us in all, {} us of them the program; {} fences, the longest {} us",
        timing["total_us"], timing["program_us"], timing["fences"], timing["longest_fence_us"]
    )?;
    writeln!(out, "  longest stall of a vCPU {} us; {} traps", timing["longest_stall_us"], value["traps"])
}

fn fits(out: &mut String, value: &Value, style: Style) -> std::fmt::Result {
    writeln!(out, "{}", style.green("the plan fits"))?;
    sites(out, value, style)?;
    writeln!(out, "  strategy {} ({})", text(value, "strategy"), text(value, "reason"))
}

/// Leaves only those targets whose name contains `pattern`.
pub fn keep_targets(value: &mut Value, pattern: &str) {
    for (list, field) in
        [("static_keys", "name"), ("static_calls", "name"), ("features", "name"), ("spinlocks", "operation")]
    {
        if let Some(Value::Array(lines)) = value.get_mut(list) {
            lines.retain(|line| text(line, field).contains(pattern));
        }
    }
}

fn targets(out: &mut String, value: &Value, style: Style) -> std::fmt::Result {
    let heading = |out: &mut String, list: &str, text: &str| match array(value, list) {
        [] => Ok(()),
        _ => writeln!(out, "{}", style.bold(text)),
    };
    heading(out, "static_keys", "static keys")?;
    for key in array(value, "static_keys") {
        writeln!(out, "  {:<50} {:>3} users, {} jumps", text(key, "name"), key["users"], key["entries"])?;
    }
    heading(out, "static_calls", "static calls")?;
    for call in array(value, "static_calls") {
        writeln!(out, "  {:<50} {}, {} calls", text(call, "name"), text(call, "target"), call["sites"])?;
    }
    heading(out, "features", "alternatives, by feature of the processor")?;
    for feature in array(value, "features") {
        let present = match feature["present"].as_bool() {
            Some(true) => "there",
            Some(false) => "not there",
            None => "unknown",
        };
        writeln!(out, "  {:<50} {present}, {} places", text(feature, "name"), feature["alternatives"])?;
    }
    heading(out, "spinlocks", "spinlocks")?;
    for operation in array(value, "spinlocks") {
        writeln!(out, "  {:<50} {}", text(operation, "operation"), text(operation, "target"))?;
    }
    Ok(())
}

fn program(out: &mut String, value: &Value, style: Style) -> std::fmt::Result {
    sites(out, value, style)?;
    writeln!(
        out,
        "  strategy {} ({}), {} fences",
        text(value, "strategy"),
        text(value, "reason"),
        value["fences"]
    )?;
    for (number, step) in (1..).zip(array(value, "steps")) {
        writeln!(out, "  {number:>4}  {}", step.as_str().unwrap_or(""))?;
    }
    Ok(())
}

fn info(out: &mut String, value: &Value, style: Style) -> std::fmt::Result {
    writeln!(
        out,
        "{}, {} vCPUs, {} MiB, up {} ms",
        style.bold(text(value, "state")),
        value["cpus"],
        value["memory_mib"],
        value["uptime_ms"]
    )?;
    let kernel = &value["kernel"];
    if kernel.is_null() {
        writeln!(out, "kernel {} (not started far enough to be patched)", text(value, "kernel_file"))?;
    } else {
        writeln!(out, "kernel {} at {}", text(kernel, "release"), text(kernel, "base"))?;
    }
    let arena = &value["arena"];
    if !arena.is_null() {
        writeln!(out, "copies of instructions at {}, {} bytes", text(arena, "base"), arena["used_bytes"])?;
    }
    if value["breakpoints"] != 0 {
        writeln!(out, "{} breakpoints of its own delivered to the guest", value["breakpoints"])?;
    }
    writeln!(out, "{} patches applied; fences by {}", value["patches"], text(value, "fence"))
}
