//! The JSON of a plan: what may be in it, and what is checked before it becomes a [`Plan`].

use serde::Deserialize;

use crate::plan::pointer::Pointer;
use crate::plan::refusal::{Refusal, Refused};
use crate::plan::write_policy::Policy;
use crate::plan::{
    DEFAULT_DEADLINE_MS, MAX_BUILD_ID, MAX_BYTES, MAX_DEADLINE_MS, MAX_NAME, MAX_OUTSIDE, MAX_PATCHES,
    MAX_SITE, ObjectFile, Patch, Plan, Spinlocks, Strategy, VERSION,
};

// Every field of `RawPatch` is optional: a missing field is then reported by the kind of patch that
// needs it, and an unknown field by its name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlan {
    version: u32,
    name: String,
    kernel: Option<RawKernel>,
    deadline_ms: Option<u64>,
    #[serde(default)]
    strategy: Strategy,
    #[serde(default)]
    atomic: bool,
    #[serde(default)]
    quiesced: RawQuiesced,
    #[serde(default)]
    over: Vec<String>,
    on_guest_write: Option<Policy>,
    #[serde(default)]
    pending: bool,
    patches: Vec<RawPatch>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKernel {
    release: Option<String>,
    build_id: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawQuiesced {
    preemptible: bool,
    outside: Vec<String>,
    tasks_outside: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawPatch {
    at: Option<String>,
    expect: Option<String>,
    replace: Option<String>,
    redirect: Option<String>,
    to: Option<String>,
    static_key: Option<String>,
    static_call: Option<String>,
    target: Option<String>,
    alternatives: Option<String>,
    enable: Option<bool>,
    smp_locks: Option<bool>,
    force: Option<bool>,
    paravirt: Option<String>,
    keep_fentry: Option<bool>,
    object: Option<RawObject>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawObject {
    before: ObjectFile,
    after: ObjectFile,
}

impl Plan {
    /// Reads a plan from JSON.
    ///
    /// ```
    /// use patcher::plan::{Patch, Plan, Strategy};
    ///
    /// let plan = Plan::parse(
    ///     br#"{ "version": 1, "name": "demo", "patches": [{ "redirect": "f", "to": "g" }] }"#,
    /// )
    /// .expect("well-formed");
    /// assert_eq!(plan.strategy, Strategy::Auto);
    /// assert!(matches!(&plan.patches[0], Patch::Redirect { from, to, .. } if from == "f" && to == "g"));
    ///
    /// // Every mistake is reported, each with its code and its place.
    /// let refused = Plan::parse(br#"{ "version": 2, "name": "", "patches": [] }"#).unwrap_err();
    /// let places: Vec<_> = refused.iter().map(|refused| refused.pointer.to_string()).collect();
    /// assert_eq!(places, ["/version", "/name", "/patches"]);
    /// assert_eq!(refused[0].refusal.code(), "plan_malformed");
    /// ```
    ///
    /// # Errors
    /// Every mistake, each with its place as a JSON pointer (RFC 6901).
    pub fn parse(json: &[u8]) -> Result<Self, Vec<Refused>> {
        if json.len() > MAX_BYTES {
            return Err(vec![Refusal::PlanTooLarge { bytes: json.len(), limit: MAX_BYTES }.at_root()]);
        }
        if let Ok(raw) = serde_json::from_slice::<RawPlan>(json) {
            return raw.check();
        }
        // Tracking the path doubles the time, so only a plan that failed is read with it.
        let mut reader = serde_json::Deserializer::from_slice(json);
        let raw: RawPlan = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let at = Pointer::from_path(error.path());
            vec![Refusal::PlanMalformed { what: error.into_inner().to_string() }.at(at)]
        })?;
        reader.end().map_err(|error| {
            vec![Refusal::PlanMalformed { what: format!("after the plan: {error}") }.at_root()]
        })?;
        raw.check()
    }
}

impl RawPlan {
    fn check(self) -> Result<Plan, Vec<Refused>> {
        let mut wrong = Vec::new();
        let mut refuse = |pointer: &str, what: String| {
            wrong.push(Refusal::PlanMalformed { what }.at(Pointer::new(pointer)));
        };
        if self.version != VERSION {
            refuse("/version", format!("version {} is unknown, {VERSION} is the only one", self.version));
        }
        if self.name.is_empty() || self.name.len() > MAX_NAME || !self.name.chars().all(is_name_char) {
            refuse("/name", format!("a name is 1 to {MAX_NAME} letters, digits, '-', '_' or '.'"));
        }
        let deadline_ms = self.deadline_ms.unwrap_or(DEFAULT_DEADLINE_MS);
        if !(1..=MAX_DEADLINE_MS).contains(&deadline_ms) {
            refuse("/deadline_ms", format!("a deadline is 1 to {MAX_DEADLINE_MS} milliseconds"));
        }
        if self.patches.is_empty() || self.patches.len() > MAX_PATCHES {
            refuse(
                "/patches",
                format!("a plan has 1 to {MAX_PATCHES} patches, this one {}", self.patches.len()),
            );
        }
        let one_by_one = matches!(self.strategy, Strategy::Store | Strategy::Breakpoint | Strategy::Bypass);
        if self.atomic && one_by_one && self.patches.len() > 1 {
            refuse(
                "/strategy",
                "it changes sites one after another; an atomic plan of several needs hold or inspect".into(),
            );
        }
        let RawQuiesced { preemptible, outside, tasks_outside } = self.quiesced;
        for (functions, field) in [(&outside, "outside"), (&tasks_outside, "tasks_outside")] {
            if functions.len() > MAX_OUTSIDE {
                refuse(&format!("/quiesced/{field}"), format!("{MAX_OUTSIDE} functions are the limit"));
            }
        }
        let conditional = preemptible || !outside.is_empty() || !tasks_outside.is_empty();
        if conditional && !matches!(self.strategy, Strategy::Auto | Strategy::Inspect) {
            refuse(
                "/strategy",
                "\"quiesced\" needs inspect: no other strategy looks where the vCPUs are".into(),
            );
        }
        let is_empty = |kernel: &RawKernel| kernel.release.is_none() && kernel.build_id.is_none();
        if self.kernel.as_ref().is_some_and(is_empty) {
            refuse("/kernel", "a kernel is named by \"release\", \"build_id\" or both".into());
        }
        let kernel = self.kernel.unwrap_or_default();
        if let Some(Err(what)) = kernel.build_id.as_deref().map(build_id) {
            refuse("/kernel/build_id", what);
        }
        let mut patches = Vec::with_capacity(self.patches.len());
        for (i, patch) in self.patches.into_iter().enumerate() {
            match patch.check() {
                Ok(patch) => patches.push(patch),
                Err((field, what)) => refuse(&format!("/patches/{i}{field}"), what),
            }
        }
        let plan = Plan {
            name: self.name,
            release: kernel.release,
            build_id: kernel.build_id.and_then(|digits| build_id(&digits).ok()),
            deadline_ms,
            strategy: self.strategy,
            atomic: self.atomic,
            preemptible,
            outside,
            tasks_outside,
            over: self.over,
            on_guest_write: self.on_guest_write,
            pending: self.pending,
            patches,
        };
        let brings = plan.patches.iter().position(|patch| matches!(patch, Patch::Object { .. }));
        if let Some(i) = brings.filter(|_| plan.pending) {
            let what =
                "an object concerns no module, so nothing is to be waited for; make it a plan of its own";
            wrong.push(Refusal::PlanMalformed { what: what.into() }.at(Pointer::patch(i)));
        }
        if plan.pending && wrong.is_empty() && plan.modules().is_empty() {
            let what = "it names no module that it could wait for: a module's symbol is module:symbol";
            wrong.push(Refusal::PlanMalformed { what: what.into() }.at(Pointer::new("/pending")));
        }
        if wrong.is_empty() { Ok(plan) } else { Err(wrong) }
    }
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// The kinds of patches: the field that selects each, and the fields that go with it.
const KINDS: &str = "a patch has \"at\" with \"expect\" and \"replace\", \"redirect\" with \"to\", \
    \"static_key\" with \"enable\", \"static_call\" with \"target\", \"alternatives\" with \"enable\", \
    \"smp_locks\", \"paravirt\" with \"to\", or \"object\" with \"before\" and \"after\"";

impl RawPatch {
    fn check(mut self) -> Result<Patch, (&'static str, String)> {
        let patch = self.take()?;
        match self.left_over() {
            None => Ok(patch),
            Some(field) => Err((field, format!("this does not belong here: {KINDS}"))),
        }
    }

    /// Takes the fields of one kind of patch.
    fn take(&mut self) -> Result<Patch, (&'static str, String)> {
        let missing = || ("", KINDS.to_owned());
        if let Some(at) = self.at.take() {
            let (expect, replace) = self.expect.take().zip(self.replace.take()).ok_or_else(missing)?;
            let expect = bytes(&expect).map_err(|what| ("/expect", what))?;
            let replace = bytes(&replace).map_err(|what| ("/replace", what))?;
            return Ok(Patch::Raw { at, expect, replace });
        }
        if let Some(from) = self.redirect.take() {
            let to = self.to.take().ok_or_else(missing)?;
            return Ok(Patch::Redirect { from, to, keep_fentry: self.keep_fentry.take().unwrap_or(false) });
        }
        if let Some(static_key) = self.static_key.take() {
            return Ok(Patch::StaticKey { static_key, enable: self.enable.take().ok_or_else(missing)? });
        }
        if let Some(static_call) = self.static_call.take() {
            return Ok(Patch::StaticCall { static_call, target: self.target.take().ok_or_else(missing)? });
        }
        if let Some(alternatives) = self.alternatives.take() {
            return Ok(Patch::Alternatives { alternatives, enable: self.enable.take().ok_or_else(missing)? });
        }
        if let Some(smp_locks) = self.smp_locks.take() {
            return Ok(Patch::SmpLocks { smp_locks, force: self.force.take().unwrap_or(false) });
        }
        if let Some(group) = self.paravirt.take() {
            if group != "spinlocks" {
                return Err(("/paravirt", format!("{group:?} is unknown; \"spinlocks\" is the only group")));
            }
            let to = match self.to.take().ok_or_else(missing)?.as_str() {
                "native" => Spinlocks::Native,
                "kvm" => Spinlocks::Kvm,
                other => return Err(("/to", format!("{other:?} is neither \"native\" nor \"kvm\""))),
            };
            return Ok(Patch::Paravirt { to });
        }
        if let Some(RawObject { before, after }) = self.object.take() {
            return Ok(Patch::Object { before, after });
        }
        Err(missing())
    }

    /// The first field that no kind has taken.
    fn left_over(&self) -> Option<&'static str> {
        let fields = [
            ("/expect", self.expect.is_some()),
            ("/replace", self.replace.is_some()),
            ("/redirect", self.redirect.is_some()),
            ("/to", self.to.is_some()),
            ("/static_key", self.static_key.is_some()),
            ("/static_call", self.static_call.is_some()),
            ("/target", self.target.is_some()),
            ("/alternatives", self.alternatives.is_some()),
            ("/enable", self.enable.is_some()),
            ("/smp_locks", self.smp_locks.is_some()),
            ("/force", self.force.is_some()),
            ("/paravirt", self.paravirt.is_some()),
            ("/keep_fentry", self.keep_fentry.is_some()),
            ("/object", self.object.is_some()),
        ];
        fields.into_iter().find(|(_, there)| *there).map(|(field, _)| field)
    }
}

/// The bytes of a build ID in hex digits, as `vmm kernel info` prints it.
fn build_id(digits: &str) -> Result<Vec<u8>, String> {
    let bytes = hex::decode(digits).ok().filter(|bytes| (1..=MAX_BUILD_ID).contains(&bytes.len()));
    bytes.ok_or_else(|| format!("a build ID is 1 to {MAX_BUILD_ID} pairs of hex digits"))
}

/// The bytes of a site in hex digits; ASCII white space is ignored.
fn bytes(text: &str) -> Result<Vec<u8>, String> {
    let digits = text.replace(|c: char| c.is_ascii_whitespace(), "");
    let bytes = hex::decode(digits).map_err(|_| format!("{text:?} is not pairs of hex digits"))?;
    if (1..=MAX_SITE).contains(&bytes.len()) {
        Ok(bytes)
    } else {
        Err(format!("a site has 1 to {MAX_SITE} bytes, not {}", bytes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> Vec<(String, &'static str)> {
        Plan::parse(json.as_bytes())
            .expect_err("it should be refused")
            .iter()
            .map(|refused| (refused.pointer.to_string(), refused.refusal.code()))
            .collect()
    }

    #[test]
    fn bytes_are_pairs_of_hex_digits() {
        assert_eq!(bytes("0f 1F\n44"), Ok(vec![0x0f, 0x1f, 0x44]));
        for bad in ["0", "0g", "0x90", "é0", ""] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_full_plan_is_read() {
        let plan = Plan::parse(
            br#"{"version":1,"name":"a","kernel":{"release":"6.1"},"deadline_ms":5,"strategy":"hold","atomic":true,
                "patches":[{"redirect":"f","to":"g"},{"at":"f+0x14","expect":"0f1f","replace":"90"}]}"#,
        )
        .expect("a plan");
        assert_eq!(plan.release.as_deref(), Some("6.1"));
        assert_eq!(plan.patches.len(), 2);
        assert_eq!(plan.deadline_ms, 5);
    }

    #[test]
    fn a_kernel_is_named_by_release_build_id_or_both() {
        let kernel = |json: &str| {
            let plan = format!(
                r#"{{"version":1,"name":"a","kernel":{json},"patches":[{{"redirect":"f","to":"g"}}]}}"#
            );
            Plan::parse(plan.as_bytes()).map(|plan| (plan.release, plan.build_id))
        };
        assert_eq!(kernel(r#"{"build_id":"01fE"}"#), Ok((None, Some(vec![1, 0xfe]))));
        let both = kernel(r#"{"release":"6.1","build_id":"00"}"#);
        assert_eq!(both, Ok((Some("6.1".to_owned()), Some(vec![0]))));
        let refused = kernel("{}").expect_err("it says nothing");
        assert_eq!((refused.len(), refused[0].pointer.as_str()), (1, "/kernel"));
        let long = "00".repeat(MAX_BUILD_ID + 1);
        for bad in ["", "0", "0x01", "zz", "01 fe", long.as_str()] {
            let refused = kernel(&format!(r#"{{"build_id":"{bad}"}}"#)).expect_err("it is refused");
            assert_eq!(refused.len(), 1, "{bad}");
            assert_eq!(
                (refused[0].pointer.as_str(), refused[0].refusal.code()),
                ("/kernel/build_id", "plan_malformed"),
                "{bad}"
            );
        }
    }

    #[test]
    fn every_kind_of_patch_is_read() {
        let patch = |json: &str| {
            let plan = format!(r#"{{"version":1,"name":"a","patches":[{json}]}}"#);
            Plan::parse(plan.as_bytes()).expect("a plan").patches.remove(0)
        };
        assert_eq!(
            patch(r#"{"static_key":"k+0x8","enable":false}"#),
            Patch::StaticKey { static_key: "k+0x8".into(), enable: false }
        );
        assert_eq!(
            patch(r#"{"static_call":"c","target":"none"}"#),
            Patch::StaticCall { static_call: "c".into(), target: "none".into() }
        );
        assert_eq!(
            patch(r#"{"alternatives":"smap","enable":true}"#),
            Patch::Alternatives { alternatives: "smap".into(), enable: true }
        );
        assert_eq!(patch(r#"{"smp_locks":true}"#), Patch::SmpLocks { smp_locks: true, force: false });
        assert_eq!(patch(r#"{"paravirt":"spinlocks","to":"kvm"}"#), Patch::Paravirt { to: Spinlocks::Kvm });
        let (before, after) = (ObjectFile(b"a.o".to_vec()), ObjectFile(vec![0xff; 2]));
        assert_eq!(
            patch(r#"{"object":{"before":{"base64":"YS5v"},"after":{"base64":"//8="}}}"#),
            Patch::Object { before, after }
        );
    }

    #[test]
    fn a_pending_plan_names_what_it_waits_for() {
        let plan = Plan::parse(
            br#"{"version":1,"name":"a","pending":true,"quiesced":{"outside":["c:f"]},"patches":[
                {"redirect":"kvm-intel:f","to":"g"},{"static_call":"x","target":"b:h"},{"redirect":"f","to":"g"},
                {"static_key":"a:k","enable":true},{"at":"0x10","expect":"0f1f","replace":"90"}]}"#,
        )
        .expect("a plan");
        assert!(plan.pending);
        assert_eq!(plan.modules().into_iter().collect::<Vec<_>>(), ["a", "b", "c", "kvm_intel"]);
        let first = plan.patches.iter().map(|patch| patch.modules().pop_first()).collect::<Vec<_>>();
        let names = [Some("kvm_intel"), Some("b"), None, Some("a"), None];
        assert_eq!(first, names.map(|name| name.map(str::to_owned)));
        let object = r#"{"object":{"before":{"base64":""},"after":{"base64":""}}}"#;
        let brings = format!(
            r#"{{"version":1,"name":"a","pending":true,"patches":[{{"redirect":"m:f","to":"g"}},{object}]}}"#
        );
        assert_eq!(refused(&brings), [("/patches/1".to_owned(), "plan_malformed")]);
        let none = r#"{"version":1,"name":"a","pending":true,"patches":[{"redirect":"f","to":"g"}]}"#;
        assert_eq!(refused(none), [("/pending".to_owned(), "plan_malformed")]);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let malformed = |at: &str| vec![(at.to_owned(), "plan_malformed")];
        assert_eq!(refused("{"), malformed(""));
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"at":"f","bogus":1}]}"#),
            malformed("/patches/0/bogus")
        );
        assert_eq!(refused(r#"{"version":1,"name":"a","patches":[{"at":7}]}"#), malformed("/patches/0/at"));
        assert_eq!(refused(r#"{"version":1,"name":"a","patches":[{"at":"f"}]}"#), malformed("/patches/0"));
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"at":"f","expect":"9","replace":"90"}]}"#),
            malformed("/patches/0/expect")
        );
        assert_eq!(
            refused(r#"{"version":2,"name":"","deadline_ms":0,"patches":[]}"#),
            [
                ("/version", "plan_malformed"),
                ("/name", "plan_malformed"),
                ("/deadline_ms", "plan_malformed"),
                ("/patches", "plan_malformed")
            ]
            .map(|(at, code)| (at.to_owned(), code))
        );
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"redirect":"f","to":"g"}]} x"#),
            malformed("")
        );
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"static_key":"k","enable":true,"to":"g"}]}"#),
            malformed("/patches/0/to")
        );
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"paravirt":"spinlocks","to":"xen"}]}"#),
            malformed("/patches/0/to")
        );
        for (bad, at) in [
            (r#""a.o""#, "/patches/0/object/before"),
            (r#"{"base64":"YS5"}"#, "/patches/0/object/before"),
            (r#"{"base64":"YS5v","x":1}"#, "/patches/0/object/before"),
        ] {
            let object = format!(r#"{{"object":{{"before":{bad},"after":{{"base64":""}}}}}}"#);
            let plan = format!(r#"{{"version":1,"name":"a","patches":[{object}]}}"#);
            assert_eq!(refused(&plan), malformed(at), "{bad}");
        }
        assert_eq!(refused(&" ".repeat(MAX_BYTES + 1)), [(String::new(), "plan_too_large")]);
    }
}
