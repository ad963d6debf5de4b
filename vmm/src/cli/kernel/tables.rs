//! `vmm kernel tables`: the tables of patch sites.

use patcher::addr::Gva;
use patcher::image::KernelImage;
use patcher::insn;
use serde_json::json;

use crate::cli::args::Table;
use crate::cli::kernel::rows::Row;

/// The rows of a table; `None` if this kernel does not have it.
pub(super) fn rows(image: &KernelImage, table: Table) -> Option<Vec<Row>> {
    let tables = image.tables();
    let place = |at: Gva| image.symbols().describe(at);
    match table {
        Table::JumpEntries => Some(
            tables
                .jump_entries
                .as_ref()?
                .iter()
                .map(|entry| {
                    vec![
                        ("at", json!(entry.code)),
                        ("code", json!(place(entry.code))),
                        ("target", json!(place(entry.target))),
                        ("key", json!(place(entry.key))),
                        ("branch", json!(entry.branch)),
                    ]
                })
                .collect(),
        ),
        Table::StaticCallSites => Some(
            tables
                .static_call_sites
                .as_ref()?
                .iter()
                .map(|site| {
                    vec![
                        ("at", json!(site.code)),
                        ("code", json!(place(site.code))),
                        ("key", json!(place(site.key))),
                        ("tail", json!(site.tail)),
                    ]
                })
                .collect(),
        ),
        Table::Alternatives => Some(
            tables
                .alternatives
                .as_ref()?
                .iter()
                .map(|alternative| {
                    vec![
                        ("at", json!(alternative.at)),
                        ("code", json!(place(alternative.at))),
                        ("feature", json!(tables.feature_name(alternative.feature))),
                        ("inverted", json!(alternative.inverted)),
                        ("original", json!(insn::hex(&alternative.original))),
                        ("replacement", json!(insn::hex(&alternative.replacement))),
                    ]
                })
                .collect(),
        ),
        Table::SmpLocks => Some(
            tables
                .smp_locks
                .as_ref()?
                .iter()
                .map(|at| vec![("at", json!(at)), ("code", json!(place(*at)))])
                .collect(),
        ),
        Table::ParavirtSites => Some(
            tables
                .paravirt_sites
                .as_ref()?
                .iter()
                .map(|site| {
                    vec![
                        ("at", json!(site.at)),
                        ("code", json!(place(site.at))),
                        ("operation", json!(site.operation)),
                        ("len", json!(site.len)),
                    ]
                })
                .collect(),
        ),
        Table::Exceptions => Some(
            tables
                .exceptions
                .as_ref()?
                .iter()
                .map(|at| vec![("at", json!(at)), ("code", json!(place(*at)))])
                .collect(),
        ),
    }
}
