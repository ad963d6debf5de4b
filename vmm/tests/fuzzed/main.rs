//! The properties that the fuzz targets check, in a short form: the seeds, and some thousand inputs made of
//! them, the same in every run.

mod checks;
mod seeds;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// What is done to a seed: at some place, bytes are removed and others put in.
fn edits() -> impl Strategy<Value = Vec<(prop::sample::Index, usize, Vec<u8>)>> {
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..9),
        prop::collection::vec(prop::sample::select(vec![0, 1, 0x7f, 0x80, 0xff]), 1..9),
    ];
    prop::collection::vec((any::<prop::sample::Index>(), 0..9_usize, bytes), 0..6)
}

fn edited(mut seed: Vec<u8>, edits: Vec<(prop::sample::Index, usize, Vec<u8>)>, same_size: bool) -> Vec<u8> {
    for (at, removed, put) in edits {
        let at = at.index(seed.len() + 1);
        let removed = if same_size { put.len() } else { removed };
        let end = (at + removed).min(seed.len());
        seed.splice(at..end, put);
    }
    seed
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(19), ..ProptestConfig::default() }
}

/// Written below the folder `FUZZ_CORPUS`, if that is set, for the fuzzer.
#[test]
fn seeds_hold() {
    for seed in seeds::boot() {
        assert_eq!(checks::loaded(&seed), Ok(()));
    }
    for (name, check, seeds) in seeds::all() {
        for (number, seed) in seeds.iter().enumerate() {
            check(seed);
            let Some(folder) = std::env::var_os("FUZZ_CORPUS") else { continue };
            let folder = std::path::PathBuf::from(folder).join(name);
            std::fs::create_dir_all(&folder).expect("a folder");
            std::fs::write(folder.join(number.to_string()), seed).expect("written");
        }
    }
}

proptest! {
    #![proptest_config(config(4000))]

    #[test]
    fn page_tables(edits in edits(), same_size in any::<bool>(), which in any::<prop::sample::Index>()) {
        checks::paging(&edited(which.get(&seeds::paging()).clone(), edits, same_size));
    }

    #[test]
    fn ports(edits in edits(), same_size in any::<bool>(), which in any::<prop::sample::Index>()) {
        checks::ports(&edited(which.get(&seeds::ports()).clone(), edits, same_size));
    }

    #[test]
    fn boot_headers(edits in edits(), same_size in any::<bool>(), place in prop::option::of(0x1f0..0x270_usize)) {
        let mut seed = seeds::boot().remove(0);
        if let (Some(place), Some((_, _, put))) = (place, edits.first()) {
            let put = &put[..put.len().min(8)];
            seed[place..place + put.len()].copy_from_slice(put);
            checks::boot(&seed);
        } else {
            checks::boot(&edited(seed, edits, same_size));
        }
    }
}
