//! Tests of the choice of an engine, and of reading streams ahead. The clock is paused: time advances only while all
//! tasks are idle.

use std::convert::Infallible;
use std::time::Duration;

use http::Request as HttpRequest;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use tower::ServiceExt;

use super::*;
use crate::context::RequestContext;
use crate::proto::v1::completion_event::Event;
use crate::proto::v1::inference_server::InferenceServer;
use crate::request::Parameter;
use crate::telemetry::{Api, Telemetry};
use remote::{EngineChannel, RemoteUpstream};
use scripted::{ScriptedEngine, ScriptedStream, engine, started, token};
use wrapped::WrappedUpstream;

mod placement;
mod resumption;
mod wrapped;

const LONG: Duration = Duration::from_secs(3_600);

/// Creates a cluster of remote engines that are up.
fn cluster<const N: usize>(engines: [ScriptedEngine; N]) -> Cluster {
    let up = |engine| remote_engine(engine, Health::always_up());
    cluster_of(engines.into_iter().map(up).collect())
}

fn cluster_of(upstreams: Vec<Arc<dyn Upstream>>) -> Cluster {
    let telemetry = Telemetry::new();
    let member = |(number, upstream)| {
        let name = format!("engine {number}").as_str().into();
        Arc::new(Member::new(&name, upstream, &telemetry))
    };
    let members = upstreams.into_iter().enumerate().map(member).collect();
    let table = RoutingTable::new(
        members,
        Vec::new(),
        PlacementPolicy::default(),
        &RoutingTable::default(),
    );
    Cluster::with_table(watch::channel(Arc::new(table)).1, GatewayId::random())
}

fn remote_engine(engine: ScriptedEngine, health: Health) -> Arc<dyn Upstream> {
    watched_engine(engine, watch::channel(health).1)
}

fn watched_engine(engine: ScriptedEngine, health: watch::Receiver<Health>) -> Arc<dyn Upstream> {
    let service = InferenceServer::new(engine);
    let service =
        ServiceExt::<HttpRequest<Body>>::map_err(service, |never: Infallible| match never {});
    Arc::new(RemoteUpstream::scripted(
        EngineChannel::new(service),
        health,
    ))
}

async fn complete(cluster: &Cluster) -> Result<CheckedEvents, Error> {
    let request = v1::CompletionRequest::default();
    let events = cluster.complete(request, &call_context()).await;
    events.map_err(Error::from)
}

fn call_context() -> CallContext {
    CallContext::new(&RequestContext::for_test(Api::Http, http::Version::HTTP_11))
}

/// Creates an engine that starts every completion, sends one token, and nothing more.
fn silent_engine(name: &'static str) -> ScriptedEngine {
    engine(move |_| {
        let events = tokio_stream::iter([started(name), token(0, "a")]);
        Ok(Box::pin(events.chain(tokio_stream::pending())))
    })
}

fn rejecting_engine(kind: ErrorKind) -> ScriptedEngine {
    engine(move |_| Err(Error::new(kind, "rejected").into()))
}

/// Returns the model name from the `started` event. In these tests, each engine reports its own name there.
async fn started_by(events: &mut CheckedEvents) -> String {
    match events.next().await {
        Some(Ok(Event::Started(started))) => started.model,
        other => panic!("expected a started event: {other:?}"),
    }
}

#[tokio::test]
async fn the_engine_with_the_fewest_streams_gets_the_next_request() {
    let cluster = cluster([silent_engine("a"), silent_engine("b")]);
    let mut first = complete(&cluster).await.unwrap();
    assert_eq!(started_by(&mut first).await, "a");
    let mut second = complete(&cluster).await.unwrap();
    assert_eq!(started_by(&mut second).await, "b");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_cannot_accept_a_request_is_skipped() {
    use ErrorKind::{Draining, ModelNotFound, NoWorker, NotReady, QueueFull};
    for kind in [Draining, ModelNotFound, NoWorker, NotReady, QueueFull] {
        let cluster = cluster([rejecting_engine(kind), silent_engine("b")]);
        let mut events = complete(&cluster).await.unwrap();
        assert_eq!(started_by(&mut events).await, "b");
    }
}

#[tokio::test]
async fn an_invalid_request_is_sent_to_one_engine_only() {
    let cluster = cluster([
        rejecting_engine(ErrorKind::InvalidValue),
        silent_engine("b"),
    ]);
    let error = complete(&cluster).await.err().map(|error| error.kind);
    assert_eq!(error, Some(ErrorKind::InvalidValue));
}

#[tokio::test(start_paused = true)]
async fn model_not_found_is_returned_only_if_every_engine_returns_it() {
    let (full, unknown) = (ErrorKind::QueueFull, ErrorKind::ModelNotFound);
    for (engines, expected) in [
        ([unknown, full], full),
        ([full, unknown], full),
        ([unknown, unknown], unknown),
    ] {
        let cluster = cluster(engines.map(rejecting_engine));
        let error = complete(&cluster).await.err().map(|error| error.kind);
        assert_eq!(error, Some(expected), "{engines:?}");
    }
}

/// Creates an engine whose stream forwards the events that the test sends.
fn forwarding_engine(
    capacity: usize,
) -> (
    mpsc::Sender<Result<v1::CompletionEvent, Status>>,
    ScriptedEngine,
) {
    let (sender, receiver) = mpsc::channel(capacity);
    let receiver = Mutex::new(Some(receiver));
    let engine = engine(move |_| {
        let receiver = receiver.lock().expect("the lock is not poisoned").take();
        let events = ReceiverStream::new(receiver.expect("the test sends one request"));
        let script: ScriptedStream = Box::pin(events);
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
    let mut is_full = false;
    for index in 0..1_000 {
        is_full = is_full || timeout(LONG, sender.send(token(index, "a"))).await.is_err();
    }
    assert!(is_full, "the buffer is bounded");
    drop(events);
    let closed = timeout(LONG, sender.closed()).await;
    assert!(closed.is_ok(), "the stream is not cancelled");
}

#[tokio::test(start_paused = true)]
async fn a_finished_stream_is_given_one_second_to_send_its_trailers() {
    let (sender, engine) = forwarding_engine(3);
    let mut events = complete(&cluster([engine])).await.unwrap();
    for event in [started("m"), scripted::end(), scripted::summary()] {
        sender.send(event).await.unwrap();
    }
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
    let down = Health {
        availability: Availability::Down,
        models: vec![model],
        ..Health::default()
    };
    let with_model = remote_engine(silent_engine("m"), down);
    let without_model = remote_engine(
        rejecting_engine(ErrorKind::ModelNotFound),
        Health::always_up(),
    );
    let cluster = cluster_of(vec![with_model, without_model]);
    let error_kind = async |model: &str| {
        let request = v1::CompletionRequest {
            model: model.to_owned(),
            ..v1::CompletionRequest::default()
        };
        let answer = cluster.complete(request, &call_context()).await;
        answer.err().map(|failure| failure.error().kind)
    };
    for name in ["m", "also"] {
        assert_eq!(error_kind(name).await, Some(ErrorKind::NoWorker));
    }
    assert_eq!(error_kind("n").await, Some(ErrorKind::ModelNotFound));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_leaves_finishes_its_streams_and_gets_no_new_ones() {
    let (events, engine) = forwarding_engine(1);
    let leaving = Mutex::new(Some(engine));
    let connect = move |engine: &EngineSpec| {
        let engine = if engine.address.as_str() == "http://leaving:1" {
            let engine = leaving.lock().expect("the lock is not poisoned").take();
            engine.expect("the engine joins once")
        } else {
            silent_engine("joined")
        };
        remote_engine(engine, Health::always_up())
    };
    let engines = |names: &[&str]| -> ClusterSpec {
        let addresses = names
            .iter()
            .map(|name| name.parse().expect("a valid address"));
        addresses.collect()
    };
    let (snapshots, membership) = mpsc::channel(1);
    snapshots
        .send(engines(&["http://leaving:1"]))
        .await
        .unwrap();
    let membership = Membership::new(ReceiverStream::new(membership));
    let members = Members::new(connect, &Telemetry::new());
    let (table, following) = follow_membership(membership, members);
    tokio::spawn(following);
    let mut changes = table.clone();
    let cluster = Cluster::with_table(table, GatewayId::random());
    events.send(started("leaving")).await.unwrap();
    let mut stream = complete(&cluster).await.unwrap();
    assert_eq!(started_by(&mut stream).await, "leaving");

    let both = engines(&["http://joined:1", "http://leaving:1/"]);
    snapshots.send(both).await.unwrap();
    changes.changed().await.unwrap();
    let mut second = complete(&cluster).await.unwrap();
    assert_eq!(started_by(&mut second).await, "joined");
    let mut third = complete(&cluster).await.unwrap();
    assert_eq!(started_by(&mut third).await, "joined");

    snapshots.send(engines(&["http://joined:1"])).await.unwrap();
    changes.changed().await.unwrap();
    let mut fourth = complete(&cluster).await.unwrap();
    // The new engine has more streams than the engine that has left.
    assert_eq!(started_by(&mut fourth).await, "joined");

    let mut last = token(0, "a").unwrap();
    if let Some(Event::Tokens(tokens)) = &mut last.event {
        tokens.finish_reason = v1::FinishReason::Stop.into();
    }
    events.send(Ok(last)).await.unwrap();
    events.send(scripted::summary()).await.unwrap();
    let rest: Vec<_> = stream.collect().await;
    assert!(
        matches!(&rest[..], [Ok(Event::Tokens(_)), Ok(Event::Summary(_))]),
        "{rest:?}"
    );
}

#[tokio::test]
async fn a_request_that_uses_a_declared_unsupported_parameter_goes_to_another_upstream() {
    let limited = || -> Arc<dyn Upstream> {
        let engine = remote_engine(silent_engine("limited"), Health::always_up());
        Arc::new(WrappedUpstream::new(engine).without(Parameter::LogitBias))
    };
    let full = remote_engine(silent_engine("full"), Health::always_up());
    let biased = v1::CompletionRequest {
        input: Some(Input::Prompt("a".to_owned())),
        logit_bias: [(1, 5.0)].into(),
        ..v1::CompletionRequest::default()
    };
    let context = call_context();
    let cluster = cluster_of(vec![limited(), full]);
    let mut events = cluster
        .complete(biased.clone(), &context)
        .await
        .ok()
        .unwrap();
    assert_eq!(started_by(&mut events).await, "full");
    let plain = v1::CompletionRequest {
        logit_bias: Default::default(),
        ..biased.clone()
    };
    let mut events = cluster.complete(plain, &context).await.ok().unwrap();
    assert_eq!(started_by(&mut events).await, "limited");

    let alone = cluster_of(vec![limited()]);
    let failure = alone.complete(biased, &context).await.err().unwrap();
    let error = failure.error();
    let expected = (ErrorKind::UnsupportedParameter, Some("logit_bias"));
    assert_eq!((error.kind, error.param.as_deref()), expected);
}

#[tokio::test]
async fn unknown_fields_are_taken_only_for_a_model_whose_upstream_takes_them() {
    let health = |model: &str| Health {
        models: vec![v1::Model {
            name: model.to_owned(),
            aliases: vec![format!("{model}-alias")],
            ..v1::Model::default()
        }],
        ..Health::always_up()
    };
    let tokenway = || remote_engine(silent_engine("t"), health("t"));
    let openai = || -> Arc<dyn Upstream> {
        let engine = remote_engine(silent_engine("o"), health("o"));
        Arc::new(WrappedUpstream::new(engine).without(Parameter::LogitBias))
    };
    let both = cluster_of([tokenway(), openai()].into());
    for (model, takes) in [
        ("t", false),
        ("t-alias", false),
        ("o", true),
        ("o-alias", true),
        ("", true),
        ("x", true),
    ] {
        assert_eq!(both.takes_extra_fields(model), takes, "{model}");
    }
    let alone = cluster_of([tokenway()].into());
    for model in ["t", "", "x"] {
        assert!(!alone.takes_extra_fields(model), "{model}");
    }
}

#[tokio::test]
async fn a_request_that_this_gateway_has_passed_on_before_is_rejected() {
    let cluster = cluster([silent_engine("a")]);
    let gateway = cluster.gateway().cloned().unwrap();
    let mut passed_on = tonic::metadata::MetadataMap::new();
    Via::default().write_with(&GatewayId::random(), &mut passed_on);
    let from_another_gateway = CallContext {
        via: Via::from_metadata(&passed_on),
        ..call_context()
    };
    let message = v1::CompletionRequest::default();
    assert!(
        cluster
            .complete(message.clone(), &from_another_gateway)
            .await
            .is_ok()
    );
    from_another_gateway
        .via
        .write_with(&gateway, &mut passed_on);
    let circle = CallContext {
        via: Via::from_metadata(&passed_on),
        ..call_context()
    };
    let failure = cluster.complete(message, &circle).await.err().unwrap();
    assert_eq!(failure.error().kind, ErrorKind::UpstreamError);
    assert!(gateway.has_detected_loop(&Status::from(failure)));
    let listed = cluster.list_models(&circle).await.err().unwrap();
    assert!(gateway.has_detected_loop(&Status::from(listed)));
}
