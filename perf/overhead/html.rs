//! A run as one HTML page that needs nothing from elsewhere, for someone who has never seen the project.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use super::charts::{self, ChartError};
use super::machine::Machine;
use super::report::Report;
use super::results::Results;
use super::scenario::Scenario;
use super::table;
use super::targets::{Bound, Target};

const STYLE: &str = "
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; padding: 0 1rem;
         color: #1d2530; background: #fff }
  h1 { font-size: 1.8rem } h2 { margin-top: 2.5rem } figure { margin: 1rem 0 }
  figure svg { width: 100%; height: auto } figcaption, .note { color: #556; font-size: .9rem }
  table { border-collapse: collapse; width: 100%; font-size: .9rem }
  th, td { padding: .3rem .6rem; border-bottom: 1px solid #dde; text-align: left }
  td.number { text-align: right; font-variant-numeric: tabular-nums }
  .pass { color: #067a3f; font-weight: 600 } .fail { color: #b3261e; font-weight: 600 }
  pre { background: #f5f6f8; padding: 1rem; overflow-x: auto; font-size: .8rem }";

const INTRODUCTION: &str = "
<p>A language model makes one token at a time. Tokenway carries each from the device that makes it to a
client, over <b>gRPC</b> or over <b>HTTP</b>. This page shows what that costs. The device is simulated, so
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
<tr><th>CPU per token</th><td>processor time of all the server's threads, the device's too, over the tokens
of the round</td></tr>
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
    body.push_str("<h1>What Tokenway adds to a token</h1>");
    body.push_str(INTRODUCTION);
    body.push_str(&stamp(&report.machine));
    body.push_str(&faults(&report.faults));
    body.push_str(&targets_table(&report.targets));
    pictures(&mut body, &report.results)?;
    body.push_str("<h2>All figures</h2><pre>");
    body.push_str(&escaped(&table::text(&report.results)));
    body.push_str("</pre>");
    body.push_str(DEFINITIONS);
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>What Tokenway adds to a token</title><style>{STYLE}</style></head>\
         <body>{body}</body></html>\n"
    ))
}

fn pictures(body: &mut String, results: &Results) -> Result<(), ChartError> {
    let (paced, full) = (Scenario::Paced(64), Scenario::Full(64));
    body.push_str("<h2>Latency: 64 streams of 50 tokens a second</h2>");
    let caption = "Left is better. A lane that lies on its floor adds nothing.";
    figure(body, &charts::latency(results, paced)?, caption);
    let caption = "What each door adds to the floor beneath it, quantile by quantile.";
    figure(body, &charts::added(results, paced)?, caption);
    let cpu = charts::bars(results, paced, "CPU per token, µs", |round| {
        round.cpu_us_per_token
    })?;
    figure(body, &cpu, "Shorter is better.");
    body.push_str("<h2>Throughput: 64 streams at full speed</h2>");
    let tokens = charts::bars(results, full, "million tokens per second", |round| {
        Some(round.tokens_per_second / 1e6)
    })?;
    figure(body, &tokens, "Longer is better.");
    let cpu = charts::bars(results, full, "CPU per token, µs", |round| {
        round.cpu_us_per_token
    })?;
    figure(body, &cpu, "Shorter is better.");
    body.push_str("<h2>Time to the first token: 1,000 short requests a second</h2>");
    let ttft = charts::ttft(results, Scenario::OpenLoop)?;
    figure(body, &ttft, "Left is better.");
    body.push_str("<h2>The knee: more streams</h2>");
    let name = "million tokens per second";
    let knee = charts::over_streams(results, name, Scenario::full_streams, |round| {
        Some(round.tokens_per_second / 1e6)
    })?;
    figure(body, &knee, "At full speed.");
    let name = "one-way latency at p99, µs";
    let knee = charts::over_streams(results, name, Scenario::paced_streams, |round| {
        Some(round.one_way_p99_us)
    })?;
    figure(body, &knee, "At 50 tokens a second for each stream.");
    Ok(())
}

fn faults(faults: &[String]) -> String {
    if faults.is_empty() {
        return String::new();
    }
    let faults = escaped(&faults.join("\n"));
    format!("<h2 class=\"fail\">What went wrong</h2><pre>{faults}</pre>")
}

fn stamp(machine: &Machine) -> String {
    let Machine {
        commit,
        cores,
        processor,
        kernel,
        load_before,
        load_after,
        build,
        ..
    } = machine;
    let text = format!(
        "Commit {commit} ({build} build), {cores} cores of {processor}, Linux {kernel}; load average \
         {load_before} before and {load_after} after."
    );
    format!("<p class=\"note\">{}</p>", escaped(&text))
}

fn targets_table(targets: &[Target]) -> String {
    let mut rows = String::new();
    for target in targets {
        let (class, verdict) = if target.pass {
            ("pass", "pass")
        } else {
            ("fail", "FAIL")
        };
        let bound = match target.bound {
            Bound::AtLeast => "≥",
            Bound::AtMost => "≤",
        };
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
        "<h2>Targets</h2><table><tr><th>What</th><th>Median</th><th>Rounds</th><th>Limit</th>\
         <th></th></tr>{rows}</table>"
    )
}

fn figure(body: &mut String, svg: &str, caption: &str) {
    if svg.is_empty() {
        return;
    }
    let caption = escaped(caption);
    // Writing to a string cannot fail.
    let _ = write!(
        body,
        "<figure>{svg}<figcaption>{caption}</figcaption></figure>"
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
