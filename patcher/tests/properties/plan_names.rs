//! What a plan names: the kernel it was made for, and one of several symbols of a name.

use patcher::addr::Gva;
use patcher::image::KernelImage;
use patcher::image::symbols::{Found, Symbols};
use patcher::linux::{Kernel, Modules};
use patcher::plan::Plan;
use patcher::resolve::{RunningGuest, resolve};
use proptest::prelude::*;

use crate::{checks, miniature};

/// A plan for another release or build is refused, with a reason for each, before anything else is looked at.
#[test]
fn a_plan_for_another_kernel_is_refused() {
    let miniature = KernelImage::parse(&miniature::vmlinux()).expect("a kernel");
    let symbols = Symbols::new([(miniature::BASE, b'T', "_text")].into_iter()).expect("one");
    let nameless = KernelImage::from_parts("6.1.0-miniature".to_owned(), symbols, Gva(miniature::BASE));
    let refused = |image: &KernelImage, kernel: &str| {
        let plan = format!(
            r#"{{"version":1,"name":"x","kernel":{kernel},"patches":[{{"redirect":"no_such","to":"no_such"}}]}}"#
        );
        let plan = Plan::parse(plan.as_bytes()).expect("it is well-formed");
        let memory = [0xa5, 0];
        let text = checks::Anywhere::new(&memory).expect("memory");
        let kernel = Kernel { image, slide: 0, modules: &Modules::NONE };
        let refused = resolve(&plan, RunningGuest { kernel, text: &text, vcpus: 1 }, []);
        let refused = refused.expect_err("it is refused").into_iter();
        refused.map(|refused| refused.to_string()).collect::<Vec<_>>()
    };
    for right in [r#"{"build_id":"01020304"}"#, r#"{"release":"6.1.0-miniature","build_id":"01020304"}"#] {
        let all = refused(&miniature, right);
        assert!(!all.is_empty() && all.iter().all(|one| !one.contains("kernel_mismatch")), "{all:?}");
    }
    let other = "/kernel/build_id: the plan is for kernel build 01020305, but the guest runs build 01020304 \
                 [kernel_mismatch]";
    assert_eq!(refused(&miniature, r#"{"build_id":"01020305"}"#), [other]);
    let both = refused(&miniature, r#"{"release":"6.2","build_id":"01020305"}"#);
    assert_eq!((both.len(), both[1].as_str()), (2, other));
    assert_eq!(
        refused(&nameless, r#"{"build_id":"01020304"}"#),
        [
            "/kernel/build_id: the plan is for kernel build 01020304, but the guest runs one without a build ID \
          [kernel_mismatch]"
        ]
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// However symbols share names and addresses: each can be written in a form that leads to it and to
    /// nothing else.
    #[test]
    fn every_symbol_has_a_form_that_leads_to_it(
        symbols in prop::collection::vec((0..40_u64, 0..6_usize), 1..60),
        beyond in 1..100_usize,
    ) {
        const NAMES: [&str; 6] = ["a", "b", "a.0", "a.cold", "b.1", "c"];
        const SLIDE: u64 = 0x20_0000;
        let first = (miniature::BASE, b'T', "_text");
        let all = symbols.iter().map(|(at, name)| (miniature::BASE + 16 * at, b't', NAMES[*name]));
        let table = Symbols::new(std::iter::once(first).chain(all)).expect("few");
        let image = KernelImage::from_parts("x".to_owned(), table, Gva(miniature::BASE));
        let kernel = Kernel { image: &image, slide: SLIDE, modules: &Modules::NONE };
        for (at, _, name) in image.symbols().iter() {
            let form = image.symbols().unique_name(name, at).expect("it has one");
            let live = Gva(at.0 + SLIDE);
            prop_assert_eq!(kernel.address(&form), Ok(live), "{}", form);
            let form = image.symbols().from_first(at).expect("it has one");
            prop_assert_eq!(kernel.address(&form), Ok(live), "{}", form);
            let described = kernel.identify(Gva(live.0 + 3)).expect("it has one");
            prop_assert_eq!(kernel.address(&described), Ok(Gva(live.0 + 3)), "{}", described);
            let places = image.symbols().iter().filter(|(.., other)| *other == name).count();
            let none = format!("{name},{}", places + beyond);
            prop_assert_eq!(image.symbols().find(&none), Found::None, "{}", none);
        }
    }
}
