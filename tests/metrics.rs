//! Histograms and token counters of completions, on an engine and on a gateway.

mod support;

use std::time::Duration;

use serde_json::json;
use support::http::{completion, get};
use support::metrics::MetricsSnapshot;
use support::{Setup, TestServer, full_speed, grpc, with_interval};

/// Asserts the metrics of a server that has completed `completions` requests of `tokens` tokens each.
fn assert_completions(counts: &MetricsSnapshot, labels: &str, completions: u32, tokens: u32) {
    let count = |metric: &str| counts.get(&format!("tokenway_{metric}_seconds_count{{{labels}}}"));
    let completions = f64::from(completions);
    for metric in ["time_to_first_token", "request_duration", "queue"] {
        assert_eq!(count(metric), completions, "{metric}\n{}", counts.0);
    }
    let gaps = completions * f64::from(tokens - 1);
    assert_eq!(count("inter_token_latency"), gaps, "{}", counts.0);
    let total = |kind: &str| {
        counts.get(&format!(
            "tokenway_tokens_total{{kind=\"{kind}\",{labels}}}"
        ))
    };
    assert_eq!(total("completion"), completions * f64::from(tokens));
    assert!(total("prompt") >= completions, "{}", counts.0);
}

async fn complete(server: &TestServer, stream: bool) {
    let body = json!({"model": "alias", "prompt": "a", "max_tokens": 7, "stream": stream});
    assert_eq!(completion(&body).fetch(server).await.0.status, 200);
}

fn with_alias() -> Setup {
    let mut setup = Setup::test_runner(full_speed());
    setup.engine().models[0].aliases.push("alias".to_owned());
    setup
}

#[tokio::test]
async fn completions_are_counted_by_model_api_and_outcome() {
    let server = with_alias().start().await;
    complete(&server, true).await;
    complete(&server, false).await;
    let mut request = grpc::request("a", 7);
    "alias".clone_into(&mut request.model);
    grpc::collect(server.stream(request).await).await;
    let invalid = json!({"model": "no-such-model", "prompt": "a"});
    assert_eq!(completion(&invalid).fetch(&server).await.0.status, 404);
    let counts = server.drain().await;
    let labels =
        |model, api, outcome| format!("model=\"{model}\",api=\"{api}\",outcome=\"{outcome}\"");
    assert_completions(&counts, &labels("llm_test", "http", "ok"), 2, 7);
    assert_completions(&counts, &labels("llm_test", "grpc", "ok"), 1, 7);
    let rejected = labels("unknown", "http", "model_not_found");
    let duration = format!("tokenway_request_duration_seconds_count{{{rejected}}}");
    assert_eq!(counts.get(&duration), 1.0, "{}", counts.0);
    assert!(!counts.0.contains("no-such-model") && !counts.0.contains("\"alias\""));
}

#[tokio::test]
async fn a_gateway_counts_the_completions_of_its_engines() {
    let engine = with_alias().start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    gateway.ready().await.expect("the engine is up");
    complete(&gateway, true).await;
    complete(&gateway, false).await;
    let (_, body) = get("/metrics").fetch(&gateway).await;
    let labels = "model=\"llm_test\",api=\"http\",outcome=\"ok\"";
    assert_completions(&MetricsSnapshot(body.text), labels, 2, 7);
    gateway.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn the_time_between_tokens_is_the_models_interval() {
    let server = Setup::test_runner(with_interval(Duration::from_millis(20)))
        .start()
        .await;
    let body = json!({"prompt": "a", "max_tokens": 6, "stream": true});
    completion(&body).fetch(&server).await;
    let counts = server.drain().await;
    let labels = "model=\"llm_test\",api=\"http\",outcome=\"ok\"";
    let gap = |part: &str| {
        counts.get(&format!(
            "tokenway_inter_token_latency_seconds_{part}{{{labels}}}"
        ))
    };
    // A slow machine only makes the times longer, so there is no upper bound.
    assert!(gap("sum") / gap("count") >= 0.015, "{}", counts.0);
}

#[tokio::test]
async fn each_metric_has_one_help_line_and_one_type_line_before_its_values() {
    let server = with_alias().start().await;
    complete(&server, true).await;
    let MetricsSnapshot(text) = server.drain().await;
    let (mut helped, mut typed) = (Vec::new(), Vec::new());
    for line in text.lines().filter(|line| !line.is_empty()) {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["#", "HELP", name, ..] => helped.push(name),
            ["#", "TYPE", name, _] => typed.push(name),
            ["#", ..] => panic!("neither HELP nor TYPE: {line}"),
            _ => {
                let family = *typed.last().expect("a TYPE line comes first");
                assert!(line.starts_with(family), "{line} is listed under {family}");
            }
        }
    }
    assert_eq!(helped, typed);
    let families = typed.len();
    typed.sort_unstable();
    typed.dedup();
    assert_eq!(typed.len(), families, "a metric is listed twice");
}
