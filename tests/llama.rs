//! A real model over both APIs: its output, and the independence of its output from other sequences on the device.

mod support;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use futures_util::future::join_all;
use serde_json::{Value, json};
use support::http::{BodyEnd, completion, get, post, texts};
use support::{Setup, SharedServer, TestServer, grpc, model_path};
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;
use tokenway::runner::llama::{LlamaLoader, LlamaOptions};
use tonic::{Code, Streaming};

const PROMPT: &str = "The capital of France is";

/// The greedy completion of `PROMPT`: 16 tokens.
const GREEDY_TEXT: &str = " Paris.\n\nThe United States has a population of approximately 321";

fn options(model_path: PathBuf) -> LlamaOptions {
    LlamaOptions {
        model_path,
        threads: 1,
        context_length: None,
        ..LlamaOptions::default()
    }
}

fn setup_with(options: LlamaOptions, slots: usize) -> Setup {
    Setup::runner("smollm2", Arc::new(LlamaLoader::new(options)), slots)
}

fn setup(slots: usize) -> Setup {
    setup_with(options(model_path()), slots)
}

/// Returns a server with eight slots. All tests of this process share the server, because loading the model is slow.
fn shared_server() -> Arc<SharedServer> {
    static SHARED: Mutex<Weak<SharedServer>> = Mutex::new(Weak::new());
    SharedServer::get(&SHARED, || setup(8))
}

fn greedy_request(prompt: &str, max_tokens: u32) -> v1::CompletionRequest {
    v1::CompletionRequest {
        temperature: Some(0.0),
        ..grpc::request(prompt, max_tokens)
    }
}

fn seeded_request(prompt: &str, max_tokens: u32, n: u32) -> v1::CompletionRequest {
    v1::CompletionRequest {
        seed: Some(7),
        n: Some(n),
        ..grpc::request(prompt, max_tokens)
    }
}

async fn complete(server: &TestServer, request: v1::CompletionRequest) -> grpc::Completion {
    let stream = server
        .grpc()
        .await
        .complete(request)
        .await
        .expect("the request is admitted");
    grpc::collect(stream.into_inner()).await
}

fn token_ids(completion: &grpc::Completion, choice: usize) -> Vec<u32> {
    let tokens = &completion.choices[choice].tokens;
    tokens.iter().map(|token| token.id).collect()
}

/// Reads from a stream that has started, until the stream has this many tokens.
async fn read_tokens(stream: &mut Streaming<v1::CompletionEvent>, count: usize) {
    let mut read = grpc::Completion::default();
    while read.choices.first().map_or(0, |choice| choice.tokens.len()) < count {
        read.add_event(stream.message().await.expect("a stream").expect("an event"));
    }
}

fn assert_text(text: &str, completion: &grpc::Completion) {
    assert_eq!(completion.texts(0).concat(), text);
}

#[tokio::test]
async fn greedy_text_is_the_same_over_every_api_and_format() {
    let shared = shared_server();
    let server: &TestServer = &shared;
    let over_grpc = complete(server, greedy_request(PROMPT, 16)).await;
    assert_text(GREEDY_TEXT, &over_grpc);
    assert_eq!(over_grpc.choices[0].finish, v1::FinishReason::Length);
    let usage = over_grpc.usage();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (5, 16));
    let tokens = over_grpc.texts(0);
    assert_eq!(tokens.len(), 16);

    let body = json!({"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "stream": true});
    let (_, ndjson) = completion(&body).fetch(server).await;
    assert_eq!(ndjson.end, BodyEnd::Clean);
    assert_eq!(texts(&ndjson.lines(), 0), tokens);
    assert_eq!(ndjson.lines().len(), 16);

    let sse = completion(&body).accept("text/event-stream");
    let (_, sse) = sse.fetch(server).await;
    let (done, events) = sse
        .events()
        .split_last()
        .map(|(d, e)| (*d, e.to_vec()))
        .unwrap();
    assert_eq!(done, "[DONE]");
    let events: Vec<Value> = events
        .iter()
        .map(|it| serde_json::from_str(it).unwrap())
        .collect();
    assert_eq!(texts(&events, 0), tokens);

    let body = json!({"prompt": PROMPT, "max_tokens": 16, "temperature": 0});
    let (_, unary) = completion(&body).fetch(server).await;
    assert_eq!(unary.json()["choices"][0]["text"], GREEDY_TEXT);
    assert_eq!(unary.json()["usage"]["completion_tokens"], 16);
}

#[tokio::test]
async fn greedy_tokens_do_not_depend_on_the_batch_or_the_slot() {
    let server = setup(8).start().await;
    let alone = token_ids(&complete(&server, greedy_request(PROMPT, 32)).await, 0);
    let client = server.grpc().await;
    let start = async |request| {
        let stream = client
            .clone()
            .complete(request)
            .await
            .expect("the request is admitted");
        let mut stream = stream.into_inner();
        stream
            .message()
            .await
            .expect("a stream")
            .expect("a `started` event");
        stream
    };
    let mut others = Vec::new();
    for prompt in [
        "Once upon a time",
        "1 2 3",
        "日本の首都は",
        "def main():",
        "Dear",
        "The",
    ] {
        others.push(start(seeded_request(prompt, 80, 1)).await);
    }
    let mut cancelled = start(greedy_request("In the beginning", 80)).await;
    read_tokens(&mut cancelled, 2).await;
    let mut in_batch = start(greedy_request(PROMPT, 32)).await;
    let mut read = grpc::Completion::default();
    let first = in_batch.message().await.expect("a stream").expect("tokens");
    read.add_event(first);
    let counts = server.telemetry().render();
    assert!(
        counts.contains("tokenway_sequences_running 8\n"),
        "{counts}"
    );

    drop(cancelled);
    // The long prompt is prefilled in chunks while the other sequences decode. Afterwards its slot is free again.
    let long = complete(&server, greedy_request(&"A long prompt. ".repeat(40), 1)).await;
    assert_eq!(long.choices[0].tokens.len(), 1);
    let slot_used_before = token_ids(&complete(&server, greedy_request(PROMPT, 32)).await, 0);
    while let Some(event) = in_batch.message().await.expect("a stream") {
        read.add_event(event);
    }
    assert_eq!(token_ids(&read, 0), alone);
    assert_eq!(slot_used_before, alone);
    join_all(others.into_iter().map(grpc::collect)).await;
    server.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn seeded_tokens_do_not_depend_on_the_batch_and_differ_between_choices() {
    let shared = shared_server();
    let server: &TestServer = &shared;
    let request = || seeded_request("The best thing about the sea is", 24, 3);
    let first = complete(server, request()).await;
    let others = (0..4).map(|_| complete(server, grpc::request("Once upon a time", 40)));
    let (again, _) = tokio::join!(complete(server, request()), join_all(others));
    let choices: Vec<_> = (0..3).map(|choice| token_ids(&first, choice)).collect();
    for (choice, tokens) in choices.iter().enumerate() {
        assert_eq!(token_ids(&again, choice), *tokens);
    }
    assert!(choices[0] != choices[1] && choices[1] != choices[2] && choices[0] != choices[2]);
    let mut other_seed = request();
    other_seed.seed = Some(8);
    assert_ne!(
        token_ids(&complete(server, other_seed).await, 0),
        choices[0]
    );
}

#[tokio::test]
async fn more_choices_than_slots_give_the_same_tokens() {
    let request = || seeded_request("My favourite colour is", 12, 5);
    let expected = complete(&shared_server(), request()).await;
    let few_slots = setup(2).start().await;
    let in_turn = complete(&few_slots, request()).await;
    assert_eq!(in_turn.choices.len(), 5);
    for choice in 0..5 {
        assert_eq!(token_ids(&in_turn, choice), token_ids(&expected, choice));
    }
}

#[tokio::test]
async fn a_character_of_several_tokens_is_never_split() {
    let shared = shared_server();
    let server: &TestServer = &shared;
    for (prompt, several) in [
        ("List of emoji: 😀 😃 😄 😁 😆", true),
        ("日本の首都は", true),
        ("Les élèves français ont été", false),
    ] {
        let completion = complete(server, greedy_request(prompt, 40)).await;
        let texts = completion.texts(0);
        let text = texts.concat();
        assert!(!text.is_ascii() && !text.contains('\u{FFFD}'), "{text}");
        assert_eq!(
            texts.iter().any(|text| text.is_empty()),
            several,
            "{texts:?}"
        );
        let request = v1::DetokenizeRequest {
            token_ids: token_ids(&completion, 0),
            ..v1::DetokenizeRequest::default()
        };
        let detokenized = server.grpc().await.detokenize(request).await.unwrap();
        assert_eq!(detokenized.into_inner().text, text);
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_choice_and_is_never_sent() {
    let body = json!({"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "stream": true,
        "stop": "has a pop", "stream_options": {"include_usage": true}});
    let (_, body) = completion(&body).fetch(&shared_server()).await;
    let lines = body.lines();
    let text = texts(&lines, 0).concat();
    assert_eq!(text, " Paris.\n\nThe United States ");
    let (usage, choice) = (&lines[lines.len() - 1], &lines[lines.len() - 2]);
    assert_eq!(choice["choices"][0]["finish_reason"], "stop");
    // The tokens of the stop string (` has`, ` a` and ` population`) are counted too.
    assert_eq!(usage["usage"]["completion_tokens"], 10);
}

#[tokio::test]
async fn a_chat_uses_the_models_template_and_ends_at_eos() {
    let shared = shared_server();
    let server: &TestServer = &shared;
    let message = v1::ChatMessage {
        role: "user".to_owned(),
        content: "What is 2+2? Answer with one word.".to_owned(),
        ..v1::ChatMessage::default()
    };
    let mut request = greedy_request("", 100);
    let messages = vec![message];
    request.input = Some(Input::Chat(v1::Chat { messages }));
    let chat = complete(server, request).await;
    let expected = ["The", " answer", " is", " \"", "two", "\".", ""];
    assert_eq!(chat.texts(0), expected);
    assert_eq!(chat.choices[0].finish, v1::FinishReason::Stop);
    assert_eq!(
        chat.usage().completion_tokens,
        7,
        "the eos token is counted"
    );

    let rendered = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by \
        Hugging Face<|im_end|>\n<|im_start|>user\nWhat is 2+2? Answer with one word.<|im_end|>\n\
        <|im_start|>assistant\n";
    let body = json!({"prompt": rendered, "max_tokens": 100, "temperature": 0, "stream": true,
        "stream_options": {"include_usage": true}});
    let (_, body) = completion(&body).fetch(server).await;
    let lines = body.lines();
    assert_eq!(texts(&lines, 0), expected);
    assert_eq!(lines[6]["choices"][0]["finish_reason"], "stop");
    let usage = chat.usage();
    assert_eq!(lines[7]["usage"]["prompt_tokens"], usage.prompt_tokens);
}

#[tokio::test]
async fn invalid_prompts_are_rejected_and_the_server_keeps_serving() {
    let shared = shared_server();
    let server: &TestServer = &shared;
    let too_many_tokens = "word ".repeat(3000);
    let too_many_bytes = "word ".repeat(80_000);
    let one_long_word = "a".repeat(300_000);
    for (prompt, max_tokens, code) in [
        (json!([1, 49_152]), 4, "invalid_value"),
        (json!([u32::MAX]), 4, "invalid_value"),
        (json!(""), 4, "invalid_value"),
        (json!(PROMPT), 2044, "context_length_exceeded"),
        (json!(PROMPT), u32::MAX, "context_length_exceeded"),
        (json!(too_many_tokens), 4, "context_length_exceeded"),
        (json!(too_many_bytes), 4, "context_length_exceeded"),
        (json!(one_long_word), 4, "context_length_exceeded"),
    ] {
        let shown = prompt.to_string();
        let shown = &shown[..shown.len().min(40)];
        let body = json!({"prompt": prompt, "max_tokens": max_tokens});
        let (response, body) = completion(&body).fetch(server).await;
        assert_eq!(response.status, 400, "{shown}: {}", body.text);
        // If `max_tokens` alone exceeds the context, the error names `max_tokens` instead of the prompt.
        let param = if max_tokens == u32::MAX {
            "max_tokens"
        } else {
            "prompt"
        };
        let expected = (code.to_owned(), Some(param.to_owned()));
        assert_eq!(body.error(), expected, "{shown}");
        let mut request = grpc::request("", max_tokens);
        request.input = Some(match prompt.as_str() {
            Some(prompt) => Input::Prompt(prompt.to_owned()),
            None => Input::PromptTokenIds(v1::TokenIds {
                ids: serde_json::from_value(prompt).unwrap(),
            }),
        });
        let result = server.grpc().await.complete(request).await.unwrap_err();
        assert_eq!(result.code(), Code::InvalidArgument, "{shown}: {result:?}");
    }
    let announced = post("/v1/completions", "").header("content-length", "12000000");
    let (response, _) = announced.fetch(server).await;
    assert_eq!(response.status, 413);
    let twelve_megabytes = grpc::request(&"word ".repeat(2_400_000), 4);
    let result = server.grpc().await.complete(twelve_megabytes).await;
    assert_eq!(result.unwrap_err().code(), Code::OutOfRange);
    assert_text(
        GREEDY_TEXT,
        &complete(server, greedy_request(PROMPT, 16)).await,
    );
}

#[tokio::test]
async fn a_sequence_may_fill_its_context() {
    let mut options = options(model_path());
    options.context_length = Some(48);
    let server = setup_with(options, 2).start().await;
    let full = complete(&server, greedy_request(PROMPT, 43)).await;
    assert_eq!(full.choices[0].tokens.len(), 43);
    assert_eq!(full.choices[0].finish, v1::FinishReason::Length);
    let over = server
        .grpc()
        .await
        .complete(greedy_request(PROMPT, 44))
        .await;
    assert_eq!(over.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_load_failure_is_reported_with_its_path_and_reason() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let mut start = vec![0; 4_000_000];
    let mut model = std::fs::File::open(model_path()).unwrap();
    std::io::Read::read_exact(&mut model, &mut start).unwrap();
    let on = |path: PathBuf| options(path);
    for (options, reason) in [
        (on(folder.path().join("missing.gguf")), "cannot be read"),
        (on(folder.path().to_owned()), "cannot be read"),
        (on(write("empty.gguf", b"")), "not a GGUF model file"),
        (
            on(write("text.gguf", b"not a model")),
            "not a GGUF model file",
        ),
        (on(write("short.gguf", b"GGUF")), "truncated"),
        (on(write("cut.gguf", &start)), "truncated"),
        (
            LlamaOptions {
                threads: 0,
                ..on(model_path())
            },
            "`threads` must be from 1",
        ),
        (
            LlamaOptions {
                context_length: Some(0),
                ..on(model_path())
            },
            "`context_length` must be from 1",
        ),
        (
            LlamaOptions {
                context_length: Some(8193),
                ..on(model_path())
            },
            "`context_length` must be from 1 to 8192",
        ),
    ] {
        let path = options.model_path.display().to_string();
        let server = setup_with(options, 2).start_loading().await;
        let error = server.ready().await.unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains(&path), "{error}");
        server.drain().await;
    }
}

#[tokio::test]
async fn readyz_says_what_computes_the_model_and_how_many_bytes_a_slot_takes() {
    let short = LlamaOptions {
        context_length: Some(64),
        ..options(model_path())
    };
    let server = setup_with(short, 2).start().await;
    let (response, body) = get("/readyz").fetch(&server).await;
    assert_eq!(response.status, 200, "{}", body.text);
    // 30 layers with three heads of 64 keys and 64 values, two bytes each, for 64 tokens.
    let slot_bytes = 30 * 3 * (64 + 64) * 2 * 64;
    let device = json!({"name": "CPU, 1 thread", "slot_bytes": slot_bytes});
    assert_eq!(body.json()["devices"]["smollm2"], device);
}
