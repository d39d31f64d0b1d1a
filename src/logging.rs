//! The log of this process: its filter, its format and its timestamps.
//!
//! The log belongs to the process and not to a server, so its format is global. A worker process that an engine
//! starts logs in the engine's format, and the engine adds the worker's lines to its own log.

use std::env::VarError;
use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::output::Output;

mod json;

pub(crate) use json::{JsonFields, JsonLines};

/// Environment variable with the log filter, in the syntax of [`EnvFilter`].
pub(crate) const FILTER_VARIABLE: &str = "TOKENWAY_LOG";

/// Environment variable with the log format.
pub(crate) const FORMAT_VARIABLE: &str = "TOKENWAY_LOG_FORMAT";

/// Name of the field that carries the other fields of a worker process's log line, as a JSON object, when an engine
/// forwards the line.
pub(crate) const WORKER_FIELDS: &str = "worker_fields";

/// Log filter that applies if [`FILTER_VARIABLE`] is not set. llama.cpp logs a lot at `info` while it loads a model.
const DEFAULT_FILTER: &str = "info,llama-cpp-2=warn";

/// Tracing target of the span of a request. No module has this name, so a log filter that selects modules neither
/// enables nor disables the span.
pub(crate) const REQUEST_SPAN_TARGET: &str = "tokenway::request_span";

/// Log format of this process. Unset until the log is started.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// Format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people, in colour on a terminal.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    /// Returns the value of `--log-format` for this format.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Json => "json",
        }
    }
}

/// Setting for the timestamps of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timestamps {
    /// Each line has a timestamp.
    On,
    /// Lines have no timestamp, because an engine adds the lines to its own log, with timestamps.
    Off,
}

/// Error: the log filter in the environment is invalid.
#[derive(Debug, thiserror::Error)]
#[error("{FILTER_VARIABLE}: {0}")]
pub struct InvalidFilter(String);

/// Starts the log of this process. Lines go to `stderr`, filtered by `TOKENWAY_LOG`.
///
/// # Errors
/// The filter is invalid.
///
/// # Panics
/// Panics if the log of this process was started before.
pub fn init(
    stderr: &Output,
    format: LogFormat,
    timestamps: Timestamps,
) -> Result<(), InvalidFilter> {
    let invalid = |error: &dyn std::fmt::Display| InvalidFilter(error.to_string());
    let filter = match std::env::var(FILTER_VARIABLE) {
        Ok(filter) => filter
            .parse::<EnvFilter>()
            .map_err(|error| invalid(&error))?,
        Err(VarError::NotPresent) => EnvFilter::new(DEFAULT_FILTER),
        Err(error) => return Err(invalid(&error)),
    };
    let filter = with_request_span(filter);
    FORMAT.get_or_init(|| format);
    match format {
        LogFormat::Human => start_human(filter, stderr, timestamps),
        LogFormat::Json => start_json(filter, stderr.clone(), timestamps),
    }
    Ok(())
}

/// Adds the spans of requests to a filter, so that every line about a request has the request's id. A filter that
/// disables all lines is returned unchanged.
fn with_request_span(filter: EnvFilter) -> EnvFilter {
    if filter.max_level_hint() == Some(LevelFilter::OFF) {
        return filter;
    }
    let directive = format!("{REQUEST_SPAN_TARGET}=error");
    filter.add_directive(directive.parse().expect("the directive is valid"))
}

/// Starts the log of this process in JSON format.
///
/// # Panics
/// Panics if the log of this process was started before.
pub fn start_json<W>(filter: EnvFilter, writer: W, timestamps: Timestamps)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .log_internal_errors(false)
        .fmt_fields(JsonFields)
        .event_format(JsonLines { timestamps })
        .init();
}

fn start_human(filter: EnvFilter, stderr: &Output, timestamps: Timestamps) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr.clone())
        // `tracing_subscriber` reports internal errors with `eprintln!`, which panics if standard error is closed.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal());
    match timestamps {
        Timestamps::On => log.init(),
        Timestamps::Off => log.without_time().init(),
    }
}

/// Returns the log format of this process. Before the log is started, returns the default format.
#[must_use]
pub fn format() -> LogFormat {
    FORMAT.get().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_disables_all_lines_stays_off() {
        for filter in ["off", "off,tokenway=off"] {
            let filter = with_request_span(EnvFilter::new(filter));
            assert_eq!(filter.max_level_hint(), Some(LevelFilter::OFF));
        }
        let filter = with_request_span(EnvFilter::new("tokenway::text=info"));
        assert!(filter.to_string().contains(REQUEST_SPAN_TARGET), "{filter}");
    }
}
