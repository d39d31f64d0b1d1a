//! A worker that connects, violates the protocol, or stops responding.

use tokio::time::timeout;

use super::*;

#[tokio::test]
async fn an_invalid_hello_is_rejected_with_its_reason() {
    let engine = start_engine(|_| ()).await;
    let changed = |change: fn(&mut proto::Hello)| {
        let mut hello = hello_message();
        change(&mut hello);
        Sent::Hello(hello)
    };
    for (first, code, expected) in [
        (
            changed(|hello| hello.protocol_version = 1),
            Code::FailedPrecondition,
            "this engine speaks protocol_version 2",
        ),
        (
            changed(|hello| hello.model = "nobody".to_owned()),
            Code::NotFound,
            "hello.model must be one of: llm_test (got 'nobody')",
        ),
        (
            changed(|hello| hello.child_token = "stolen".to_owned()),
            Code::PermissionDenied,
            "hello.child_token is unknown",
        ),
        (
            changed(|hello| hello.name = "two\nlines".to_owned()),
            Code::InvalidArgument,
            "hello.name must have",
        ),
        (
            Sent::Heartbeat(proto::Heartbeat {
                step_ms: 0,
                prefix_cache: None,
            }),
            Code::FailedPrecondition,
            "hello must be the first message",
        ),
    ] {
        let status = engine
            .connect(first)
            .await
            .err()
            .expect("the request is rejected");
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(expected), "{status:?}");
    }
}

/// Returns a valid `ready` message with this change.
fn ready_with(change: fn(&mut proto::Ready)) -> Sent {
    let mut ready = ready_message();
    change(&mut ready);
    Sent::Ready(ready)
}

fn model_mut(ready: &mut proto::Ready) -> &mut proto::Model {
    ready.model.as_mut().expect("the model is set")
}

#[tokio::test]
async fn a_protocol_violation_is_reported_with_its_rule() {
    let engine = start_engine(|_| ()).await;
    let too_large = proto::Crashed {
        reason: "x".repeat(17 * 1024 * 1024),
    };
    for (message, rule) in [
        (Sent::Crashed(too_large), "too large"),
        (ready_with(|ready| ready.slots = 0), "ready.slots"),
        (ready_with(|ready| ready.generation = 0), "ready.generation"),
        (
            ready_with(|ready| ready.model = None),
            "ready.model is missing",
        ),
        (
            ready_with(|ready| model_mut(ready).context_length = 1),
            "context_length",
        ),
        (
            ready_with(|ready| model_mut(ready).vocabulary_size = 0),
            "vocabulary_size",
        ),
        (
            ready_with(|ready| model_mut(ready).unsupported = vec!["colour".to_owned()]),
            "'colour'",
        ),
        (Sent::Hello(hello_message()), "hello must be sent only once"),
        (
            Sent::Step(proto::Step::default()),
            "crashed must be sent after ready",
        ),
    ] {
        let status = engine.status_after(rule, [message]).await;
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
        assert!(status.message().contains(rule), "{status:?}");
    }
    let sequences = vec![proto::SequenceStep::default(); proto::MAX_STEP_ENTRIES + 1];
    let many = [
        Sent::Ready(ready_message()),
        Sent::Step(proto::Step { sequences }),
    ];
    let status = engine.status_after("many entries", many).await;
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("at most 131072"), "{status:?}");
    let crashed = Sent::Crashed(proto::Crashed::default());
    let twice = [
        Sent::Ready(ready_message()),
        crashed,
        Sent::Ready(ready_message()),
    ];
    let status = engine.status_after("same generation", twice).await;
    assert!(
        status.message().contains("ready.generation must be higher"),
        "{status:?}"
    );
}

#[tokio::test]
async fn a_worker_whose_model_differs_from_that_of_another_worker_is_rejected() {
    let engine = start_engine(|_| ()).await;
    let _first = engine.connect_ready_worker().await;
    let other = ready_with(|ready| model_mut(ready).context_length = 99);
    let status = engine.status_after("other", [other]).await;
    assert!(
        status
            .message()
            .contains("differs from the facts that another"),
        "{status:?}"
    );
}

#[tokio::test]
async fn only_the_violating_worker_gets_a_reconnect_penalty() {
    let engine = start_engine(|_| ()).await;
    let broken = Sent::Step(proto::Step::default());
    let _ = engine.status_after("one", [broken]).await;
    let hello_from = |name: &str| {
        Sent::Hello(proto::Hello {
            name: name.to_owned(),
            ..hello_message()
        })
    };
    let status = engine.connect(hello_from("one")).await.err();
    let status = status.expect("the request is rejected");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("may reconnect in"), "{status:?}");
    assert!(engine.connect(hello_from("another")).await.is_ok());
}

#[tokio::test]
async fn a_worker_that_ignores_a_sequence_is_lost() {
    let engine = start_engine(|setup| {
        let timeouts = &mut setup.engine().workers.timeouts;
        timeouts.heartbeat_timeout = Duration::from_millis(200);
        timeouts.step_limit = Some(Duration::from_millis(100));
    })
    .await;
    let mut worker = engine.connect_ready_worker().await;
    let body = json!({"prompt": [5], "max_tokens": 2});
    let request = post("/v1/completions", body.to_string());
    let address = engine.server.http_address();
    let _response = tokio::spawn(async move { request.send_to(&address).await });
    let mut heartbeat = tokio::time::interval(Duration::from_millis(20));
    let status = async {
        loop {
            tokio::select! {
                received = worker.receive() => match received {
                    Ok(Message::Question(proto::Question { question, .. })) => {
                        let pieces = proto::Pieces { bytes: b"x".to_vec(), lengths: vec![1] };
                        worker.answer_tokenizer_call(question, Answer::Pieces(pieces)).await;
                    }
                    Ok(_) => {}
                    Err(status) => break status,
                },
                _ = heartbeat.tick() => {
                    worker.send(Sent::Heartbeat(proto::Heartbeat::default())).await;
                }
            }
        }
    };
    let status = timeout(Duration::from_secs(30), status)
        .await
        .expect("the engine ends the stream");
    let reason = "neither accepted nor rejected a sequence";
    assert!(status.message().contains(reason), "{status:?}");
}

#[tokio::test]
async fn every_sequence_reaches_a_worker_with_thousands_of_slots() {
    const SLOTS: u32 = 4_096;
    const CHOICES: u32 = 128;
    let engine = start_engine(|_| ()).await;
    let mut worker = engine
        .connect(Sent::Hello(hello_message()))
        .await
        .expect("the worker is accepted");
    let offer = proto::Ready {
        slots: SLOTS,
        ..ready_message()
    };
    worker.send(Sent::Ready(offer)).await;
    engine.server.wait_until_loaded().await;
    let client = engine.server.grpc().await;
    let requests = (0..SLOTS / CHOICES).map(|_| {
        let mut client = client.clone();
        let request = v1::CompletionRequest {
            n: Some(CHOICES),
            ..grpc::request("a", 1)
        };
        async move { client.complete(request).await }
    });
    let requests = tokio::spawn(join_all(requests));
    let mut submitted = 0;
    while submitted < SLOTS {
        match worker.receive().await.expect("the stream continues") {
            Message::Submit(_) => submitted += 1,
            Message::Question(proto::Question { question, .. }) => {
                let ids = v1::TokenIds { ids: vec![1] };
                worker
                    .answer_tokenizer_call(question, Answer::Ids(ids))
                    .await;
            }
            Message::Welcome(_) | Message::Credit(_) | Message::Cancel(_) | Message::Drain(_) => {}
        }
    }
    assert_eq!(
        MetricsSnapshot::take(&engine.server).get("tokenway_resumptions_total"),
        0.0
    );
    drop(worker);
    requests.abort();
}

#[tokio::test]
async fn a_worker_without_heartbeats_is_lost_with_deadline_exceeded() {
    let engine = start_engine(|setup| {
        setup.engine().workers.timeouts.heartbeat_timeout = Duration::from_millis(100);
    })
    .await;
    let mut worker = engine.connect_ready_worker().await;
    let status = worker
        .receive()
        .await
        .expect_err("the worker sends no heartbeat");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    engine.server.wait_until_not_ready().await;
    let no_worker = expected_error(503, "no_worker", None);
    assert_eq!(http_error(&engine.server, get("/readyz")).await, no_worker);
    let (_, body) = get("/readyz").fetch(&engine.server).await;
    assert!(
        body.text
            .contains("No worker of the model 'llm_test' has connected"),
        "{}",
        body.text
    );
}

#[tokio::test]
async fn an_out_of_range_heartbeat_timeout_is_rejected_with_its_field() {
    let engine = start_engine(|_| ()).await;
    for out_of_range in [1, 99, 3_600_001] {
        let result = engine
            .connect_with_heartbeat_timeout(out_of_range)
            .await
            .err();
        let status = result.expect("the worker is rejected");
        assert_eq!(status.code(), Code::InvalidArgument);
        let rule = "hello.heartbeat_timeout_ms must be 0 or from 100 to 3600000";
        assert!(status.message().contains(rule), "{status:?}");
    }
    for in_range in [100, 3_600_000] {
        assert!(
            engine
                .connect_with_heartbeat_timeout(in_range)
                .await
                .is_ok()
        );
    }
}

#[tokio::test]
async fn the_declared_heartbeat_timeout_replaces_the_engines() {
    let engine = start_engine(|setup| {
        setup.engine().workers.timeouts.heartbeat_timeout = Duration::from_millis(100);
        // A worker's stream is one long request. The limits on client requests must not end it.
        setup.parts.limits.body_timeout = Duration::from_millis(500);
        setup.parts.limits.write_timeout = Duration::from_millis(500);
    })
    .await;
    let started = Instant::now();
    let declared = Duration::from_millis(1_500);
    let mut worker = engine
        .connect_with_heartbeat_timeout(1_500)
        .await
        .expect("the worker is accepted");
    let status = worker.wait_for_end().await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("no message"), "{status:?}");
    assert!(started.elapsed() >= declared, "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_declared_heartbeat_timeout_raises_the_step_limit() {
    let engine = start_engine(|setup| {
        setup.engine().workers.timeouts.step_limit = Some(Duration::from_secs(1));
    })
    .await;
    let mut worker = engine
        .connect_with_heartbeat_timeout(60_000)
        .await
        .expect("the worker is accepted");
    let heartbeat = |step_ms| {
        Sent::Heartbeat(proto::Heartbeat {
            step_ms,
            prefix_cache: None,
        })
    };
    worker.send(heartbeat(60_000)).await;
    // The worker sends `ready` after the heartbeat. When the engine reports the worker as ready, it has read both.
    worker.send(Sent::Ready(ready_message())).await;
    tokio::select! {
        () = engine.server.wait_until_loaded() => {}
        status = worker.wait_for_end() => panic!("{status:?}"),
    }
    worker.send(heartbeat(60_001)).await;
    let status = worker.wait_for_end().await;
    assert!(status.message().contains("step limit"), "{status:?}");
}
