//! Tests of the choice of an engine, and of reading streams ahead. The clock is paused: it advances only when every
//! task is idle.

use std::convert::Infallible;
use std::time::Duration;

use http::Request as HttpRequest;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tower::ServiceExt;

use super::*;
use crate::proto::v1::completion_event::Event;
use crate::proto::v1::inference_server::InferenceServer;
use crate::telemetry::ResponseFormat;
use engine::EngineChannel;
use remote::{Health, RemoteEngine};
use scripted::{Script, ScriptedEngine, engine, started, token};

const LONG: Duration = Duration::from_secs(3_600);

/// Creates a cluster of remote engines that are up.
fn cluster<const N: usize>(engines: [ScriptedEngine; N]) -> Cluster {
    let up = |engine| remote_engine(engine, Health::always_up());
    Cluster {
        engines: engines.into_iter().map(up).collect(),
    }
}

fn remote_engine(engine: ScriptedEngine, health: Health) -> Engine {
    let service = InferenceServer::new(engine);
    let service =
        ServiceExt::<HttpRequest<Body>>::map_err(service, |never: Infallible| match never {});
    let channels = vec![EngineChannel::new(service)];
    Engine::remote(RemoteEngine { channels, health }, TaskTracker::new())
}

async fn complete(cluster: &Cluster) -> Result<CheckedEvents, Error> {
    let request = v1::CompletionRequest::default();
    cluster
        .complete(&request, &RequestId::random(), LONG, &delivery_context())
        .await
}

/// Creates an engine that starts every completion and then sends nothing.
fn silent(name: &'static str) -> ScriptedEngine {
    engine(move |_| {
        let started = tokio_stream::once(started(name));
        Ok(Box::pin(started.chain(tokio_stream::pending())))
    })
}

fn rejecting(kind: ErrorKind) -> ScriptedEngine {
    engine(move |_| Err(Error::new(kind, "rejected").into()))
}

/// Returns the model name in the `started` event. In these tests it identifies the engine.
async fn started_by(events: &mut CheckedEvents) -> String {
    match events.next().await {
        Some(Ok(Event::Started(started))) => started.model,
        other => panic!("expected a started event: {other:?}"),
    }
}

fn delivery_context() -> DeliveryContext {
    DeliveryContext {
        format: ResponseFormat::Grpc,
        stream: None,
    }
}

#[tokio::test]
async fn the_engine_with_the_fewest_streams_gets_the_next_request() {
    let cluster = cluster([silent("a"), silent("b")]);
    let mut first = complete(&cluster).await.unwrap();
    assert_eq!(started_by(&mut first).await, "a");
    let mut second = complete(&cluster).await.unwrap();
    assert_eq!(started_by(&mut second).await, "b");
}

#[tokio::test]
async fn an_engine_that_cannot_accept_a_request_is_skipped() {
    use ErrorKind::{Draining, ModelNotFound, NoWorker, NotReady, QueueFull};
    for kind in [Draining, ModelNotFound, NoWorker, NotReady, QueueFull] {
        let cluster = cluster([rejecting(kind), silent("b")]);
        let mut events = complete(&cluster).await.unwrap();
        assert_eq!(started_by(&mut events).await, "b");
    }
}

#[tokio::test]
async fn an_invalid_request_is_sent_to_one_engine_only() {
    let cluster = cluster([rejecting(ErrorKind::InvalidValue), silent("b")]);
    let error = complete(&cluster).await.err().map(|error| error.kind);
    assert_eq!(error, Some(ErrorKind::InvalidValue));
}

#[tokio::test]
async fn model_not_found_is_returned_only_if_every_engine_returns_it() {
    let (full, unknown) = (ErrorKind::QueueFull, ErrorKind::ModelNotFound);
    for (engines, expected) in [
        ([unknown, full], full),
        ([full, unknown], full),
        ([unknown, unknown], unknown),
    ] {
        let cluster = cluster(engines.map(rejecting));
        let error = complete(&cluster).await.err().map(|error| error.kind);
        assert_eq!(error, Some(expected), "{engines:?}");
    }
}

/// Creates an engine that forwards the events that the test sends.
fn forwarding_engine(
    capacity: usize,
) -> (
    mpsc::Sender<Result<v1::CompletionEvent, Status>>,
    ScriptedEngine,
) {
    let (sender, receiver) = mpsc::channel(capacity);
    let receiver = std::sync::Mutex::new(Some(receiver));
    let engine = engine(move |_| {
        let receiver = receiver.lock().expect("the lock is not poisoned").take();
        let events = ReceiverStream::new(receiver.expect("the test sends one request"));
        let script: Script = Box::pin(events);
        Ok(script)
    });
    (sender, engine)
}

#[tokio::test(start_paused = true)]
async fn an_unread_stream_is_read_ahead_up_to_a_limit() {
    let (sender, engine) = forwarding_engine(1);
    let _unread = complete(&cluster([engine])).await.unwrap();
    let mut sent_events = 0;
    while sent_events < 1_000
        && let Ok(sent) = timeout(LONG, sender.send(token(sent_events, "a"))).await
    {
        sent.expect("the stream is open");
        sent_events += 1;
    }
    assert!(
        (64..100).contains(&sent_events),
        "{sent_events} events were read"
    );
}

#[tokio::test(start_paused = true)]
async fn dropping_the_events_cancels_an_idle_stream() {
    let (sender, engine) = forwarding_engine(1);
    let events = complete(&cluster([engine])).await.unwrap();
    drop(events);
    let closed = timeout(LONG, sender.closed()).await;
    assert!(closed.is_ok(), "the stream is not cancelled");
}

#[tokio::test(start_paused = true)]
async fn dropping_the_events_cancels_a_stream_with_a_full_buffer() {
    let (sender, engine) = forwarding_engine(1);
    let events = complete(&cluster([engine])).await.unwrap();
    let mut index = 0;
    while timeout(LONG, sender.send(token(index, "a"))).await.is_ok() {
        index += 1;
    }
    drop(events);
    let closed = timeout(LONG, sender.closed()).await;
    assert!(closed.is_ok(), "the stream is not cancelled");
}

#[tokio::test(start_paused = true)]
async fn a_finished_stream_is_given_one_second_to_send_its_trailers() {
    let (sender, engine) = forwarding_engine(2);
    let mut events = complete(&cluster([engine])).await.unwrap();
    sender.send(started("m")).await.unwrap();
    sender.send(scripted::summary()).await.unwrap();
    while events.next().await.is_some() {}
    drop(events);
    let half_a_second = Duration::from_millis(500);
    let reset = timeout(half_a_second, sender.closed()).await;
    assert!(reset.is_err(), "the stream was reset before its trailers");
    let reset_later = timeout(LONG, sender.closed()).await;
    assert!(reset_later.is_ok(), "the stream is never reset");
}

#[tokio::test]
async fn a_model_whose_only_engine_is_down_answers_no_worker() {
    let model = v1::Model {
        name: "m".to_owned(),
        aliases: vec!["also".to_owned()],
        ..v1::Model::default()
    };
    let with_model = remote_engine(silent("m"), Health::down(vec![model]));
    let without_model = remote_engine(rejecting(ErrorKind::ModelNotFound), Health::always_up());
    let cluster = Cluster {
        engines: [with_model, without_model].into(),
    };
    let error_kind = async |model: &str| {
        let request = v1::CompletionRequest {
            model: model.to_owned(),
            ..v1::CompletionRequest::default()
        };
        let id = RequestId::random();
        let answer = cluster
            .complete(&request, &id, LONG, &delivery_context())
            .await;
        answer.err().map(|error| error.kind)
    };
    for name in ["m", "also"] {
        assert_eq!(error_kind(name).await, Some(ErrorKind::NoWorker));
    }
    assert_eq!(error_kind("n").await, Some(ErrorKind::ModelNotFound));
}
