//! Pairs of relocatable objects of a stock kernel's own source, before and after a change, for tests that
//! replace functions in a running guest. Built once, as the kernel's package was, and cached.
//!
//! Of Linux 6.12 objects are as the compiler made them: objtool runs on all of that kernel at once, and on no
//! object (`delay-objtool` in scripts/Makefile.lib, because of IBT).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::provision::apt::{Apt, Kind};
use crate::provision::command::output_of;
use crate::provision::error::{AtPath, Error};
use crate::provision::kernel::Kernel;
use crate::provision::progress::Step;
use crate::provision::{cache, packages};

/// Part of the cache key: raise it when anything about the build or the changes does.
const BUILD: u32 = 5;
/// The compiler's package. Both kernels were built by it; objects of another would not belong to them.
const COMPILER: &str = "gcc-12";
/// Debian calls its compilers by their name or with this before it; the configuration has which.
const TRIPLET: &str = "x86_64-linux-gnu-";
/// `libelf` is for `objtool`, `libssl` for what signs modules, `bc`, `bison` and `flex` for the configuration
/// and the headers that are made. Without `pahole` the configuration changes, and with it `struct module`.
const PACKAGES: &[&str] =
    &[COMPILER, "make", "bc", "bison", "flex", "libelf-dev", "libssl-dev", "pahole", "xz-utils"];
/// Settings that Debian leaves out of the configuration in its package.
const STRIPPED: [&str; 4] =
    ["CONFIG_BUILD_SALT", "CONFIG_MODULE_SIG_ALL", "CONFIG_MODULE_SIG_KEY", "CONFIG_SYSTEM_TRUSTED_KEYS"];
/// Not unpacked: the greater part of the source, which no object here needs. What configures it stays.
const LEFT_OUT: [&str; 3] = ["*/drivers/*.[ch]", "*/sound/*.[ch]", "*/Documentation/*.rst"];

/// A change of one file of the source.
struct Change {
    name: &'static str,
    source: &'static str,
    /// What is there once and what takes its place.
    edits: &'static [(&'static str, &'static str)],
}

const CHANGES: [Change; 10] = [
    // A process is its own parent.
    Change {
        name: "getppid",
        source: "kernel/sys.c",
        edits: &[("task_tgid_vnr(rcu_dereference(current->real_parent))", "task_tgid_vnr(current)")],
    },
    // Two lines take turns in /proc/cmdline. New are a function, a table of pointers, a pointer into it and a
    // counter.
    Change {
        name: "cmdline",
        source: "fs/proc/cmdline.c",
        edits: &[
            (
                "static int cmdline_proc_show(",
                r#"static const char *const replaced_lines[] = { "replaced: even", "replaced: odd" };
static const char *const *replaced_next = replaced_lines;
static unsigned int replaced_reads;

static noinline void replaced_line(struct seq_file *m)
{
    seq_puts(m, *replaced_next);
    replaced_next = &replaced_lines[++replaced_reads & 1];
}

static int cmdline_proc_show("#,
            ),
            ("seq_puts(m, saved_command_line);", "replaced_line(m);"),
        ],
    },
    // /proc/version begins with another word, and ends before who built it.
    Change {
        name: "version",
        source: "fs/proc/version.c",
        edits: &[("linux_proc_banner", r#""replaced %s %s %s\n""#)],
    },
    // setpriority(2) with N sets N before, N ^ 1 after. Two arguments change places in both functions, so a
    // mixture returns N, and sets -4 (an old caller) or -3 (an old callee).
    Change {
        name: "pair",
        source: "kernel/sys.c",
        edits: &[
            (
                "static int set_one_prio(struct task_struct *p, int niceval, int error)",
                "static int set_one_prio(struct task_struct *p, int error, int niceval)",
            ),
            ("set_user_nice(p, niceval);", "set_user_nice(p, niceval ^ 1);"),
            (
                "if (p)\n\t\t\terror = set_one_prio(p, niceval, error);",
                "if (p)\n\t\t\terror = set_one_prio(p, error, niceval);",
            ),
            (
                "PIDTYPE_PGID, p) {\n\t\t\terror = set_one_prio(p, niceval, error);",
                "PIDTYPE_PGID, p) {\n\t\t\terror = set_one_prio(p, error, niceval);",
            ),
            (
                "task_pid_vnr(p))\n\t\t\t\terror = set_one_prio(p, niceval, error);",
                "task_pid_vnr(p))\n\t\t\t\terror = set_one_prio(p, error, niceval);",
            ),
        ],
    },
    // A new entry of the table of bugs: a warning, once.
    Change {
        name: "warn",
        source: "fs/proc/version.c",
        edits: &[("seq_printf(m,", "WARN_ON_ONCE(m->op);\n\tseq_printf(m,")],
    },
    // Whoever waits for the other end of a FIFO stands in this function.
    Change {
        name: "fifo",
        source: "fs/pipe.c",
        edits: &[("\t\tif (!pipe)\n\t\t\treturn -ENOMEM;", "\t\tif (!pipe)\n\t\t\treturn -ENFILE;")],
    },
    // A structure that other code has made already, and no function tells.
    Change {
        name: "layout",
        source: "fs/eventpoll.c",
        edits: &[("struct eventpoll {", "struct eventpoll {\n\tunsigned long replaced;")],
    },
    // A variable's initial value, and no code.
    Change {
        name: "data",
        source: "kernel/sys.c",
        edits: &[("int overflowuid = DEFAULT_OVERFLOWUID;", "int overflowuid = DEFAULT_OVERFLOWUID - 1;")],
    },
    // Static branches in a function that had none: by a key of the kernel's, taken while it is on and while it is off,
    // and by a key of the new code's own, which that switches.
    Change {
        name: "key",
        source: "fs/proc/loadavg.c",
        edits: &[
            (
                "#include <linux/fs.h>",
                "#include <linux/fs.h>\n#include <linux/jump_label.h>\nDECLARE_STATIC_KEY_FALSE(sched_schedstats);\n\
                 static DEFINE_STATIC_KEY_FALSE(replaced_key);",
            ),
            (
                "get_avenrun(avnrun, FIXED_1/200, 0);",
                r#"get_avenrun(avnrun, FIXED_1/200, 0);
	if (static_branch_unlikely(&sched_schedstats))
		seq_puts(m, "on ");
	if (!static_branch_likely(&sched_schedstats))
		seq_puts(m, "off ");
	if (static_branch_unlikely(&replaced_key)) {
		seq_puts(m, "odd ");
		static_branch_disable(&replaced_key);
	} else {
		seq_puts(m, "even ");
		static_branch_enable(&replaced_key);
	}"#,
            ),
        ],
    },
    // A read of an address that is not mapped, and where that goes on.
    Change {
        name: "fault",
        source: "fs/proc/loadavg.c",
        edits: &[
            ("#include <linux/fs.h>", "#include <linux/fs.h>\n#include <linux/uaccess.h>"),
            (
                "get_avenrun(avnrun, FIXED_1/200, 0);",
                r#"get_avenrun(avnrun, FIXED_1/200, 0);
	{
		unsigned long word;

		__get_kernel_nofault(&word, &avnrun[0], unsigned long, wrong);
		if (word == avnrun[0])
			seq_puts(m, "read ");
		__get_kernel_nofault(&word, 0xffffffffffe00000UL, unsigned long, fault);
wrong:
		seq_puts(m, "wrong ");
		goto end;
fault:
		seq_puts(m, "fault ");
end:;
	}"#,
            ),
        ],
    },
];

/// Two objects of one file of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Of the source as it is.
    pub before: PathBuf,
    /// Of the source with the change.
    pub after: PathBuf,
}

/// The pair of that name. The first that is asked for has all of them built.
///
/// # Errors
/// As [`pairs`], and when there is none of that name.
pub fn pair(kernel: &Kernel, name: &str) -> Result<Pair, Error> {
    let found = pairs(kernel)?.into_iter().find(|(known, _)| *known == name);
    found.map(|(_, pair)| pair).ok_or_else(|| Error::Source(format!("there is no pair of objects {name}")))
}

/// All pairs for a kernel and their names, built on first use.
///
/// # Errors
/// When the archive has no source of the kernel's very version, packages are missing and can't be installed, a
/// change does not fit the source, or the build fails.
pub fn pairs(kernel: &Kernel) -> Result<Vec<(&'static str, Pair)>, Error> {
    let folder = cache::entry(&format!("objects-{}-{BUILD}", kernel.release), |into| build(kernel, into))?;
    let pair = |Change { name, .. }: &Change| {
        let (before, after) = files(&folder, name);
        (*name, Pair { before, after })
    };
    Ok(CHANGES.iter().map(pair).collect())
}

fn files(folder: &Path, name: &str) -> (PathBuf, PathBuf) {
    (folder.join(name).join("before.o"), folder.join(name).join("after.o"))
}

fn build(kernel: &Kernel, into: &Path) -> Result<(), Error> {
    packages::ensure("building objects of the kernel", PACKAGES)?;
    let work = into.join("work");
    let shipped = fs::read_to_string(kernel.config()).at(kernel.config())?;
    let compiler = compiler(&shipped)?.to_owned();
    let tree = Tree { folder: unpacked(kernel, &work)?, release: kernel.release.clone(), compiler };

    let step = Step::new(format!("Preparing the kernel's source ({})", kernel.release));
    let config = tree.folder.join(".config");
    fs::write(&config, &shipped).at(&config)?;
    tree.make(&["olddefconfig"])?;
    unchanged(&shipped, &fs::read_to_string(&config).at(&config)?)?;
    tree.make(&["prepare"])?;
    step.done();

    let mut step = Step::new(format!("Building objects of the kernel ({})", kernel.release));
    let objects: BTreeSet<String> = CHANGES.iter().map(Change::object).collect();
    let total = CHANGES.len() as u64 + 1;
    step.at(0, total);
    tree.make(&objects.iter().map(String::as_str).collect::<Vec<_>>())?;
    for change in &CHANGES {
        let (before, _) = files(into, change.name);
        tree.keep(&change.object(), &before)?;
    }
    for (done, change) in (1..).zip(&CHANGES) {
        step.at(done, total);
        let source = tree.folder.join(change.source);
        let original = fs::read_to_string(&source).at(&source)?;
        fs::write(&source, change.applied_to(&original)?).at(&source)?;
        tree.make(&[&change.object()])?;
        let (_, after) = files(into, change.name);
        tree.keep(&change.object(), &after)?;
        fs::write(&source, original).at(&source)?;
    }
    step.done();
    fs::remove_dir_all(&work).at(&work)
}

/// Fetches and unpacks the source of the kernel's very version; returns the tree's top.
fn unpacked(kernel: &Kernel, work: &Path) -> Result<PathBuf, Error> {
    let version = kernel.version()?;
    let series: Vec<&str> = version.split('.').take(2).collect();
    let package = format!("linux-source-{}", series.join("."));

    let step = Step::new(format!("Fetching the kernel's source ({package} {version})"));
    let apt = Apt::new(&work.join("apt"), kernel.suite, Kind::Binary)?;
    let offered = output_of(apt.command("apt-cache").args(["madison", &package]))?;
    let offered: Vec<&str> =
        offered.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim).collect();
    if !offered.contains(&version.as_str()) {
        let offered = if offered.is_empty() { "none".to_owned() } else { offered.join(", ") };
        return Err(Error::Archive(format!(
            "the kernel {} is of version {version}, and the archive does not have {package} of that version; it has: \
             {offered}",
            kernel.release
        )));
    }
    let wanted = format!("{package}={version}");
    output_of(apt.command("apt-get").args(["-q", "download", &wanted]).current_dir(work))?;
    step.done();

    let step = Step::new("Unpacking the kernel's source");
    let is_package = |path: &PathBuf| path.extension().is_some_and(|ext| ext == "deb");
    let mut paths = fs::read_dir(work).at(work)?.flatten().map(|entry| entry.path());
    let fetched =
        paths.find(is_package).ok_or_else(|| Error::Archive(format!("{wanted}: nothing was fetched")))?;
    output_of(Command::new("dpkg-deb").arg("-x").arg(fetched).arg(work))?;
    let tree = work.join("tree");
    fs::create_dir_all(&tree).at(&tree)?;
    output_of(
        Command::new("tar")
            .arg("-xJf")
            .arg(work.join("usr/src").join(format!("{package}.tar.xz")))
            .arg("--strip-components=1")
            .args(LEFT_OUT.map(|pattern| format!("--exclude={pattern}")))
            .arg("-C")
            .arg(&tree),
    )?;
    step.done();
    Ok(tree)
}

/// What the compiler is called that a configuration was made for.
fn compiler(config: &str) -> Result<&str, Error> {
    let mut lines = config.lines();
    let text = lines.find_map(|line| line.strip_prefix("CONFIG_CC_VERSION_TEXT=\""));
    let name = text.and_then(|text| text.split_whitespace().next()).unwrap_or_default();
    if name.strip_prefix(TRIPLET).unwrap_or(name) == COMPILER {
        return Ok(name);
    }
    Err(Error::Source(format!(
        "the kernel was built by the compiler `{name}`; objects are built by {COMPILER}, and would not belong to it"
    )))
}

/// Checks that a configuration is the one that the kernel's package has, but for what Debian leaves out.
fn unchanged(shipped: &str, used: &str) -> Result<(), Error> {
    let (shipped, used): (BTreeSet<&str>, BTreeSet<&str>) =
        (shipped.lines().collect(), used.lines().collect());
    let is_stripped =
        |line: &str| STRIPPED.iter().any(|name| line.split(['=', ' ']).any(|word| word == *name));
    let changed: Vec<&str> =
        shipped.symmetric_difference(&used).copied().filter(|line| !is_stripped(line)).collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(Error::Source(format!(
        "this machine's tools change the kernel's configuration, so objects would not belong to it: {}",
        changed.join(", ")
    )))
}

impl Change {
    fn object(&self) -> String {
        format!("{}.o", self.source.trim_end_matches(".c"))
    }

    fn applied_to(&self, text: &str) -> Result<String, Error> {
        let mut text = text.to_owned();
        for (from, to) in self.edits {
            let count = text.matches(from).count();
            if count != 1 {
                let Self { name, source, .. } = self;
                return Err(Error::Source(format!("the change {name}: {source} has {count} times `{from}`")));
            }
            text = text.replace(from, to);
        }
        Ok(text)
    }
}

/// An unpacked source.
struct Tree {
    folder: PathBuf,
    release: String,
    compiler: String,
}

impl Tree {
    fn make(&self, targets: &[&str]) -> Result<(), Error> {
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        output_of(
            Command::new("make")
                .arg("-C")
                .arg(&self.folder)
                .arg(format!("-j{jobs}"))
                .arg(format!("CC={}", self.compiler))
                .arg(format!("HOSTCC={}", self.compiler))
                // The version of a compiler for Rust is a part of 6.12's configuration; Debian's machine had none.
                .arg("RUSTC=false")
                .arg(format!("KERNELRELEASE={}", self.release))
                // Else a tool for the types for BPF, which no object has, is built, and needs Python.
                .arg("CONFIG_DEBUG_INFO_BTF=")
                // A section for each function and each datum, so that one can be told from another.
                .arg("KCFLAGS=-ffunction-sections -fdata-sections")
                .args(targets),
        )?;
        Ok(())
    }

    /// Keeps an object, with its debug information: structure layouts are compared by it.
    fn keep(&self, object: &str, to: &Path) -> Result<(), Error> {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).at(folder)?;
        }
        let from = self.folder.join(object);
        fs::copy(&from, to).at(&from)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_fits_only_where_each_snippet_is_once() {
        let change = Change { name: "a", source: "b/c.c", edits: &[("one", "1"), ("two", "2")] };
        assert_eq!(change.object(), "b/c.o");
        assert_eq!(change.applied_to("one two").unwrap(), "1 2");
        for (text, count) in [("one", 0), ("one two two", 2)] {
            let error = change.applied_to(text).unwrap_err().to_string();
            assert_eq!(error, format!("the change a: b/c.c has {count} times `two`"));
        }
    }

    #[test]
    fn the_configuration_tells_the_compiler() {
        let config = |text| format!("# Linux\nCONFIG_CC_VERSION_TEXT=\"{text}\"\nCONFIG_A=y\n");
        for text in ["gcc-12 (Debian) 12.2.0", "x86_64-linux-gnu-gcc-12 (Debian) 12.2.0"] {
            assert_eq!(compiler(&config(text)).unwrap(), text.split(' ').next().unwrap());
        }
        for text in ["gcc-13 (Debian) 13.2.0", "clang", ""] {
            assert!(compiler(&config(text)).is_err(), "{text}");
        }
        assert!(compiler("CONFIG_A=y").is_err());
    }

    #[test]
    fn only_what_debian_leaves_out_may_differ() {
        let shipped = "# Linux\nCONFIG_A=y\n# CONFIG_B is not set\n";
        let added = "CONFIG_BUILD_SALT=\"\"\n# CONFIG_MODULE_SIG_ALL is not set\n";
        unchanged(shipped, &format!("{shipped}{added}")).unwrap();
        for used in [shipped.replace("=y", "=m"), shipped.replace("# CONFIG_B is not set\n", "")] {
            assert!(unchanged(shipped, &used).is_err(), "{used}");
        }
    }
}
