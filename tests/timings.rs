//! Token timings, in the metrics and in responses.

mod support;

use serde_json::{Value, json};
use support::grpc;
use support::http::completion;
use support::metrics::MetricsSnapshot;
use support::{Setup, TestServer, full_speed};

/// Streams `tokens` tokens for each of two prompts, with these stream options. Returns the objects of the stream.
async fn stream_objects(server: &TestServer, tokens: u32, options: &Value) -> Vec<Value> {
    let body = json!({
        "prompt": ["a", "b"], "max_tokens": tokens, "stream": true, "stream_options": options,
    });
    let (_, body) = completion(&body).fetch(server).await;
    body.lines()
}

/// Returns the number of tokens that the metrics count in a stage, for a response format.
fn counted_tokens(counts: &MetricsSnapshot, format: &str, stage: &str) -> f64 {
    let labels = format!("format=\"{format}\",stage=\"{stage}\"");
    counts.get(&format!("tokenway_token_latency_seconds_count{{{labels}}}"))
}

#[tokio::test]
async fn each_token_is_counted_once_per_stage() {
    let server = Setup::test_runner(full_speed()).start().await;
    let ask = |tokens: u32, stream: bool| {
        completion(&json!({"prompt": "a", "max_tokens": tokens, "stream": stream}))
    };
    ask(1_000, true).fetch(&server).await;
    let events = ask(2_000, true).header("accept", "text/event-stream");
    events.fetch(&server).await;
    ask(3_000, false).fetch(&server).await;
    grpc::collect(server.stream(grpc::request("a", 4_000)).await).await;
    let metrics = server.drain().await;
    for (format, tokens) in [
        ("http_ndjson", 1_000.0),
        ("http_sse", 2_000.0),
        ("grpc", 4_000.0),
    ] {
        for stage in ["engine", "frontend", "socket"] {
            assert_eq!(
                counted_tokens(&metrics, format, stage),
                tokens,
                "{format} {stage}"
            );
        }
    }
    assert_eq!(counted_tokens(&metrics, "http_unary", "engine"), 3_000.0);
    assert_eq!(counted_tokens(&metrics, "http_unary", "frontend"), 0.0);
}

#[tokio::test]
async fn gateway_and_engine_each_count_their_own_stages() {
    let engine = Setup::test_runner(full_speed()).start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    stream_objects(&gateway, 100, &json!({})).await;
    let (gateway, engine) = (gateway.drain().await, engine.drain().await);
    assert_eq!(counted_tokens(&gateway, "http_ndjson", "engine"), 0.0);
    assert_eq!(counted_tokens(&gateway, "http_ndjson", "frontend"), 200.0);
    assert_eq!(counted_tokens(&engine, "grpc", "engine"), 200.0);
}

#[tokio::test]
async fn include_timings_adds_timings_to_the_last_object() {
    let engine = Setup::test_runner(full_speed()).start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    for server in [&engine, &gateway] {
        let options = json!({"include_timings": true, "include_usage": true});
        let objects = stream_objects(server, 3, &options).await;
        let (last, tokens) = objects.split_last().expect("objects");
        assert!(tokens.iter().all(|token| token.get("timings").is_none()));
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], 6);
        let time = |name: &str| last["timings"][name].as_u64().expect("nanoseconds");
        assert!(time("queue_ns") <= time("first_token_ns"), "{last}");
        assert!(time("first_token_ns") <= time("total_ns"), "{last}");
        let prefill = time("first_token_ns") - time("queue_ns");
        assert_eq!(time("prefill_ns"), prefill);
        for stage in ["engine", "frontend"] {
            let stage = &last["timings"]["stages"][stage];
            assert_eq!(stage["tokens"], 6, "{last}");
            let time = |name: &str| stage[name].as_u64().expect("nanoseconds");
            assert!(time("mean_ns") <= time("longest_ns"));
        }
        assert!(last["timings"]["stages"]["socket"]["tokens"].is_u64());
    }
}

#[tokio::test]
async fn timings_are_sent_only_on_request() {
    let server = Setup::test_runner(full_speed()).start().await;
    let with_usage = stream_objects(&server, 3, &json!({"include_usage": true})).await;
    assert!(with_usage[6].get("timings").is_none());
    let with_times = stream_objects(&server, 3, &json!({"include_timings": true})).await;
    assert!(with_times[6].get("usage").is_none());
    assert_eq!(stream_objects(&server, 3, &json!({})).await.len(), 6);
}

#[tokio::test]
async fn the_grpc_summary_has_the_timings_of_all_stages() {
    let server = Setup::test_runner(full_speed()).start().await;
    let completion = grpc::collect(server.stream(grpc::request("a", 300)).await).await;
    let timings = completion.summary.and_then(|summary| summary.timings);
    let timings = timings.expect("timings");
    for stage in [timings.engine, timings.frontend] {
        assert_eq!(stage.expect("a stage").tokens, 300);
    }
    assert!(timings.socket.is_some());
}
