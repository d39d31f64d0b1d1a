//! The settings of the log.

use clap::{ArgAction, Args};
use serde::{Deserialize, Serialize};

use super::values::ParsedText;
use crate::logging::LogFormat;

/// The settings of a server's log.
#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Log")]
pub(super) struct LogSettings {
    /// Write a line to the log when a request ends, with its id, route, status, tokens and times
    #[arg(long, env = "TOKENWAY_ACCESS_LOG", num_args = 0..=1, default_missing_value = "true",
        default_value = "true", action = ArgAction::Set)]
    access_log: bool,
    #[command(flatten)]
    #[serde(flatten)]
    format: FormatSettings,
}

/// The setting `--log-format`, which servers and workers share.
#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Log")]
pub(super) struct FormatSettings {
    /// Format of the log: `human`, or `json` with one object per line
    #[arg(
        long,
        env = "TOKENWAY_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "human"
    )]
    log_format: ParsedText<LogFormat>,
}

impl FormatSettings {
    pub(super) fn format(&self) -> LogFormat {
        self.log_format.value
    }
}

impl LogSettings {
    /// Returns true if the server writes an access log.
    pub(super) fn access_log(&self) -> bool {
        self.access_log
    }
}
