//! Watches an OpenAI-compatible engine through its list of models, which costs it no tokens.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::client::EngineClient;
use super::flavor::Flavor;
use crate::backoff::Backoff;
use crate::cluster::health::{Availability, HEALTH_CHECK_BACKOFF, HealthPublisher};
use crate::proto::v1;

/// Time between two checks of an engine that is up.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum wait for the list of models.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of the list of models, in bytes.
const MAX_LIST_BYTES: usize = 1024 * 1024;

/// What an engine reports about itself.
#[derive(Clone, Debug, Default)]
pub(super) struct EngineFacts {
    pub(super) flavor: Flavor,
    pub(super) models: Vec<v1::Model>,
}

/// The answer to `GET /models`, in the forms of OpenAI, vLLM and llama.cpp.
#[derive(Deserialize)]
struct ModelList {
    data: Vec<ListedModel>,
}

#[derive(Deserialize)]
struct ListedModel {
    id: String,
    #[serde(default)]
    created: Option<i64>,
    #[serde(default)]
    owned_by: Option<String>,
    /// Context length (vLLM).
    #[serde(default)]
    max_model_len: Option<u32>,
    /// Facts about the model (llama.cpp).
    #[serde(default)]
    meta: Option<LlamaCppMeta>,
}

#[derive(Deserialize)]
struct LlamaCppMeta {
    /// Context length of a slot.
    #[serde(default)]
    n_ctx: Option<u32>,
    /// Context length with which the model was trained. Older servers report only this.
    #[serde(default)]
    n_ctx_train: Option<u32>,
}

/// The task that keeps the health and the facts of an engine up to date.
pub(super) struct ModelWatch {
    pub(super) client: EngineClient,
    pub(super) health: HealthPublisher,
    /// Kind of the server, if the settings name it.
    pub(super) known: Option<Flavor>,
    pub(super) facts: watch::Sender<Flavor>,
}

impl ModelWatch {
    /// Checks the engine until the task is cancelled.
    pub(super) async fn run(self) {
        let mut backoff = Backoff::new(HEALTH_CHECK_BACKOFF);
        // Asked for again whenever the engine comes back.
        let mut has_own_api = None;
        loop {
            match self.read_facts().await {
                Some(mut facts) => {
                    backoff.reset();
                    if facts.flavor == Flavor::LlamaCpp {
                        if has_own_api.is_none() {
                            has_own_api = self.has_llama_cpp_api().await;
                        }
                        if has_own_api == Some(false) {
                            facts.flavor = Flavor::LlamaCppV1;
                        }
                    }
                    self.facts.send_if_modified(|flavor| {
                        std::mem::replace(flavor, facts.flavor) != facts.flavor
                    });
                    self.health.publish(Availability::Up, Some(facts.models));
                    sleep(CHECK_INTERVAL).await;
                }
                None => {
                    has_own_api = None;
                    self.health.publish(Availability::Down, None);
                    sleep(backoff.next_delay()).await;
                }
            }
        }
    }

    /// Returns true if llama.cpp's own API can be reached, and false if a proxy hides it. `None` if the answer does not
    /// tell: a server that loads its model answers 503.
    async fn has_llama_cpp_api(&self) -> Option<bool> {
        let request = Request::get(self.client.root_target("/props")).body(Full::new(Bytes::new()));
        let answer = timeout(CHECK_TIMEOUT, self.client.send(request.ok()?)).await;
        match answer.ok()?.ok()?.status() {
            StatusCode::NOT_FOUND => Some(false),
            status if status.is_success() => Some(true),
            _ => None,
        }
    }

    async fn read_facts(&self) -> Option<EngineFacts> {
        let request = Request::get(self.client.target("/models")).body(Full::new(Bytes::new()));
        let asking = async {
            let response = self.client.send(request.ok()?).await.ok()?;
            if !response.status().is_success() {
                return None;
            }
            let body = Limited::new(response.into_body(), MAX_LIST_BYTES);
            facts_from(&body.collect().await.ok()?.to_bytes(), self.known)
        };
        timeout(CHECK_TIMEOUT, asking).await.ok()?
    }
}

/// Reads a list of models. Returns `None` if it is not one.
pub(super) fn facts_from(body: &[u8], known: Option<Flavor>) -> Option<EngineFacts> {
    let list: ModelList = serde_json::from_slice(body).ok()?;
    let owner = list
        .data
        .first()
        .and_then(|model| model.owned_by.as_deref());
    let flavor = known.unwrap_or_else(|| Flavor::from_owner(owner.unwrap_or_default()));
    let unsupported = flavor.unsupported().iter();
    let unsupported: Vec<_> = unsupported
        .map(|parameter| parameter.name().to_owned())
        .collect();
    let models = list.data.into_iter().map(|model| {
        let meta = model.meta.as_ref();
        let from_meta = meta.and_then(|meta| meta.n_ctx.or(meta.n_ctx_train));
        v1::Model {
            context_length: model.max_model_len.or(from_meta).unwrap_or(0),
            created: model.created.unwrap_or(0),
            runner: flavor.name().to_owned(),
            unsupported: unsupported.clone(),
            name: model.id,
            ..v1::Model::default()
        }
    });
    Some(EngineFacts {
        flavor,
        models: models.collect(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn facts(models: &serde_json::Value) -> EngineFacts {
        let list = json!({"object": "list", "data": models});
        facts_from(list.to_string().as_bytes(), None).expect("a list of models")
    }

    #[test]
    fn the_list_of_models_tells_the_kind_of_server_and_the_context_length() {
        let vllm =
            facts(&json!([{"id": "a", "owned_by": "vllm", "created": 3, "max_model_len": 64}]));
        assert_eq!(vllm.flavor, Flavor::Vllm);
        assert_eq!(
            (&*vllm.models[0].name, vllm.models[0].context_length),
            ("a", 64)
        );
        let frontend = facts(&json!([{"id": "a", "owned_by": "vllm-frontend-rs"}]));
        assert_eq!(frontend.flavor, Flavor::Vllm);
        let llama = json!([{"id": "b", "owned_by": "llamacpp", "meta": {"n_ctx_train": 2048}}]);
        let llama = facts(&llama);
        assert_eq!(
            (llama.flavor, llama.models[0].context_length),
            (Flavor::LlamaCpp, 2048)
        );
        let other = facts(&json!([{"id": "c", "owned_by": "me"}, {"id": "d"}]));
        assert_eq!((other.flavor, other.models.len()), (Flavor::Other, 2));
    }

    #[test]
    fn the_settings_override_the_kind_of_server() {
        let list = br#"{"data":[{"id":"a","owned_by":"llamacpp"}]}"#;
        let facts = facts_from(list, Some(Flavor::Vllm)).expect("a list of models");
        assert_eq!(
            (facts.flavor, &*facts.models[0].runner),
            (Flavor::Vllm, "vllm")
        );
    }

    #[test]
    fn an_answer_that_is_no_list_of_models_is_not_one() {
        for body in ["", "{}", "[]", "{\"data\":[{}]}"] {
            assert!(facts_from(body.as_bytes(), None).is_none(), "{body}");
        }
    }
}
