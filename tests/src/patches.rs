//! Plans given to a VM's control socket, and what becomes of them.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::vm::{Method, Vm};

/// The plan that makes `getppid` return what `getpid` does. Without a name of a strategy the
/// monitor chooses.
#[must_use]
pub fn redirect_plan(name: &str, strategy: Option<&str>) -> Value {
    json!({
        "version": 1,
        "name": name,
        "deadline_ms": 60_000,
        "strategy": strategy.unwrap_or("auto"),
        "patches": [{ "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid" }]
    })
}

/// xor edx, edx; mov esi, 1: what `getppid` asks for the namespace and the kind of its parent's number.
const ARGUMENTS: &str = "31d2be01000000";

impl Vm {
    /// A plan that changes two instructions of `getppid` to two that do the same, or with `first_only` the first
    /// one. Where they are depends on the kernel.
    ///
    /// # Errors
    /// When they are nowhere.
    pub fn arguments_plan(&self, name: &str, strategy: &str, first_only: bool) -> Result<Value> {
        /// The function is not longer.
        const END: usize = 0x60;
        let digits = if first_only { 4 } else { ARGUMENTS.len() };
        let replacement = ARGUMENTS.replace("31d2", "29d2");
        for offset in 0..END {
            let plan = json!({ "version": 1, "name": name, "deadline_ms": 60_000, "strategy": strategy, "patches": [
                { "at": format!("__x64_sys_getppid+{offset:#x}"), "expect": ARGUMENTS[..digits],
                    "replace": replacement[..digits] }] });
            let (status, _) = self.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
            if status == 200 {
                return Ok(plan);
            }
        }
        anyhow::bail!("{ARGUMENTS} is nowhere in getppid")
    }

    /// Applies a plan; fails unless it was applied. Returns the report.
    ///
    /// # Errors
    /// With the answer.
    pub fn apply(&self, plan: &Value) -> Result<Value> {
        let (status, answer) = self.request(Method::POST, "/patches", plan.to_string().as_bytes())?;
        ensure!(status == 200 && answer["state"] == "applied", "{status}: {answer:#}");
        Ok(answer)
    }

    /// Reverts a patch; fails unless it was reverted. Returns the report.
    ///
    /// # Errors
    /// With the answer.
    pub fn revert(&self, name: &str) -> Result<Value> {
        let (status, answer) = self.request(Method::POST, &format!("/patches/{name}/revert"), b"")?;
        ensure!(status == 200 && answer["state"] == "reverted", "{status}: {answer:#}");
        Ok(answer)
    }

    /// Where a function of the kernel begins.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn address(&self, function: &str) -> Result<u64> {
        // A redirect leaves the mark of an indirect branch's target alone.
        let site = self.redirected(function, false)?;
        let at = site["at"].as_str().and_then(|text| u64::from_str_radix(&text[2..], 16).ok());
        Ok(at.with_context(|| format!("{site:#}"))? - offset(&site)?)
    }

    /// How far behind a function's start the place for the tracer ends: 0 if it has none, as `siphash_4u64` of 6.1.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn behind_the_tracer(&self, function: &str) -> Result<u64> {
        offset(&self.redirected(function, true)?)
    }

    /// The site that a redirect of a function would change.
    fn redirected(&self, function: &str, keep_fentry: bool) -> Result<Value> {
        let plan = json!({ "version": 1, "name": "probe", "patches": [
            { "redirect": function, "to": function, "keep_fentry": keep_fentry }] });
        let (_, answer) = self.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
        answer["sites"].get(0).cloned().with_context(|| format!("{answer:#}"))
    }

    /// Checks a plan that is refused with this code; returns the message.
    ///
    /// # Errors
    /// When it is not refused, or for another reason.
    pub fn refused(&self, code: &str, plan: &Value) -> Result<String> {
        let (_, answer) = self.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
        let refusal = &answer["refusals"][0];
        ensure!(refusal["code"] == code, "{answer:#}");
        refusal["message"].as_str().map(str::to_owned).context("a refusal without a message")
    }
}

/// How far behind the start of its function a site is.
fn offset(site: &Value) -> Result<u64> {
    match site["symbol"].as_str().with_context(|| format!("{site:#}"))?.rsplit_once("+0x") {
        Some((_, offset)) => Ok(u64::from_str_radix(offset, 16)?),
        None => Ok(0),
    }
}
