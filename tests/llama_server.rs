//! A gateway in front of llama.cpp's own server. Both run the same model file, so their greedy texts are compared.

mod support;

use std::sync::Arc;

use futures_util::future::join_all;
use serde_json::{Value, json};
use support::http::{BodyEnd, Request, completion, get, post, texts};
use support::program::llama_cpp_server;
use support::running_program::RunningProgram;
use support::{Setup, TestServer, grpc, model_path, route_with_fallbacks};
use tokenway::cluster::RoutePolicy;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;
use tokio::sync::Notify;

const PROMPT: &str = "The capital of France is";

/// llama.cpp's server and a gateway in front of it.
struct Pair {
    _engine: RunningProgram,
    /// Address of llama.cpp's server.
    engine: String,
    gateway: TestServer,
}

/// Starts llama.cpp's server. Returns it and its URL.
async fn start_engine() -> (RunningProgram, String) {
    let mut running = llama_cpp_server(&model_path()).start();
    let url = running.read_line().await;
    (running, url)
}

async fn start() -> Pair {
    let (running, url) = start_engine().await;
    let address = url.strip_prefix("http://").expect("a URL").to_owned();
    let gateway = Setup::gateway_at(&[format!("openai+{url}")]).start().await;
    gateway.ready().await.expect("the engine is up");
    Pair {
        _engine: running,
        engine: address,
        gateway,
    }
}

fn greedy(max_tokens: u32, stream: bool) -> Value {
    json!({"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "stream": stream})
}

/// Returns the JSON that llama.cpp's server answers to a request that is not streamed.
async fn direct(pair: &Pair, request: Request) -> Value {
    let mut response = request.send_to(&pair.engine).await;
    let body = response.read_rest().await;
    assert_eq!(response.status, 200, "{}", body.text);
    body.json()
}

#[tokio::test]
async fn a_completion_has_the_same_text_and_usage_as_directly_from_the_engine() {
    let pair = start().await;
    let expected = direct(&pair, completion(&greedy(16, false))).await;
    let text = expected["choices"][0]["text"].as_str().expect("a text");
    assert!(text.starts_with(" Paris"), "{text}");

    let (_, body) = completion(&greedy(16, false)).fetch(&pair.gateway).await;
    assert_eq!(body.json()["choices"][0]["text"], text);
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(
            body.json()["usage"][count],
            expected["usage"][count],
            "{count}"
        );
    }
    let (_, body) = completion(&greedy(16, true)).fetch(&pair.gateway).await;
    let lines = body.lines();
    assert_eq!(
        (texts(&lines, 0).concat(), body.end),
        (text.to_owned(), BodyEnd::Clean)
    );
    let last = lines.last().expect("a line");
    assert_eq!(last["choices"][0]["finish_reason"], "length");

    let request = v1::CompletionRequest {
        temperature: Some(0.0),
        ..grpc::request(PROMPT, 16)
    };
    let over_grpc = grpc::collect(pair.gateway.stream(request).await).await;
    assert_eq!(over_grpc.texts(0).concat(), text);
    assert_eq!(over_grpc.usage().completion_tokens, 16);
    let ids: Vec<_> = over_grpc.choices[0].tokens.iter().map(|it| it.id).collect();
    let ids = json!({"tokens": ids}).to_string();
    let (_, body) = post("/detokenize", ids).fetch(&pair.gateway).await;
    assert_eq!(body.json()["prompt"], text);
}

#[tokio::test]
async fn a_client_gets_the_rest_of_a_completion_after_the_ids_that_it_has() {
    let pair = start().await;
    let request = v1::CompletionRequest {
        temperature: Some(0.0),
        seed: Some(1),
        ..grpc::request(PROMPT, 16)
    };
    let whole = grpc::collect(pair.gateway.stream(request.clone()).await).await;
    let tokens = &whole.choices[0].tokens;
    let resumed = v1::CompletionRequest {
        resume: vec![v1::ResumedChoice {
            choice: 0,
            token_ids: tokens[..6].iter().map(|token| token.id).collect(),
        }],
        ..request
    };
    let mut stream = pair.gateway.stream(resumed).await;
    let (mut rest, mut usage) = (Vec::new(), None);
    while let Some(event) = stream.message().await.expect("the stream continues") {
        match event.event.expect("the event has a known type") {
            Event::Tokens(tokens) => rest.extend(tokens.tokens.iter().map(v1::Token::from)),
            Event::Summary(summary) => usage = summary.usage,
            Event::Started(_) | Event::Prompt(_) | Event::Chat(_) => {}
        }
    }
    assert_eq!(rest, tokens[6..]);
    assert_eq!(usage.expect("a summary").completion_tokens, 16);
}

#[tokio::test]
async fn a_chat_uses_the_engines_own_template() {
    let pair = start().await;
    let messages = json!([{"role": "user", "content": "Name the capital of France."}]);
    let chat = json!({"messages": messages, "max_tokens": 16, "temperature": 0}).to_string();
    let expected = direct(&pair, post("/v1/chat/completions", chat.clone())).await;
    let (_, body) = post("/v1/chat/completions", chat)
        .fetch(&pair.gateway)
        .await;
    let message = |answer: &Value| answer["choices"][0]["message"]["content"].clone();
    assert_eq!(message(&body.json()), message(&expected));
    assert_eq!(
        body.json()["usage"]["prompt_tokens"],
        expected["usage"]["prompt_tokens"]
    );
}

#[tokio::test]
async fn the_engines_stop_strings_and_errors_reach_the_client() {
    let pair = start().await;
    let mut request = greedy(16, false);
    request["stop"] = json!(["."]);
    let (_, body) = completion(&request).fetch(&pair.gateway).await;
    let choice = body.json()["choices"][0].clone();
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!(" Paris"), &json!("stop"))
    );

    let request = json!({"prompt": "a b ".repeat(3_000), "max_tokens": 1});
    let (response, body) = completion(&request).fetch(&pair.gateway).await;
    assert_eq!(
        (response.status, &*body.error().0),
        (400, "context_length_exceeded")
    );

    let (_, models) = get("/v1/models").fetch(&pair.gateway).await;
    assert_eq!(models.json()["data"][0]["max_model_len"], 1_024);
}

/// Number of tokens of each stream of the test that kills an engine.
const TOKENS: u32 = 24;

/// Number of streams on each API.
const STREAMS: usize = 20;

fn prompts() -> impl Iterator<Item = String> {
    let starts = [
        "The capital of France is",
        "Once upon a time, in a village near the sea,",
        "A recipe for apple pie: first",
        "1, 2, 3, 4, 5,",
        "In Z\u{fc}rich there is a",
    ];
    starts.into_iter().cycle().map(str::to_owned).take(STREAMS)
}

fn stream_of(prompt: &str) -> Value {
    json!({
        "model": "m", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": true,
        "stream_options": {"include_timings": true},
    })
}

/// Returns the name of the model that a server lists.
async fn only_model(url: &str) -> String {
    let address = url.strip_prefix("http://").expect("a URL");
    let mut response = get("/v1/models").send_to(address).await;
    let models = response.read_rest().await.json();
    models["data"][0]["id"].as_str().expect("a name").to_owned()
}

/// Reads a greedy text over HTTP, token by token. Returns it with the number of its resumptions.
async fn text_over_http(gateway: &TestServer, prompt: &str, progress: &Notify) -> (String, u64) {
    let mut response = completion(&stream_of(prompt)).send(gateway).await;
    let (mut text, mut resumptions) = (String::new(), 0);
    while let Some(line) = response.read_json_line().await {
        assert!(line.get("error").is_none(), "{line}");
        text += line["choices"][0]["text"].as_str().unwrap_or_default();
        let timings = &line["timings"];
        let resumed = timings["resumptions"].as_u64().unwrap_or(0);
        if resumed > 0 {
            assert_eq!(timings["resumption_method"], "token_ids");
        }
        resumptions += resumed;
        progress.notify_one();
    }
    (text, resumptions)
}

async fn text_over_grpc(gateway: &TestServer, prompt: &str) -> (String, u64) {
    let request = v1::CompletionRequest {
        model: "m".to_owned(),
        temperature: Some(0.0),
        ..grpc::request(prompt, TOKENS)
    };
    let seen = grpc::collect(gateway.stream(request).await).await;
    assert!(seen.error.is_none(), "{:?}", seen.error);
    let timings = seen.timings();
    if timings.resumptions > 0 {
        let method = timings.resumption_method();
        assert_eq!(method, v1::ResumptionMethod::TokenIds);
    }
    (seen.texts(0).concat(), timings.resumptions.into())
}

#[tokio::test]
async fn greedy_texts_stay_the_same_when_one_of_two_servers_is_killed() {
    let (first, first_url) = start_engine().await;
    let (_second, second_url) = start_engine().await;
    let model = only_model(&first_url).await;
    let urls = [first_url, second_url].map(|url| format!("openai+{url}"));
    let policy = RoutePolicy {
        // The number of slots of each server.
        max_concurrency: Some(2),
        ..RoutePolicy::default()
    };
    let mut route = route_with_fallbacks(0, policy);
    let mut second = route.targets[0].clone();
    second.engine = "1".into();
    route.targets.push(second);
    for target in &mut route.targets {
        target.model = Some(model.clone());
    }
    let gateway = Setup::route(&urls, route).start().await;
    gateway.ready().await.expect("the engines are up");
    let progress = Arc::new(Notify::new());
    let mut expected = Vec::new();
    for prompt in prompts().take(5) {
        expected.push(text_over_http(&gateway, &prompt, &progress).await.0);
    }
    let over_http = prompts().map(|prompt| {
        let (gateway, progress) = (&gateway, Arc::clone(&progress));
        async move { text_over_http(gateway, &prompt, &progress).await }
    });
    let over_grpc = prompts().map(|prompt| {
        let gateway = &gateway;
        async move { text_over_grpc(gateway, &prompt).await }
    });
    let kill = async {
        for _ in 0..5 {
            progress.notified().await;
        }
        first.signal(rustix::process::Signal::KILL);
    };
    let (http, grpc, ()) = tokio::join!(join_all(over_http), join_all(over_grpc), kill);
    let resumptions: u64 = http.iter().chain(&grpc).map(|(_, count)| count).sum();
    assert!(resumptions > 0, "the killed server had no stream");
    for (api, texts) in [("HTTP", http), ("gRPC", grpc)] {
        for (at, (text, _)) in texts.iter().enumerate() {
            assert_eq!(text, &expected[at % 5], "{api}, stream {at}");
        }
    }
}

#[tokio::test]
async fn the_engines_tokenizer_and_log_probabilities_reach_the_client() {
    let pair = start().await;
    let text = json!({"content": PROMPT, "add_special": true}).to_string();
    let expected = direct(&pair, post("/tokenize", text)).await;
    let text = json!({"prompt": PROMPT}).to_string();
    let (_, body) = post("/tokenize", text).fetch(&pair.gateway).await;
    let tokens = body.json()["tokens"].clone();
    assert_eq!(tokens, expected["tokens"]);
    let ids = json!({"tokens": tokens}).to_string();
    let (_, body) = post("/detokenize", ids).fetch(&pair.gateway).await;
    assert_eq!(body.json()["prompt"], PROMPT);
    let chat = json!({"messages": [{"role": "user", "content": PROMPT}]}).to_string();
    let (_, body) = post("/tokenize", chat).fetch(&pair.gateway).await;
    let count = body.json()["count"].as_u64().expect("a number of tokens");
    assert!(count > 5, "the template adds tokens");

    // The emoji has several tokens, so the engine's text of the last of them is not the bytes of that token.
    let mut request = json!({"prompt": "Repeat: \u{1f600}\u{1f600} \u{1f600}", "max_tokens": 6});
    request["temperature"] = json!(0);
    let (_, body) = completion(&request).fetch(&pair.gateway).await;
    let text = body.json()["choices"][0]["text"].clone();
    request["logprobs"] = json!(0);
    let (_, body) = completion(&request).fetch(&pair.gateway).await;
    let choice = &body.json()["choices"][0];
    assert_eq!(choice["text"], text);
    let logprobs = choice["logprobs"]["token_logprobs"]
        .as_array()
        .expect("a list");
    assert!(!logprobs.is_empty() && logprobs.iter().all(Value::is_number));
}
