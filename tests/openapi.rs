//! The HTTP API behaves as `GET /openapi.json` describes it. schemathesis generates the requests.

mod support;

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use support::http::get;
use support::program::python;
use support::{Setup, full_speed};
use tokenway::request::{ChatMessage, TokenId};
use tokenway::runner::llm_test::TestRunnerLoader;
use tokenway::runner::{
    BosPolicy, LoadError, LoadedModel, Loader, Model, ModelError, ModelFacts, TokenBytes,
};

/// Context length of the model. It is short, so that no generated request runs long.
const CONTEXT_LENGTH: u32 = 64;

/// Loader of a test runner with a short context.
struct ShortContextLoader(TestRunnerLoader);

struct ShortContextModel {
    model: Arc<dyn Model>,
    facts: ModelFacts,
}

impl Loader for ShortContextLoader {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let LoadedModel { model, runner } = self.0.load(slots, progress)?;
        let facts = ModelFacts {
            context_length: CONTEXT_LENGTH,
            ..model.facts().clone()
        };
        Ok(LoadedModel {
            model: Arc::new(ShortContextModel { model, facts }),
            runner,
        })
    }

    fn name(&self) -> &'static str {
        self.0.name()
    }
}

impl Model for ShortContextModel {
    fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    fn tokenize(&self, text: &str, bos: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        self.model.tokenize(text, bos)
    }

    fn token_bytes(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        self.model.token_bytes(ids)
    }

    fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        self.model.render_chat(messages)
    }
}

#[tokio::test]
async fn every_response_matches_the_openapi_description() {
    let loader = ShortContextLoader(TestRunnerLoader::new(full_speed()));
    let server = Setup::runner("llm_test", Arc::new(loader), 64)
        .start()
        .await;
    let program = python("tests/clients/openapi.py").arg(server.http_url());
    program.run().await.expect_success();
}

#[tokio::test]
async fn the_compatibility_page_names_every_field_and_route() {
    let server = Setup::test_runner(full_speed()).start().await;
    let (_, body) = get("/openapi.json").fetch(&server).await;
    let description = body.json();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/compatibility.md");
    let page = std::fs::read_to_string(path).expect("the page exists");
    let names = |object: &Value| -> Vec<String> {
        let object = object.as_object().expect("an object");
        object.keys().cloned().collect()
    };
    let schemas = &description["components"]["schemas"];
    for body in [
        "CompletionsBody",
        "ChatBody",
        "StreamOptions",
        "DetokenizeBody",
    ] {
        for field in names(&schemas[body]["properties"]) {
            assert!(page.contains(&format!("`{field}`")), "{body}: {field}");
        }
    }
    for route in names(&description["paths"]) {
        let is_named = ["GET", "POST"]
            .iter()
            .any(|it| page.contains(&format!("`{it} {route}`")));
        assert!(is_named, "{route}");
    }
}
