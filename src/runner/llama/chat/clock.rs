//! The template function `strftime_now(format)`, which formats the local time like Python's
//! `datetime.now().strftime(format)`.

use jiff::Zoned;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use minijinja::{Error, ErrorKind};

/// Returns the current time. Tests use a fixed time.
pub(super) type Clock = fn() -> Zoned;

/// Formats a time like Python's `strftime`. Directives that Python does not know are left unchanged.
///
/// # Errors
/// The time has no value for a directive.
pub(super) fn strftime(now: &Zoned, format: &str) -> Result<String, Error> {
    // The names of days and months are English, and `%c` is as in Python's C locale.
    let config = Config::new().custom(PosixCustom::new()).lenient(true);
    let time = BrokenDownTime::from(now);
    time.to_string_with_config(&config, python_directives(format))
        .map_err(|error| {
            let reason = format!("strftime_now({format:?}): {error}");
            Error::new(ErrorKind::InvalidOperation, reason)
        })
}

/// Rewrites the directives for which the crate `jiff` and Python differ. Python's `now()` has no time zone, so `%z`
/// and `%Z` are empty. `%f` always has six digits. Directives that only `jiff` knows are escaped.
fn python_directives(format: &str) -> String {
    let mut output = String::with_capacity(format.len());
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        output.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let Some(directive) = after.chars().next() else {
            // Python leaves a percent sign at the end unchanged.
            output.push_str("%%");
            return output;
        };
        match directive {
            'z' | 'Z' => {}
            'f' => output.push_str("%6f"),
            'N' | 'Q' | 'q' | '.' | ':' => {
                output.push_str("%%");
                output.push(directive);
            }
            _ => {
                output.push('%');
                output.push(directive);
            }
        }
        rest = &after[directive.len_utf8()..];
    }
    output.push_str(rest);
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format_fixed_time(format: &str) -> String {
        let now: Zoned = "2024-07-04T17:08:09.000123+02:00[Europe/Berlin]"
            .parse()
            .unwrap();
        strftime(&now, format).unwrap()
    }

    #[test]
    fn strftime_matches_python() {
        // Output of Python 3.11 for datetime(2024, 7, 4, 17, 8, 9, 123).
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
            assert_eq!(format_fixed_time(format), python, "{format}");
        }
    }
}
