//! Progress for a person (a bar) and for a log (a line now and then).

use std::borrow::Cow;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One step of set-up that takes longer than a blink. Ends when dropped or [`Step::done`].
pub struct Step {
    title: Cow<'static, str>,
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Instant,
}

impl Step {
    /// Announces the step.
    pub fn new(title: impl Into<Cow<'static, str>>) -> Self {
        let title = title.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_message(title.to_string());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            eprintln!("  {title} ...");
        }
        Self { title, bar, started: Instant::now(), last_line: Instant::now() }
    }

    /// Tells how far it is, out of `total`.
    pub fn at(&mut self, position: u64, total: u64) {
        if let Some(bar) = &self.bar {
            if bar.length() != Some(total)
                && let Ok(style) =
                    ProgressStyle::with_template("{spinner} {msg} [{bar:30}] {pos}/{len} {elapsed}")
            {
                bar.set_style(style);
                bar.set_length(total);
            }
            bar.set_position(position);
        } else if self.last_line.elapsed() > Duration::from_secs(15) {
            self.last_line = Instant::now();
            eprintln!("  {}: {position}/{total}", self.title);
        }
    }

    /// Ends the step and says how long it took.
    pub fn done(mut self) {
        let line = format!("  {} ({:.1} s)", self.title, self.started.elapsed().as_secs_f64());
        match self.bar.take() {
            Some(bar) => {
                bar.finish_and_clear();
                eprintln!("{line}");
            }
            None => eprintln!("{line}"),
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
