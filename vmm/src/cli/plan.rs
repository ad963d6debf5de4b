//! Reads plans, and the objects that they name.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use patcher::plan::{MAX_BYTES, ObjectFile, VERSION};
use serde_json::{Value, json};

use crate::cli::args::PlanArgs;
use crate::cli::error::Error;
use crate::host::file;

/// What an object of a patch is called.
const SIDES: [&str; 2] = ["before", "after"];

/// The plan that the command line names, or makes.
pub(super) fn of(args: &PlanArgs) -> Result<Vec<u8>, Error> {
    let PlanArgs { plan, before, after, name, deadline_ms } = args;
    if let Some(path) = plan {
        return read(path);
    }
    let sides = before.as_deref().zip(after.as_deref());
    let (before, after) = sides.ok_or_else(|| nothing("name a plan, or --before and --after"))?;
    let stem = after.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let name = name.clone().or(stem).unwrap_or_default();
    let object = json!({ "before": object(before)?, "after": object(after)? });
    let mut plan = json!({ "version": VERSION, "name": name, "patches": [{ "object": object }] });
    if let Some(deadline_ms) = deadline_ms {
        plan["deadline_ms"] = json!(deadline_ms);
    }
    Ok(plan.to_string().into_bytes())
}

/// Reads a plan from a file, or from standard input if the path is `-`, and the objects that it names.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let from_stdin = path.as_os_str() == "-";
    let name = || if from_stdin { "standard input".to_owned() } else { path.display().to_string() };
    let result = if from_stdin { bounded(io::stdin()) } else { File::open(path).and_then(bounded) };
    let plan = result.map_err(|source| Error::Plan { path: name(), source })?;
    let folder = if from_stdin { Path::new(".") } else { file::folder(path) };
    with_objects(plan, |name| object(&folder.join(name)))
}

/// Reads one byte more than a plan may have, so that a plan that is too long is refused as such,
/// and not cut off.
fn bounded(source: impl Read) -> io::Result<Vec<u8>> {
    let mut plan = Vec::new();
    source.take(MAX_BYTES as u64 + 1).read_to_end(&mut plan)?;
    Ok(plan)
}

/// Puts objects in place of their names. What is no plan, or names none, stays as it is: the monitor says what is
/// wrong with it.
fn with_objects(plan: Vec<u8>, read: impl Fn(&str) -> Result<ObjectFile, Error>) -> Result<Vec<u8>, Error> {
    let Ok(mut value) = serde_json::from_slice::<Value>(&plan) else { return Ok(plan) };
    let mut named = false;
    let patches = value.get_mut("patches").and_then(Value::as_array_mut);
    for patch in patches.into_iter().flatten() {
        for side in SIDES {
            let Some(object) = patch.pointer_mut(&format!("/object/{side}")) else { continue };
            if let Some(name) = object.as_str() {
                *object = json!(read(name)?);
                named = true;
            }
        }
    }
    Ok(if named { value.to_string().into_bytes() } else { plan })
}

fn object(path: &Path) -> Result<ObjectFile, Error> {
    let content = file::read(path, MAX_BYTES as u64);
    content.map(ObjectFile).map_err(|source| Error::Plan { path: path.display().to_string(), source })
}

fn nothing(what: &str) -> Error {
    Error::Plan { path: String::new(), source: io::Error::new(io::ErrorKind::InvalidInput, what) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn objects_are_put_in_place_of_their_names() {
        let read = |name: &str| Ok(ObjectFile(name.as_bytes().to_vec()));
        let with =
            |plan: &str| String::from_utf8(with_objects(plan.into(), read).expect("files")).expect("text");
        let named = r#"{"patches":[{"redirect":"f"},{"object":{"before":"a.o","after":{"base64":"eA=="}}}]}"#;
        let plan: Value = serde_json::from_str(&with(named)).expect("JSON");
        assert_eq!(plan["patches"][1]["object"]["before"], json!({ "base64": "YS5v" }));
        assert_eq!(plan["patches"][1]["object"]["after"], json!({ "base64": "eA==" }));
        for other in ["{", "[]", r#"{ "patches": 1 }"#, r#"{ "patches": [{"object": 1}, 2] }"#] {
            assert_eq!(with(other), other);
        }
    }

    #[test]
    fn a_plan_is_made_of_two_objects() {
        let own = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        let args = |name: Option<&str>| PlanArgs {
            plan: None,
            before: Some(own("Cargo.toml")),
            after: Some(own("Cargo.toml")),
            name: name.map(str::to_owned),
            deadline_ms: Some(7),
        };
        let plan: Value = serde_json::from_slice(&of(&args(None)).expect("files")).expect("JSON");
        assert_eq!((&plan["name"], &plan["deadline_ms"]), (&json!("Cargo"), &json!(7)));
        let object = &plan["patches"][0]["object"];
        assert!(object["before"]["base64"].is_string() && object["before"] == object["after"]);
        let plan: Value = serde_json::from_slice(&of(&args(Some("fix"))).expect("files")).expect("JSON");
        assert_eq!(plan["name"], "fix");
        let missing = PlanArgs { after: Some(PathBuf::from("/nonexistent.o")), ..args(None) };
        assert!(of(&missing).is_err_and(|error| error.to_string().contains("/nonexistent.o")));
    }
}
