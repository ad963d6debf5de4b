//! Attacks from ring 0, by the module `hostile` (`guest/hostile`).

use std::fs;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::stage::Stage;

const FILE: &str = "/sys/module/hostile/parameters/attack";
/// The module saw the processor behave wrongly (`EBADE`).
const WRONG: i32 = 52;

/// Has the module do one of its attacks.
pub(super) fn run(stage: &Arc<Stage>, attack: &str) -> io::Result<()> {
    while stage.goes_on() {
        match fs::write(FILE, attack) {
            Err(error) if error.raw_os_error() == Some(WRONG) => {
                stage.expect(false, || format!("{attack} in ring 0"));
            }
            result => result?,
        }
        stage.done();
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
