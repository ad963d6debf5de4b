//! Who stands in functions of the guest's kernel.

use crate::api::inside::{Inside, InsideFunction, InsideTask, InsideWhy};
use crate::cli::render::Render;
use crate::cli::render::page::{Page, bold, green, plain};

impl Render for Inside {
    fn render(&self, page: &mut Page) {
        for InsideFunction { name, start, end, pieces } in &self.functions {
            let elsewhere = match pieces {
                0 => String::new(),
                1 => ", and a piece elsewhere".to_owned(),
                count => format!(", and {count} pieces elsewhere"),
            };
            page.line([bold(name), plain(format_args!(" from {start} to {end}{elsewhere}"))]);
        }
        for InsideTask { pid, comm, address, symbol, why } in &self.tasks {
            let place = symbol.clone().unwrap_or_else(|| address.to_string());
            let why = match why {
                InsideWhy::Function => "",
                InsideWhy::Kprobe => ", a copy of an instruction that has a kprobe",
                InsideWhy::Tracer => ", a tracer's trampoline",
            };
            page.line([plain(format_args!("  {pid} ")), bold(comm), plain(format_args!(": {place}{why}"))]);
        }
        if self.tasks.is_empty() {
            page.line([green("nobody stands inside")]);
        }
        let Self { tasks_looked_at, looked_at_again, held_us, attempts, .. } = self;
        let again = if *attempts == 1 { String::new() } else { format!(", at attempt {attempts}") };
        page.line([plain(format_args!(
            "{tasks_looked_at} tasks, {looked_at_again} of them looked at again while the vCPUs were held, \
             for {held_us} us{again}"
        ))]);
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;

    use super::*;

    #[test]
    fn who_stands_inside_and_that_nobody_does() {
        let function =
            InsideFunction { name: "do_syslog".to_owned(), start: Gva(0x100), end: Gva(0x200), pieces: 1 };
        let task = InsideTask {
            pid: 7,
            comm: "a\x1bb".to_owned(),
            address: Gva(0x110),
            symbol: Some("do_syslog+0x10".to_owned()),
            why: InsideWhy::Function,
        };
        let mut inside = Inside {
            functions: vec![function],
            tasks: vec![task],
            tasks_looked_at: 90,
            looked_at_again: 3,
            attempts: 2,
            held_us: 450,
        };
        assert_eq!(
            inside.page().text(),
            "do_syslog from 0x100 to 0x200, and a piece elsewhere\n  7 a\\x1bb: do_syslog+0x10\n\
             90 tasks, 3 of them looked at again while the vCPUs were held, for 450 us, at attempt 2\n"
        );
        (inside.tasks, inside.attempts) = (Vec::new(), 1);
        assert!(inside.page().text().contains("nobody stands inside\n90 tasks, 3 of them"));
    }
}
