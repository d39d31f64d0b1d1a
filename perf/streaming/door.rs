//! One door's measurement: a stream, what its tokens tell, and what is wrong with it.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::timeout;

use super::Plan;
use crate::client::{LlmStreamingClient, Received, StreamError};
use crate::metrics::StreamingMetrics;
use crate::order::{self, OrderFault};
use crate::stamps::StampReport;

/// How long a stream may take beyond what its tokens are allowed. Past that it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the progress is drawn.
const REDRAW: Duration = Duration::from_millis(100);

/// What came out of one door.
pub(super) struct DoorResult {
    /// What is to be reported. `None` when the tokens are not those that were asked for: figures over
    /// others would mean nothing.
    report: Option<Report>,
    /// What is wrong.
    pub(super) failures: Vec<String>,
}

struct Report {
    metrics: StreamingMetrics,
    overhead_ms: f64,
    stamps: StampReport,
}

/// Streams through a door, and judges what came.
pub(super) async fn measure<C: LlmStreamingClient>(client: &C, plan: &Plan) -> DoorResult {
    let tokens = plan.request.tokens;
    let progress = progress(C::DOOR, tokens);
    let mut received = Received::of(tokens, progress.clone());
    let limit = time_limit(plan);
    let ended = timeout(limit, client.stream(&plan.request, &mut received)).await;
    progress.finish_and_clear();
    let mut failures = Vec::new();
    match ended {
        Ok(ended) => failures.extend(faults(&received, ended, tokens)),
        Err(_) => failures.push(format!(
            "the stream hangs: {} of {tokens} tokens came within {} s",
            received.samples().len(),
            limit.as_secs(),
        )),
    }
    let report = failures
        .is_empty()
        .then(|| Report::of(&received, plan))
        .flatten();
    let max_overhead_ms = plan.max_overhead_ms;
    if let Some(Report { overhead_ms, .. }) = report
        && overhead_ms > max_overhead_ms
    {
        failures.push(format!(
            "the overhead of {} ms per token is above the {max_overhead_ms} ms of \
             --max-overhead-ms",
            hundredths(overhead_ms),
        ));
    }
    DoorResult { report, failures }
}

/// How long a stream may take: slower than this its overhead is above the limit anyway.
fn time_limit(plan: &Plan) -> Duration {
    let overhead = Duration::try_from_secs_f64(plan.max_overhead_ms / 1e3).unwrap_or_default();
    plan.interval
        .saturating_add(overhead)
        .saturating_mul(plan.request.tokens)
        .saturating_add(PATIENCE)
}

/// What is wrong with a stream that ended so.
fn faults(received: &Received, ended: Result<(), StreamError>, expected: u32) -> Vec<String> {
    let indices: Vec<u32> = received.samples().iter().map(|s| s.index).collect();
    let order = order::check(&indices, expected);
    match (order, ended) {
        (Ok(()), Ok(())) => vec![],
        (Err(order), Ok(()) | Err(StreamError::TooMany(_))) => vec![order.to_string()],
        // Tokens that are missing because the stream broke are not lost on the way.
        (Ok(()) | Err(OrderFault::LostAtEnd { .. }), Err(ended)) => vec![ended.to_string()],
        (Err(order), Err(ended)) => vec![order.to_string(), ended.to_string()],
    }
}

/// A bar on standard error while the stream runs; nothing where that is no terminal.
fn progress(door: &'static str, tokens: u32) -> ProgressBar {
    let bar = ProgressBar::new(tokens.into());
    if bar.is_hidden() {
        return bar;
    }
    let style = ProgressStyle::with_template("{prefix} {bar:40} {pos}/{len} tokens, {eta} left")
        .expect("the template is right");
    bar.set_style(style);
    bar.set_prefix(door);
    // On a thread of its own, so that no token waits for the terminal.
    bar.enable_steady_tick(REDRAW);
    bar
}

impl Report {
    fn of(received: &Received, plan: &Plan) -> Option<Self> {
        let (samples, requested_ns) = (received.samples(), received.requested_ns());
        let metrics = StreamingMetrics::of(samples, requested_ns)?;
        Some(Self {
            overhead_ms: metrics.calculate_overhead_ms(plan.interval),
            metrics,
            stamps: StampReport::of(samples, requested_ns),
        })
    }
}

impl DoorResult {
    /// Writes the figures, if there are any.
    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let Some(report) = &self.report else {
            return writeln!(out, "No figures: the stream was not a whole one.");
        };
        writeln!(out, "{}", report.metrics)?;
        writeln!(
            out,
            "Overhead per token: {}ms",
            hundredths(report.overhead_ms)
        )?;
        report
            .stamps
            .write(report.metrics.received_token_count, out)
    }
}

impl StampReport {
    fn write(&self, tokens: u32, out: &mut dyn Write) -> io::Result<()> {
        let (one_way, lateness) = match self {
            Self::Absent => {
                return writeln!(out, "One-way latency: unknown, the server sends no stamps");
            }
            Self::ForeignClock => {
                let why = "the server's stamps are not of this machine's clock";
                return writeln!(out, "One-way latency: unknown, {why}");
            }
            Self::Known { one_way, lateness } => (one_way, lateness),
        };
        writeln!(out, "One-way latency (received - emitted): {one_way}")?;
        if u32::try_from(one_way.count) != Ok(tokens) {
            let stamped = one_way.count;
            writeln!(out, "Only {stamped} of {tokens} tokens have stamps")?;
        }
        let Some(lateness) = lateness else {
            return writeln!(out, "Lateness: unknown, the server names no times due");
        };
        writeln!(
            out,
            "Schedule lateness (received - due): {}",
            lateness.schedule
        )?;
        writeln!(out, "Runner lateness (emitted - due): {}", lateness.runner)
    }
}

/// A number with two decimals, where nothing is `0.00` from either side.
fn hundredths(number: f64) -> String {
    let text = format!("{number:.2}");
    if text == "-0.00" {
        "0.00".to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;
    use crate::client::StreamRequest;

    /// A door that accepts and then says nothing.
    struct SilentDoor;

    impl LlmStreamingClient for SilentDoor {
        const DOOR: &'static str = "silent";

        async fn stream(
            &self,
            _request: &StreamRequest,
            _received: &mut Received,
        ) -> Result<(), StreamError> {
            pending().await
        }
    }

    fn plan(max_overhead_ms: f64) -> Plan {
        let (model, tokens) = (None, 1000);
        Plan {
            request: StreamRequest { model, tokens },
            interval: Duration::from_millis(20),
            max_overhead_ms,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_hangs_is_told_as_such() {
        let result = measure(&SilentDoor, &plan(3.0)).await;
        assert!(result.report.is_none());
        assert_eq!(
            result.failures,
            ["the stream hangs: 0 of 1000 tokens came within 83 s"]
        );
    }

    #[test]
    fn nothing_has_no_sign() {
        let texts = [-0.004, 0.004, -0.006].map(hundredths);
        assert_eq!(texts, ["0.00", "0.00", "-0.01"]);
    }

    #[test]
    fn a_negative_limit_does_not_shorten_the_wait() {
        assert_eq!(time_limit(&plan(-1000.0)), Duration::from_secs(80));
    }
}
