//! The limit of open files of a process, of which each socket is one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Reason why the limit cannot be raised.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OpenFilesError {
    #[error(
        "this run needs {needed} open files in one process, and the hard limit RLIMIT_NOFILE allows \
         {hard} (`ulimit -Hn`): raise it, or leave out the loads of thousands of streams"
    )]
    HardLimit { needed: u64, hard: u64 },
    #[error("cannot raise the limit RLIMIT_NOFILE of open files: {0}")]
    Refused(#[from] rustix::io::Errno),
}

/// Allows this process, and each that it starts from now on, to open this many files.
pub(crate) fn allow(files: u32) -> Result<(), OpenFilesError> {
    match raised(&getrlimit(Resource::Nofile), files)? {
        Some(limit) => Ok(setrlimit(Resource::Nofile, limit)?),
        None => Ok(()),
    }
}

/// Returns the limit to set, unless this one is high enough. `None` within a limit is unlimited.
fn raised(limit: &Rlimit, files: u32) -> Result<Option<Rlimit>, OpenFilesError> {
    let needed = u64::from(files);
    if limit.current.is_none_or(|current| current >= needed) {
        return Ok(None);
    }
    if let Some(hard) = limit.maximum
        && hard < needed
    {
        return Err(OpenFilesError::HardLimit { needed, hard });
    }
    Ok(Some(Rlimit {
        current: limit.maximum.or(Some(needed)),
        maximum: limit.maximum,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(current: Option<u64>, maximum: Option<u64>) -> Rlimit {
        Rlimit { current, maximum }
    }

    #[test]
    fn a_limit_that_is_too_low_is_raised_to_the_hard_one() {
        for (before, after) in [
            (limit(Some(100), Some(100)), None),
            (limit(None, None), None),
            (
                limit(Some(99), Some(200)),
                Some(limit(Some(200), Some(200))),
            ),
            (limit(Some(99), None), Some(limit(Some(100), None))),
        ] {
            assert_eq!(raised(&before, 100), Ok(after), "{before:?}");
        }
    }

    #[test]
    fn a_hard_limit_that_is_too_low_is_named() {
        let refused = raised(&limit(Some(50), Some(99)), 100).unwrap_err();
        let text = refused.to_string();
        for part in ["100", "99", "RLIMIT_NOFILE", "ulimit -Hn"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
