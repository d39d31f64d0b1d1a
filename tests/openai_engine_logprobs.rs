//! Log probabilities and echoed prompts of OpenAI-compatible engines, as clients of both APIs see them.

mod support;

use serde_json::{Value, json};
use support::http::{completion, post, texts};
use support::openai_engine::{OpenAiEngine, Received, Step, event, whole_with_usage};
use support::{Setup, TestServer, grpc};
use tokenway::error::ErrorKind;
use tokenway::proto::v1;

async fn gateway(engine: &OpenAiEngine) -> TestServer {
    let gateway = Setup::gateway_at(&[engine.url()]).start().await;
    gateway.ready().await.expect("the engine is up");
    gateway
}

/// A response in the form of completions or of chats, as the request asks. Its second chunk has a character whose bytes
/// belong to two tokens, and its third has text that is not that of its tokens.
fn scored_response(request: &Received) -> Vec<Step> {
    let is_chat = request.path.ends_with("/chat/completions");
    let chunk = |text: &str, tokens: &[&[u8]], reason: Option<&str>| {
        let entry = |bytes: &&[u8]| {
            let likely = json!({"token": "z", "bytes": [122], "logprob": -2.0});
            json!({"token": "?", "bytes": bytes, "logprob": -0.5, "top_logprobs": [likely]})
        };
        let in_chat = json!({"content": tokens.iter().map(entry).collect::<Vec<_>>()});
        let shown = |bytes: &&[u8]| match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| {
                format!("{text}\\x{byte:02x}")
            }),
        };
        let in_completion = json!({
            "tokens": tokens.iter().map(shown).collect::<Vec<_>>(),
            "token_logprobs": vec![-0.5; tokens.len()],
            "top_logprobs": vec![json!({"z": -2.0}); tokens.len()],
            "text_offset": vec![0; tokens.len()],
        });
        event(&match is_chat {
            true => json!({"model": "m", "choices": [{
                "index": 0, "delta": {"content": text}, "logprobs": in_chat, "finish_reason": reason,
            }]}),
            false => json!({"model": "m", "choices": [{
                "index": 0, "text": text, "logprobs": in_completion, "finish_reason": reason,
            }]}),
        })
    };
    let events = vec![
        chunk("ab", &[b"a", b"b"], None),
        chunk("\u{e9}", &[b"\xc3", b"\xa9"], None),
        chunk("end", &[b"end", b"STOP"], Some("stop")),
    ];
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 6});
    whole_with_usage(events, &usage)
}

/// Texts of the tokens of that response.
const TEXTS: [&str; 6] = ["a", "b", "", "\u{e9}", "", "end"];

#[tokio::test]
async fn each_token_of_a_completion_has_its_text_and_its_log_probabilities() {
    let engine = OpenAiEngine::start(scored_response).await;
    let gateway = gateway(&engine).await;
    let unary = json!({"prompt": "hi", "logprobs": 1});
    let stream = json!({"prompt": "hi", "logprobs": 1, "stream": true});

    let (_, body) = completion(&stream).fetch(&gateway).await;
    let lines = body.lines();
    assert_eq!(texts(&lines, 0), TEXTS);
    let logprobs = &lines[3]["choices"][0]["logprobs"];
    let expected = json!({
        "tokens": ["bytes:\\xa9"], "token_logprobs": [-0.5],
        "top_logprobs": [{"bytes:\\xa9": -0.5, "z": -2.0}], "text_offset": [2],
    });
    assert_eq!(logprobs, &expected);
    assert_eq!(engine.received()[0].body["logprobs"], 1);

    let sse = completion(&stream).accept("text/event-stream");
    let (_, body) = sse.fetch(&gateway).await;
    assert_eq!(body.events().len(), TEXTS.len() + 1, "and [DONE]");

    let (_, body) = completion(&unary).fetch(&gateway).await;
    let choice = &body.json()["choices"][0];
    assert_eq!(choice["text"], TEXTS.concat());
    let tokens = json!(["a", "b", "bytes:\\xc3", "bytes:\\xa9", "end", "STOP"]);
    assert_eq!(choice["logprobs"]["tokens"], tokens);

    let request = v1::CompletionRequest {
        logprobs: Some(1),
        ..grpc::request("hi", 9)
    };
    let answer = grpc::collect(gateway.stream(request).await).await;
    assert_eq!(answer.texts(0), TEXTS);
    let tokens = &answer.choices[0].tokens;
    let bytes: Vec<_> = tokens
        .iter()
        .flat_map(|token| {
            token
                .logprobs
                .clone()
                .expect("they are asked for")
                .token_bytes
        })
        .collect();
    assert_eq!(bytes, "ab\u{e9}endSTOP".as_bytes());
    let first = tokens[0].logprobs.as_ref().expect("they are asked for");
    assert_eq!((first.logprob, first.top[0].logprob), (Some(-0.5), -2.0));
}

#[tokio::test]
async fn each_token_of_a_chat_has_its_text_and_its_log_probabilities() {
    let engine = OpenAiEngine::start(scored_response).await;
    let gateway = gateway(&engine).await;
    let body = json!({
        "messages": [{"role": "user", "content": "hi"}], "logprobs": true, "top_logprobs": 1,
    });
    let (_, answer) = post("/v1/chat/completions", body.to_string())
        .fetch(&gateway)
        .await;
    let choice = &answer.json()["choices"][0];
    assert_eq!(choice["message"]["content"], TEXTS.concat());
    let content = choice["logprobs"]["content"].as_array().expect("a list");
    let bytes: Vec<_> = content.iter().map(|entry| entry["bytes"].clone()).collect();
    let expected = [
        json!([97]),
        json!([98]),
        json!([0xc3]),
        json!([0xa9]),
        json!(b"end"),
        json!(b"STOP"),
    ];
    assert_eq!(bytes, expected);
    let likely = json!([{"token": "z", "bytes": [122], "logprob": -2.0}]);
    assert_eq!(content[5]["top_logprobs"], likely);
    let received = &engine.received()[0].body;
    assert_eq!(
        (&received["logprobs"], &received["top_logprobs"]),
        (&json!(true), &json!(1))
    );
}

#[tokio::test]
async fn an_engine_without_log_probabilities_still_delivers_the_text() {
    for logprobs in [Value::Null, json!({}), json!({"content": null})] {
        let chunk = json!({"model": "m", "choices": [{
            "index": 0, "text": "ab", "logprobs": logprobs, "finish_reason": "stop",
        }]});
        let usage = json!({"prompt_tokens": 1, "completion_tokens": 1});
        let engine = OpenAiEngine::answering(whole_with_usage(vec![event(&chunk)], &usage)).await;
        let gateway = gateway(&engine).await;
        let unary = json!({"prompt": "hi", "logprobs": 1});
        let (_, body) = completion(&unary).fetch(&gateway).await;
        assert_eq!(body.json()["choices"][0]["text"], "ab", "{}", body.text);
    }
}

const VLLM: &str = r#"{"data":[{"id":"v","owned_by":"vllm","max_model_len":64}]}"#;

#[tokio::test]
async fn a_prompt_that_vllm_echoes_reaches_clients_of_both_apis_as_the_prompt() {
    let engine = OpenAiEngine::with_models(VLLM, |_| {
        let chunk = |text: &str, reason: Option<&str>| {
            event(&json!({"model": "v", "choices": [
                {"index": 0, "text": text, "finish_reason": reason},
            ]}))
        };
        let usage = json!({"prompt_tokens": 2, "completion_tokens": 2});
        whole_with_usage(
            vec![chunk("hi there", None), chunk("!", Some("stop"))],
            &usage,
        )
    })
    .await;
    let gateway = gateway(&engine).await;
    let unary = json!({"prompt": "hi", "echo": true});
    let (_, body) = completion(&unary).fetch(&gateway).await;
    assert_eq!(body.json()["choices"][0]["text"], "hi there!");
    let stream = json!({"prompt": "hi", "echo": true, "stream": true});
    let (_, body) = completion(&stream).fetch(&gateway).await;
    assert_eq!(texts(&body.lines(), 0), ["hi", " there", "!"]);
    assert_eq!(engine.received()[0].body["echo"], true);
    let request = v1::CompletionRequest {
        echo: true,
        ..grpc::request("hi", 9)
    };
    let answer = grpc::collect(gateway.stream(request.clone()).await).await;
    assert_eq!(
        (&*answer.prompt.text, answer.texts(0)),
        ("hi", vec![" there", "!"])
    );
    let scored = v1::CompletionRequest {
        logprobs: Some(1),
        ..request
    };
    let (_, error) = grpc::grpc_error(&gateway, scored).await;
    let expected = (ErrorKind::UnsupportedParameter, Some("echo".to_owned()));
    assert_eq!((error.kind, error.param), expected);
}
