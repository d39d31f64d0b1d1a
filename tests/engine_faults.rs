//! Faults of an engine behind the gateway before its first token, through both APIs. A second engine answers where the
//! first one fails, and the client sees only the whole text.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use support::http::completion;
use support::metrics::MetricsSnapshot;
use support::openai_engine::{OpenAiEngine, Step, event, story, story_until, whole};
use support::story::{
    APIS, Api, busy, failed, failing_first, gateway, honest, impatient, over_grpc, over_http,
    prompt_of, story_request, whole_story,
};
use support::{Setup, route_with_fallbacks};
use tokenway::cluster::RoutePolicy;

/// Returns the times between the requests that an engine received.
fn gaps(engine: &OpenAiEngine) -> Vec<Duration> {
    let received = engine.received();
    let pairs = received.windows(2);
    pairs.map(|pair| pair[1].at - pair[0].at).collect()
}

#[tokio::test]
async fn a_busy_engine_without_an_alternative_is_asked_again_when_it_says() {
    let cases = ["retry-after: 1\r\n", ""].map(|headers| APIS.map(|api| (headers, api)));
    let asked = cases.concat().into_iter().map(async |(headers, api)| {
        let engine = failing_first(vec![vec![busy(headers)]]).await;
        let gateway = gateway(&[&engine], RoutePolicy::default()).await;
        assert_eq!(api.story(&gateway).await, whole_story(0));
        let gap = gaps(&engine)[0];
        assert!(gap >= Duration::from_secs(1), "{gap:?}");
    });
    join_all(asked).await;
}

#[tokio::test]
async fn an_engine_that_stays_busy_is_asked_three_times_and_its_answer_passed_on() {
    let asked = APIS.map(async |api| {
        let engine = OpenAiEngine::answering(vec![busy("retry-after: 1\r\n")]).await;
        let gateway = gateway(&[&engine], RoutePolicy::default()).await;
        let error = api.error(&gateway).await;
        assert_eq!(error, ("queue_full".to_owned(), Some(1)), "{api:?}");
        let gaps = gaps(&engine);
        assert_eq!(gaps.len(), 2, "{api:?}");
        assert!(gaps.iter().all(|gap| *gap >= Duration::from_secs(1)));
    });
    join_all(asked).await;
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
        for api in APIS {
            let (first, second) = (failing_first(vec![fault.clone()]).await, honest().await);
            let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
            assert_eq!(api.story(&gateway).await, whole_story(0));
            assert_eq!((first.received().len(), second.received().len()), (2, 0));
        }
    }
}

#[tokio::test]
async fn a_request_is_sent_again_within_one_try_only_on_a_connection_that_was_idle() {
    let policy = RoutePolicy {
        tries: 1,
        ..RoutePolicy::default()
    };
    // The first request leaves an idle connection behind, on which the second one breaks. The third one breaks on a new
    // connection.
    let engine = failing_first(vec![whole(&["a"]), vec![Step::Rst], vec![Step::Rst]]).await;
    let gateway = gateway(&[&engine], policy).await;
    let request = completion(&json!({"model": "m", "prompt": "hi"}));
    let (response, _) = request.clone().fetch(&gateway).await;
    assert_eq!(response.status, 200);
    let (response, body) = request.fetch(&gateway).await;
    assert_eq!((response.status, &*body.error().0), (502, "upstream_error"));
    assert_eq!(engine.received().len(), 3);
}

#[tokio::test]
async fn the_deadline_holds_whatever_the_engine_does() {
    let silent = [Step::WaitForClose];
    let never_answers = OpenAiEngine::answering(silent.to_vec()).await;
    let falls_silent = OpenAiEngine::start({
        let silent = silent.clone();
        move |received| story_until(received, 2, &silent)
    })
    .await;
    let breaks_then_hangs = OpenAiEngine::start(move |received| match &*prompt_of(received) {
        "hi" => story_until(received, 2, &[Step::Rst]),
        _ => silent.to_vec(),
    })
    .await;
    for engine in [never_answers, falls_silent, breaks_then_hangs] {
        let gateway = gateway(&[&engine], RoutePolicy::default()).await;
        let stream = json!({"model": "m", "prompt": "hi", "max_tokens": 50, "stream": true});
        let request = completion(&stream).header("x-request-timeout", "0.7");
        let started = Instant::now();
        let (_, body) = request.fetch(&gateway).await;
        let last = body.lines().pop().unwrap_or_else(|| body.json());
        assert_eq!(last["error"]["code"], "deadline_exceeded", "{}", body.text);
        assert!(started.elapsed() >= Duration::from_millis(700));
    }
}

#[tokio::test]
async fn an_engine_that_keeps_failing_is_replaced() {
    // The connection that the health check has used may have been closed while it was idle, so a request that breaks on
    // it is sent once more.
    for (fault, most) in [(failed(500), 4), (failed(503), 4), (Step::Rst, 5)] {
        let (first, second) = (
            OpenAiEngine::answering(vec![fault.clone()]).await,
            honest().await,
        );
        let gateway = gateway(&[&first, &second], RoutePolicy::default()).await;
        assert_eq!(over_http(&gateway).await, whole_story(0), "{fault:?}");
        assert_eq!(over_grpc(&gateway).await, whole_story(0), "{fault:?}");
        assert!(first.received().len() <= most, "{fault:?}");
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
            let error = Api::Grpc.error(&gateway).await;
            assert_eq!(error.0, "context_length_exceeded");
            assert!(second.received().is_empty());
        } else {
            assert_eq!(over_grpc(&gateway).await, whole_story(0));
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
    for api in APIS.repeat(10) {
        assert_eq!(api.story(&gateway).await, whole_story(0));
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
    let over_http = tokio::spawn({
        let address = gateway.http_address();
        async move { request.send_to(&address).await }
    });
    let mut client = gateway.grpc().await;
    let over_grpc = tokio::spawn(async move { client.complete(story_request()).await });
    engine.wait_for_requests(2).await;
    over_http.abort();
    over_grpc.abort();
    let next_try = engine.wait_for_requests(3);
    let waited = tokio::time::timeout(Duration::from_millis(2_500), next_try).await;
    assert!(waited.is_err(), "a request was sent again for nobody");
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
    assert_eq!(Api::Grpc.error(&gateway).await.0, "queue_full");
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
    for api in APIS {
        assert_eq!(api.story(&gateway).await, whole_story(0));
    }
    assert_eq!((first.received().len(), second.received().len()), (1, 2));
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
        let requests = APIS.repeat(50).into_iter();
        let seen = join_all(requests.map(|api| api.story(&gateway))).await;
        assert!(seen.iter().all(|seen| *seen == whole_story(0)), "{fault:?}");
    }
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
