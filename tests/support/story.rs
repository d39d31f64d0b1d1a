//! A gateway in front of engines that tell one story, and the story as clients of both APIs get it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tokenway::cluster::RoutePolicy;
use tokenway::proto::v1;

use super::http::{BodyEnd, completion, texts};
use super::openai_engine::{OpenAiEngine, Received, STORY, Step, story};
use super::{Setup, TestServer, grpc, route_with_fallbacks};

/// The story as the client gets it in one piece.
pub fn story_text() -> String {
    STORY.concat()
}

/// A policy with short limits, so that a silent engine is left soon.
pub fn impatient() -> RoutePolicy {
    RoutePolicy {
        first_token_timeout: Duration::from_millis(300),
        stall_timeout: Duration::from_millis(300),
        ..RoutePolicy::default()
    }
}

/// Starts a gateway that uses the first engine, and the second one as its fallback.
pub async fn gateway(engines: &[&OpenAiEngine], policy: RoutePolicy) -> TestServer {
    let urls: Vec<_> = engines.iter().map(|engine| engine.url()).collect();
    let route = route_with_fallbacks(engines.len() - 1, policy);
    let gateway = Setup::route(&urls, route).start().await;
    gateway.ready().await.expect("an engine is up");
    gateway
}

/// What a client gets of a completion, in any API.
#[derive(Debug, PartialEq)]
pub struct Seen {
    pub text: String,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub resumptions: u64,
}

/// Returns what a client gets of the whole story: its usage is that of an undisturbed run.
pub fn whole_story(resumptions: u64) -> Seen {
    Seen {
        text: story_text(),
        prompt_tokens: 3,
        completion_tokens: 8,
        resumptions,
    }
}

/// One of the APIs that clients use.
#[derive(Clone, Copy, Debug)]
pub enum Api {
    Http,
    Grpc,
}

pub const APIS: [Api; 2] = [Api::Http, Api::Grpc];

impl Api {
    /// Asks for the story as a stream, which must be whole.
    pub async fn story(self, gateway: &TestServer) -> Seen {
        match self {
            Self::Http => over_http(gateway).await,
            Self::Grpc => over_grpc(gateway).await,
        }
    }

    /// Sends a request that must fail. Returns its error code, and the delay after which to try again, in seconds.
    pub async fn error(self, gateway: &TestServer) -> (String, Option<u64>) {
        match self {
            Self::Http => {
                let request = completion(&json!({"model": "m", "prompt": "hi"}));
                let (response, body) = request.fetch(gateway).await;
                let seconds = response.header("retry-after");
                let seconds = seconds.map(|text| text.parse().expect("a number"));
                (body.error().0, seconds)
            }
            Self::Grpc => {
                let (_, error) = grpc::grpc_error(gateway, story_request()).await;
                let seconds = error.retry_after.map(|delay| delay.as_secs());
                (error.kind.mapping().code.to_owned(), seconds)
            }
        }
    }
}

/// Returns the request for the story over gRPC.
pub fn story_request() -> v1::CompletionRequest {
    v1::CompletionRequest {
        model: "m".to_owned(),
        ..grpc::request("hi", 50)
    }
}

/// Asks for the story over HTTP, as a stream. The stream must be whole.
pub async fn over_http(gateway: &TestServer) -> Seen {
    let body = json!({
        "model": "m", "prompt": "hi", "max_tokens": 50, "stream": true,
        "stream_options": {"include_usage": true, "include_timings": true},
    });
    let (response, body) = completion(&body).fetch(gateway).await;
    assert_eq!(
        (response.status, &body.end),
        (200, &BodyEnd::Clean),
        "{}",
        body.text
    );
    let lines = body.lines();
    let last = lines.last().expect("a line");
    assert!(
        lines.iter().all(|line| line.get("error").is_none()),
        "{lines:?}"
    );
    Seen {
        text: texts(&lines, 0).concat(),
        prompt_tokens: last["usage"]["prompt_tokens"].as_u64().expect("a number"),
        completion_tokens: last["usage"]["completion_tokens"]
            .as_u64()
            .expect("a number"),
        resumptions: last["timings"]["resumptions"].as_u64().expect("a number"),
    }
}

/// Asks for the story over gRPC. The stream must be whole.
pub async fn over_grpc(gateway: &TestServer) -> Seen {
    let seen = grpc::collect(gateway.stream(story_request()).await).await;
    assert!(seen.error.is_none(), "{:?}", seen.error);
    Seen {
        text: seen.texts(0).concat(),
        prompt_tokens: seen.usage().prompt_tokens.into(),
        completion_tokens: seen.usage().completion_tokens.into(),
        resumptions: seen.timings().resumptions.into(),
    }
}

/// Starts an engine that answers its first requests with these steps, one after the other, and tells the story later.
pub async fn failing_first(answers: Vec<Vec<Step>>) -> OpenAiEngine {
    let requests = AtomicUsize::new(0);
    OpenAiEngine::start(move |received| {
        let number = requests.fetch_add(1, Ordering::Relaxed);
        answers
            .get(number)
            .cloned()
            .unwrap_or_else(|| story(received))
    })
    .await
}

pub async fn honest() -> OpenAiEngine {
    OpenAiEngine::start(story).await
}

pub fn busy(headers: &'static str) -> Step {
    Step::Answer(429, headers, json!({"error": {"message": "slow down"}}))
}

pub fn failed(status: u16) -> Step {
    Step::Answer(status, "", json!({"error": {"message": "oops"}}))
}

/// Returns the prompt of a completion request.
pub fn prompt_of(received: &Received) -> String {
    received.body["prompt"].as_str().expect("a text").to_owned()
}
