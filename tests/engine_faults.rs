//! Faults of an engine behind the gateway, through both APIs. A second engine answers where the first one fails, and
//! the client sees only the whole text.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use support::grpc;
use support::http::{BodyEnd, completion, post, texts};
use support::metrics::MetricsSnapshot;
use support::openai_engine::{
    OpenAiEngine, Received, STORY, Step, chat_delta, delta, event, story, story_until,
};
use support::{Setup, TestServer, route_with_fallbacks};
use tokenway::cluster::RoutePolicy;
use tokenway::proto::v1;
use tonic::Code;

/// The story as the client gets it in one piece.
fn story_text() -> String {
    STORY.concat()
}

/// A policy with short limits, so that a silent engine is left soon.
fn impatient() -> RoutePolicy {
    RoutePolicy {
        first_token_timeout: Duration::from_millis(300),
        stall_timeout: Duration::from_millis(300),
        ..RoutePolicy::default()
    }
}

/// Starts a gateway that uses the first engine, and the second one as its fallback.
async fn gateway(engines: &[&OpenAiEngine], policy: RoutePolicy) -> TestServer {
    let urls: Vec<_> = engines.iter().map(|engine| engine.url()).collect();
    let route = route_with_fallbacks(engines.len() - 1, policy);
    let gateway = Setup::route(&urls, route).start().await;
    gateway.ready().await.expect("an engine is up");
    gateway
}

/// What a client gets of a completion, in any API.
#[derive(Debug, PartialEq)]
struct Seen {
    text: String,
    prompt_tokens: u64,
    completion_tokens: u64,
    resumptions: u64,
}

/// Returns what a client gets of the whole story: its usage is that of an undisturbed run.
fn whole_story(resumptions: u64) -> Seen {
    Seen {
        text: story_text(),
        prompt_tokens: 3,
        completion_tokens: 8,
        resumptions,
    }
}

/// Asks for the story over HTTP, as a stream. The stream must be whole.
async fn over_http(gateway: &TestServer) -> Seen {
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
async fn over_grpc(gateway: &TestServer) -> Seen {
    let request = v1::CompletionRequest {
        model: "m".to_owned(),
        ..grpc::request("hi", 50)
    };
    let seen = grpc::collect(gateway.stream(request).await).await;
    assert!(seen.error.is_none(), "{:?}", seen.error);
    Seen {
        text: seen.texts(0).concat(),
        prompt_tokens: seen.usage().prompt_tokens.into(),
        completion_tokens: seen.usage().completion_tokens.into(),
        resumptions: seen.timings().resumptions.into(),
    }
}

/// Starts an engine that answers its first requests with these steps, one after the other, and tells the story later.
async fn failing_first(answers: Vec<Vec<Step>>) -> OpenAiEngine {
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

async fn honest() -> OpenAiEngine {
    OpenAiEngine::start(story).await
}

fn busy(headers: &'static str) -> Step {
    Step::Answer(429, headers, json!({"error": {"message": "slow down"}}))
}

fn failed(status: u16) -> Step {
    Step::Answer(status, "", json!({"error": {"message": "oops"}}))
}

/// Returns the times between the requests that an engine received.
fn gaps(engine: &OpenAiEngine) -> Vec<Duration> {
    let received = engine.received();
    let pairs = received.windows(2);
    pairs.map(|pair| pair[1].at - pair[0].at).collect()
}

#[tokio::test]
async fn a_busy_engine_without_an_alternative_is_asked_again_when_it_says() {
    for headers in ["retry-after: 1\r\n", ""] {
        let engine = failing_first(vec![vec![busy(headers)]]).await;
        let gateway = gateway(&[&engine], RoutePolicy::default()).await;
        assert_eq!(over_http(&gateway).await, whole_story(0));
        assert!(
            gaps(&engine)[0] >= Duration::from_secs(1),
            "{:?}",
            gaps(&engine)
        );
    }
}

#[tokio::test]
async fn an_engine_that_stays_busy_is_asked_three_times_and_its_answer_passed_on() {
    let engine = OpenAiEngine::answering(vec![busy("retry-after: 1\r\n")]).await;
    let gateway = gateway(&[&engine], RoutePolicy::default()).await;
    let (response, body) = completion(&json!({"model": "m", "prompt": "hi"}))
        .fetch(&gateway)
        .await;
    assert_eq!(
        (response.status, response.header("retry-after")),
        (429, Some("1"))
    );
    assert_eq!(body.error().0, "queue_full");
    assert_eq!(engine.received().len(), 3);
    assert!(
        gaps(&engine)
            .iter()
            .all(|gap| *gap >= Duration::from_secs(1))
    );
}

#[tokio::test]
async fn a_busy_engine_is_left_at_once_if_another_can_answer() {
    let (first, second) = (
        OpenAiEngine::answering(vec![busy("retry-after: 9\r\n")]).await,
        honest().await,
    );
    let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
    assert_eq!(over_http(&gateway).await, whole_story(0));
    assert_eq!(over_grpc(&gateway).await, whole_story(0));
    assert_eq!(
        first.received().len(),
        1,
        "the second request goes elsewhere at once"
    );
    assert_eq!(second.received().len(), 2);
}

#[tokio::test]
async fn a_fault_that_may_pass_is_tried_once_more_on_the_same_engine() {
    for fault in [vec![failed(500)], vec![Step::Rst], vec![Step::Fin]] {
        let (first, second) = (failing_first(vec![fault]).await, honest().await);
        let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
        assert_eq!(over_http(&gateway).await, whole_story(0));
        assert_eq!((first.received().len(), second.received().len()), (2, 0));
    }
}

#[tokio::test]
async fn an_engine_that_keeps_failing_is_replaced() {
    for fault in [failed(500), failed(503), Step::Rst] {
        let (first, second) = (
            OpenAiEngine::answering(vec![fault.clone()]).await,
            honest().await,
        );
        let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
        assert_eq!(over_http(&gateway).await, whole_story(0), "{fault:?}");
        assert_eq!(over_grpc(&gateway).await, whole_story(0), "{fault:?}");
        assert!(first.received().len() <= 4, "{fault:?}");
    }
}

#[tokio::test]
async fn an_engine_that_cannot_be_reached_is_replaced() {
    let second = honest().await;
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        format!("openai+http://{address}/v1")
    };
    for url in [closed, "openai+http://no-such-host.invalid:1/v1".to_owned()] {
        let route = route_with_fallbacks(1, RoutePolicy::default());
        let gateway = Setup::route(&[url.clone(), second.url()], route)
            .start()
            .await;
        gateway.ready().await.expect("the second engine is up");
        assert_eq!(over_http(&gateway).await, whole_story(0), "{url}");
        assert_eq!(over_grpc(&gateway).await, whole_story(0), "{url}");
    }
}

#[tokio::test]
async fn an_engine_without_a_first_token_is_replaced_and_not_asked_again() {
    let never_answers = vec![Step::WaitForClose];
    let no_token = vec![Step::Head, Step::WaitForClose];
    let only_a_role = vec![
        Step::Head,
        event(&json!({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})),
        Step::WaitForClose,
    ];
    for steps in [never_answers, no_token, only_a_role] {
        let (first, second) = (OpenAiEngine::answering(steps).await, honest().await);
        let gateway = gateway(&[&first, &second], impatient()).await;
        assert_eq!(over_http(&gateway).await, whole_story(0));
        first.wait_for_closed(1).await;
        assert_eq!(over_grpc(&gateway).await, whole_story(0));
        first.wait_for_closed(2).await;
        assert_eq!((first.received().len(), second.received().len()), (2, 2));
    }
}

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

fn prompt_of(received: &Received) -> String {
    received.body["prompt"].as_str().expect("a text").to_owned()
}

#[tokio::test]
async fn a_stream_goes_on_at_its_own_engine_if_there_is_no_other() {
    let engine = OpenAiEngine::start(|received| story_until(received, 3, &[Step::Fin])).await;
    let gateway = gateway(&[&engine], RoutePolicy::default()).await;
    assert_eq!(over_http(&gateway).await, whole_story(2));
    let limits: Vec<_> = engine
        .received()
        .iter()
        .map(|received| received.body["max_tokens"].as_u64())
        .collect();
    assert_eq!(limits, [Some(50), Some(47), Some(44)]);
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
    let request = v1::CompletionRequest {
        model: "m".to_owned(),
        ..grpc::request("hi", 50)
    };
    let seen = grpc::collect(gateway.stream(request).await).await;
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
async fn a_request_that_is_at_fault_itself_is_not_tried_again() {
    let (first, second) = (
        OpenAiEngine::answering(vec![failed(400)]).await,
        honest().await,
    );
    let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
    for _ in 0..8 {
        let body = json!({"model": "m", "prompt": "hi"});
        let (response, body) = completion(&body).fetch(&gateway).await;
        assert_eq!((response.status, &*body.error().0), (400, "invalid_value"));
    }
    // The breaker counts no such answer.
    assert_eq!((first.received().len(), second.received().len()), (8, 0));
}

#[tokio::test]
async fn a_prompt_that_is_too_long_goes_to_a_target_with_a_larger_context_only() {
    let too_long = json!({"error": {"message": "too long", "code": "context_length_exceeded"}});
    let models = |length: u32| format!(r#"{{"data":[{{"id":"m","max_model_len":{length}}}]}}"#);
    for (length, status) in [(64, 400), (128, 200)] {
        let answer = Step::Answer(400, "", too_long.clone());
        let first = OpenAiEngine::with_models(&models(64), move |_| vec![answer.clone()]).await;
        let second = OpenAiEngine::with_models(&models(length), story).await;
        let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
        let request = completion(&json!({"model": "m", "prompt": "hi"}));
        // The larger context is known once the gateway has read the second engine's list of models.
        let answer = async {
            loop {
                let (response, body) = request.clone().fetch(&gateway).await;
                if response.status == status {
                    return body;
                }
            }
        };
        let answer = tokio::time::timeout(Duration::from_secs(10), answer).await;
        let answer = answer.expect("the gateway reads the lists of models");
        if status == 400 {
            assert_eq!(answer.error().0, "context_length_exceeded");
            assert!(second.received().is_empty());
        }
    }
}

#[tokio::test]
async fn a_breaker_opens_on_faults_and_one_probe_closes_it() {
    let works = Arc::new(AtomicUsize::new(0));
    let is_working = Arc::clone(&works);
    let first = OpenAiEngine::start(move |received| match is_working.load(Ordering::Relaxed) {
        0 => vec![failed(500)],
        _ => story(received),
    })
    .await;
    let second = honest().await;
    let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
    for _ in 0..20 {
        assert_eq!(over_http(&gateway).await, whole_story(0));
    }
    let tried = first.received().len();
    assert!(tried <= 6, "{tried} requests reached the failing engine");
    let metrics = gateway.telemetry().render();
    let opened = r#"tokenway_engine_breaker_changes_total{engine="0",state="open"} 1"#;
    assert!(metrics.contains(opened), "{metrics}");
    works.store(1, Ordering::Relaxed);
    let recovery = async {
        while first.received().len() == tried {
            assert_eq!(over_http(&gateway).await, whole_story(0));
        }
    };
    let recovered = tokio::time::timeout(Duration::from_secs(5), recovery).await;
    recovered.expect("the first engine gets requests within seconds");
    let answered = second.received().len();
    assert_eq!(over_http(&gateway).await, whole_story(0));
    assert_eq!(second.received().len(), answered, "the breaker is closed");
}

#[tokio::test]
async fn a_client_that_leaves_between_two_tries_ends_them() {
    let engine = OpenAiEngine::answering(vec![busy("retry-after: 1\r\n")]).await;
    let gateway = gateway(&[&engine], RoutePolicy::default()).await;
    let request = completion(&json!({"model": "m", "prompt": "hi"}));
    let client = tokio::spawn({
        let address = gateway.http_address();
        async move { request.send_to(&address).await }
    });
    engine.wait_for_requests(1).await;
    client.abort();
    let second_try = engine.wait_for_requests(2);
    let waited = tokio::time::timeout(Duration::from_millis(2_500), second_try).await;
    assert!(waited.is_err(), "the request was sent again for nobody");
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
}

#[tokio::test]
async fn requests_wait_for_a_saturated_target_up_to_the_depth_of_the_queue() {
    let engine = OpenAiEngine::start(|received| match &*prompt_of(received) {
        "hi" => story_until(received, 1, &[Step::WaitForClose]),
        _ => vec![failed(400)],
    })
    .await;
    let policy = RoutePolicy {
        max_concurrency: Some(1),
        queue_depth: 1,
        ..RoutePolicy::default()
    };
    let gateway = gateway(&[&engine], policy).await;
    let stream = json!({"model": "m", "prompt": "hi", "stream": true, "max_tokens": 50});
    let mut running = completion(&stream).send(&gateway).await;
    running.read_line().await.expect("the first word");
    let waiting = tokio::spawn({
        let address = gateway.http_address();
        let request = completion(&json!({"model": "m", "prompt": "other"}));
        async move { request.send_to(&address).await.status }
    });
    let queued = async {
        while MetricsSnapshot::take(&gateway).get("tokenway_requests_queued") < 1.0 {
            tokio::task::yield_now().await;
        }
    };
    let queued = tokio::time::timeout(Duration::from_secs(10), queued).await;
    queued.expect("the second request waits");
    let third = completion(&json!({"model": "m", "prompt": "third"}));
    let (response, _) = third.fetch(&gateway).await;
    assert_eq!(response.status, 429);
    assert_eq!(engine.received().len(), 1);
    drop(running);
    assert_eq!(waiting.await.expect("it is answered"), 400);
}

#[tokio::test]
async fn a_fallback_takes_what_the_queue_has_no_room_for() {
    let first =
        OpenAiEngine::start(|received| story_until(received, 1, &[Step::WaitForClose])).await;
    let second = honest().await;
    let policy = RoutePolicy {
        max_concurrency: Some(1),
        queue_depth: 0,
        ..RoutePolicy::default()
    };
    let gateway = gateway(&[&first, &second], policy).await;
    let stream = json!({"model": "m", "prompt": "hi", "stream": true, "max_tokens": 50});
    let mut running = completion(&stream).send(&gateway).await;
    running.read_line().await.expect("the first word");
    assert_eq!(over_http(&gateway).await, whole_story(0));
    assert_eq!((first.received().len(), second.received().len()), (1, 1));
}

#[tokio::test]
async fn many_requests_at_once_survive_an_engine_that_fails_all_of_them() {
    for fault in [busy(""), failed(500), Step::Rst] {
        let (first, second) = (
            OpenAiEngine::answering(vec![fault.clone()]).await,
            honest().await,
        );
        let mut route = route_with_fallbacks(1, RoutePolicy::default());
        // Both engines share the requests.
        let second_target = route.fallback.remove(0);
        route.targets.push(second_target);
        let gateway = Setup::route(&[first.url(), second.url()], route)
            .start()
            .await;
        gateway.ready().await.expect("an engine is up");
        let requests = (0..100).map(|_| over_http(&gateway));
        let seen = futures_util::future::join_all(requests).await;
        assert!(seen.iter().all(|seen| *seen == whole_story(0)), "{fault:?}");
    }
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

#[tokio::test]
async fn a_model_without_a_route_is_not_found_and_a_route_is_listed() {
    let engine = honest().await;
    let mut route = route_with_fallbacks(0, RoutePolicy::default());
    route.model = "chat".to_owned();
    route.targets[0].model = Some("m".to_owned());
    let gateway = Setup::route(&[engine.url()], route).start().await;
    gateway.ready().await.expect("the engine is up");
    let body = |model: &str| completion(&json!({"model": model, "prompt": "hi", "max_tokens": 50}));
    let (response, answer) = body("m").fetch(&gateway).await;
    assert_eq!(
        (response.status, &*answer.error().0),
        (404, "model_not_found")
    );
    assert!(
        answer.text.contains("The gateway has: chat."),
        "{}",
        answer.text
    );
    let (_, answer) = body("chat").fetch(&gateway).await;
    assert_eq!(answer.json()["model"], "m", "the model that answered");
    assert_eq!(engine.received()[0].body["model"], "m");
    let (_, listed) = support::http::get("/v1/models").fetch(&gateway).await;
    assert_eq!(listed.json()["data"][0]["id"], "chat");
}
