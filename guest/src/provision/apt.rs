//! A private apt: downloads from any suite of the distribution without touching the
//! system's own lists, from the mirror and with the keyring that the system itself uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::provision::command::output_of;
use crate::provision::error::{AtPath, Error};

/// Whether packages or their sources are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Binary packages.
    Binary,
    /// Source packages.
    Source,
}

/// An apt configuration of our own, below a folder.
#[derive(Debug)]
pub struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Sets up a private apt below `folder` for `suite` (a codename such as `trixie`, or
    /// `bookworm-backports`), its updates and its security archive, and fetches the package lists.
    ///
    /// # Errors
    /// [`Error::Archive`] when the system has no apt source to derive ours from.
    pub fn new(folder: &Path, suite: &str, kind: Kind) -> Result<Self, Error> {
        let sources = derive(&system_sources()?, &host_codename()?, suite, kind);
        if sources.is_empty() {
            return Err(Error::Archive(
                "no apt source for this system's own suite was found under /etc/apt; \
                 the kernel and QEMU's source are fetched from the same mirror"
                    .into(),
            ));
        }
        let folder = folder.to_path_buf();
        for sub in ["parts", "lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(sub)).at(&folder)?;
        }
        fs::write(folder.join("parts/own.sources"), sources).at(&folder)?;
        let at = folder.display();
        fs::write(
            folder.join("apt.conf"),
            format!(
                "Dir::Etc::sourcelist \"/dev/null\";\n\
                 Dir::Etc::sourceparts \"{at}/parts\";\n\
                 Dir::State::Lists \"{at}/lists\";\n\
                 Dir::Cache \"{at}/cache\";\n\
                 APT::Sandbox::User \"root\";\n\
                 Acquire::Languages \"none\";\n"
            ),
        )
        .at(&folder)?;
        let apt = Self { folder };
        output_of(apt.command("apt-get").args(["-q", "update"]))?;
        Ok(apt)
    }

    /// A command of apt's family that uses this configuration.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt.conf"));
        command
    }
}

/// One source of packages: where from, which suites, signed by what.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    uris: String,
    suites: Vec<String>,
    signed_by: Option<String>,
}

fn host_codename() -> Result<String, Error> {
    let path = "/etc/os-release";
    let text = fs::read_to_string(path).at(path)?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .ok_or_else(|| Error::Archive(format!("{path} has no VERSION_CODENAME")))
}

fn system_sources() -> Result<Vec<Source>, Error> {
    let mut sources = Vec::new();
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(folder.flatten().map(|entry| entry.path()));
    }
    files.sort();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|ext| ext.to_str()) {
            Some("sources") => sources.extend(parse_deb822(&text)),
            Some("list") => sources.extend(parse_lines(&text)),
            _ => {}
        }
    }
    Ok(sources)
}

/// The format of `*.sources`: stanzas of `Field: value` (sources.list(5)).
fn parse_deb822(text: &str) -> Vec<Source> {
    let field = |stanza: &str, name: &str| {
        stanza.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    text.split("\n\n")
        .filter(|stanza| field(stanza, "Enabled").is_none_or(|value| value != "no"))
        .filter_map(|stanza| {
            Some(Source {
                uris: field(stanza, "URIs")?,
                suites: field(stanza, "Suites")?.split_whitespace().map(str::to_owned).collect(),
                signed_by: field(stanza, "Signed-By").filter(|value| value.starts_with('/')),
            })
        })
        .collect()
}

/// The format of `*.list`: `deb [options] uri suite components` (sources.list(5)).
fn parse_lines(text: &str) -> Vec<Source> {
    text.lines()
        .filter_map(|line| {
            let rest = line.trim().strip_prefix("deb ")?.trim();
            let (options, rest) = match rest.strip_prefix('[') {
                Some(inner) => inner.split_once(']')?,
                None => ("", rest),
            };
            let mut words = rest.split_whitespace();
            Some(Source {
                uris: words.next()?.to_owned(),
                suites: vec![words.next()?.to_owned()],
                signed_by: options
                    .split_whitespace()
                    .find_map(|option| option.strip_prefix("signed-by=").map(str::to_owned)),
            })
        })
        .collect()
}

/// Rewrites the system's sources of its own suite `from` to the suite `to`.
fn derive(sources: &[Source], from: &str, to: &str, kind: Kind) -> String {
    let wanted = |suite: &str| {
        let rest = suite.strip_prefix(from)?;
        // Backports have no updates of their own.
        let exists = rest.is_empty() || !to.contains('-') && matches!(rest, "-updates" | "-security");
        exists.then(|| format!("{to}{rest}"))
    };
    let types = match kind {
        Kind::Binary => "deb",
        Kind::Source => "deb-src",
    };
    let mut text = String::new();
    for source in sources {
        let suites: Vec<_> = source.suites.iter().filter_map(|suite| wanted(suite)).collect();
        if suites.is_empty() {
            continue;
        }
        text += &format!(
            "Types: {types}\nURIs: {}\nSuites: {}\nComponents: main\n",
            source.uris,
            suites.join(" ")
        );
        if let Some(keyring) = &source.signed_by {
            text += &format!("Signed-By: {keyring}\n");
        }
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_give_the_same_source_for_another_suite() {
        let deb822 = parse_deb822(
            "Types: deb\n# a comment\nURIs: mirror:/x\nSuites: bookworm bookworm-updates\nSigned-By: /k.gpg\n\n\
             Types: deb\nURIs: mirror:/s\nSuites: bookworm-security\nSigned-By: /k.gpg\n\n\
             Types: deb\nEnabled: no\nURIs: mirror:/off\nSuites: bookworm\n",
        );
        let lines = parse_lines(
            "# a comment\ndeb [arch=amd64 signed-by=/k.gpg] mirror:/x bookworm main\n\
             deb [signed-by=/k.gpg] mirror:/x bookworm-updates main\n\
             deb [signed-by=/k.gpg] mirror:/s bookworm-security main\ndeb other:/ nodistro main\n",
        );
        assert_eq!(
            derive(&deb822, "bookworm", "trixie", Kind::Source),
            "Types: deb-src\nURIs: mirror:/x\nSuites: trixie trixie-updates\nComponents: main\nSigned-By: /k.gpg\n\n\
             Types: deb-src\nURIs: mirror:/s\nSuites: trixie-security\nComponents: main\nSigned-By: /k.gpg\n\n"
        );
        let from_lines = derive(&lines, "bookworm", "trixie", Kind::Binary);
        assert_eq!(from_lines.matches("Suites: trixie").count(), 3);
        assert!(!from_lines.contains("nodistro"));
        assert_eq!(
            derive(&deb822, "bookworm", "bookworm-backports", Kind::Binary),
            "Types: deb\nURIs: mirror:/x\nSuites: bookworm-backports\nComponents: main\nSigned-By: /k.gpg\n\n"
        );
    }
}
