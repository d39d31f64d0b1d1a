//! The gRPC API of a gateway, and changes to its list of engines.

mod support;

use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use support::http::{Request, completion};
use support::program::engine_process;
use support::{Setup, TestServer, full_speed, grpc, silent_at, with_interval};
use tokenway::cluster::{CallContext, Cluster, ClusterSpec, Membership};
use tokenway::context::{Arrival, RequestContext};
use tokenway::critical::CriticalTasks;
use tokenway::delivery::FlushHandle;
use tokenway::error::Error;
use tokenway::listen::Address;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;
use tokenway::request::RequestId;
use tokenway::request_memory::RequestMemory;
use tokenway::runner::llm_test::TestRunnerLoader;
use tokenway::telemetry::{Api, RequestRecord, Route, Telemetry};
use tokio::time::{Instant, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Creates a request context without a server.
fn request_context() -> RequestContext {
    RequestContext::new(Arrival {
        id: RequestId::random(),
        deadline: Instant::now() + Duration::from_secs(60),
        flush: FlushHandle::new(Arc::default(), http::Version::HTTP_2),
        record: RequestRecord::new(&Telemetry::new(), Api::Grpc, Route::UNMATCHED, 0),
        caller: None,
        invalid: None,
        memory: RequestMemory::new(0),
    })
}

fn stream_request() -> Request {
    completion(&json!({"prompt": "a", "max_tokens": 5, "stream": true}))
}

#[tokio::test]
async fn a_gateways_grpc_api_is_the_service_of_its_engines() {
    let engine = Setup::test_runner(full_speed()).start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let mut call = tonic::Request::new(grpc::request("a", 2_048));
    let id = "an-id".parse().expect("an id is ASCII");
    call.metadata_mut().insert("x-request-id", id);
    let mut client = gateway.grpc().await;
    let response = client.complete(call).await.expect("it is admitted");
    let echoed = response.metadata().get("x-request-id");
    assert_eq!(echoed.and_then(|id| id.to_str().ok()), Some("an-id"));
    let completion = grpc::collect(response.into_inner()).await;
    assert_eq!(
        completion.started.as_ref().expect("it starts").request_id,
        "an-id"
    );
    let expected: Vec<_> = (0..2_048).map(|index| format!("token_{index}")).collect();
    assert_eq!(completion.texts(0), expected);
    assert_eq!(completion.usage().completion_tokens, 2_048);

    let listed = client.list_models(v1::ListModelsRequest {}).await;
    let listed = listed.expect("the models").into_inner().models;
    assert_eq!(listed[0].name, "llm_test");
    let model = "llm_test".to_owned();
    let found = client.get_model(v1::GetModelRequest { model }).await;
    assert_eq!(
        found.expect("the model").into_inner().model.as_ref(),
        listed.first()
    );
    let request = v1::TokenizeRequest {
        input: Some(v1::tokenize_request::Input::Text("a b".to_owned())),
        ..v1::TokenizeRequest::default()
    };
    let tokenized = client.tokenize(request.clone()).await.expect("token ids");
    let from_engine = engine.grpc().await.tokenize(request).await;
    let from_engine = from_engine.expect("token ids").into_inner();
    assert_eq!(*tokenized.get_ref(), from_engine);
    let request = v1::DetokenizeRequest {
        token_ids: vec![3, 4],
        ..v1::DetokenizeRequest::default()
    };
    let text = client.detokenize(request).await.expect("a text");
    assert_eq!(text.into_inner().text, "token_3token_4");
    drop(client);
    let counts = gateway.drain().await;
    counts.assert_all_gauges_are_zero();
    // The five requests are the completion and the four other calls.
    assert_eq!(counts.ended_requests("grpc", "ok"), 5.0, "{}", counts.0);
}

#[tokio::test]
async fn an_engines_grpc_errors_pass_the_gateway_unchanged() {
    let engine = Setup::test_runner(full_speed()).start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let full = grpc::request("a", 1);
    for request in [
        v1::CompletionRequest {
            temperature: Some(3.0),
            ..full.clone()
        },
        v1::CompletionRequest {
            model: "none".to_owned(),
            ..full.clone()
        },
        v1::CompletionRequest {
            max_tokens: Some(2_000_000),
            ..full.clone()
        },
    ] {
        let rejection = async |server: &TestServer| {
            let answer = server.grpc().await.complete(request.clone()).await;
            answer.expect_err("the request is rejected")
        };
        let (direct, passed_on) = tokio::join!(rejection(&engine), rejection(&gateway));
        assert_eq!(passed_on.code(), direct.code());
        assert_eq!(passed_on.message(), direct.message());
        assert_eq!(passed_on.details(), direct.details());
        assert!(!passed_on.details().is_empty());
    }
}

#[tokio::test]
async fn a_grpc_deadline_reaches_the_engine_through_the_gateway() {
    let engine = Setup::test_runner(silent_at(2)).start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let mut call = tonic::Request::new(grpc::request("a", 5));
    call.set_timeout(Duration::from_millis(300));
    let stream = gateway.stream(call).await;
    // Without the client's deadline, the engine would apply its default of one minute.
    let completion = timeout(Duration::from_secs(20), grpc::collect(stream)).await;
    let completion = completion.expect("the client's deadline reaches the engine");
    assert_eq!(completion.token_count(0), 2);
    let status = completion.error.expect("the deadline passes");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(!status.details().is_empty(), "it is the engine's error");
    let counts = engine.drain().await;
    assert_eq!(
        counts.ended_requests("grpc", "deadline_exceeded"),
        1.0,
        "{}",
        counts.0
    );
}

#[tokio::test]
async fn killing_an_engine_ends_grpc_streams_with_an_error() {
    let (engine, address) = engine_process().await;
    let gateway = Setup::gateway_at(&[&address]).start().await;
    let stream = gateway.stream(grpc::request("a", 5)).await;
    let mut engine = Some(engine);
    let completion = grpc::collect_from(stream, |tokens| {
        if tokens == 2
            && let Some(engine) = engine.take()
        {
            engine.signal(Signal::KILL);
        }
    });
    let completion = completion.await;
    assert_eq!(completion.token_count(0), 2);
    let status = completion.error.expect("the engine is dead");
    assert_eq!(Error::from(&status).kind.mapping().code, "upstream_error");
}

#[tokio::test]
async fn a_resumed_grpc_request_continues_through_the_gateway() {
    let engine = Setup::test_runner(full_speed()).start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let resumed = v1::ResumedChoice {
        choice: 0,
        token_ids: vec![0, 1, 2],
    };
    let request = v1::CompletionRequest {
        resume: vec![resumed],
        seed: Some(1),
        ..grpc::request("a", 5)
    };
    let mut stream = gateway.stream(request).await;
    let mut received = Vec::new();
    while let Some(event) = stream.message().await.expect("no error") {
        if let Some(Event::Tokens(tokens)) = event.event {
            let ids = (tokens.first_index..).zip(tokens.tokens.iter().map(v1::Token::from));
            received.extend(ids.map(|(index, token)| (index, token.text)));
        }
    }
    let expected = [(3, "token_3".to_owned()), (4, "token_4".to_owned())];
    assert_eq!(received, expected);
}

#[tokio::test]
async fn a_draining_gateway_ends_its_grpc_streams_with_draining() {
    let engine = Setup::test_runner(silent_at(2)).start().await;
    let gateway = Setup::gateway(&[&engine]).drain(Duration::ZERO, Duration::from_millis(1));
    let gateway = gateway.start().await;
    let mut stream = gateway.stream(grpc::request("a", 5)).await;
    assert!(stream.message().await.expect("no error").is_some());
    let (counts, completion) = tokio::join!(gateway.drain(), grpc::collect(stream));
    counts.assert_all_gauges_are_zero();
    let status = completion.error.expect("the gateway drains");
    assert_eq!(Error::from(&status).kind.mapping().code, "draining");
}

#[tokio::test]
async fn a_gateways_grpc_health_follows_its_engines() {
    let (engine, address) = engine_process().await;
    let gateway = Setup::gateway_at(&[&address]).start().await;
    let channel = Endpoint::from_shared(gateway.grpc_url()).expect("an address");
    let mut health = HealthClient::new(channel.connect_lazy());
    let watch = health.watch(HealthCheckRequest::default()).await;
    let mut reports = watch.expect("health is served").into_inner();
    let mut next = async || {
        let report = reports.message().await.expect("the watch goes on");
        report.expect("the watch goes on").status()
    };
    assert_eq!(next().await, ServingStatus::Serving);
    engine.signal(Signal::KILL);
    assert_eq!(next().await, ServingStatus::NotServing);
    engine.wait_for_exit_code().await;
}

#[tokio::test]
async fn a_gateway_that_reaches_itself_under_another_name_sends_itself_no_requests() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = folder.path().join("gateway.sock");
    let link = folder.path().join("link.sock");
    std::os::unix::fs::symlink(&socket, &link).expect("a link");
    let itself = format!("unix:{}", link.display());
    let start = async |engines: &[&str]| {
        let mut setup = Setup::gateway_at(engines);
        setup.parts.grpc = Some(Address::Unix(socket.clone()));
        setup.start().await
    };
    let gateway = start(&[&itself]).await;
    let (response, body) = stream_request().fetch(&gateway).await;
    let error = body.json()["error"].clone();
    let message = error["message"].as_str().expect("a message");
    // The request may arrive before or after the gateway has noticed that the engine is gone.
    match (response.status, error["code"].as_str()) {
        (502, Some("upstream_error")) => {
            assert!(message.contains("is an engine of itself"), "{message}");
        }
        (503, Some("no_worker")) => {}
        other => panic!("{other:?}: {message}"),
    }
    gateway.drain().await.assert_all_gauges_are_zero();

    let engine = Setup::test_runner(full_speed()).start().await;
    let gateway = start(&[&itself, &engine.grpc_url()]).await;
    for _ in 0..10 {
        let (response, body) = stream_request().fetch(&gateway).await;
        assert_eq!((response.status, body.lines().len()), (200, 5));
    }
    gateway.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn an_engine_that_leaves_the_membership_finishes_its_streams() {
    let leaving = Setup::test_runner(with_interval(Duration::from_millis(1)))
        .start()
        .await;
    let joining = Setup::runner("joined", Arc::new(TestRunnerLoader::new(full_speed())), 8);
    let joining = joining.start().await;
    let only = |server: &TestServer| {
        let address = server.grpc_url().parse().expect("an address");
        [address].into_iter().collect()
    };
    let (snapshots, membership) = tokio::sync::mpsc::channel::<ClusterSpec>(1);
    snapshots
        .send(only(&leaving))
        .await
        .expect("it is followed");
    let (critical, stop) = (CriticalTasks::default(), CancellationToken::new());
    let membership = Membership::new(ReceiverStream::new(membership));
    let cluster = Cluster::remote(membership, &Telemetry::new(), &critical, &stop);
    let context = CallContext::new(&request_context());
    let mut stream = cluster
        .complete(grpc::request("a", 500), &context)
        .await
        .expect("it is admitted");
    assert!(matches!(stream.next().await, Some(Ok(Event::Started(_)))));
    snapshots
        .send(only(&joining))
        .await
        .expect("it is followed");
    // The cluster takes a snapshot from the channel only after it has applied the previous one.
    snapshots
        .send(only(&joining))
        .await
        .expect("it is followed");
    drop(snapshots.reserve().await.expect("it is followed"));
    let models = cluster.list_models(&context).await.expect("the models");
    assert_eq!(models.len(), 1);
    assert_eq!(models[0].name, "joined");
    let mut tokens = 0;
    let mut ended = false;
    while let Some(event) = stream.next().await {
        match event.expect("the stream goes on") {
            Event::Tokens(batch) => tokens += batch.tokens.len(),
            Event::Summary(_) => ended = true,
            Event::Started(_) | Event::Prompt(_) | Event::Chat(_) => {}
        }
    }
    assert_eq!((tokens, ended), (500, true));
    stop.cancel();
}
