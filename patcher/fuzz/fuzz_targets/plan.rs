//! Plans: any bytes are read or refused. `cargo fuzz run -s none plan`, in `patcher/`.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/properties/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|json: &[u8]| checks::plan(json));
