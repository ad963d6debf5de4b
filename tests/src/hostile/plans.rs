//! Plans by each strategy with each policy, beside everything else.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::stage::Stage;
use crate::selfpatching::{NEIGHBOUR, neighbour_is_enabled};
use crate::vm::{Method, Vm};

const STRATEGIES: [&str; 5] = ["breakpoint", "bypass", "hold", "inspect", "store"];
const POLICIES: [Option<&str>; 4] = [None, Some("yield"), Some("rebase"), Some("deny")];

/// Short, as no other request is answered while a program waits for the guest.
const DEADLINE_MS: u32 = 2000;

pub(super) struct Plans {
    patches: [Value; 3],
    rounds: usize,
    outcomes: BTreeMap<String, usize>,
}

impl Plans {
    pub(super) fn new(vm: &Vm, stage: &Stage) -> Result<Self> {
        let patches = [
            json!({ "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid", "keep_fentry": true }),
            json!({ "static_key": NEIGHBOUR, "enable": !neighbour_is_enabled(vm)? }),
            json!({ "at": stage.site, "expect": "90", "replace": "91" }),
        ];
        Ok(Self { patches, rounds: 0, outcomes: BTreeMap::new() })
    }

    pub(super) fn rounds(&self) -> usize {
        self.rounds
    }

    /// Applies a plan and reverts it. Either is done, or refused by a code.
    pub(super) fn round(&mut self, vm: &Vm) -> Result<()> {
        let strategy = STRATEGIES[self.rounds % STRATEGIES.len()];
        let policy = POLICIES[self.rounds / STRATEGIES.len() % POLICIES.len()];
        let patch = &self.patches[self.rounds % self.patches.len()];
        self.rounds += 1;
        let mut plan = json!({ "version": 1, "name": "flip", "strategy": strategy, "deadline_ms": DEADLINE_MS,
            "patches": [patch] });
        if let Some(policy) = policy {
            plan["on_guest_write"] = policy.into();
        }
        if patch.get("at").is_some() {
            plan["over"] = json!([crate::test_function::PATCH]);
        }
        let outcome = |(status, answer): (u16, Value)| -> Result<String> {
            let text = answer["refusals"][0]["code"].as_str().or(answer["state"].as_str());
            text.map(str::to_owned).with_context(|| format!("{plan}: {status} {answer:#}"))
        };
        let applied = outcome(vm.request(Method::POST, "/patches", plan.to_string().as_bytes())?)?;
        self.note(&format!("{strategy} {applied}"));
        ensure!(!matches!(applied.as_str(), "failed" | "held"), "{plan}: {applied}");
        if applied != "applied" {
            return Ok(());
        }
        // A guest that never lets go of its locks is given some time.
        for _ in 0..20 {
            let reverted = outcome(vm.request(Method::POST, "/patches/flip/revert", b"")?)?;
            self.note(&format!("{strategy} {reverted}"));
            if matches!(reverted.as_str(), "reverted" | "superseded" | "not_applied") {
                return Ok(());
            }
        }
        anyhow::bail!("{plan}: it can't be reverted: {:?}", self.outcomes)
    }

    fn note(&mut self, what: &str) {
        *self.outcomes.entry(what.to_owned()).or_default() += 1;
    }

    /// What became of them. Some must have worked by every strategy.
    pub(super) fn summary(&self) -> String {
        format!("{} plans: {:?}", self.rounds, self.outcomes)
    }
}
