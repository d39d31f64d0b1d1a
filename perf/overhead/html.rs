//! A run as one HTML page that needs nothing from elsewhere, for someone who has never seen the project.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use super::charts;
use super::drawing::ChartError;
use super::page::{escaped, figure, stamp, whole};
use super::report::Report;
use super::results::{Results, Round};
use super::scale::Scale;
use super::scenario::{Scenario, Size};
use super::table;
use super::targets::Target;

const INTRODUCTION: &str = "
<p>A language model makes one token at a time. Tokenway carries each from the device that makes it to a
client, over <b>gRPC</b> or over <b>HTTP</b>: its two doors. Each way to a client is a <i>lane</i>. This page shows what that costs. The device is simulated, so
that when each token was made is known to the microsecond; the same device is also read through the barest
of servers (<i>floors</i>: tonic or axum with one handler, a raw socket, a channel in the same process). The
distance to the floor is what Tokenway adds. All lanes took turns on one machine in one run: compare them
with each other, not with another machine's figures.</p>";

const DEFINITIONS: &str = "
<h2>What the words mean</h2>
<table>
<tr><th>One-way latency</th><td>from the device's emission of a token to the return of the client's read
that brought it, both on the machine's monotonic clock</td></tr>
<tr><th>Full speed</th><td>the device makes tokens as fast as they are read; a client of one thread reads,
checks every index and does nothing else</td></tr>
<tr><th>TTFT</th><td>time to first token: from the time at which a request was due to the read that brought
its first token. Requests are due one each millisecond, however long those before take, so that a wait is
never hidden by asking later</td></tr>
<tr><th>Sent late</th><td>from the time at which a request was due to that at which the client began it: the
client's own fault, and part of TTFT</td></tr>
<tr><th>CPU per token</th><td>processor time of all the server's threads over the tokens of the round; where
the device keeps a cadence, without its thread, which waits actively for the last 50 µs before each token</td></tr>
<tr><th>Timing of stages</th><td>what a running server does to know for each token how long it took in the
engine, at the door and to the socket: the same calls, timed apart in every round</td></tr>
<tr><th>Wake-up</th><td>what a token of a single stream takes at the median through a channel to a thread that
sleeps; what a second process adds is measured in these</td></tr>
<tr><th>Load CPU</th><td>the share of one processor that the client took, which is one thread: near 100% it
may be what holds up the tokens</td></tr>
<tr><th>Memory per stream</th><td>what the server's resident memory had grown by while all the streams were
open, their connections included, over their number; for queued requests, over their connections'</td></tr>
<tr><th>Median, lowest, highest</th><td>of the rounds; a ratio or a difference is taken within each
round</td></tr>
</table>";

/// Writes the page.
pub(super) fn write(path: &Path, report: &Report) -> io::Result<()> {
    let page = page(report).map_err(io::Error::other)?;
    fs::write(path, page)
}

fn page(report: &Report) -> Result<String, ChartError> {
    let mut body = String::new();
    body.push_str(INTRODUCTION);
    body.push_str(&stamp(&report.machine));
    body.push_str(&faults(&report.faults));
    body.push_str(&targets_table(&report.targets));
    pictures(&mut body, &report.results)?;
    body.push_str("<h2>All figures</h2><pre>");
    body.push_str(&escaped(&table::text(&report.results)));
    body.push_str("</pre>");
    body.push_str(DEFINITIONS);
    Ok(whole("What Tokenway adds to a token", &body))
}

fn pictures(body: &mut String, results: &Results) -> Result<(), ChartError> {
    let (paced, full) = (Scenario::Paced(64), Scenario::Full(64));
    let cpu = |scenario| {
        charts::bars(results, scenario, "CPU per token, µs", |round| {
            round.cpu_us_per_token
        })
    };
    let shorter = "Shorter is better. Bar: the median of the rounds; line: lowest to highest.";
    let title = "Latency: 64 streams of 50 tokens a second";
    let latency = [
        (
            charts::latency(results, paced)?,
            "Left is better. A lane that lies on its floor adds nothing.",
        ),
        (
            charts::added(results, paced)?,
            "What each door adds to the floor beneath it, quantile by quantile.",
        ),
        (cpu(paced)?, shorter),
    ];
    section(body, title, &latency);
    let name = "million tokens per second";
    let tokens = |round: &Round| Some(round.tokens_per_second / 1e6);
    let throughput = [
        (
            charts::bars(results, full, name, tokens)?,
            "Longer is better. Bar: the median of the rounds; line: lowest to highest.",
        ),
        (cpu(full)?, shorter),
    ];
    section(body, "Throughput: 64 streams at full speed", &throughput);
    let title = "Time to the first token: 1,000 short requests a second";
    let ttft = charts::ttft(results, Scenario::OpenLoop)?;
    section(body, title, &[(ttft, "Left is better.")]);
    let knee = [
        (
            charts::over_streams(results, name, Scenario::full_streams, tokens)?,
            "At full speed.",
        ),
        (
            charts::over_streams(
                results,
                "one-way latency at p99, µs",
                Scenario::paced_streams,
                |round| Some(round.one_way_p99_us),
            )?,
            "At 50 tokens a second for each stream; where there are thousands, at 20, over gRPC and as NDJSON only.",
        ),
    ];
    section(body, "Scaling with the number of streams", &knee);
    scale(body, results)
}

fn scale(body: &mut String, results: &Results) -> Result<(), ChartError> {
    let [many, _, slow, queued] = Scale::all(Size::WHOLE.crowd).map(Scenario::Scale);
    let memory = |scenario| {
        charts::bars(results, scenario, "memory, KiB", |round| {
            Some(round.rss_per_stream? / 1024.0)
        })
    };
    let captions =
        [many, slow, queued].map(|scenario| format!("For each of {}.", scenario.title()));
    let [of_many, of_slow, of_queued] = &captions;
    let title = "Thousands of streams";
    let figures = [
        (charts::latency(results, many)?, "Left is better."),
        (memory(many)?, of_many),
        (memory(slow)?, of_slow),
        (memory(queued)?, of_queued),
    ];
    section(body, title, &figures);
    Ok(())
}

/// A title and figures, of which those that the run did not measure are left out.
fn section(body: &mut String, title: &str, figures: &[(String, &str)]) {
    let drawn: Vec<_> = figures.iter().filter(|(svg, _)| !svg.is_empty()).collect();
    if drawn.is_empty() {
        return;
    }
    // Writing to a string cannot fail.
    let _ = write!(body, "<h2>{}</h2>", escaped(title));
    for (svg, caption) in drawn {
        figure(body, svg, caption);
    }
}

fn faults(faults: &[String]) -> String {
    if faults.is_empty() {
        return String::new();
    }
    let faults = escaped(&faults.join("\n"));
    format!("<h2 class=\"fail\">What went wrong</h2><pre>{faults}</pre>")
}

fn targets_table(targets: &[Target]) -> String {
    let mut rows = String::new();
    for target in targets {
        let (class, verdict) = if target.pass {
            ("pass", "pass")
        } else {
            ("fail", "FAIL")
        };
        let bound = target.bound.sign();
        let (spread, unit, limit) = (target.spread, target.unit, target.limit);
        // Writing to a string cannot fail.
        let _ = write!(
            rows,
            "<tr><td>{}</td><td class=\"number\">{:.2} {unit}</td>\
             <td class=\"number\">{:.2} to {:.2}</td><td class=\"number\">{bound} {limit:.2} {unit}</td>\
             <td class=\"{class}\">{verdict}</td></tr>",
            escaped(&target.target),
            target.value,
            spread.lowest,
            spread.highest,
        );
    }
    format!(
        "<h2>Targets</h2><table><tr><th>Target</th><th>Median</th><th>Lowest to highest</th><th>Limit</th>\
         <th>Result</th></tr>{rows}</table>"
    )
}
