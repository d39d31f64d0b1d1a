//! The values that the HTML template of a run shows, for readers who do not know the project.

use serde_json::{Value, json};

use super::charts::{
    added_latency_chart, bar_chart, chart_over_streams, latency_chart, ttft_chart,
};
use super::report::Report;
use super::results::Round;
use super::scale::Scale;
use super::scenario::{RunSize, Scenario};
use super::table;

pub(super) fn page_values(report: &Report) -> Value {
    let results = &report.results;
    let (paced, full) = (Scenario::Paced(64), Scenario::Full(64));
    let cpu = |scenario| {
        bar_chart(results, scenario, "CPU per token, µs", |round| {
            round.cpu_us_per_token
        })
    };
    let tokens = |round: &Round| Some(round.rates.tokens_per_second / 1e6);
    let tokens_name = "million tokens per second";
    let p99 = |round: &Round| Some(round.one_way_p99_us);
    let p99_name = "one-way latency at p99, µs";
    let [many, _, slow, queued] = Scale::all(RunSize::WHOLE.crowd).map(Scenario::Scale);
    let memory_of = |scenario: Scenario| {
        let kib = |round: &Round| Some(round.rss_per_stream? / 1024.0);
        let chart = bar_chart(results, scenario, "memory, KiB", kib);
        json!({ "chart": chart, "title": scenario.title() })
    };
    let memory = [many, slow, queued].map(memory_of);
    json!({
        "machine": report.machine,
        "faults": report.faults,
        "targets": report.targets,
        "latency": latency_chart(results, paced),
        "added": added_latency_chart(results, paced),
        "paced_cpu": cpu(paced),
        "throughput": bar_chart(results, full, tokens_name, tokens),
        "full_cpu": cpu(full),
        "ttft": ttft_chart(results, Scenario::OpenLoop),
        "scaling_throughput": chart_over_streams(results, tokens_name, Scenario::full_streams, tokens),
        "scaling_latency": chart_over_streams(results, p99_name, Scenario::paced_streams, p99),
        "many_latency": latency_chart(results, many),
        "memory": memory,
        "text": table::render_tables(results),
    })
}
