//! `vmm kernel info`: what an image has, in numbers, and what can be done with the kernel.

use patcher::addr::Gva;
use patcher::image::profile::{Capability, State};
use patcher::image::{KernelImage, Tables};
use patcher::insn;
use serde::Serialize;

use crate::cli::render::page::{Page, bold, plain};

/// What an image has, in numbers; `null` if this kernel has no such table.
#[derive(Debug, Serialize)]
pub(super) struct Info {
    release: String,
    build_id: Option<String>,
    compression: Option<&'static str>,
    text_base: Gva,
    symbols: usize,
    jump_entries: Option<usize>,
    static_keys: usize,
    static_call_sites: Option<usize>,
    static_calls: usize,
    alternatives: Option<usize>,
    smp_locks: Option<usize>,
    paravirt_sites: Option<usize>,
    mcount_locations: Option<usize>,
    orc_entries: Option<usize>,
    exceptions: Option<usize>,
    capabilities: Vec<CapabilityLine>,
}

/// Whether a kernel has a capability.
#[derive(Debug, Serialize)]
struct CapabilityLine {
    name: &'static str,
    state: &'static str,
    /// Why it is missing.
    reason: Option<String>,
}

impl CapabilityLine {
    fn new((capability, state): (Capability, &State)) -> Self {
        let (state, reason) = match state {
            State::Supported => ("supported", None),
            State::Absent => ("absent", None),
            State::Missing { reason } => ("missing", Some(reason.clone())),
        };
        Self { name: capability.name(), state, reason }
    }
}

impl Info {
    /// Counts what an image has.
    pub(super) fn new(image: &KernelImage) -> Self {
        let tables: &Tables = image.tables();
        Self {
            release: image.release().to_owned(),
            build_id: image.build_id().map(insn::hex),
            compression: image.compression(),
            text_base: image.text_base(),
            symbols: image.symbols().len(),
            jump_entries: tables.jump_entries.as_ref().map(Vec::len),
            static_keys: image.static_keys().len(),
            static_call_sites: tables.static_call_sites.as_ref().map(Vec::len),
            static_calls: image.static_calls().len(),
            alternatives: tables.alternatives.as_ref().map(Vec::len),
            smp_locks: tables.smp_locks.as_ref().map(Vec::len),
            paravirt_sites: tables.paravirt_sites.as_ref().map(Vec::len),
            mcount_locations: tables.mcount_locations.as_ref().map(Vec::len),
            orc_entries: tables.orc_entries,
            exceptions: tables.exceptions.as_ref().map(Vec::len),
            capabilities: image.profile().iter().map(CapabilityLine::new).collect(),
        }
    }

    /// The same for a terminal.
    pub(super) fn page(&self) -> Page {
        let mut page = Page::default();
        page.line([bold("Linux "), bold(&self.release), plain(format_args!(" at {}", self.text_base))]);
        let known = |text: Option<&str>, otherwise: &str| plain(text.unwrap_or(otherwise));
        let count = |count: Option<usize>| count.map_or_else(|| plain("none"), plain);
        page.table(
            [
                ("build id", known(self.build_id.as_deref(), "none")),
                ("compression", known(self.compression, "none: this is a plain vmlinux")),
                ("symbols", plain(self.symbols)),
                ("static keys", plain(self.static_keys)),
                ("jump entries", count(self.jump_entries)),
                ("static calls", plain(self.static_calls)),
                ("static call sites", count(self.static_call_sites)),
                ("alternatives", count(self.alternatives)),
                ("SMP locks", count(self.smp_locks)),
                ("paravirt sites", count(self.paravirt_sites)),
                ("mcount locations", count(self.mcount_locations)),
                ("ORC entries", count(self.orc_entries)),
                ("exceptions", count(self.exceptions)),
            ]
            .map(|(what, found)| [plain(""), plain(what), found]),
        );
        page.line([bold("Capabilities")]);
        page.rows(self.capabilities.iter().map(|line| {
            let reason = line.reason.as_deref().unwrap_or_default();
            vec![plain(""), plain(line.name), plain(line.state), plain(reason)]
        }));
        page
    }
}
