//! Wall-clock time as text.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A time as RFC 3339 has it, in UTC, to the microsecond.
pub(super) fn rfc3339(time: SystemTime) -> String {
    const DAY: u64 = 24 * 3600;
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (seconds, micros) = (since.as_secs(), since.subsec_micros());
    let (year, month, day) = date(seconds / DAY);
    let (hour, minute, second) = (seconds % DAY / 3600, seconds % 3600 / 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// The date so many days after 1970-01-01, in the Gregorian calendar: in years that begin in March the leap
/// day is the last, and the lengths of months repeat every five (153 days).
fn date(days: u64) -> (u64, u64, u64) {
    /// Days of 400, 100 and 4 years, of one year, and from 0000-03-01 to 1970-01-01.
    const D400: u64 = 146_097;
    const D100: u64 = 36_524;
    const D4: u64 = 1461;
    const D1: u64 = 365;
    const EPOCH: u64 = 719_468;
    let days = days + EPOCH;
    let (era, of_era) = (days / D400, days % D400);
    // The last day of four years, of a century and of an era would begin another year.
    let year = (of_era - of_era / (D4 - 1) + of_era / D100 - of_era / (D400 - 1)) / D1;
    let of_year = of_era - (D1 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000007Z"),
            (951_782_399, "2000-02-28T23:59:59.000007Z"),
            (951_782_400, "2000-02-29T00:00:00.000007Z"),
            (951_868_800, "2000-03-01T00:00:00.000007Z"),
            (1_795_995_017, "2026-11-29T23:30:17.000007Z"),
            (1_798_761_599, "2026-12-31T23:59:59.000007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000007Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::new(seconds, 7000)), expected);
        }
    }
}
