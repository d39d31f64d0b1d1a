//! Measures one API: runs a stream, computes the figures of its tokens, and lists its faults.

use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use indicatif::ProgressBar;
use tokenway::runner::monotonic_ns;
use tokio::time::timeout;

use super::Options;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::load::{Consumer, Load};
use crate::load_stats::{LoadStats, RequestTimer, TimestampStatus};
use crate::progress;
use crate::statistics::{Percentiles, count_to_f64};
use crate::stream::{Connection, Event, Format, Stream};

/// Time that a stream may take in addition to the time of its tokens. A stream that takes longer hangs.
const STREAM_TIMEOUT: Duration = Duration::from_secs(60);
/// Time between two updates of the progress bar.
const REDRAW: Duration = Duration::from_millis(100);

/// Result of the measurement of one API.
pub(super) struct Measurement {
    /// Figures of the stream. `None` if the stream was not complete.
    report: Option<ApiReport>,
    pub(super) failures: Vec<String>,
}

struct ApiReport {
    metrics: StreamingMetrics,
    overhead_ms: f64,
    stats: LoadStats,
}

/// Figures with the names and definitions of the reference system's performance test.
#[derive(Debug, PartialEq)]
struct StreamingMetrics {
    received_token_count: u32,
    /// Time from the request to the last token.
    total_streaming_time_ms: f64,
    /// Mean time between tokens: (last token − first token) / (tokens − 1). A constant delay cancels out.
    mean_receive_interval_ms: f64,
    /// Tokens per second: (tokens − 1) / total time.
    throughput_tokens_per_second: f64,
}

impl Measurement {
    /// Runs a stream through an API, and checks its tokens and its overhead.
    pub(super) async fn run(
        options: &Options,
        url: &ServerUrl,
        format: Format,
        api: &'static str,
    ) -> Self {
        let load = Load {
            request_timestamps: true,
            every_gap: true,
            model: options.model.clone(),
            ..Load::of_test_runner(1, options.tokens)
        };
        let mut received = StreamProgress {
            consumer: Consumer::start(0, &load),
            stats: LoadStats::new(),
            bar: stream_bar(api, options.tokens),
        };
        let limit = time_limit(options);
        let streamed = timeout(limit, received.run_stream(&load, url, format)).await;
        received.bar.finish_and_clear();
        let StreamProgress {
            consumer,
            mut stats,
            ..
        } = received;
        let hangs = Fault::Hangs {
            after: consumer.token_count(),
            seconds: limit.as_secs(),
        };
        consumer.record_end(streamed.unwrap_or(Err(hangs)), &mut stats);
        let mut failures = stats.faults.clone();
        let mut report = None;
        if failures.is_empty() {
            report = ApiReport::from_timer(&consumer.progress, options.interval_ms, stats);
        }
        let limit_ms = options.max_overhead_ms;
        if let Some(ApiReport { overhead_ms, .. }) = report
            && overhead_ms > limit_ms
        {
            let overhead = format_hundredths(overhead_ms);
            failures.push(format!(
                "the overhead of {overhead} ms per token is above the {limit_ms} ms of --max-overhead-ms"
            ));
        }
        Self { report, failures }
    }

    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.report {
            Some(report) => report.write(out),
            None => writeln!(out, "No figures: the stream was not complete."),
        }
    }
}

/// Counts and times of a stream while it is read.
struct StreamProgress {
    consumer: Consumer,
    stats: LoadStats,
    bar: ProgressBar,
}

impl StreamProgress {
    async fn run_stream(
        &mut self,
        load: &Load,
        url: &ServerUrl,
        format: Format,
    ) -> Result<(), Fault> {
        let mut connection = Connection::open(url, format.protocol()).await?;
        self.consumer = Consumer::start(monotonic_ns(), load);
        let mut stream = Stream::open(&mut connection, format, &load.completion_request()).await?;
        let reading = stream.read_to_end(|event, received_ns| {
            if let Event::Token(_) = event {
                self.bar.inc(1);
            }
            self.consumer
                .consume_event(event, received_ns, &mut self.stats)
        });
        reading.await?.complete(stream.token_count())
    }
}

/// Returns the time after which a stream counts as hung. A stream within `--max-overhead-ms` ends before it.
fn time_limit(options: &Options) -> Duration {
    let overhead = Duration::try_from_secs_f64(options.max_overhead_ms / 1e3).unwrap_or_default();
    let interval = options.interval_ms.saturating_add(overhead);
    interval
        .saturating_mul(options.tokens)
        .saturating_add(STREAM_TIMEOUT)
}

/// Creates a progress bar that its own thread draws, so that no token waits for the terminal.
fn stream_bar(api: &'static str, tokens: u32) -> ProgressBar {
    let bar = progress::create_bar(
        tokens.into(),
        "{prefix} {bar:40} {pos}/{len} tokens, {eta} left",
    );
    bar.set_prefix(api);
    if !bar.is_hidden() {
        bar.enable_steady_tick(REDRAW);
    }
    bar
}

impl ApiReport {
    fn from_timer(progress: &RequestTimer, interval: Duration, stats: LoadStats) -> Option<Self> {
        let metrics = StreamingMetrics::from_timer(progress)?;
        Some(Self {
            overhead_ms: metrics.mean_receive_interval_ms - interval.as_secs_f64() * 1e3,
            metrics,
            stats,
        })
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.metrics)?;
        let overhead = format_hundredths(self.overhead_ms);
        writeln!(out, "Overhead per token: {overhead}ms")?;
        let why = match self.stats.timestamp_status() {
            TimestampStatus::Known => return self.write_times(out),
            TimestampStatus::NotRequested | TimestampStatus::Absent => {
                "the server sends no timestamps"
            }
            TimestampStatus::ForeignClock => {
                "the server's timestamps come from another machine's clock"
            }
        };
        writeln!(out, "One-way latency: unknown, {why}")
    }

    fn write_times(&self, out: &mut dyn Write) -> io::Result<()> {
        let times = &self.stats.times;
        let (stamped, tokens) = (times.one_way.len(), self.stats.tokens);
        let one_way = Percentiles::from_histogram(&times.one_way);
        writeln!(out, "One-way latency (received - emitted): {one_way}")?;
        if stamped != tokens {
            writeln!(out, "Only {stamped} of {tokens} tokens have timestamps")?;
        }
        if times.lateness.is_empty() {
            return writeln!(out, "Lateness: unknown, the server sends no due times");
        }
        let schedule = Percentiles::from_histogram(&times.lateness);
        writeln!(out, "Schedule lateness (received - due): {schedule}")?;
        let runner = Percentiles::from_histogram(&times.runner);
        writeln!(out, "Runner lateness (emitted - due): {runner}")
    }
}

impl StreamingMetrics {
    /// Returns the figures of a stream. `None` with fewer than two tokens, between which there is no interval.
    fn from_timer(progress: &RequestTimer) -> Option<Self> {
        let intervals = f64::from(progress.count.checked_sub(1).filter(|count| *count > 0)?);
        let total_ms = count_to_f64(progress.total_ns()) / 1e6;
        Some(Self {
            received_token_count: progress.count,
            total_streaming_time_ms: total_ms,
            mean_receive_interval_ms: count_to_f64(progress.streaming_ns()) / 1e6 / intervals,
            throughput_tokens_per_second: intervals / (total_ms / 1e3),
        })
    }
}

impl fmt::Display for StreamingMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "StreamingMetrics(received_tokens={}, total_streaming_time_ms={:.2}, \
             mean_receive_interval_ms={:.2}, throughput_tokens_per_second={:.2})",
            self.received_token_count,
            self.total_streaming_time_ms,
            self.mean_receive_interval_ms,
            self.throughput_tokens_per_second,
        )
    }
}

/// Formats a number with two decimals, but never as `-0.00`.
fn format_hundredths(number: f64) -> String {
    let text = format!("{number:.2}");
    if text == "-0.00" {
        "0.00".to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::ApiChoice;
    use super::*;

    const MS: u64 = 1_000_000;

    fn options(max_overhead_ms: f64) -> Options {
        Options {
            tokens: 1000,
            interval_ms: Duration::from_millis(20),
            max_overhead_ms,
            http: None,
            grpc: None,
            model: None,
            api: ApiChoice::Http,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_hangs_is_reported_after_its_time_limit() {
        // The kernel accepts the connection, and nothing answers.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = ServerUrl::from_authority(&listener.local_addr().unwrap().to_string());
        let result = Measurement::run(&options(3.0), &url, Format::Ndjson, "HTTP").await;
        assert!(result.report.is_none());
        let reason = "the stream hangs: 0 tokens arrived within 83 s";
        assert_eq!(result.failures, [reason]);
    }

    #[test]
    fn a_negative_limit_does_not_shorten_the_time_limit() {
        assert_eq!(time_limit(&options(-1000.0)), Duration::from_secs(80));
    }

    #[test]
    fn zero_has_no_sign() {
        let texts = [-0.004, 0.004, -0.006].map(format_hundredths);
        assert_eq!(texts, ["0.00", "0.00", "-0.01"]);
    }

    #[test]
    fn the_references_figures_are_as_it_defines_them() {
        let (mut stats, mut progress) = (LoadStats::new(), RequestTimer::start(100 * MS, true));
        progress.record_token(&mut stats, 130 * MS, None);
        // A single token has no interval.
        assert_eq!(StreamingMetrics::from_timer(&progress), None);
        progress.record_token(&mut stats, 151 * MS, None);
        progress.record_token(&mut stats, 175 * MS, None);
        let metrics = StreamingMetrics::from_timer(&progress).unwrap();
        assert_eq!(
            metrics.to_string(),
            "StreamingMetrics(received_tokens=3, total_streaming_time_ms=75.00, \
             mean_receive_interval_ms=22.50, throughput_tokens_per_second=26.67)"
        );
    }
}
