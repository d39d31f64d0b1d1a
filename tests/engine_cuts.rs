//! Streams that break behind the gateway, through both APIs. Another request continues each of them, and the client
//! sees only the whole text, or exactly one error.

mod support;

use serde_json::{Value, json};
use support::TestServer;
use support::grpc;
use support::http::{BodyEnd, completion, post, texts};
use support::openai_engine::{
    OpenAiEngine, STORY, Step, chat_delta, delta, event, story, story_until,
};
use support::story::{
    APIS, failed, gateway, honest, impatient, over_grpc, over_http, prompt_of, story_request,
    story_text, whole_story,
};
use tokenway::cluster::RoutePolicy;
use tokenway::proto::v1;
use tonic::Code;

/// Returns the ends of a stream that breaks after some words.
fn cuts() -> Vec<Vec<Step>> {
    let chunk = |text: &str| Step::Chunk(text.to_owned());
    vec![
        vec![Step::Fin],
        vec![Step::Rst],
        vec![Step::End],
        vec![chunk("data: [DONE]\n\n"), Step::End],
        vec![chunk("data: {\"choices\":[{\"index\":0,\"te"), Step::Fin],
        vec![
            chunk("data: {\"choices\":[{\"index\":0,\"te\n\n"),
            Step::End,
        ],
        vec![
            chunk("data: {\"error\":{\"message\":\"x\"}}\n\n"),
            Step::End,
        ],
        vec![chunk("event: error\ndata: x\n\n"), Step::End],
        vec![event(&delta("", Some("abort"))), Step::End],
        vec![
            Step::Bytes(b"data: {\"choices\":[{\"index\":0,\"text\":\" f\xc3"),
            Step::Fin,
        ],
        vec![Step::WaitForClose],
    ]
}

#[tokio::test]
async fn a_stream_that_breaks_goes_on_at_another_engine_after_the_last_word() {
    for end in cuts() {
        for words in [1, 5, 7] {
            let script = end.clone();
            let first =
                OpenAiEngine::start(move |received| story_until(received, words, &script)).await;
            let second = honest().await;
            let gateway = gateway(&[&first, &second], impatient()).await;
            assert_eq!(
                over_http(&gateway).await,
                whole_story(1),
                "{end:?} after {words}"
            );
            assert_eq!(
                over_grpc(&gateway).await,
                whole_story(1),
                "{end:?} after {words}"
            );
            let prompts: Vec<_> = second.received().iter().map(prompt_of).collect();
            let continued = format!("hi{}", STORY[..words].concat());
            assert_eq!(prompts, [continued.clone(), continued]);
        }
    }
}

#[tokio::test]
async fn a_stream_goes_on_at_its_own_engine_if_there_is_no_other() {
    let engine = OpenAiEngine::start(|received| story_until(received, 3, &[Step::Fin])).await;
    let gateway = gateway(&[&engine], RoutePolicy::default()).await;
    for api in APIS {
        assert_eq!(api.story(&gateway).await, whole_story(2));
    }
    let received = engine.received();
    let limits: Vec<_> = received.iter().map(|it| &it.body["max_tokens"]).collect();
    assert_eq!(limits, [50, 47, 44, 50, 47, 44]);
}

#[tokio::test]
async fn a_stream_that_falls_silent_goes_on_at_its_own_engine_if_there_is_no_other() {
    let silent = [Step::WaitForClose];
    let engine = OpenAiEngine::start(move |received| story_until(received, 5, &silent)).await;
    let gateway = gateway(&[&engine], impatient()).await;
    assert_eq!(over_http(&gateway).await, whole_story(1));
    assert_eq!(over_grpc(&gateway).await, whole_story(1));
}

#[tokio::test]
async fn a_stream_that_no_engine_can_continue_ends_with_one_error() {
    let engine = OpenAiEngine::start(|received| match &*prompt_of(received) {
        "hi" => story_until(received, 2, &[Step::Rst]),
        _ => vec![failed(500)],
    })
    .await;
    let gateway = gateway(&[&engine], RoutePolicy::default()).await;
    let body = json!({"model": "m", "prompt": "hi", "max_tokens": 50, "stream": true});
    let (_, body) = completion(&body).fetch(&gateway).await;
    let lines = body.lines();
    assert_eq!((lines.len(), &body.end), (3, &BodyEnd::Unclean));
    assert_eq!(texts(&lines[..2], 0), STORY[..2]);
    assert_eq!(lines[2]["error"]["code"], "upstream_error");
    let seen = grpc::collect(gateway.stream(story_request()).await).await;
    let status = seen.error.as_ref().expect("the stream fails");
    assert_eq!((status.code(), seen.token_count(0)), (Code::Aborted, 2));
}

/// Returns a chat of one message.
fn chat() -> Value {
    json!({
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": true,
        "stream_options": {"include_usage": true, "include_timings": true},
    })
}

/// Asks for the story as a chat. Returns its text and the method of its resumption.
async fn as_chat(gateway: &TestServer) -> (String, Value) {
    let (_, body) = post("/v1/chat/completions", chat().to_string())
        .accept("application/x-ndjson")
        .fetch(gateway)
        .await;
    assert_eq!(body.end, BodyEnd::Clean, "{}", body.text);
    let lines = body.lines();
    let contents = lines
        .iter()
        .filter_map(|line| line["choices"][0]["delta"]["content"].as_str());
    let text = contents.collect();
    let method = lines.last().expect("a line")["timings"]["resumption_method"].clone();
    (text, method)
}

const LLAMA_CPP: &str = r#"{"data":[{"id":"m","owned_by":"llamacpp"}]}"#;

#[tokio::test]
async fn a_chat_goes_on_after_the_start_of_the_answer_where_the_engine_supports_it() {
    let first = OpenAiEngine::start(|received| story_until(received, 4, &[Step::Rst])).await;
    let second = OpenAiEngine::with_models(LLAMA_CPP, story).await;
    let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
    assert_eq!(as_chat(&gateway).await, (story_text(), json!("text")));
    let messages = &second.received()[0].body["messages"];
    assert_eq!(messages[1]["role"], "assistant");
    assert_eq!(messages[1]["content"], STORY[..4].concat());
}

#[tokio::test]
async fn a_refused_start_of_the_answer_is_no_error_of_the_client() {
    let first = OpenAiEngine::start(|received| story_until(received, 4, &[Step::Rst])).await;
    let second = OpenAiEngine::with_models(LLAMA_CPP, |received| {
        let messages = received.body["messages"].as_array().expect("a chat");
        match messages.len() {
            1 => story(received),
            _ => vec![failed(400)],
        }
    })
    .await;
    let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
    assert_eq!(as_chat(&gateway).await, (story_text(), json!("replay")));
    assert_eq!(second.received().len(), 2);
}

#[tokio::test]
async fn a_replay_that_differs_ends_the_stream_with_one_error() {
    let first = OpenAiEngine::start(|received| story_until(received, 2, &[Step::Rst])).await;
    let other = vec![
        Step::Head,
        event(&chat_delta("Once", None)),
        event(&chat_delta(" over", Some("stop"))),
        Step::End,
    ];
    let second = OpenAiEngine::answering(other).await;
    let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
    let (_, body) = post("/v1/chat/completions", chat().to_string())
        .accept("application/x-ndjson")
        .fetch(&gateway)
        .await;
    assert_eq!(body.end, BodyEnd::Unclean);
    let lines = body.lines();
    let errors = lines.iter().filter(|line| line.get("error").is_some());
    assert_eq!(errors.count(), 1, "{lines:?}");
    assert!(!body.text.contains("over"), "{}", body.text);
}

#[tokio::test]
async fn each_choice_goes_on_by_itself() {
    let two = |text: [&str; 2], reason: [Option<&str>; 2]| {
        let choice =
            |at: usize| json!({"index": at, "text": text[at], "finish_reason": reason[at]});
        event(&json!({"model": "m", "choices": [choice(0), choice(1)]}))
    };
    let first = OpenAiEngine::answering(vec![
        Step::Head,
        two(["Once", "Once"], [None, None]),
        two([" upon", " more"], [None, Some("stop")]),
        Step::Rst,
    ])
    .await;
    let second = honest().await;
    let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
    let body = json!({"model": "m", "prompt": "hi", "n": 2, "max_tokens": 50});
    let (_, body) = completion(&body).fetch(&gateway).await;
    let choices = &body.json()["choices"];
    assert_eq!(choices[0]["text"], story_text());
    assert_eq!(choices[1]["text"], "Once more");
    assert_eq!(body.json()["usage"]["completion_tokens"], 10);
    assert_eq!(second.received().len(), 1);
    assert_eq!(second.received()[0].body["n"], Value::Null);

    let request = v1::CompletionRequest {
        n: Some(2),
        ..story_request()
    };
    let seen = grpc::collect(gateway.stream(request).await).await;
    assert_eq!(seen.texts(0).concat(), story_text());
    assert_eq!(seen.texts(1).concat(), "Once more");
    assert_eq!(seen.usage().completion_tokens, 10);
}

#[tokio::test]
async fn the_default_limit_of_a_completion_holds_across_breaks() {
    let engine = OpenAiEngine::start(|received| story_until(received, 3, &[Step::Fin])).await;
    let gateway = gateway(&[&engine], RoutePolicy::default()).await;
    let body = json!({"model": "m", "prompt": "hi", "stream": true});
    let (_, body) = completion(&body).fetch(&gateway).await;
    assert_eq!(texts(&body.lines(), 0).concat(), story_text());
    let received = engine.received();
    let limits = received.iter().map(|it| it.body["max_tokens"].as_u64());
    let limits: Vec<_> = limits.collect();
    assert_eq!(limits, [Some(16), Some(13), Some(10)]);
}
