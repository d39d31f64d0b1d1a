//! The measurement of one API: a stream, the figures of its tokens, and the faults in it.

use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use indicatif::ProgressBar;
use tokenway::runner::monotonic_ns;
use tokio::time::timeout;

use super::Options;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::figures::{Figures, Progress, Stamps};
use crate::load::{Consumer, Load};
use crate::progress;
use crate::statistics::{Percentiles, count};
use crate::stream::{Connection, Event, Format, Stream};

/// Time that a stream may take in addition to that of its tokens. After that it hangs.
const STREAM_TIMEOUT: Duration = Duration::from_secs(60);

/// Interval at which the progress bar is drawn.
const REDRAW: Duration = Duration::from_millis(100);

/// Result of one API.
pub(super) struct Measurement {
    /// `None` if the stream was not complete: figures of other tokens would mean nothing.
    report: Option<Report>,
    pub(super) failures: Vec<String>,
}

struct Report {
    metrics: StreamingMetrics,
    overhead_ms: f64,
    figures: Figures,
}

/// Figures of the reference system's performance test, by its names and definitions.
#[derive(Debug, PartialEq)]
struct StreamingMetrics {
    received_token_count: u32,
    /// From the request to the last token.
    total_streaming_time_ms: f64,
    /// (last token − first token) / (tokens − 1). A delay that is the same for all tokens cancels out.
    mean_receive_interval_ms: f64,
    /// (tokens − 1) / total time.
    throughput_tokens_per_second: f64,
}

impl Measurement {
    /// Streams through an API, and judges the tokens.
    pub(super) async fn of(
        options: &Options,
        url: &ServerUrl,
        format: Format,
        api: &'static str,
    ) -> Self {
        let load = Load {
            timed: true,
            every_gap: true,
            model: options.model.clone(),
            ..Load::of_test_runner(1, options.tokens)
        };
        let mut received = Received {
            consumer: Consumer::start(0, &load),
            figures: Figures::new(),
            bar: bar(api, options.tokens),
        };
        let limit = time_limit(options);
        let streamed = timeout(limit, received.stream(&load, url, format)).await;
        received.bar.finish_and_clear();
        let Received {
            consumer,
            mut figures,
            ..
        } = received;
        let hangs = Fault::Hangs {
            after: consumer.count(),
            seconds: limit.as_secs(),
        };
        consumer.ended(streamed.unwrap_or(Err(hangs)), &mut figures);
        let mut failures = figures.faults.clone();
        let mut report = None;
        if failures.is_empty() {
            report = Report::of(&consumer.progress, options.interval_ms, figures);
        }
        let limit_ms = options.max_overhead_ms;
        if let Some(Report { overhead_ms, .. }) = report
            && overhead_ms > limit_ms
        {
            let overhead = hundredths(overhead_ms);
            failures.push(format!(
                "the overhead of {overhead} ms per token is above the {limit_ms} ms of --max-overhead-ms"
            ));
        }
        Self { report, failures }
    }

    /// Prints the figures, if there are any.
    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.report {
            Some(report) => report.write(out),
            None => writeln!(out, "No figures: the stream was not complete."),
        }
    }
}

/// Tokens of a stream as they arrive.
struct Received {
    consumer: Consumer,
    figures: Figures,
    bar: ProgressBar,
}

impl Received {
    async fn stream(&mut self, load: &Load, url: &ServerUrl, format: Format) -> Result<(), Fault> {
        let mut connection = Connection::open(url, format.protocol()).await?;
        self.consumer = Consumer::start(monotonic_ns(), load);
        let mut stream = Stream::open(&mut connection, format, &load.completion()).await?;
        let reading = stream.read_to_end(|event, received_ns| {
            if let Event::Token(_) = event {
                self.bar.inc(1);
            }
            self.consumer.event(event, received_ns, &mut self.figures)
        });
        reading.await?.complete(stream.count())
    }
}

/// Time after which a stream hangs. A slower stream is above the overhead's limit anyway.
fn time_limit(options: &Options) -> Duration {
    let overhead = Duration::try_from_secs_f64(options.max_overhead_ms / 1e3).unwrap_or_default();
    let interval = options.interval_ms.saturating_add(overhead);
    interval
        .saturating_mul(options.tokens)
        .saturating_add(STREAM_TIMEOUT)
}

/// A progress bar whose thread draws it, so that no token waits for the terminal.
fn bar(api: &'static str, tokens: u32) -> ProgressBar {
    let bar = progress::bar(
        tokens.into(),
        "{prefix} {bar:40} {pos}/{len} tokens, {eta} left",
    );
    bar.set_prefix(api);
    if !bar.is_hidden() {
        bar.enable_steady_tick(REDRAW);
    }
    bar
}

impl Report {
    fn of(progress: &Progress, interval: Duration, figures: Figures) -> Option<Self> {
        let metrics = StreamingMetrics::of(progress)?;
        Some(Self {
            overhead_ms: metrics.mean_receive_interval_ms - interval.as_secs_f64() * 1e3,
            metrics,
            figures,
        })
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.metrics)?;
        let overhead = hundredths(self.overhead_ms);
        writeln!(out, "Overhead per token: {overhead}ms")?;
        let why = match self.figures.stamps() {
            Stamps::Known => return self.write_times(out),
            Stamps::NotRequested | Stamps::Absent => "the server sends no stamps",
            Stamps::ForeignClock => "the server's stamps are not of this machine's clock",
        };
        writeln!(out, "One-way latency: unknown, {why}")
    }

    fn write_times(&self, out: &mut dyn Write) -> io::Result<()> {
        let times = &self.figures.times;
        let (stamped, tokens) = (times.one_way.len(), self.figures.tokens);
        let one_way = Percentiles::of(&times.one_way);
        writeln!(out, "One-way latency (received - emitted): {one_way}")?;
        if stamped != tokens {
            writeln!(out, "Only {stamped} of {tokens} tokens have stamps")?;
        }
        if times.lateness.is_empty() {
            return writeln!(out, "Lateness: unknown, the server sends no due times");
        }
        let schedule = Percentiles::of(&times.lateness);
        writeln!(out, "Schedule lateness (received - due): {schedule}")?;
        let runner = Percentiles::of(&times.runner);
        writeln!(out, "Runner lateness (emitted - due): {runner}")
    }
}

impl StreamingMetrics {
    /// Figures of a stream; `None` with fewer than two tokens, which have no interval.
    fn of(progress: &Progress) -> Option<Self> {
        let intervals = f64::from(progress.count.checked_sub(1).filter(|count| *count > 0)?);
        let total_ms = count(progress.total_ns()) / 1e6;
        Some(Self {
            received_token_count: progress.count,
            total_streaming_time_ms: total_ms,
            mean_receive_interval_ms: count(progress.streaming_ns()) / 1e6 / intervals,
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

/// Formats with two decimals, and never as `-0.00`.
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
        let url = ServerUrl::at(&listener.local_addr().unwrap().to_string());
        let result = Measurement::of(&options(3.0), &url, Format::Ndjson, "HTTP").await;
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
        let texts = [-0.004, 0.004, -0.006].map(hundredths);
        assert_eq!(texts, ["0.00", "0.00", "-0.01"]);
    }

    #[test]
    fn the_references_figures_are_as_it_defines_them() {
        let (mut figures, mut progress) = (Figures::new(), Progress::start(100 * MS, true));
        progress.token(&mut figures, 130 * MS, None);
        // One token has no interval.
        assert_eq!(StreamingMetrics::of(&progress), None);
        progress.token(&mut figures, 151 * MS, None);
        progress.token(&mut figures, 175 * MS, None);
        let metrics = StreamingMetrics::of(&progress).unwrap();
        assert_eq!(
            metrics.to_string(),
            "StreamingMetrics(received_tokens=3, total_streaming_time_ms=75.00, \
             mean_receive_interval_ms=22.50, throughput_tokens_per_second=26.67)"
        );
    }
}
