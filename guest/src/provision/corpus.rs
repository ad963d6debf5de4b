//! The corpus: the stock kernels of every series that the distribution's archive offers.
//!
//! Which those are is decided once, from the archive's lists, and kept in the cache beside the images.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::provision::apt::{Apt, Kind};
use crate::provision::cache;
use crate::provision::command::output_of;
use crate::provision::error::{AtPath, Error};
use crate::provision::kernel::{fetch_image, image_in};
use crate::provision::progress::Step;

/// The suites, oldest first, and the flavours wanted of their series. A series that several suites
/// have is the last one's. Of the newest series of all, every flavour is wanted.
const SUITES: [(&str, &[Flavour]); 4] = [
    ("bullseye", &[Flavour::Cloud]),
    ("bookworm", &Flavour::ALL),
    ("trixie", &Flavour::ALL),
    ("trixie-backports", &[Flavour::Cloud]),
];
/// What must be among them: a series and how many flavours of it.
const MINIMUM: [(Series, usize); 3] = [((5, 10), 1), ((6, 1), 3), ((6, 12), 2)];
/// How many flavours of the newest series must be.
const MINIMUM_NEWEST: usize = 2;
/// Part of the cache keys: raise it to choose and fetch anew.
const CONTENT: u32 = 1;

/// The first two numbers of a release.
type Series = (u32, u32);

/// What a kernel is configured for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flavour {
    /// Virtual machines.
    Cloud,
    /// Any machine.
    Generic,
    /// `PREEMPT_RT`.
    Realtime,
}

impl Flavour {
    const ALL: [Self; 3] = [Self::Cloud, Self::Generic, Self::Realtime];

    fn of(release: &str) -> Self {
        match release {
            _ if release.ends_with("-cloud-amd64") => Self::Cloud,
            _ if release.ends_with("-rt-amd64") => Self::Realtime,
            _ => Self::Generic,
        }
    }
}

/// A kernel of the corpus.
#[derive(Debug, Clone)]
pub struct Stock {
    /// What `uname -r` says in it.
    pub release: String,
    /// The bootable image.
    pub bzimage: PathBuf,
}

/// A kernel that the archive offers: the suite, and what `uname -r` will say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Offer {
    suite: String,
    release: String,
}

/// The corpus, fetched on first use, oldest first.
///
/// # Errors
/// [`Error::Archive`] when the archive lacks what must be in it; as [`Apt::new`].
pub fn kernels() -> Result<Vec<Stock>, Error> {
    let mut archive = Archive::default();
    let list = cache::entry(&format!("corpus-list-{CONTENT}"), |into| {
        let step = Step::new("Asking the archive for its kernels");
        let path = into.join("list");
        let chosen = choose(&archive.offers()?);
        expect_minimum(&chosen)?;
        let lines = chosen.iter().map(|offer| format!("{} {}\n", offer.suite, offer.release));
        fs::write(&path, lines.collect::<String>()).at(&path)?;
        step.done();
        Ok(())
    })?
    .join("list");
    let text = fs::read_to_string(&list).at(&list)?;
    let wanted: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once(' ')).collect();
    let mut step = None;
    let mut all = Vec::new();
    for (number, (suite, release)) in (0..).zip(&wanted) {
        let entry = format!("corpus-{release}-{CONTENT}");
        let folder = cache::entry(&entry, |into| {
            step.get_or_insert_with(|| Step::new("Fetching the corpus of stock kernels"))
                .at(number, wanted.len() as u64);
            fetch(archive.of(suite)?, release, into)
        })?;
        all.push(Stock { release: (*release).to_owned(), bzimage: folder.join("vmlinuz") });
    }
    step.into_iter().for_each(Step::done);
    Ok(all)
}

/// Fetches an image, and nothing else of its package.
fn fetch(apt: &Apt, release: &str, into: &Path) -> Result<(), Error> {
    let unpacked = into.join("unpacked");
    fetch_image(apt, &format!("linux-image-{release}"), &into.join("work"), &unpacked)?;
    let image = image_in(&unpacked).filter(|(found, _)| found == release).map(|(_, path)| path);
    let image = image.ok_or_else(|| Error::Archive(format!("no vmlinuz in the package of {release}")))?;
    fs::rename(&image, into.join("vmlinuz")).at(&image)?;
    fs::remove_dir_all(&unpacked).at(&unpacked)
}

/// The archive's lists, each fetched when it is first asked for.
#[derive(Default)]
struct Archive {
    suites: BTreeMap<String, Apt>,
}

impl Archive {
    fn folder() -> PathBuf {
        std::env::temp_dir().join(format!("vmm-corpus-{}", std::process::id()))
    }

    fn of(&mut self, suite: &str) -> Result<&Apt, Error> {
        if !self.suites.contains_key(suite) {
            let apt = Apt::new(&Self::folder().join(suite), suite, Kind::Binary)?;
            self.suites.insert(suite.to_owned(), apt);
        }
        self.suites.get(suite).ok_or_else(|| Error::Archive(format!("no lists of {suite}")))
    }

    /// All that the suites have.
    fn offers(&mut self) -> Result<Vec<Offer>, Error> {
        let mut offers = Vec::new();
        for (suite, _) in SUITES {
            let names = output_of(self.of(suite)?.command("apt-cache").args(["pkgnames", "linux-image-"]))?;
            let releases = names.lines().filter_map(|name| name.strip_prefix("linux-image-"));
            let offer = |release: &str| Offer { suite: suite.to_owned(), release: release.to_owned() };
            offers.extend(releases.filter(|release| series(release).is_some()).map(offer));
        }
        Ok(offers)
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        if !self.suites.is_empty() {
            // Only space is lost if it stays.
            let _ = fs::remove_dir_all(Self::folder());
        }
    }
}

/// The numbers in a release, by which releases are ordered.
fn numbers(release: &str) -> Vec<u32> {
    let version = release.trim_end_matches("-amd64");
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// The series of a kernel's release; none if it is another package's name: one that only depends
/// on the newest of a series (`6.12-amd64`), an unsigned image, debug information.
fn series(release: &str) -> Option<Series> {
    let mut parts = release.split('.');
    let first_two = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let patch_level = parts.next()?.starts_with(|c: char| c.is_ascii_digit());
    (patch_level && release.ends_with("-amd64")).then_some(first_two)
}

/// The newest of each series and wanted flavour, oldest series first.
fn choose(offers: &[Offer]) -> Vec<Offer> {
    let suite_of = |offer: &Offer| SUITES.iter().position(|(suite, _)| *suite == offer.suite);
    let last_suite =
        |wanted| offers.iter().filter(|offer| series(&offer.release) == wanted).filter_map(suite_of).max();
    let newest = offers.iter().filter_map(|offer| series(&offer.release)).max();
    let mut chosen: BTreeMap<(Series, Flavour), Offer> = BTreeMap::new();
    for offer in offers {
        let (Some(series), Some(suite), flavour) =
            (series(&offer.release), suite_of(offer), Flavour::of(&offer.release))
        else {
            continue;
        };
        let is_wanted = Some(series) == newest || SUITES[suite].1.contains(&flavour);
        if !is_wanted || last_suite(Some(series)) != Some(suite) {
            continue;
        }
        let so_far = chosen.get(&(series, flavour));
        if so_far.is_none_or(|old| numbers(&old.release) < numbers(&offer.release)) {
            chosen.insert((series, flavour), offer.clone());
        }
    }
    chosen.into_values().collect()
}

/// Fails if the archive offers less than must be in the corpus.
fn expect_minimum(chosen: &[Offer]) -> Result<(), Error> {
    let count = |wanted: Series| chosen.iter().filter(|o| series(&o.release) == Some(wanted)).count();
    let newest = chosen.iter().filter_map(|offer| series(&offer.release)).max().unwrap_or_default();
    for (wanted, least) in MINIMUM.into_iter().chain([(newest, MINIMUM_NEWEST)]) {
        if count(wanted) < least {
            let ((major, minor), found) = (wanted, count(wanted));
            return Err(Error::Archive(format!(
                "the archive offers {found} kernels {major}.{minor}, and the corpus needs {least}"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offers(listed: &[(&str, &[&str])]) -> Vec<Offer> {
        let of = |(suite, releases): &(&str, &[&str])| -> Vec<Offer> {
            let offer = |release: &&str| Offer { suite: (*suite).into(), release: (*release).into() };
            releases.iter().filter(|release| series(release).is_some()).map(offer).collect()
        };
        listed.iter().flat_map(of).collect()
    }

    const LISTED: [(&str, &[&str]); 4] = [
        (
            "bullseye",
            &["5.10.0-9-cloud-amd64", "5.10.0-46-cloud-amd64", "5.10.0-46-amd64", "6.1.0-0.deb11.52-amd64"],
        ),
        (
            "bookworm",
            &[
                "6.1-amd64",
                "6.1.0-56-amd64",
                "6.1.0-56-rt-amd64",
                "6.1.0-56-cloud-amd64",
                "6.1.0-56-amd64-dbg",
                "6.1.0-56-amd64-unsigned",
                "6.12.117+deb12-cloud-amd64",
            ],
        ),
        ("trixie", &["6.12.115+deb13.1-cloud-amd64", "6.12.115+deb13-cloud-amd64", "6.12.90+deb13-rt-amd64"]),
        (
            "trixie-backports",
            &[
                "7.2.9+deb13-cloud-amd64",
                "7.2.12+deb13-cloud-amd64",
                "7.2.12+deb13-rt-amd64",
                "7.3.4+deb13-rt-amd64",
                "7.3.4+deb13-amd64",
            ],
        ),
    ];

    #[test]
    fn the_newest_of_each_series_is_chosen_from_the_last_suite_that_has_it() {
        let chosen = choose(&offers(&LISTED));
        let releases: Vec<_> = chosen.iter().map(|offer| offer.release.as_str()).collect();
        assert_eq!(
            releases,
            [
                "5.10.0-46-cloud-amd64",
                "6.1.0-56-cloud-amd64",
                "6.1.0-56-amd64",
                "6.1.0-56-rt-amd64",
                "6.12.115+deb13.1-cloud-amd64",
                "6.12.90+deb13-rt-amd64",
                "7.2.12+deb13-cloud-amd64",
                "7.3.4+deb13-amd64",
                "7.3.4+deb13-rt-amd64",
            ]
        );
        expect_minimum(&chosen).expect("enough");
    }

    #[test]
    fn an_archive_that_lacks_a_kernel_is_told_of() {
        for lacking in
            ["5.10.0-46-cloud-amd64", "6.1.0-56-rt-amd64", "6.12.90+deb13-rt-amd64", "7.3.4+deb13-rt-amd64"]
        {
            let mut chosen = choose(&offers(&LISTED));
            chosen.retain(|offer| offer.release != lacking);
            let told = expect_minimum(&chosen).expect_err(lacking).to_string();
            let series = series(lacking).map(|(major, minor)| format!("{major}.{minor},"));
            assert!(told.contains(&series.expect("a series")), "{told}");
        }
    }
}
