//! Metrics of the engines behind a gateway. The label `engine` is the name of an engine in the gateway's settings.

use metrics::{Key, Label, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::PrometheusRecorder;

use super::{RECORDER_METADATA, Telemetry};
use crate::error::ErrorKind;

const TRIES: &str = "tokenway_engine_tries_total";
const FAILED_TRY_TOKENS: &str = "tokenway_engine_failed_try_tokens_total";
const BREAKER_CHANGES: &str = "tokenway_engine_breaker_changes_total";
const PLACEMENTS: &str = "tokenway_engine_placements_total";
const WARM_PROMPT_TOKENS: &str = "tokenway_engine_warm_prompt_tokens_total";
const STREAM_RESUMPTIONS: &str = "tokenway_stream_resumptions_total";

/// Value of the label `prefix`: compares the chosen engine's known prefix of the prompt with those of the other engines
/// of the same tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrefixPlacement {
    /// No engine of the tier was known to have a prefix.
    Cold,
    /// The chosen engine was known to have a prefix, and no other engine of the tier a longer one.
    Warm,
    /// Another engine of the tier was known to have a longer prefix, but was not chosen.
    WarmerElsewhere,
}

impl PrefixPlacement {
    fn label(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::WarmerElsewhere => "warmer_elsewhere",
        }
    }
}

impl Telemetry {
    /// Counts a try of a request on an engine: `Ok` when its first token arrived, or the error.
    pub(crate) fn count_engine_try(&self, engine: &str, outcome: Result<(), ErrorKind>) {
        let outcome = outcome.map_or_else(|kind| kind.mapping().code, |()| "ok");
        self.count_for_engine(TRIES, engine, ("outcome", outcome), 1);
    }

    /// Counts the tokens that clients received from a stream of an engine that broke.
    pub(crate) fn count_failed_try_tokens(&self, engine: &str, tokens: u32) {
        let key = Key::from_parts(FAILED_TRY_TOKENS, vec![engine_label(engine)]);
        let counter = self.recorder.register_counter(&key, &RECORDER_METADATA);
        counter.increment(tokens.into());
    }

    /// Counts a change of the state of an engine's breaker. `state` is the new state.
    pub(crate) fn count_breaker_change(&self, engine: &str, state: &'static str) {
        self.count_for_engine(BREAKER_CHANGES, engine, ("state", state), 1);
    }

    /// Counts a stream that an engine has accepted, and the prompt tokens that the engine is expected to reuse.
    pub(crate) fn count_placement(&self, engine: &str, prefix: PrefixPlacement, warm_tokens: u64) {
        self.count_for_engine(PLACEMENTS, engine, ("prefix", prefix.label()), 1);
        let key = Key::from_parts(WARM_PROMPT_TOKENS, vec![engine_label(engine)]);
        let counter = self.recorder.register_counter(&key, &RECORDER_METADATA);
        counter.increment(warm_tokens);
    }

    /// Counts a stream that goes on after its engine's stream broke.
    pub(crate) fn count_stream_resumption(&self, method: &'static str) {
        self.labelled_counter(STREAM_RESUMPTIONS, &[("method", method)])
            .increment(1);
    }

    fn count_for_engine(
        &self,
        name: &'static str,
        engine: &str,
        (label, value): (&'static str, &'static str),
        count: u64,
    ) {
        let labels = vec![engine_label(engine), Label::from_static_parts(label, value)];
        let key = Key::from_parts(name, labels);
        let counter = self.recorder.register_counter(&key, &RECORDER_METADATA);
        counter.increment(count);
    }
}

fn engine_label(engine: &str) -> Label {
    Label::new("engine", SharedString::from(engine.to_owned()))
}

/// Describes the metrics of engines.
pub(super) fn describe(recorder: &PrometheusRecorder) {
    for (name, text) in [
        (
            TRIES,
            "Tries of requests on engines behind the gateway, by engine and outcome: 'ok' (the first token arrived) or \
             an error code.",
        ),
        (
            FAILED_TRY_TOKENS,
            "Tokens that clients received from streams that then broke, by engine.",
        ),
        (
            BREAKER_CHANGES,
            "Changes of the circuit breakers of engines, by engine and new state: 'closed', 'open' or 'half_open'.",
        ),
        (
            PLACEMENTS,
            "Streams that an engine accepted, by engine and prefix: 'warm' (no equally preferred engine is known to have \
             a longer prefix of the prompt), 'warmer_elsewhere' (another one has a longer prefix, but \
             was not chosen) or 'cold' (none has a prefix).",
        ),
        (
            WARM_PROMPT_TOKENS,
            "Prompt tokens that the gateway expected an engine to reuse, by engine. Estimated from the length of the \
             text.",
        ),
        (
            STREAM_RESUMPTIONS,
            "Streams that went on after the stream of their engine broke, by method: 'restart' (before the first \
             token), 'resume', 'token_ids', 'text' or 'replay'.",
        ),
    ] {
        recorder.describe_counter(name.into(), Some(Unit::Count), SharedString::from(text));
    }
}
