//! What can be patched in a running guest, by the names that a plan uses, with its present state.

use serde::Serialize;

use crate::addr::Gva;
use crate::image::lock_ops::OPERATIONS;
use crate::image::names::tally;
use crate::image::tables::CALL_KEY;
use crate::linux::memory::{GuestMemory, read_u32, read_u64};
use crate::plan::refusal::Refusal;
use crate::resolve::RunningGuest;

/// Everything that a plan can name, except functions and raw sites.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Targets {
    /// For `static_key`.
    pub static_keys: Vec<KeyTarget>,
    /// For `static_call`.
    pub static_calls: Vec<CallTarget>,
    /// For `alternatives`: features of the processor.
    pub features: Vec<FeatureTarget>,
    /// For `paravirt`: the operations of spinlocks.
    pub spinlocks: Vec<SpinlockTarget>,
}

/// A static key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyTarget {
    /// Its name.
    pub name: String,
    /// Its count of users: the key is true if positive. Negative while the guest changes it.
    pub users: i32,
    /// How many jumps it switches.
    pub entries: usize,
}

/// A static call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CallTarget {
    /// Its name.
    pub name: String,
    /// What it calls; `none` if nothing.
    pub target: String,
    /// How many call sites it has.
    pub sites: usize,
}

/// A CPU feature that alternatives depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FeatureTarget {
    /// Its name.
    pub name: String,
    /// Whether the kernel has the feature's bit set; `None` if that is not known.
    pub present: Option<bool>,
    /// How many alternatives depend on it.
    pub alternatives: usize,
}

/// An operation of spinlocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SpinlockTarget {
    /// The operation.
    pub operation: &'static str,
    /// The function that implements it.
    pub target: String,
}

/// Lists all targets.
///
/// # Errors
/// [`Refusal::Unmapped`], or why the modules can't be read.
pub fn list(guest: RunningGuest<'_>) -> Result<Targets, Refusal> {
    let bounded = guest.bounded();
    let listed = list_within(RunningGuest { text: &bounded, ..guest });
    if bounded.is_exhausted() { Err(Refusal::TooMuchToRead) } else { listed }
}

fn list_within(guest: RunningGuest<'_>) -> Result<Targets, Refusal> {
    let RunningGuest { kernel, text, .. } = guest;
    let name_of = |at: Gva| kernel.identify(at).unwrap_or_else(|| at.to_string());
    let entries = tally(kernel.jump_entries()?.map(|entry| entry.key));
    let key = |(at, entries): (Gva, usize)| {
        let users = read_u32(text, at)?.cast_signed();
        Ok(KeyTarget { name: name_of(at), users, entries })
    };
    let sites = tally(kernel.static_call_sites()?.map(|site| site.key));
    let symbols = kernel.image.symbols().iter().map(|(at, _, name)| (String::new(), kernel.live(at), name));
    let of_modules = kernel.modules.all()?.iter().flat_map(|module| {
        module.symbols.iter().map(|(at, _, name)| (format!("{}:", module.name), at, name))
    });
    let call = |(module, at, symbol): (String, Gva, &str)| {
        let name = symbol.strip_prefix(CALL_KEY)?;
        let target = read_u64(text, at).map(|target| match target {
            0 => crate::resolve::expand::static_call::NOTHING.to_owned(),
            target => name_of(Gva(target)),
        });
        let sites = sites.get(&at).copied().unwrap_or(0);
        Some(target.map(|target| CallTarget { name: format!("{module}{name}"), target, sites }))
    };
    let mut static_calls: Vec<CallTarget> =
        symbols.chain(of_modules).filter_map(call).collect::<Result<_, Refusal>>()?;
    static_calls.sort_by(|a, b| a.name.cmp(&b.name));
    let tables = kernel.image.tables();
    let feature = |(name, alternatives): (String, usize)| {
        let present = tables.feature(&name).and_then(|number| kernel.has_feature(text, number).ok());
        FeatureTarget { name, present, alternatives }
    };
    let pointers = kernel.image.lock_ops().map(|ops| ops.pointers);
    let operation = |(operation, pointer): (&'static str, Gva)| {
        let target = name_of(Gva(read_u64(text, kernel.live(pointer))?));
        Ok(SpinlockTarget { operation, target })
    };
    Ok(Targets {
        static_keys: entries.into_iter().map(key).collect::<Result<_, Refusal>>()?,
        static_calls,
        features: tables.feature_counts().into_iter().map(feature).collect(),
        spinlocks: OPERATIONS
            .into_iter()
            .zip(pointers.into_iter().flatten())
            .map(operation)
            .collect::<Result<_, Refusal>>()?,
    })
}
