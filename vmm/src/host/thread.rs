//! The kinds of threads.

use std::fmt;

/// A kind of thread, by what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Writes a queue to the console or the log.
    Writer,
    /// Reads the kernel image.
    Symbols,
    /// Runs a vCPU.
    Vcpu,
    /// Changes the guest.
    Controller,
    /// Serves the control socket.
    Api,
    /// Looks up what program a client is.
    Namer,
    /// The first thread, once it runs the event loop.
    Events,
}

impl Thread {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Writer, Self::Symbols, Self::Vcpu, Self::Controller, Self::Api, Self::Namer, Self::Events];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Writer => "writer",
            Self::Symbols => "symbols",
            Self::Vcpu => "vcpu",
            Self::Controller => "controller",
            Self::Api => "api",
            Self::Namer => "namer",
            Self::Events => "events",
        }
    }
}

impl fmt::Display for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
