//! A gateway in front of vLLM's gRPC API: what clients of both APIs see, and what the engine receives.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::http::{BodyEnd, completion, expected_error, get, http_error, post, texts};
use support::openai_engine::{OpenAiEngine, STORY, story};
use support::vllm_engine::{Step, VllmEngine, ending, output, prompt, send, whole};
use support::{Setup, TestServer, grpc};
use tokenway::cluster::{ApiKey, EngineSpec};
use tokenway::error::ErrorKind;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;
use tokenway::server::Source;
use tokio::time::timeout;
use tonic::Request;
use tonic::transport::Endpoint;
use tonic_health::ServingStatus;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus as ReportedStatus;
use tonic_health::pb::health_client::HealthClient;
use vllm_proto::finish_info::FinishReason;
use vllm_proto::generate_request::Prompt;
use vllm_proto::{GenerateRequest, RandomSampling, StoppingCriteria};

async fn gateway(engine: &VllmEngine) -> TestServer {
    let gateway = Setup::gateway_at(&[engine.url()]).start().await;
    gateway.ready().await.expect("the engine is up");
    gateway
}

fn stream_body() -> Value {
    json!({"prompt": "hi", "max_tokens": 9, "stream": true, "stream_options": {"include_usage": true}})
}

/// Returns the only request that the engine received.
fn only_request(engine: &VllmEngine) -> GenerateRequest {
    let received = engine.received();
    assert_eq!(received.len(), 1);
    received[0].message.clone()
}

#[tokio::test]
async fn each_token_is_one_line_in_every_format_and_one_token_over_grpc() {
    let expected = ["The ", "c\u{e4}t", "\u{1f600}\n\"x\""];
    let engine = VllmEngine::answering(whole(&expected)).await;
    let gateway = gateway(&engine).await;
    let mut body = stream_body();
    body["stream_options"]["return_token_ids"] = json!(true);

    let (_, body) = completion(&body).fetch(&gateway).await;
    let lines = body.lines();
    assert_eq!(texts(&lines, 0), expected);
    let ids: Vec<_> = lines[..3]
        .iter()
        .map(|line| &line["choices"][0]["token_ids"])
        .collect();
    assert_eq!(ids, [&json!([10]), &json!([11]), &json!([12])]);
    assert_eq!(lines[2]["choices"][0]["finish_reason"], "length");
    assert_eq!((lines.len(), &lines[0]["model"]), (4, &json!("m")));
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6});
    assert_eq!(lines[3]["usage"], usage);
    assert_eq!(body.end, BodyEnd::Clean);

    let request = completion(&stream_body()).accept("text/event-stream");
    let (_, body) = request.fetch(&gateway).await;
    let events = body.events();
    assert_eq!((events.len(), events[4]), (5, "[DONE]"));

    let unary = json!({"prompt": "hi", "max_tokens": 9});
    let (_, body) = completion(&unary).fetch(&gateway).await;
    assert_eq!(body.json()["choices"][0]["text"], expected.concat());
    assert_eq!(body.json()["usage"], usage);

    let over_grpc = grpc::collect(gateway.stream(grpc::request("hi", 9)).await).await;
    assert_eq!(over_grpc.texts(0), expected);
    let ids: Vec<_> = over_grpc.choices[0]
        .tokens
        .iter()
        .map(|token| token.id)
        .collect();
    assert_eq!(ids, [10, 11, 12]);
    let started = over_grpc.started.as_ref().expect("it starts");
    assert_eq!((started.prompt_tokens, started.text_only), (3, false));
    let seed = engine.received()[3]
        .message
        .sampling
        .as_ref()
        .and_then(|it| it.seed);
    assert_eq!(Some(started.seed), seed);
    assert_eq!(over_grpc.choices[0].finish, v1::FinishReason::Length);
    assert_eq!(
        (
            over_grpc.usage().prompt_tokens,
            over_grpc.usage().completion_tokens
        ),
        (3, 3)
    );
    assert_eq!(engine.cancelled(), 0, "a whole response is not cancelled");
}

#[tokio::test]
async fn tokens_that_arrive_together_are_lines_of_their_own() {
    let engine = VllmEngine::answering(vec![
        prompt(3),
        send(output(0, "", &[10])),
        send(output(0, "\u{e9}b", &[11, 12])),
        send(ending(output(0, "", &[2]), FinishReason::Stop, 4)),
        Step::End,
    ])
    .await;
    let gateway = gateway(&engine).await;
    let (_, body) = completion(&stream_body()).fetch(&gateway).await;
    let lines = body.lines();
    assert_eq!(texts(&lines, 0), ["", "", "\u{e9}b", ""]);
    assert_eq!(lines[3]["choices"][0]["finish_reason"], "stop");
    assert_eq!(lines[4]["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn the_choices_of_a_request_are_told_apart() {
    let engine = VllmEngine::answering(vec![
        prompt(3),
        send(output(1, "x", &[20])),
        send(output(0, "a", &[10])),
        send(ending(output(1, "y", &[21]), FinishReason::Stop, 2)),
        send(output(0, "b", &[11])),
        send(ending(output(0, "c", &[12]), FinishReason::Length, 3)),
        Step::End,
    ])
    .await;
    let gateway = gateway(&engine).await;
    let mut body = stream_body();
    body["n"] = json!(2);
    let (_, body) = completion(&body).fetch(&gateway).await;
    let lines = body.lines();
    assert_eq!(texts(&lines, 0), ["a", "b", "c"]);
    assert_eq!(texts(&lines, 1), ["x", "y"]);
    assert_eq!(lines[5]["usage"]["completion_tokens"], 5);
    let sampling = only_request(&engine).sampling.expect("it is set");
    assert_eq!(sampling.num_sequences, 2);

    let request = v1::CompletionRequest {
        n: Some(2),
        ..grpc::request("hi", 9)
    };
    let over_grpc = grpc::collect(gateway.stream(request).await).await;
    assert_eq!(
        (over_grpc.texts(0), over_grpc.texts(1)),
        (vec!["a", "b", "c"], vec!["x", "y"])
    );
    let finish: Vec<_> = over_grpc
        .choices
        .iter()
        .map(|choice| choice.finish)
        .collect();
    assert_eq!(finish, [v1::FinishReason::Length, v1::FinishReason::Stop]);
}

#[tokio::test]
async fn the_engine_receives_the_options_of_the_client() {
    let engine = VllmEngine::answering(whole(&["a"])).await;
    let gateway = gateway(&engine).await;
    let body = json!({
        "model": "other", "prompt": [3, 1], "max_tokens": 9, "min_tokens": 1, "seed": -4, "temperature": 0.5,
        "top_p": 0.25, "top_k": 4, "min_p": 0.125, "presence_penalty": 1.0, "frequency_penalty": -1.0,
        "repetition_penalty": 1.5, "logit_bias": {"3": -2.0}, "stop": ["x", "yz"], "stop_token_ids": [2],
        "include_stop_str_in_output": true, "ignore_eos": true, "priority": -5,
    });
    let request = completion(&body).header("x-request-id", "an-id");
    let (response, body) = request.fetch(&gateway).await;
    assert_eq!(response.status, 200, "{}", body.text);
    assert_eq!(body.json()["model"], "m");
    let received = only_request(&engine);
    assert_eq!((&*received.model, received.priority), ("m", -5));
    assert!(
        received.request_id.starts_with("an-id"),
        "{}",
        received.request_id
    );
    let ids = vllm_proto::TokenIds { ids: vec![3, 1] };
    assert_eq!(received.prompt, Some(Prompt::TokenIds(ids)));
    assert_eq!(received.temperature, Some(0.5));
    let sampling = RandomSampling {
        num_sequences: 1,
        top_k: Some(4),
        top_p: Some(0.25),
        min_p: Some(0.125),
        seed: Some(-4),
    };
    assert_eq!(received.sampling, Some(sampling));
    let stopping = StoppingCriteria {
        max_new_tokens: 9,
        min_new_tokens: 1,
        stop_token_ids: vec![2],
        stop_strings: vec!["x".to_owned(), "yz".to_owned()],
        include_stop_strings: true,
        ignore_eos: true,
        thinking_token_budget: None,
    };
    assert_eq!(received.stopping, Some(stopping));
    let decoding = received.decoding.expect("it is set");
    assert_eq!(
        (decoding.presence_penalty, decoding.frequency_penalty),
        (1.0, -1.0)
    );
    assert_eq!(
        (decoding.repetition_penalty, decoding.logit_bias[&3]),
        (1.5, -2.0)
    );
}

#[tokio::test]
async fn a_stream_is_delivered_while_the_engine_still_generates() {
    let mut steps = whole(&["a", "b"]);
    steps.insert(2, Step::WaitForSignal);
    let engine = VllmEngine::answering(steps).await;
    let gateway = gateway(&engine).await;
    let mut response = completion(&stream_body()).send(&gateway).await;
    let first = response.read_json_line().await.expect("a line");
    assert_eq!(first["choices"][0]["text"], "a");
    engine.resume();
    let second = response.read_json_line().await.expect("a line");
    assert_eq!(second["choices"][0]["text"], "b");
}

#[tokio::test]
async fn each_token_has_its_log_probability() {
    let with_logprob = |mut output: vllm_proto::SequenceOutput, logprob| {
        output.logprobs = vec![logprob];
        output
    };
    let last = ending(output(0, "b", &[11]), FinishReason::Length, 2);
    let engine = VllmEngine::answering(vec![
        prompt(3),
        send(with_logprob(output(0, "a", &[10]), -0.5)),
        send(with_logprob(last, -0.25)),
        Step::End,
    ])
    .await;
    let gateway = gateway(&engine).await;
    let body = json!({"prompt": "hi", "max_tokens": 2, "logprobs": 0});
    let (_, body) = completion(&body).fetch(&gateway).await;
    let expected = json!({
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"a": -0.5}, {"b": -0.25}],
        "text_offset": [0, 1],
    });
    assert_eq!(body.json()["choices"][0]["logprobs"], expected);
    let options = only_request(&engine).response.expect("it is set");
    assert!(options.output_logprobs);

    let request = v1::CompletionRequest {
        logprobs: Some(0),
        ..grpc::request("hi", 2)
    };
    let over_grpc = grpc::collect(gateway.stream(request).await).await;
    let tokens = over_grpc.choices[0].tokens.iter();
    let logprobs: Vec<_> = tokens
        .map(|token| token.logprobs.as_ref().and_then(|it| it.logprob))
        .collect();
    assert_eq!(logprobs, [Some(-0.5), Some(-0.25)]);
}

#[tokio::test]
async fn a_field_that_vllms_grpc_api_does_not_have_is_rejected_and_named() {
    let engine = VllmEngine::answering(whole(&["a"])).await;
    let gateway = gateway(&engine).await;
    for (field, value) in [
        ("logprobs", json!(1)),
        ("echo", json!(true)),
        ("suffix", json!("end")),
    ] {
        let mut body = json!({"prompt": "hi"});
        body[field] = value;
        let answer = http_error(&gateway, completion(&body)).await;
        assert_eq!(
            answer,
            expected_error(400, "unsupported_parameter", Some(field))
        );
    }
    let chat = json!({"messages": [{"role": "user", "content": "hi"}]});
    let (response, body) = post("/v1/chat/completions", chat.to_string())
        .fetch(&gateway)
        .await;
    let (code, param) = body.error();
    assert_eq!((response.status, &*code), (400, "unsupported_parameter"));
    assert_eq!(param.as_deref(), Some("messages"));
    assert!(body.text.contains("openai+http://"), "{}", body.text);

    let chat = v1::CompletionRequest {
        input: Some(Input::Chat(v1::Chat {
            messages: vec![v1::ChatMessage {
                role: "user".to_owned(),
                ..v1::ChatMessage::default()
            }],
        })),
        ..v1::CompletionRequest::default()
    };
    let (_, error) = grpc::grpc_error(&gateway, chat).await;
    assert_eq!(
        (error.kind, error.param.as_deref()),
        (ErrorKind::UnsupportedParameter, Some("chat"))
    );
    let tokenize = post("/tokenize", json!({"prompt": "hi"}).to_string());
    assert_eq!(http_error(&gateway, tokenize).await.0, 404);
    assert!(engine.received().is_empty());
}

#[tokio::test]
async fn a_chat_goes_to_an_engine_of_the_same_model_that_has_chats() {
    let without_chats = VllmEngine::answering(whole(&["a"])).await;
    let with_chats = OpenAiEngine::start(story).await;
    let urls = [without_chats.url(), with_chats.url()];
    let gateway = Setup::gateway_at(&urls).start().await;
    gateway.ready().await.expect("an engine is up");
    let chat = json!({"messages": [{"role": "user", "content": "hi"}], "model": "m"}).to_string();
    for _ in 0..2 {
        let (_, body) = post("/v1/chat/completions", chat.clone())
            .fetch(&gateway)
            .await;
        let content = &body.json()["choices"][0]["message"]["content"];
        assert_eq!(content, &STORY.concat(), "{}", body.text);
    }
    assert!(without_chats.received().is_empty());
}

#[tokio::test]
async fn the_engine_tells_the_names_and_the_context_length_of_its_model() {
    let engine = VllmEngine::answering(whole(&["a"])).await;
    let gateway = gateway(&engine).await;
    let (_, listed) = get("/v1/models").fetch(&gateway).await;
    assert_eq!(listed.json()["data"][0]["id"], "m");
    let request = v1::GetModelRequest {
        model: "other".to_owned(),
    };
    let found = gateway.grpc().await.get_model(request).await;
    let model = found
        .expect("it is found")
        .into_inner()
        .model
        .expect("it is set");
    assert_eq!(
        (&*model.name, model.context_length, &*model.runner),
        ("m", 64, "vllm")
    );
    assert!(model.unsupported.contains(&"chat".to_owned()));
    let unknown = completion(&json!({"prompt": "hi", "model": "unknown"}));
    let answer = http_error(&gateway, unknown).await;
    assert_eq!(
        answer,
        expected_error(404, "model_not_found", Some("model"))
    );
    assert!(engine.received().is_empty());
}

#[tokio::test]
async fn an_engine_is_up_while_its_health_service_says_so() {
    let mut engine = VllmEngine::answering(whole(&["a"])).await;
    let gateway = gateway(&engine).await;
    let channel = Endpoint::from_shared(gateway.grpc_url()).expect("it is a URL");
    let mut client = HealthClient::new(channel.connect_lazy());
    let watching = client
        .watch(Request::new(HealthCheckRequest::default()))
        .await;
    let mut reports = watching.expect("health can be watched").into_inner();
    let mut next_status = async || {
        let report = timeout(Duration::from_secs(30), reports.message()).await;
        let report = report.expect("the health changes within the timeout");
        let report = report.expect("the stream goes on");
        report.expect("the stream goes on").status()
    };
    assert_eq!(next_status().await, ReportedStatus::Serving);

    engine.set_health(ServingStatus::NotServing).await;
    assert_eq!(next_status().await, ReportedStatus::NotServing);
    engine.rename_model("renamed");
    engine.set_health(ServingStatus::Serving).await;
    assert_eq!(next_status().await, ReportedStatus::Serving);
    let (_, listed) = get("/v1/models").fetch(&gateway).await;
    assert_eq!(listed.json()["data"][0]["id"], "renamed");
    engine.kill();
    assert_eq!(next_status().await, ReportedStatus::NotServing);
}

#[tokio::test]
async fn the_key_of_an_engine_is_sent_with_every_request() {
    let engine = VllmEngine::answering(whole(&["a"])).await;
    let address = engine.url().parse().expect("an address");
    let spec = EngineSpec {
        api_key: ApiKey::new("a-key"),
        ..EngineSpec::at(address)
    };
    let mut setup = Setup::gateway_at(&[engine.url()]);
    let Source::Remote(cluster) = &mut setup.parts.source else {
        panic!("a gateway has remote engines");
    };
    cluster.engines = vec![spec];
    let gateway = setup.start().await;
    gateway.ready().await.expect("the engine is up");
    let (_, body) = completion(&json!({"prompt": "hi"})).fetch(&gateway).await;
    assert_eq!(body.json()["choices"][0]["text"], "a");
    let received = engine.received();
    assert_eq!(received[0].authorization.as_deref(), Some("Bearer a-key"));
}
