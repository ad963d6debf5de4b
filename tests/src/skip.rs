//! A test that cannot run somewhere is shown as skipped, with its reason. In CI that is a failure:
//! nothing that is promised may go untested unnoticed.

use libtest_mimic::Failed;

/// Whether a test may be left out for `reason`.
///
/// # Errors
/// In CI.
pub fn may_skip(reason: &str, is_ci: bool) -> Result<(), Failed> {
    if is_ci { Err(format!("skipped in CI: {reason}").into()) } else { Ok(()) }
}

/// Whether this is a run of CI, which sets `CI=true`.
#[must_use]
pub fn is_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_fails_in_ci_and_tells_its_reason() {
        assert!(may_skip("no rig", false).is_ok());
        let failed = may_skip("no rig", true).expect_err("a failure");
        assert!(failed.message().is_some_and(|text| text.contains("no rig")), "{failed:?}");
    }
}
