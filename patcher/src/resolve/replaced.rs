//! Functions that are replaced as a whole: what else is changed in one would not be executed.

use crate::linux::Kernel;
use crate::plan::refusal::{Pointer, Refusal, Refused};
use crate::plan::{Patch, Plan};
use crate::resolve::resolved_plan::ResolvedPlan;
use crate::site::{OWN, Site};

/// Refuses sites, in functions that this plan or an applied one replaces, whose places were chosen by a plan: not by
/// tables of the kernel's own, such as those of static keys, which must stay right for a revert. A plan may name an applied
/// one in `over`.
#[must_use]
pub fn in_replaced<'a>(
    plan: &Plan,
    resolved: &ResolvedPlan,
    kernel: &Kernel<'_>,
    applied: impl IntoIterator<Item = &'a ResolvedPlan>,
) -> Vec<Refused> {
    let is_chosen = |site: &Site| !kernel.image.tables().is_switched(kernel.linked(site.at));
    let inside = |outer: &ResolvedPlan, site: &Site| {
        outer.old.iter().map(|place| &place.code).find(|code| code.contains(&site.at)).map(|code| code.start)
    };
    let own = |site: &Site| {
        let patch = plan.patches.iter().enumerate().find(|(i, _)| Pointer::patch(*i) == site.pointer);
        matches!(patch, Some((_, Patch::Raw { .. } | Patch::Redirect { .. })))
    };
    let refusal = |site: &Site, other, whose: &str, pointer: &Pointer| {
        Refusal::OverlappingSites { at: site.at, other, whose: whose.to_owned() }.at(pointer.clone())
    };
    let mut refused = Vec::new();
    for site in resolved.sites.iter().filter(|site| own(site)) {
        refused.extend(inside(resolved, site).map(|other| refusal(site, other, OWN, &site.pointer)));
    }
    for other in applied.into_iter().filter(|other| !plan.over.contains(&other.name)) {
        for site in resolved.sites.iter().filter(|site| is_chosen(site)) {
            let replaced = inside(other, site);
            refused.extend(replaced.map(|at| refusal(site, at, &other.name, &site.pointer)));
        }
        for site in other.sites.iter().filter(|site| is_chosen(site)) {
            if let Some(at) = inside(resolved, site) {
                let pointer = resolved.sites.iter().find(|site| inside(resolved, site) == Some(at));
                let pointer = pointer.map_or_else(|| Pointer::new(""), |site| site.pointer.clone());
                let refusal = Refusal::OverlappingSites { at, other: site.at, whose: other.name.clone() };
                refused.push(refusal.at(pointer));
            }
        }
    }
    refused
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gva;
    use crate::image::{KernelImage, Symbols};
    use crate::linux::Modules;
    use crate::plan::Strategy;
    use crate::safety::blockers::Patchers;
    use crate::safety::old_code::Place;

    const F: Gva = Gva(0xffff_ffff_8100_0000);

    /// A plan with a site, of that kind, at an address, which replaces a function if it has one.
    fn resolved(name: &str, at: Gva, replaces: bool) -> ResolvedPlan {
        let place = Place { name: "f".into(), code: F..Gva(F.0 + 0x40), pieces: Vec::new() };
        ResolvedPlan {
            name: name.into(),
            strategy: Strategy::Auto,
            atomic: false,
            deadline_ms: 1,
            preemptible: false,
            unlocked: false,
            outside: Vec::new(),
            tasks_outside: Vec::new(),
            old: if replaces { vec![place] } else { Vec::new() },
            new: Vec::new(),
            brings: Vec::new(),
            counts: Vec::new(),
            left: None,
            sites: vec![Site {
                pointer: Pointer::patch(0),
                at,
                symbol: "f".into(),
                old: vec![0x90],
                new: vec![0xcc],
                old_inside: Vec::new(),
                new_inside: Vec::new(),
                may_fault: false,
            }],
            data: Vec::new(),
            blockers: Vec::new(),
            patchers: Patchers::default(),
            on_guest_write: None,
        }
    }

    #[test]
    fn a_replaced_function_is_not_changed_elsewhere() {
        let symbols = Symbols::new([(F.0, b'T', "f")].into_iter()).expect("few");
        let image = KernelImage::from_parts("6.1".into(), symbols, F);
        let kernel = Kernel { image: &image, slide: 0, modules: &Modules::NONE };
        let plan = |over: &str| {
            let json = format!(
                r#"{{"version":1,"name":"new","over":[{over}],
                    "patches":[{{"at":"f","expect":"90","replace":"cc"}}]}}"#
            );
            Plan::parse(json.as_bytes()).expect("a plan")
        };
        let (inside, outside) = (Gva(F.0 + 9), Gva(F.0 + 0x40));
        let whose = |new: &ResolvedPlan, old: &ResolvedPlan, over: &str| {
            let refused = in_replaced(&plan(over), new, &kernel, [old]);
            let whose = refused.into_iter().map(|refused| match refused.refusal {
                Refusal::OverlappingSites { whose, .. } => whose,
                other => panic!("{other}"),
            });
            whose.collect::<Vec<_>>()
        };
        let plain = |at| resolved("new", at, false);
        assert_eq!(whose(&plain(inside), &resolved("old", F, true), ""), ["old"]);
        assert!(whose(&plain(inside), &resolved("old", F, true), r#""old""#).is_empty(), "it is asked for");
        assert!(whose(&plain(outside), &resolved("old", F, true), "").is_empty());
        assert!(whose(&plain(inside), &resolved("old", outside, false), "").is_empty());
        // The other way round, and in one plan.
        assert_eq!(whose(&resolved("new", outside, true), &resolved("old", inside, false), ""), ["old"]);
        assert_eq!(whose(&resolved("new", inside, true), &resolved("old", outside, false), ""), [OWN]);
    }
}
