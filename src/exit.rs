//! The one way out of the process.
//!
//! A device may still compute on its thread when the process ends: llama.cpp's calls cannot be interrupted. An ordinary
//! exit runs `atexit` handlers and C++ destructors, which would pull llama.cpp's global data from under that thread and
//! crash the process. So `main` never returns, and nothing calls [`std::process::exit`].

/// The exit code of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// The command did what it was asked to. A server has drained.
    Success,
    /// The command failed, or a second signal stopped a server before it had drained.
    Failure,
    /// The command line, the environment or the settings file is wrong.
    Usage,
    /// `main` panicked, which is a bug. The code is the one that Rust's own exit would have.
    Panic,
}

impl ExitCode {
    /// The number that the parent process sees.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::Panic => 101,
        }
    }
}

/// Ends the process. No destructor, `atexit` handler or other thread runs any further.
///
/// Whatever is still in a buffer is lost: flush first.
pub fn now(code: ExitCode) -> ! {
    signal_hook::low_level::exit(code.number().into())
}
