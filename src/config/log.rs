//! The settings of the log.

use clap::{ArgAction, Args};
use serde::{Deserialize, Serialize};

/// The settings of a server's log.
#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Log")]
pub(super) struct LogSettings {
    /// Write a line to the log when a request ends, with its id, route, status, tokens and times
    #[arg(long, env = "TOKENWAY_ACCESS_LOG", num_args = 0..=1, default_missing_value = "true",
        default_value = "true", action = ArgAction::Set)]
    access_log: bool,
}

impl LogSettings {
    /// Returns true if the server writes an access log.
    pub(super) fn access_log(&self) -> bool {
        self.access_log
    }
}
