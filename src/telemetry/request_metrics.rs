//! Histograms and token counters of completions, by model, API and outcome. Each request is recorded once, when it
//! ends.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use super::histogram::{Buckets, DURATION_BOUNDS, TOKEN_GAP_BOUNDS, WAIT_TIME_BOUNDS};
use super::token_gaps::InterTokenTimes;

const FIRST_TOKEN: &str = "tokenway_time_to_first_token_seconds";
const INTER_TOKEN_LATENCY: &str = "tokenway_inter_token_latency_seconds";
const REQUEST_DURATION: &str = "tokenway_request_duration_seconds";
const QUEUE_TIME: &str = "tokenway_queue_seconds";
const TOKENS: &str = "tokenway_tokens_total";

/// Number of tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenUsage {
    /// Tokens of all prompts.
    pub prompt: u64,
    /// Tokens of all choices.
    pub completion: u64,
}

/// Metrics of all completions that have ended.
#[derive(Default)]
pub(super) struct RequestMetrics {
    series: Mutex<BTreeMap<Labels, CompletionMetrics>>,
}

/// Label values of a completion. Each comes from a closed set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Labels {
    /// Name of a served model, `unknown` or `none`.
    pub(super) model: Arc<str>,
    pub(super) api: &'static str,
    /// `ok` or an error code.
    pub(super) outcome: &'static str,
}

/// Times and token counts of one completion. A time is `None` if the completion did not get that far.
pub(super) struct CompletionObservation {
    pub(super) duration_ns: u64,
    pub(super) queue_ns: Option<u64>,
    pub(super) first_token_ns: Option<u64>,
    pub(super) usage: TokenUsage,
}

struct CompletionMetrics {
    first_token: Buckets,
    gap: Buckets,
    duration: Buckets,
    queue: Buckets,
    usage: TokenUsage,
}

impl RequestMetrics {
    /// Records a completion that has ended.
    pub(super) fn record(
        &self,
        labels: Labels,
        observation: &CompletionObservation,
        gaps: &InterTokenTimes,
    ) {
        let mut all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let series = all.entry(labels).or_default();
        series.duration.add(observation.duration_ns, 1);
        if let Some(queue_ns) = observation.queue_ns {
            series.queue.add(queue_ns, 1);
        }
        if let Some(first_token_ns) = observation.first_token_ns {
            series.first_token.add(first_token_ns, 1);
        }
        series.gap.merge(gaps.buckets());
        series.usage.prompt += observation.usage.prompt;
        series.usage.completion += observation.usage.completion;
    }

    /// Appends the metrics in Prometheus's text format.
    pub(super) fn write(&self, out: &mut String) -> fmt::Result {
        let all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let all: Vec<_> = all
            .iter()
            .map(|(labels, series)| (labels.to_string(), series))
            .collect();
        let mut histogram = |name: &str, help: &str, of: fn(&CompletionMetrics) -> &Buckets| {
            writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram")?;
            for (labels, series) in &all {
                of(series).write(name, labels, out)?;
            }
            Ok(())
        };
        histogram(
            FIRST_TOKEN,
            "Time from the arrival of a completion request until its first token was written.",
            |series| &series.first_token,
        )?;
        histogram(
            INTER_TOKEN_LATENCY,
            "Time between two tokens of a choice when they were written. Tokens written together share the time \
             equally.",
            |series| &series.gap,
        )?;
        histogram(
            REQUEST_DURATION,
            "Time from the arrival of a completion request until its end.",
            |series| &series.duration,
        )?;
        histogram(
            QUEUE_TIME,
            "Time from the arrival of a completion request until a worker started it.",
            |series| &series.queue,
        )?;
        writeln!(
            out,
            "# HELP {TOKENS} Tokens of completion requests that have ended, by kind.\n# TYPE {TOKENS} counter"
        )?;
        for (labels, CompletionMetrics { usage, .. }) in &all {
            let (prompt, completion) = (usage.prompt, usage.completion);
            writeln!(out, "{TOKENS}{{kind=\"prompt\",{labels}}} {prompt}")?;
            writeln!(out, "{TOKENS}{{kind=\"completion\",{labels}}} {completion}")?;
        }
        Ok(())
    }
}

/// Labels in Prometheus's text format.
impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("model=\"")?;
        for character in self.model.chars() {
            match character {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                other => f.write_char(other)?,
            }
        }
        write!(f, "\",api=\"{}\",outcome=\"{}\"", self.api, self.outcome)
    }
}

impl Default for CompletionMetrics {
    fn default() -> Self {
        Self {
            first_token: Buckets::new(&WAIT_TIME_BOUNDS),
            gap: Buckets::new(&TOKEN_GAP_BOUNDS),
            duration: Buckets::new(&DURATION_BOUNDS),
            queue: Buckets::new(&WAIT_TIME_BOUNDS),
            usage: TokenUsage::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completion_that_never_started_counts_only_its_duration() {
        let metrics = RequestMetrics::default();
        let labels = Labels {
            model: "a\"b".into(),
            api: "http",
            outcome: "queue_full",
        };
        let observation = CompletionObservation {
            duration_ns: 2_000_000_000,
            queue_ns: None,
            first_token_ns: None,
            usage: TokenUsage::default(),
        };
        metrics.record(labels, &observation, &InterTokenTimes::default());
        let mut text = String::new();
        metrics
            .write(&mut text)
            .expect("writing to a `String` cannot fail");
        let labels = "model=\"a\\\"b\",api=\"http\",outcome=\"queue_full\"";
        for line in [
            format!("{REQUEST_DURATION}_sum{{{labels}}} 2.000000000"),
            format!("{REQUEST_DURATION}_bucket{{{labels},le=\"1.5\"}} 0"),
            format!("{REQUEST_DURATION}_bucket{{{labels},le=\"2\"}} 1"),
            format!("{QUEUE_TIME}_count{{{labels}}} 0"),
            format!("{FIRST_TOKEN}_count{{{labels}}} 0"),
            format!("{TOKENS}{{kind=\"prompt\",{labels}}} 0"),
        ] {
            assert!(text.lines().any(|it| it == line), "{line}\n{text}");
        }
    }
}
