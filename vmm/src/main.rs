//! x
fn main() { std::process::exit(1) }
