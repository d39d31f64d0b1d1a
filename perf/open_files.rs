//! How many files a process may have open at once; a socket is one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Why so many files cannot be open.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OpenFilesError {
    /// Nobody but the system's administrator can allow it.
    #[error(
        "this run needs {needed} open files in one process, and the hard limit RLIMIT_NOFILE allows \
         {hard} (`ulimit -Hn`): raise it, or leave out the loads of thousands of streams"
    )]
    HardLimit {
        /// How many are needed.
        needed: u64,
        /// How many there may be.
        hard: u64,
    },
    /// The system says why.
    #[error("the limit RLIMIT_NOFILE of open files cannot be raised: {0}")]
    Refused(#[from] rustix::io::Errno),
}

/// Sees to it that this process, and each that it starts from now on, may have so many files open.
///
/// # Errors
/// When the system does not allow it.
pub(crate) fn allow(files: u32) -> Result<(), OpenFilesError> {
    match raised(&getrlimit(Resource::Nofile), files)? {
        Some(limit) => Ok(setrlimit(Resource::Nofile, limit)?),
        None => Ok(()),
    }
}

/// The limit that allows so many, if this one does not. No limit at all is `None` within it.
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
    fn a_limit_is_raised_to_the_hard_one_only_where_it_is_too_low() {
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
