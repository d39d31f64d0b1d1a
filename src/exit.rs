//! Exit codes, and the only function that exits the process.
//!
//! A call into llama.cpp cannot be interrupted, so a device thread may still be computing when the process exits. An
//! ordinary exit runs `atexit` handlers and C++ destructors. They would destroy llama.cpp's global data while the
//! device thread uses it, and crash the process. Therefore `main` never returns, and nothing calls
//! [`std::process::exit`].

/// Exit code of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// The command succeeded, or a server shut down after a complete drain.
    Success,
    /// The command failed, or a second signal stopped a server before its drain was complete.
    Failure,
    /// The command line, an environment variable or the settings file is invalid.
    Usage,
    /// `main` panicked, which is a bug. The code is the same as that of an ordinary Rust panic.
    Panic,
}

impl ExitCode {
    /// Returns the exit status that the parent process sees.
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

/// Exits the process at once, without destructors or `atexit` handlers.
///
/// Buffered output is lost, so flush it first.
pub fn exit_now(code: ExitCode) -> ! {
    signal_hook::low_level::exit(code.number().into())
}
