//! The object `timings` of a stream, for `stream_options.include_timings`.

use serde_json::{Value, json};

use crate::delivery::DeliverySummary;
use crate::proto::v1;

/// Builds the JSON object `timings`. Its times start with the arrival of the request at the engine. `delivery` has
/// the times per token in the stages that the gateway measures.
pub(super) fn timings_object(timings: &v1::Timings, delivery: DeliverySummary) -> Value {
    let engine = timings.engine.unwrap_or_default();
    json!({
        "queue_ns": timings.queue_ns,
        "prefill_ns": timings.first_token_ns.saturating_sub(timings.queue_ns),
        "first_token_ns": timings.first_token_ns,
        "total_ns": timings.total_ns,
        "resumptions": timings.resumptions,
        "resumption_method": resumption_method(timings.resumption_method()),
        "stages": {
            "engine": stage(engine),
            "frontend": stage(delivery.frontend.into()),
            "socket": stage(delivery.socket.into()),
        },
    })
}

fn resumption_method(method: v1::ResumptionMethod) -> Option<&'static str> {
    match method {
        v1::ResumptionMethod::Unspecified => None,
        v1::ResumptionMethod::Resume => Some("resume"),
        v1::ResumptionMethod::TokenIds => Some("token_ids"),
        v1::ResumptionMethod::Text => Some("text"),
        v1::ResumptionMethod::Replay => Some("replay"),
    }
}

fn stage(timing: v1::StageTiming) -> Value {
    json!({
        "tokens": timing.tokens,
        "mean_ns": timing.mean_ns,
        "longest_ns": timing.longest_ns,
    })
}
