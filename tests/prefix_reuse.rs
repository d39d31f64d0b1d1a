//! Reuse of prompt tokens that an earlier request has computed, as clients and operators see it. The test runner takes
//! a fixed time for each prompt token that is not computed yet.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::http::{Request, completion, get, http_error, post};
use support::metrics::MetricsSnapshot;
use support::program::start_server;
use support::{Setup, TestServer, full_speed, grpc};
use tokenway::caller::PrefixSharing;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::runner::llm_test::TestRunnerOptions;

/// Time for each prompt token that is not computed yet.
const TOKEN_DELAY: Duration = Duration::from_millis(1);

fn setup() -> Setup {
    Setup::test_runner(TestRunnerOptions {
        prompt_token_delay: TOKEN_DELAY,
        ..full_speed()
    })
}

/// Returns a prompt of this many words.
fn words(count: usize) -> String {
    let words: Vec<_> = (0..count).map(|index| format!("word{index}")).collect();
    words.join(" ")
}

fn chat(messages: &[(&str, &str)]) -> Request {
    let messages: Vec<_> = messages
        .iter()
        .map(|(role, content)| json!({"role": role, "content": content}))
        .collect();
    let body = json!({"messages": messages, "max_tokens": 5});
    post("/v1/chat/completions", body.to_string())
}

/// Sends a request and returns the number of reused prompt tokens.
async fn cached_tokens(server: &TestServer, request: Request) -> u64 {
    let (response, body) = request.fetch(server).await;
    assert_eq!(response.status, 200, "{}", body.text);
    let cached = &body.json()["usage"]["prompt_tokens_details"]["cached_tokens"];
    cached.as_u64().expect("the usage has cached tokens")
}

#[tokio::test]
async fn each_turn_of_a_chat_reuses_the_turns_before_it() {
    let server = setup().start().await;
    let first = words(50);
    // The rendered chat has one more word for the role of each message.
    assert_eq!(cached_tokens(&server, chat(&[("user", &first)])).await, 0);
    let second = [("user", &*first), ("user", "more")];
    assert_eq!(cached_tokens(&server, chat(&second)).await, 51);
    assert_eq!(cached_tokens(&server, chat(&second)).await, 52);
    let counts = server.drain().await;
    assert_eq!(counts.get("tokenway_prefix_cache_hits_total"), 2.0);
    assert_eq!(counts.get("tokenway_prefix_cache_tokens_total"), 103.0);
}

#[tokio::test]
async fn both_apis_report_the_same_number_of_cached_tokens() {
    let server = setup().start().await;
    let prompt = words(40);
    let request = || grpc::request(&prompt, 3);
    let usage = grpc::collect(server.stream(request()).await).await.usage();
    assert_eq!(
        (usage.prompt_tokens, usage.cached_prompt_tokens),
        (40, Some(0))
    );
    let usage = grpc::collect(server.stream(request()).await).await.usage();
    assert_eq!(usage.cached_prompt_tokens, Some(39));
    let body = json!({"prompt": prompt, "max_tokens": 3});
    assert_eq!(cached_tokens(&server, completion(&body)).await, 39);
}

#[tokio::test]
async fn a_stream_and_a_request_with_several_choices_count_cached_tokens_once() {
    let server = setup().start().await;
    let prompt = words(30);
    let body = json!({"prompt": prompt, "max_tokens": 3, "n": 3});
    // Choices 1 and 2 reuse the prompt of choice 0, but the prompt is counted once.
    assert_eq!(cached_tokens(&server, completion(&body)).await, 0);
    let body = json!({
        "prompt": prompt, "max_tokens": 3, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let (_, body) = completion(&body).fetch(&server).await;
    let usage = body.lines().into_iter().find_map(|line| {
        let usage = &line["usage"];
        usage.is_object().then(|| usage.clone())
    });
    let usage = usage.expect("a line with the usage");
    assert_eq!(usage["prompt_tokens_details"], json!({"cached_tokens": 29}));
}

#[tokio::test]
async fn a_runner_that_reuses_no_prefixes_reports_no_cached_tokens() {
    let server = Setup::test_runner(full_speed()).start().await;
    let body = json!({"prompt": "a b", "max_tokens": 3});
    for _ in 0..2 {
        let (_, answer) = completion(&body).fetch(&server).await;
        assert_eq!(answer.json()["usage"].get("prompt_tokens_details"), None);
    }
}

#[tokio::test]
async fn prompts_with_different_salts_are_kept_apart() {
    let server = setup().start().await;
    let salted = |salt: Value| {
        completion(&json!({"prompt": words(20), "max_tokens": 3, "cache_salt": salt}))
    };
    for (salt, cached) in [
        (json!("a"), 0),
        (json!("b"), 0),
        (Value::Null, 0),
        (json!("a"), 19),
        (Value::Null, 19),
    ] {
        assert_eq!(
            cached_tokens(&server, salted(salt.clone())).await,
            cached,
            "{salt}"
        );
    }
    let too_long = salted("x".repeat(513).into());
    let (_, _, param) = http_error(&server, too_long).await;
    assert_eq!(param.as_deref(), Some("cache_salt"));
}

/// Sends a prompt as this caller. Returns the number of reused tokens, and the time until the whole answer has arrived.
async fn probe(server: &TestServer, key: Option<&str>, user: &str) -> (u64, Duration) {
    let body = json!({"prompt": words(80), "max_tokens": 1, "user": user});
    let mut request = completion(&body);
    if let Some(key) = key {
        request = request.header("authorization", key);
    }
    let started = Instant::now();
    let cached = cached_tokens(server, request).await;
    (cached, started.elapsed())
}

#[tokio::test]
async fn with_sharing_limited_to_callers_no_other_caller_detects_a_prompt_by_its_timing() {
    let mut setup = setup();
    setup.parts.prefix_sharing = PrefixSharing::Caller;
    let server = setup.start().await;
    let whole_prompt = TOKEN_DELAY * 80;
    probe(&server, Some("Bearer victim"), "ann").await;
    for (key, user) in [
        (Some("Bearer attacker"), "ann"),
        (Some("Bearer victim"), "eve"),
        (None, "ann"),
    ] {
        let (cached, time) = probe(&server, key, user).await;
        assert_eq!(cached, 0, "{key:?} {user}");
        assert!(time >= whole_prompt, "{time:?}");
    }
    let (cached, _) = probe(&server, Some("Bearer victim"), "ann").await;
    assert_eq!(cached, 79);
}

#[tokio::test]
async fn a_gateway_keeps_callers_apart_on_its_engines() {
    let engine = setup().start().await;
    let mut gateway = Setup::gateway(&[&engine]);
    gateway.parts.prefix_sharing = PrefixSharing::Caller;
    let gateway = gateway.start().await;
    gateway.ready().await.expect("the engine is up");
    assert_eq!(probe(&gateway, Some("Bearer victim"), "").await.0, 0);
    assert_eq!(probe(&gateway, Some("Bearer attacker"), "").await.0, 0);
    assert_eq!(probe(&gateway, Some("Bearer victim"), "").await.0, 79);
    // A client that calls the engine directly does not have the gateway's salt, so it shares nothing with this caller.
    assert_eq!(probe(&engine, Some("Bearer victim"), "").await.0, 0);
}

#[tokio::test]
async fn worker_processes_report_their_cached_tokens_and_evictions() {
    let arguments = [
        "--isolation",
        "process",
        "--slots",
        "1",
        "--test-runner-frequency-ms",
        "0",
        "--test-runner-prompt-token-delay-ms",
        "0.1",
    ];
    let (_server, [http_url, grpc_url]) = start_server(&arguments).await;
    let client = InferenceClient::connect(grpc_url).await;
    let mut client = client.expect("the server accepts connections");
    let mut cached = Vec::new();
    for prompt in ["a b c d", "a b c e", "f g"] {
        let stream = client.complete(grpc::request(prompt, 2)).await;
        let completion = grpc::collect(stream.expect("a stream").into_inner()).await;
        cached.push(completion.usage().cached_prompt_tokens);
    }
    assert_eq!(cached, [Some(0), Some(3), Some(0)]);
    // The worker reports evictions with its next heartbeat.
    let address = http_url.strip_prefix("http://").expect("an HTTP URL");
    let evictions = async || {
        let body = get("/metrics").send_to(address).await.read_rest().await;
        MetricsSnapshot(body.text).get("tokenway_prefix_cache_evictions_total")
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while evictions().await < 1.0 {
        assert!(Instant::now() < deadline, "no eviction is reported");
        tokio::task::yield_now().await;
    }
}
