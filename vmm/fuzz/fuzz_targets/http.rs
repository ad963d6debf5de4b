//! The control socket: any bytes from a client. `cargo soak fuzz --target http`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmm::api::server::fuzzed::client(input));
