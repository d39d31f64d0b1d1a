//! The local date and time that a chat template writes: `strftime_now(format)`, as Python's
//! `datetime.now().strftime(format)` does.

use jiff::Zoned;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use minijinja::{Error, ErrorKind};

/// Tells a template the time. Tests have clocks that stand still.
pub(super) type Clock = fn() -> Zoned;

/// A format of Python for this time. Directives that Python does not know are written as they are.
///
/// # Errors
/// When the time has no value for a directive.
pub(super) fn strftime(now: &Zoned, format: &str) -> Result<String, Error> {
    // Day and month names are the English ones, and `%c` has the form of Python's C locale.
    let config = Config::new().custom(PosixCustom::new()).lenient(true);
    let time = BrokenDownTime::from(now);
    time.to_string_with_config(&config, python_directives(format))
        .map_err(|error| {
            let reason = format!("strftime_now({format:?}): {error}");
            Error::new(ErrorKind::InvalidOperation, reason)
        })
}

/// The directives that jiff and Python read differently, in jiff's terms: Python's `now()` knows no time zone,
/// so `%z` and `%Z` are empty; `%f` is always six digits; and jiff has some of its own.
fn python_directives(format: &str) -> String {
    let mut written = String::with_capacity(format.len());
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        written.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let Some(directive) = after.chars().next() else {
            // Python writes a percent sign at the end as it is.
            written.push_str("%%");
            return written;
        };
        match directive {
            'z' | 'Z' => {}
            'f' => written.push_str("%6f"),
            'N' | 'Q' | 'q' | '.' | ':' => {
                written.push_str("%%");
                written.push(directive);
            }
            _ => {
                written.push('%');
                written.push(directive);
            }
        }
        rest = &after[directive.len_utf8()..];
    }
    written.push_str(rest);
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(format: &str) -> String {
        let now: Zoned = "2024-07-04T17:08:09.000123+02:00[Europe/Berlin]"
            .parse()
            .unwrap();
        strftime(&now, format).unwrap()
    }

    #[test]
    fn strftime_matches_python() {
        // Each was written by Python 3.11 for datetime(2024, 7, 4, 17, 8, 9, 123).
        for (format, python) in [
            ("%d %b %Y", "04 Jul 2024"),
            ("%B %d, %Y", "July 04, 2024"),
            ("%Y-%m-%d", "2024-07-04"),
            ("%A %a %w %u %j", "Thursday Thu 4 4 186"),
            ("%H %I %M %S %f %p", "17 05 08 09 000123 PM"),
            ("%y %U %W %V %G", "24 26 27 27 2024"),
            ("%-d %e %-H", "4  4 17"),
            (
                "%c | %x | %X",
                "Thu Jul  4 17:08:09 2024 | 07/04/24 | 17:08:09",
            ),
            ("%D %F %T %R %h", "07/04/24 2024-07-04 17:08:09 17:08 Jul"),
            ("[%z%Z]", "[]"),
            ("100%% é %! %Q %", "100% é %! %Q %"),
        ] {
            assert_eq!(written(format), python, "{format}");
        }
    }
}
