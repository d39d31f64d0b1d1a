//! Fields that Tokenway does not know, and the tokenizer APIs, of OpenAI-compatible engines behind a gateway.

mod support;

use prost_types::value::Kind;
use prost_types::{Struct, Value as ProtoValue};
use serde_json::{Value, json};
use support::http::{Request, completion, post};
use support::openai_engine::{OpenAiEngine, Received, Step, whole};
use support::{Setup, TestServer, full_speed, grpc};
use tokenway::error::ErrorKind;
use tokenway::proto::v1;
use tokenway::proto::v1::tokenize_request::Input as TokenizeInput;

async fn gateway(engine: &OpenAiEngine) -> TestServer {
    start(Setup::gateway_at(&[engine.url()])).await
}

async fn start(setup: Setup) -> TestServer {
    let gateway = setup.start().await;
    gateway.ready().await.expect("an engine is up");
    gateway
}

fn chat(fields: &Value) -> Request {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
    let fields = fields.as_object().expect("fields").clone();
    body.as_object_mut().expect("a body").extend(fields);
    post("/v1/chat/completions", body.to_string())
}

#[tokio::test]
async fn unknown_fields_of_the_body_reach_an_openai_compatible_engine() {
    let engine = OpenAiEngine::answering(whole(&["a"])).await;
    let extra = json!({
        "chat_template_kwargs": {"enable_thinking": false, "depth": [1, 2.5, null, "x"]},
        "mirostat": 2, "ratio": 0.25, "nothing": null,
    });
    for setup in [
        Setup::gateway_at(&[engine.url()]),
        Setup::gateway_at(&[engine.url()]).ignoring_unknown_fields(),
    ] {
        let gateway = start(setup).await;
        let mut body = extra.clone();
        body["prompt"] = json!("hi");
        for request in [chat(&extra), completion(&body)] {
            let (response, answer) = request.fetch(&gateway).await;
            assert_eq!(response.status, 200, "{}", answer.text);
            assert_eq!(response.header("x-ignored-fields"), None);
        }
    }
    for Received { body, .. } in engine.received() {
        assert_eq!(body["chat_template_kwargs"], extra["chat_template_kwargs"]);
        assert_eq!(body["mirostat"].to_string(), "2", "an integer");
        assert_eq!((&body["ratio"], body.get("nothing")), (&json!(0.25), None));
    }
}

#[tokio::test]
async fn unknown_fields_over_grpc_reach_an_openai_compatible_engine() {
    let engine = OpenAiEngine::answering(whole(&["a"])).await;
    let gateway = gateway(&engine).await;
    let with = |name: &str| v1::CompletionRequest {
        extra_fields: Some(Struct {
            fields: [(
                name.to_owned(),
                ProtoValue {
                    kind: Some(Kind::NumberValue(2.0)),
                },
            )]
            .into(),
        }),
        ..grpc::request("hi", 9)
    };
    grpc::collect(gateway.stream(with("mirostat")).await).await;
    assert_eq!(engine.received()[0].body["mirostat"].to_string(), "2");
    for name in ["stream", "model", "n", "messages"] {
        let (_, error) = grpc::grpc_error(&gateway, with(name)).await;
        let expected = (
            ErrorKind::InvalidValue,
            Some(format!("extra_fields.{name}")),
        );
        assert_eq!((error.kind, error.param), expected);
    }
    let tokenway = Setup::test_runner(full_speed()).start().await;
    for server in [&tokenway, &start(Setup::gateway(&[&tokenway])).await] {
        let (_, error) = grpc::grpc_error(server, with("mirostat")).await;
        let expected = (
            ErrorKind::UnsupportedParameter,
            Some("extra_fields".to_owned()),
        );
        assert_eq!((error.kind, error.param), expected);
    }
}

#[tokio::test]
async fn a_field_that_cannot_be_passed_on_is_rejected_and_named() {
    let engine = OpenAiEngine::answering(whole(&["a"])).await;
    let gateway = gateway(&engine).await;
    for (fields, code, param) in [
        (json!({"best_of": 2}), "unknown_parameter", "best_of"),
        (json!({"prompt": "a"}), "unknown_parameter", "prompt"),
        (json!({"cat": u64::MAX}), "invalid_value", "cat"),
        (
            json!({"stream_options": {"cat": 1}, "stream": true}),
            "unknown_parameter",
            "stream_options.cat",
        ),
        (json!({"store": true}), "unsupported_parameter", "store"),
    ] {
        let (response, body) = chat(&fields).fetch(&gateway).await;
        let expected = (code.to_owned(), Some(param.to_owned()));
        assert_eq!((response.status, body.error()), (400, expected), "{fields}");
    }
    assert!(engine.received().is_empty());
}

#[tokio::test]
async fn without_an_engine_that_takes_them_unknown_fields_are_rejected_or_ignored() {
    let tokenway = Setup::test_runner(full_speed()).start().await;
    let fields = json!({"dog": 1, "cat": 2, "max_tokens": 1});
    for setup in [
        Setup::gateway(&[&tokenway]),
        Setup::test_runner(full_speed()),
    ] {
        let server = start(setup.clone()).await;
        let (response, body) = chat(&fields).fetch(&server).await;
        let expected = ("unknown_parameter".to_owned(), Some("dog".to_owned()));
        assert_eq!((response.status, body.error()), (400, expected));

        let server = start(setup.ignoring_unknown_fields()).await;
        let (response, body) = chat(&fields).fetch(&server).await;
        assert_eq!(response.status, 200, "{}", body.text);
        assert_eq!(response.header("x-ignored-fields"), Some("dog,cat"));
    }
}

const VLLM: &str = r#"{"data":[{"id":"v","owned_by":"vllm","max_model_len":64}]}"#;
const LLAMA_CPP: &str =
    r#"{"data":[{"id":"l","owned_by":"llamacpp","meta":{"n_ctx_train":2048}}]}"#;

/// Answers the tokenizer APIs of vLLM and of llama.cpp.
fn tokenizer_answer(request: &Received) -> Vec<Step> {
    let answer = match &*request.path {
        "/tokenize" => json!({"tokens": [5, 6], "count": 2, "max_model_len": 64}),
        "/detokenize" if request.body["model"] == "v" => json!({"prompt": "hi"}),
        "/detokenize" => json!({"content": "hi"}),
        "/apply-template" => json!({"prompt": "<user>hi"}),
        path => panic!("{path} is no tokenizer API"),
    };
    vec![Step::Answer(200, "", answer)]
}

#[tokio::test]
async fn the_tokenizer_of_each_kind_of_engine_serves_both_apis() {
    for (models, context_length) in [(VLLM, 64), (LLAMA_CPP, 2048)] {
        let engine = OpenAiEngine::with_models(models, tokenizer_answer).await;
        let gateway = gateway(&engine).await;
        let (_, body) = post("/tokenize", r#"{"prompt": "hi"}"#)
            .fetch(&gateway)
            .await;
        let expected = json!({"count": 2, "max_model_len": context_length, "tokens": [5, 6]});
        assert_eq!(body.json(), expected);
        let (_, body) = post("/detokenize", r#"{"tokens": [5, 6]}"#)
            .fetch(&gateway)
            .await;
        assert_eq!(body.json(), json!({"prompt": "hi"}));
        assert_eq!(engine.received()[1].body["tokens"], json!([5, 6]));

        let mut client = gateway.grpc().await;
        let text = v1::TokenizeRequest {
            input: Some(TokenizeInput::Text("hi".to_owned())),
            ..v1::TokenizeRequest::default()
        };
        let answer = client.tokenize(text).await.expect("it has a tokenizer");
        assert_eq!(answer.into_inner().token_ids, [5, 6]);
        let ids = v1::DetokenizeRequest {
            token_ids: vec![5, 6],
            ..v1::DetokenizeRequest::default()
        };
        let answer = client.detokenize(ids).await.expect("it has a tokenizer");
        assert_eq!(answer.into_inner().text, "hi");
    }
}

#[tokio::test]
async fn llama_cpp_gets_prompts_over_its_own_api_unless_a_proxy_hides_it() {
    // A server that loads its model answers 503.
    for (props_status, path) in [
        (200, "/completion"),
        (503, "/completion"),
        (404, "/v1/completions"),
    ] {
        let engine = OpenAiEngine::with_props(LLAMA_CPP, props_status, |_| {
            vec![Step::Answer(400, "", json!({"error": {"message": "no"}}))]
        })
        .await;
        let gateway = gateway(&engine).await;
        completion(&json!({"prompt": "hi"})).fetch(&gateway).await;
        assert_eq!(engine.received()[0].path, path);
    }
}

#[tokio::test]
async fn each_kind_of_engine_gets_a_text_and_a_chat_in_its_own_form() {
    let chat =
        json!({"messages": [{"role": "user", "content": "hi"}], "add_special_tokens": false});
    let requests = [json!({"prompt": "hi"}), chat.clone()];

    let engine = OpenAiEngine::with_models(VLLM, tokenizer_answer).await;
    let vllm = gateway(&engine).await;
    for request in &requests {
        post("/tokenize", request.to_string()).fetch(&vllm).await;
    }
    let bodies: Vec<_> = engine.received().into_iter().map(|it| it.body).collect();
    let mut expected_chat = chat.clone();
    expected_chat["model"] = json!("v");
    assert_eq!(
        bodies,
        [json!({"model": "v", "prompt": "hi"}), expected_chat]
    );

    let engine = OpenAiEngine::with_models(LLAMA_CPP, tokenizer_answer).await;
    let llama_cpp = gateway(&engine).await;
    for request in &requests {
        post("/tokenize", request.to_string())
            .fetch(&llama_cpp)
            .await;
    }
    let received = engine.received();
    let shown: Vec<_> = received.iter().map(|it| (&*it.path, &it.body)).collect();
    let tokenize = |content: &str, add_special: bool| json!({"model": "l", "content": content, "add_special": add_special, "with_pieces": false});
    let template = json!({"model": "l", "messages": chat["messages"]});
    let expected = [
        ("/tokenize", &tokenize("hi", true)),
        ("/apply-template", &template),
        ("/tokenize", &tokenize("<user>hi", false)),
    ];
    assert_eq!(shown, expected);
}

#[tokio::test]
async fn an_engine_without_a_tokenizer_answers_404_and_a_broken_answer_is_an_upstream_error() {
    let other = OpenAiEngine::answering(Vec::new()).await;
    let old = OpenAiEngine::with_models(VLLM, |_| {
        vec![Step::Answer(404, "", json!({"detail": "Not Found"}))]
    })
    .await;
    let broken = OpenAiEngine::with_models(VLLM, |_| vec![Step::Answer(200, "", json!({}))]).await;
    for (engine, status, code) in [
        (&other, 404, "not_found"),
        (&old, 404, "not_found"),
        (&broken, 502, "upstream_error"),
    ] {
        let gateway = gateway(engine).await;
        for request in [
            post("/tokenize", r#"{"prompt": "hi"}"#),
            post("/detokenize", r#"{"tokens": [5]}"#),
        ] {
            let (response, body) = request.fetch(&gateway).await;
            assert_eq!((response.status, &*body.error().0), (status, code));
        }
    }
}
