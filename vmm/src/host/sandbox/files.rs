//! Landlock (Linux Documentation/userspace-api/landlock.rst): a thread opens, makes and removes no file. All that
//! it needs is open by then; one folder's files may be removed, as the control socket is at the end.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};

/// How much of it the host's kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// All that is asked for.
    Denied,
    /// A part of it: the kernel has an older version.
    PartlyDenied,
    /// Nothing: the kernel was built or started without it.
    Open,
}

/// Restricts the calling thread, as far as the kernel can.
///
/// # Errors
/// When the kernel has Landlock, and it failed.
pub(super) fn deny(removable_in: Option<&Path>) -> Result<Files, RulesetError> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .create()?;
    // A folder that is gone holds nothing to be removed.
    let folder = removable_in.and_then(|path| PathFd::new(path).ok());
    let rule = folder.map(|folder| Ok::<_, RulesetError>(PathBeneath::new(folder, AccessFs::RemoveFile)));
    let status = ruleset.add_rules(rule)?.restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Files::Denied,
        RulesetStatus::PartiallyEnforced => Files::PartlyDenied,
        RulesetStatus::NotEnforced => Files::Open,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::ErrorKind;

    use super::*;

    #[test]
    fn nothing_is_opened_and_one_folder_s_files_are_removed() {
        let folders = [tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder")];
        let [mine, other] = folders.each_ref().map(|folder| folder.path().join("file"));
        for path in [&mine, &other] {
            fs::write(path, "text").expect("written");
        }
        let (from, inner) = (folders[0].path().to_owned(), [mine.clone(), other.clone()]);
        let results = std::thread::spawn(move || {
            let files = deny(Some(&from)).expect("restricted");
            let kind = |result: std::io::Result<()>| result.map_err(|error| error.kind());
            let read = kind(fs::read(&inner[0]).map(drop));
            let made = kind(fs::write(from.join("new"), "text"));
            (files, read, made, inner.map(|path| kind(fs::remove_file(path))))
        })
        .join()
        .expect("it ended");
        if results.0 == Files::Open {
            eprintln!("skipped: this kernel has no Landlock");
            return;
        }
        let denied = Err(ErrorKind::PermissionDenied);
        assert_eq!((results.1, results.2, results.3), (denied, denied, [Ok(()), denied]));
        assert!(other.exists() && !mine.exists());
    }
}
