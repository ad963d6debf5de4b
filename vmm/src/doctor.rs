//! stub
/// stub
pub fn run(_json: bool) -> u8 { 1 }
