//! The JSON objects of successful responses, except completions. `openapi.rs` builds the API description from these
//! structs.

use std::collections::BTreeMap;

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::json::to_vec;
use crate::proto::v1;
use crate::runner::DeviceFacts;
use crate::telemetry::WorkerCounts;

/// Tokens of a text or a chat.
#[derive(Serialize, ToSchema)]
pub(super) struct Tokenized {
    /// Number of tokens.
    pub(super) count: usize,
    /// Context length of the model, in tokens.
    pub(super) max_model_len: u32,
    /// Token ids, in order.
    pub(super) tokens: Vec<u32>,
}

/// Text of a list of tokens.
#[derive(Serialize, ToSchema)]
pub(super) struct Detokenized {
    /// Text, with invalid UTF-8 replaced by U+FFFD. Control tokens, such as the end-of-sequence token, have no
    /// text.
    pub(super) prompt: String,
}

/// Facts about a model's tokenizer that a client needs to count tokens as the model does.
#[derive(Serialize, ToSchema)]
pub(super) struct TokenizerInfo {
    /// Beginning-of-sequence token (BOS), which starts every prompt; null if the model has none.
    #[schema(required)]
    bos_token: Option<String>,
    /// End-of-sequence token (EOS), which ends the output; null if the model has none.
    #[schema(required)]
    eos_token: Option<String>,
    /// Context length of the model, in tokens.
    model_max_length: u32,
}

impl From<v1::Model> for TokenizerInfo {
    fn from(model: v1::Model) -> Self {
        let non_empty = |token: String| Some(token).filter(|token| !token.is_empty());
        Self {
            bos_token: non_empty(model.bos_token),
            eos_token: non_empty(model.eos_token),
            model_max_length: model.context_length,
        }
    }
}

/// All models.
#[derive(Serialize, ToSchema)]
pub(super) struct ModelList {
    /// `list`.
    pub(super) object: &'static str,
    /// Models, ordered by name.
    pub(super) data: Vec<Model>,
}

/// A model that the server offers.
#[derive(Serialize, ToSchema)]
pub(super) struct Model {
    /// Name of the model, as used in requests.
    id: String,
    /// `model`.
    object: &'static str,
    /// Time when the server started to serve the model, in seconds since the Unix epoch.
    created: i64,
    /// `tokenway`.
    owned_by: &'static str,
    /// Context length, in tokens.
    max_model_len: u32,
    /// Other names of the model that requests may use.
    aliases: Vec<String>,
}

impl From<v1::Model> for Model {
    fn from(model: v1::Model) -> Self {
        Self {
            id: model.name,
            object: "model",
            created: model.created,
            owned_by: "tokenway",
            max_model_len: model.context_length,
            aliases: model.aliases,
        }
    }
}

/// State of the server.
#[derive(Serialize, ToSchema)]
pub(super) struct Status {
    /// `alive`, `ready`, `healthy` or `draining`.
    status: &'static str,
    /// Number of this engine's workers in each state: `loading`, `ready`, `lost`, `failed` or `given_up`. Only at
    /// `/readyz`.
    #[serde(skip_serializing_if = "Option::is_none")]
    workers: Option<BTreeMap<&'static str, u32>>,
    /// Device of each of this engine's models, if its runner describes it. Only at `/readyz`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    devices: BTreeMap<String, Device>,
}

/// The device that runs a model.
#[derive(Serialize, ToSchema)]
struct Device {
    /// The device in words.
    name: String,
    /// Memory in bytes that each slot of a worker takes. 0 if it is unknown.
    slot_bytes: u64,
}

impl Status {
    pub(super) fn new(status: &'static str) -> Self {
        Self {
            status,
            workers: None,
            devices: BTreeMap::new(),
        }
    }

    pub(super) fn with_devices(self, devices: BTreeMap<String, DeviceFacts>) -> Self {
        let devices = devices.into_iter().map(|(model, device)| {
            let DeviceFacts { name, slot_bytes } = device;
            (model, Device { name, slot_bytes })
        });
        Self {
            devices: devices.collect(),
            ..self
        }
    }

    pub(super) fn with_workers(self, workers: Option<WorkerCounts>) -> Self {
        let by_label = |counts: WorkerCounts| {
            let counts = counts.into_iter();
            counts
                .map(|(state, count)| (state.label(), count))
                .collect()
        };
        Self {
            workers: workers.map(by_label),
            ..self
        }
    }
}

/// Builds a response with status 200 and a JSON body.
pub(super) fn json(object: &impl Serialize) -> Response {
    ([(CONTENT_TYPE, "application/json")], to_vec(object)).into_response()
}
