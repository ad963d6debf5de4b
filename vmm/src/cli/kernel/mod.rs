//! `vmm kernel`: what a kernel image says of itself, without a guest.

use std::path::Path;

use patcher::image::{Contents, KernelImage, StaticCall, StaticKey, unpack};
use patcher::object::relocatable::MAX_OBJECT;
use patcher::object::{Layouts, Object, compare, match_image};
use serde_json::json;

use crate::boot::kernel::MAX_FILE;
use crate::cli::args::KernelCommand;
use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;
use crate::cli::kernel::info::Info;
use crate::cli::output;
use crate::cli::render::page::{Page, plain};
use crate::host::file;

mod comparing;
mod info;
mod matching;
mod rows;
mod tables;

/// Runs one of the commands. A reader that has seen enough, such as `head`, is no failure.
pub(super) fn run(command: &KernelCommand) -> Result<ExitStatus, Error> {
    match print(command) {
        Err(error) if !error.is_broken_pipe() => Err(error),
        Err(_) => Ok(ExitStatus::Done),
        Ok(status) => Ok(status),
    }
}

fn print(command: &KernelCommand) -> Result<ExitStatus, Error> {
    match command {
        KernelCommand::Info { file } => {
            let info = Info::new(&read(&file.kernel)?);
            if file.json { output::print_json(&info)? } else { output::print(&info.page())? }
        }
        KernelCommand::Symbols { file, pattern } => {
            let image = read(&file.kernel)?;
            let chosen = image.symbols().iter().filter(|(.., name)| matches(pattern.as_deref(), name));
            // As a plan writes it: `name,N` if the name is not unique.
            let form = |at, name: &str| image.symbols().unique_name(name, at).unwrap_or_else(|| name.into());
            if file.json {
                let line = |(at, kind, name)| json!({ "at": at, "kind": char::from(kind), "name": name, "plan": form(at, name) });
                output::print_json(&chosen.map(line).collect::<Vec<_>>())?;
            } else {
                let mut page = Page::default();
                for (at, kind, name) in chosen {
                    page.line([plain(format_args!("{:016x} {} {}", at.0, char::from(kind), form(at, name)))]);
                }
                output::print(&page)?;
            }
        }
        KernelCommand::Tables { file, table } => {
            rows::print(file.json, tables::rows(&read(&file.kernel)?, *table))?;
        }
        KernelCommand::Keys { file, pattern } => {
            let keys = read(&file.kernel)?.static_keys().into_iter();
            let keys = keys.filter(|key| matches(pattern.as_deref(), &key.name));
            let row = |StaticKey { name, at, initially, entries, .. }: StaticKey| {
                vec![
                    ("name", json!(name)),
                    ("at", json!(at)),
                    ("initially", json!(initially)),
                    ("entries", json!(entries)),
                ]
            };
            rows::print(file.json, Some(keys.map(row).collect()))?;
        }
        KernelCommand::Calls { file, pattern } => {
            let calls = read(&file.kernel)?.static_calls().into_iter();
            let calls = calls.filter(|call| matches(pattern.as_deref(), &call.name));
            let row = |StaticCall { name, key, trampoline, initially, sites, .. }: StaticCall| {
                vec![
                    ("name", json!(name)),
                    ("key", json!(key)),
                    ("trampoline", json!(trampoline)),
                    ("initially", json!(initially)),
                    ("sites", json!(sites)),
                ]
            };
            rows::print(file.json, Some(calls.map(row).collect()))?;
        }
        KernelCommand::Features { file, pattern } => {
            let features = read(&file.kernel)?.tables().feature_counts().into_iter();
            let features = features.filter(|(name, _)| matches(pattern.as_deref(), name));
            let row =
                |(name, alternatives)| vec![("name", json!(name)), ("alternatives", json!(alternatives))];
            rows::print(file.json, Some(features.map(row).collect()))?;
        }
        KernelCommand::Match { file, object } => {
            let report = matched(&file.kernel, object)?;
            if file.json {
                output::print_json(&report)?
            } else {
                output::print(&report.page())?
            }
            return Ok(if report.belongs() { ExitStatus::Done } else { ExitStatus::Refused });
        }
        KernelCommand::Compare { before, after, json } => {
            let report = compared(before, after)?;
            if *json {
                output::print_json(&report)?
            } else {
                output::print(&report.page())?
            }
            return Ok(if report.is_replaceable() { ExitStatus::Done } else { ExitStatus::Refused });
        }
    }
    Ok(ExitStatus::Done)
}

/// What differs between two objects.
fn compared(before: &Path, after: &Path) -> Result<comparing::Report, Error> {
    let (first, second) = (bytes(before, MAX_OBJECT)?, bytes(after, MAX_OBJECT)?);
    let layouts = Layouts::read(&first).and_then(|one| Ok((one, Layouts::read(&second)?)));
    let broken = |path: &Path| {
        let path = path.to_owned();
        |source| Error::Object { path, source }
    };
    let first = Object::parse(&first).map_err(broken(before))?;
    let second = Object::parse(&second).map_err(broken(after))?;
    Ok(comparing::Report::new(&compare(&first, &second).map_err(broken(after))?, layouts))
}

/// What an object has to do with a kernel.
fn matched(kernel: &Path, object: &Path) -> Result<matching::Report, Error> {
    let of_kernel = |source| Error::Kernel { path: kernel.to_owned(), source };
    let of_object = |source| Error::Object { path: object.to_owned(), source };
    let file = bytes(kernel, MAX_FILE)?;
    let vmlinux = unpack(&file).map_err(of_kernel)?;
    let image = KernelImage::parse(&vmlinux).map_err(of_kernel)?;
    let contents = Contents::parse(&vmlinux).map_err(of_kernel)?;
    let code = bytes(object, MAX_OBJECT)?;
    let code = Object::parse(&code).map_err(of_object)?;
    let found = match_image(&code, &image, &contents).map_err(of_object)?;
    Ok(matching::Report::new(image.release(), &found))
}

fn bytes(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    file::read(path, limit).map_err(|source| Error::KernelFile { path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<KernelImage, Error> {
    let file = bytes(path, MAX_FILE)?;
    KernelImage::parse(&file).map_err(|source| Error::Kernel { path: path.to_owned(), source })
}

fn matches(pattern: Option<&str>, name: &str) -> bool {
    pattern.is_none_or(|pattern| name.contains(pattern))
}
