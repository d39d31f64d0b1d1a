//! A run as an HTML page, for readers who do not know the project.

use std::io;
use std::path::Path;

use super::charts;
use super::report::Report;
use super::results::{Results, Round};
use super::scale::Scale;
use super::scenario::{Scenario, Size};
use super::table;
use super::targets::Target;
use crate::report::{ChartError, Page};

const INTRODUCTION: &str = "
<p>A language model makes one token at a time. Tokenway carries each from the device that makes it to a
client, over <b>gRPC</b> or over <b>HTTP</b>. Each way from the device to a client is a <i>measured path</i>.
This page shows the cost of each. The device is simulated, so that the emission time of each token is known to
the microsecond; the same device is also read through minimal servers (<i>floors</i>: tonic or axum with one
handler, a raw socket, a channel in the same process). The distance to the floor is the cost that Tokenway adds.
All paths took turns on one machine in one run: compare them with each other, not with figures of another
machine.</p>";

const DEFINITIONS: &str = "
<h2>Definitions</h2>
<table>
<tr><th>One-way latency</th><td>from the device's emission of a token to the return of the client's read
that returned it, both on the machine's monotonic clock</td></tr>
<tr><th>Full speed</th><td>the device makes tokens as fast as they are read; a client of one thread reads,
checks every index and does nothing else</td></tr>
<tr><th>TTFT</th><td>time to first token: from the time at which a request was due to the read that returned
its first token. One request is due each millisecond, however long the earlier ones take, so that no wait is
hidden by a late request</td></tr>
<tr><th>Sent late</th><td>from the time at which a request was due to its start by the client: the client's own
delay, and part of TTFT</td></tr>
<tr><th>CPU per token</th><td>processor time of all the server's threads over the tokens of the round; if the
device is paced, without its thread, which waits actively for the last 50 µs before each token</td></tr>
<tr><th>Timing of stages</th><td>the work of a running server to record the time of each token in the engine,
in the API and on the way to the socket: the same calls, timed apart in every round</td></tr>
<tr><th>Wake-up</th><td>median latency of a single stream's token through a channel to a sleeping thread; the
cost of a second process is measured in these</td></tr>
<tr><th>Load CPU</th><td>the share of one processor that the client took, which is one thread: near 100% the
client may be the bottleneck</td></tr>
<tr><th>Memory per stream</th><td>growth of the server's resident memory while all the streams were open,
including their connections, over the number of streams; for queued requests, growth beyond the
connections</td></tr>
<tr><th>Median, lowest, highest</th><td>of the rounds; a ratio or a difference is taken within each
round</td></tr>
</table>";

/// Writes the page.
pub(super) fn write(path: &Path, report: &Report) -> io::Result<()> {
    page(report).map_err(io::Error::other)?.save(path)
}

fn page(report: &Report) -> Result<Page, ChartError> {
    let mut page = Page::new("What Tokenway adds to a token", INTRODUCTION);
    page.machine(&report.machine);
    if !report.faults.is_empty() {
        page.text("fail", "Faults", &report.faults.join("\n"));
    }
    targets(&mut page, &report.targets);
    charts(&mut page, &report.results)?;
    page.text("", "All figures", &table::text(&report.results));
    page.html(DEFINITIONS);
    Ok(page)
}

fn charts(page: &mut Page, results: &Results) -> Result<(), ChartError> {
    let (paced, full) = (Scenario::Paced(64), Scenario::Full(64));
    let cpu = |scenario| {
        let cpu = |round: &Round| round.cpu_us_per_token;
        charts::bars(results, scenario, "CPU per token, µs", cpu)
    };
    let shorter = "Shorter is better. Bar: the median of the rounds; line: lowest to highest.";
    let longer = "Longer is better. Bar: the median of the rounds; line: lowest to highest.";
    let latency = [
        (
            charts::latency(results, paced)?,
            "Left is better. A path that lies on its floor adds nothing.",
        ),
        (
            charts::added(results, paced)?,
            "Latency that each path adds to the floor beneath it, quantile by quantile.",
        ),
        (cpu(paced)?, shorter),
    ];
    page.figures("Latency: 64 streams of 50 tokens a second", &latency);
    let name = "million tokens per second";
    let tokens = |round: &Round| Some(round.tokens_per_second / 1e6);
    let throughput = [
        (charts::bars(results, full, name, tokens)?, longer),
        (cpu(full)?, shorter),
    ];
    page.figures("Throughput: 64 streams at full speed", &throughput);
    let ttft = [(
        charts::ttft(results, Scenario::OpenLoop)?,
        "Left is better.",
    )];
    page.figures(
        "Time to the first token: 1,000 short requests a second",
        &ttft,
    );
    let p99 = |round: &Round| Some(round.one_way_p99_us);
    let p99_name = "one-way latency at p99, µs";
    let scaling = [
        (
            charts::over_streams(results, name, Scenario::full_streams, tokens)?,
            "At full speed.",
        ),
        (
            charts::over_streams(results, p99_name, Scenario::paced_streams, p99)?,
            "At 50 tokens a second for each stream; with thousands of streams at 20, over gRPC and as NDJSON \
             only.",
        ),
    ];
    page.figures("Scaling with the number of streams", &scaling);
    scale_charts(page, results)
}

fn scale_charts(page: &mut Page, results: &Results) -> Result<(), ChartError> {
    let [many, _, slow, queued] = Scale::all(Size::WHOLE.crowd).map(Scenario::Scale);
    let memory = |scenario| {
        let kib = |round: &Round| Some(round.rss_per_stream? / 1024.0);
        charts::bars(results, scenario, "memory, KiB", kib)
    };
    let caption = |scenario: Scenario| format!("For each of {}.", scenario.title());
    let captions = [many, slow, queued].map(caption);
    let figures = [
        (charts::latency(results, many)?, "Left is better."),
        (memory(many)?, &captions[0]),
        (memory(slow)?, &captions[1]),
        (memory(queued)?, &captions[2]),
    ];
    page.figures("Thousands of streams", &figures);
    Ok(())
}

fn targets(page: &mut Page, targets: &[Target]) {
    page.heading("Targets");
    page.html(
        "<table><tr><th>Target</th><th>Median</th><th>Lowest to highest</th><th>Limit</th>\
         <th>Result</th></tr>",
    );
    for target in targets {
        let (class, verdict) = if target.pass {
            ("pass", "pass")
        } else {
            ("fail", "FAIL")
        };
        let (spread, unit) = (target.spread, target.unit);
        let limit = format!("{} {:.2} {unit}", target.bound.sign(), target.limit);
        page.row(&[
            ("", target.target.clone()),
            ("number", format!("{:.2} {unit}", target.value)),
            (
                "number",
                format!("{:.2} to {:.2}", spread.lowest, spread.highest),
            ),
            ("number", limit),
            (class, verdict.to_owned()),
        ]);
    }
    page.html("</table>");
}
