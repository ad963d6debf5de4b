//! Holds `docs/limits.md` to the refusals: every code has its row, every row its code.

use std::collections::BTreeSet;

#[test]
fn every_refusal_code_is_documented_and_none_is_invented() {
    let source = include_str!("../src/plan/refusal.rs");
    let in_code: BTreeSet<&str> = source
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Self::")?.split_once("=> \""))
        .filter_map(|(_, rest)| rest.strip_suffix("\","))
        .collect();
    let page = include_str!("../docs/limits.md");
    let rows: Vec<Vec<&str>> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let in_page: BTreeSet<&str> = rows.iter().map(|row| row[0].trim_matches('`')).collect();
    assert!(in_code.len() > 20, "the codes were not found in the source: {in_code:?}");
    assert_eq!(in_code, in_page);
    assert_eq!(rows.len(), in_page.len(), "a code has two rows");
    for row in rows {
        assert!(
            row.len() == 3 && row.iter().all(|cell| !cell.is_empty()),
            "{row:?} lacks a reason or a remedy"
        );
    }
}
