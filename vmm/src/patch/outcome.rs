//! Plans, reports and answers, as the audit log tells them.

use patcher::plan::Strategy;
use patcher::plan::refusal::Refused;
use patcher::resolve::ResolvedPlan;
use patcher::site::Site;

use crate::api::command::Answer;
use crate::api::wire::{PatchState, Report, us};
use crate::audit::chain::{Sum, sha256};
use crate::audit::record::{Change, MOST_NAME, MOST_SITES, Outcome, SiteDigest, short, shorter};
use crate::guest::kernel::GuestKernel;

/// Most codes of refusals that are listed.
const MOST_CODES: usize = 16;

/// What a plan is about to change, by that strategy.
pub(super) fn change_by(kernel: &GuestKernel, plan: &ResolvedPlan, strategy: Strategy) -> Change {
    let (sites, data) = (&plan.sites, &plan.data);
    let image = &kernel.kernel().image;
    let (mut before, mut after) = (Sum::default(), Sum::default());
    let pieces = sites.iter().map(|site| (site.at, &site.old, &site.new));
    for (at, old, new) in pieces.chain(data.iter().map(|datum| (datum.at, &datum.old, &datum.new))) {
        before.add(at.0, old);
        after.add(at.0, new);
    }
    let digest = |site: &Site| SiteDigest {
        at: site.at.to_string(),
        symbol: shorter(&site.symbol, MOST_NAME),
        before: sha256(&site.old),
        after: sha256(&site.new),
    };
    Change {
        release: short(image.release()),
        build_id: image.build_id().map(patcher::insn::hex).map(|id| short(&id)),
        strategy: word(&strategy),
        count: sites.len(),
        data: data.len(),
        before: before.digest(),
        after: after.digest(),
        sites: sites.iter().take(MOST_SITES).map(digest).collect(),
    }
}

/// What a report says.
pub(super) fn of_report(report: &Report) -> Outcome {
    Outcome {
        state: word(&report.state),
        failure: report.failure.as_deref().map(short),
        total_us: Some(report.timing.total_us),
        longest_stall_us: Some(report.timing.longest_stall_us),
        ..Outcome::default()
    }
}

/// What became of a plan.
pub(super) fn of_reported(result: &Result<Report, Vec<Refused>>) -> Outcome {
    match result {
        Ok(report) => of_report(report),
        Err(refused) => of_refused(refused),
    }
}

fn of_refused(refused: &[Refused]) -> Outcome {
    let codes = refused.iter().take(MOST_CODES).map(|refused| refused.refusal.code()).collect();
    Outcome { state: "refused".to_owned(), codes, ..Outcome::default() }
}

/// That something is in a state now, and why.
pub(super) fn of_state(state: PatchState, why: &str) -> Outcome {
    Outcome { state: word(&state), failure: Some(short(why)), ..Outcome::default() }
}

/// That something was done, or why not.
pub(super) fn of_result<T, E: ToString>(result: &Result<T, E>) -> Outcome {
    match result {
        Ok(_) => done(),
        Err(error) => failed(&error.to_string()),
    }
}

fn done() -> Outcome {
    Outcome { state: "done".to_owned(), ..Outcome::default() }
}

fn failed(why: &str) -> Outcome {
    Outcome { state: "failed".to_owned(), failure: Some(short(why)), ..Outcome::default() }
}

/// What an answer says.
pub(super) fn outcome(answer: &Answer) -> Outcome {
    match answer {
        Answer::Report(report) => of_report(report),
        Answer::Refused(refusals) => of_refused(&refusals.refusals),
        Answer::Failed(why) => failed(why),
        Answer::Done(took) => Outcome { total_us: Some(us(*took)), ..done() },
        _ => done(),
    }
}

/// A word of the control socket's JSON.
fn word(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).ok();
    value.as_ref().and_then(|value| value.as_str()).unwrap_or_default().to_owned()
}
