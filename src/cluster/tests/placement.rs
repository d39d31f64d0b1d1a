//! Tests of a cluster's prefix index: which prompts it records for which engine, and when it forgets them.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::cluster::health::HealthPublisher;

/// Creates an engine that ends every completion without a token.
fn quick_engine(name: &'static str) -> ScriptedEngine {
    engine(move |_| {
        let events = [started(name), scripted::end(), scripted::summary()];
        Ok(Box::pin(tokio_stream::iter(events)))
    })
}

/// Returns a request of about 200 prompt tokens.
fn request(model: &str, subject: &str) -> v1::CompletionRequest {
    v1::CompletionRequest {
        model: model.to_owned(),
        input: Some(Input::Prompt(
            format!("Tell me about {subject}.").repeat(40),
        )),
        ..v1::CompletionRequest::default()
    }
}

/// Sends a request. Returns its stream and the name of its engine.
async fn send(cluster: &Cluster, request: v1::CompletionRequest) -> (CheckedEvents, String) {
    let events = cluster.complete(request, &call_context()).await;
    let mut events = events.map_err(Error::from).unwrap();
    let engine = started_by(&mut events).await;
    (events, engine)
}

/// Sends a request and reads its answer to the end. Returns the name of its engine.
async fn engine_of(cluster: &Cluster, request: v1::CompletionRequest) -> String {
    let (events, engine) = send(cluster, request).await;
    let rest: Vec<_> = events.collect().await;
    assert!(
        matches!(rest.last(), Some(Ok(Event::Summary(_)))),
        "{rest:?}"
    );
    engine
}

/// Makes the prompt about stars warm on the second engine: a request that runs on the first engine keeps it busier.
async fn warm_second_engine(cluster: &Cluster) {
    let (_running, engine) = send(cluster, request("m", "whales")).await;
    assert_eq!(engine, "a");
    assert_eq!(engine_of(cluster, request("m", "stars")).await, "b");
}

#[tokio::test]
async fn a_prompt_goes_where_it_is_warm_but_for_another_model_it_is_cold() {
    let cluster = cluster([quick_engine("a"), quick_engine("b")]);
    warm_second_engine(&cluster).await;
    assert_eq!(engine_of(&cluster, request("m", "stars")).await, "b");
    assert_eq!(engine_of(&cluster, request("m", "glass")).await, "a");
    assert_eq!(engine_of(&cluster, request("n", "stars")).await, "a");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_rejects_a_request_is_not_remembered_for_its_prompt() {
    let requests = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&requests);
    let rejecting = engine(move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
        Err(Error::new(ErrorKind::QueueFull, "full").into())
    });
    let cluster = cluster([rejecting, quick_engine("b")]);
    for _ in 0..3 {
        assert_eq!(engine_of(&cluster, request("m", "stars")).await, "b");
        // After this time, the first engine no longer counts as busy.
        tokio::time::advance(Duration::from_secs(30)).await;
    }
    assert_eq!(requests.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_engine_that_was_down_counts_as_cold() {
    let engine = EngineSpec::at("http://b:1".parse().expect("an address"));
    let (publisher, health) = HealthPublisher::new(&engine);
    let second = watched_engine(quick_engine("b"), health);
    let first = remote_engine(quick_engine("a"), Health::always_up());
    let cluster = cluster_of(vec![first, second]);
    warm_second_engine(&cluster).await;
    assert_eq!(engine_of(&cluster, request("m", "stars")).await, "b");

    publisher.publish(Availability::Down, None);
    assert_eq!(engine_of(&cluster, request("m", "glass")).await, "a");
    publisher.publish(Availability::Up, None);
    assert_eq!(engine_of(&cluster, request("m", "stars")).await, "a");
}

#[tokio::test]
async fn an_engine_that_leaves_and_joins_again_counts_as_cold() {
    let connect = |engine: &EngineSpec| {
        let name = match engine.address.as_str() {
            "http://a:1" => "a",
            _ => "b",
        };
        remote_engine(quick_engine(name), Health::always_up())
    };
    let mut members = Members::new(connect, &Telemetry::new());
    let mut snapshot = |names: &[&str], placement| {
        let names = names.iter();
        let engines = names.map(|name| name.parse().expect("an address"));
        members.apply(ClusterSpec {
            placement,
            ..engines.collect()
        })
    };
    let (both, default) = (["http://a:1", "http://b:1"], PlacementPolicy::default());
    let (sender, table) = watch::channel(snapshot(&both, default));
    let cluster = Cluster::with_table(table, GatewayId::random());
    let stars = || engine_of(&cluster, request("m", "stars"));
    warm_second_engine(&cluster).await;

    sender.send_replace(snapshot(&both, default));
    assert_eq!(stars().await, "b", "a reload that changes nothing");
    sender.send_replace(snapshot(&both, PlacementPolicy::LeastLoad));
    assert_eq!(stars().await, "a", "placement by load alone");
    sender.send_replace(snapshot(&both, default));
    warm_second_engine(&cluster).await;
    assert_eq!(stars().await, "b");
    sender.send_replace(snapshot(&both[..1], default));
    sender.send_replace(snapshot(&both, default));
    assert_eq!(stars().await, "a", "the second engine is another one");
}

#[tokio::test]
async fn an_engine_that_was_down_between_two_requests_counts_as_cold() {
    let engine = EngineSpec::at("http://a:1".parse().expect("an address"));
    let (publisher, health) = HealthPublisher::new(&engine);
    let upstream = watched_engine(quick_engine("a"), health);
    let member = Member::new(&"a".into(), upstream, &Telemetry::new());
    let cache = member.cache_id();
    for availability in [Availability::Up, Availability::Up] {
        publisher.publish(availability, None);
    }
    assert_eq!(member.cache_id(), cache);
    for availability in [Availability::Down, Availability::Up] {
        publisher.publish(availability, None);
    }
    assert_ne!(member.cache_id(), cache);
}

#[tokio::test]
async fn a_long_cache_salt_is_rejected_before_it_is_hashed() {
    let cluster = cluster([quick_engine("a")]);
    for (bytes, is_valid) in [(512, true), (513, false)] {
        let request = v1::CompletionRequest {
            cache_salt: "a".repeat(bytes),
            ..request("m", "stars")
        };
        let result = cluster.complete(request, &call_context()).await;
        let param = result.err().and_then(|failure| Error::from(failure).param);
        let expected = (!is_valid).then_some("cache_salt");
        assert_eq!(param.as_deref(), expected, "{bytes} bytes");
    }
}

#[tokio::test]
async fn an_engine_that_cannot_be_reached_counts_as_cold() {
    let upstream = remote_engine(quick_engine("a"), Health::always_up());
    let member = Arc::new(Member::new(&"a".into(), upstream, &Telemetry::new()));
    let cache = member.cache_id();
    let fail = |failure: &Failure| member.pass().unwrap().record_failure(failure, false);
    fail(&Error::internal().into());
    assert_eq!(member.cache_id(), cache);
    fail(&Failure::unreachable());
    assert_ne!(member.cache_id(), cache);
}
