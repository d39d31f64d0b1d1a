//! The latency of tokens from the device to the socket, by stage and response format.
//!
//! The histograms have fixed buckets. Recording a token searches among twenty bounds and does three additions. It
//! allocates no memory, even if the metrics are never scraped.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The metric's name.
const METRIC_NAME: &str = "tokenway_token_latency_seconds";

const METRIC_HELP: &str = "Time that each token spent in a stage: engine (from its emission by the device until \
    its request's stream received it), frontend (until its line or message was written), socket (until \
    the connection was flushed).";

/// Upper bounds of the buckets: in nanoseconds, and in seconds as Prometheus prints them.
const BUCKET_BOUNDS: [(u64, &str); 20] = [
    (1_000, "0.000001"),
    (2_000, "0.000002"),
    (5_000, "0.000005"),
    (10_000, "0.00001"),
    (20_000, "0.00002"),
    (50_000, "0.00005"),
    (100_000, "0.0001"),
    (200_000, "0.0002"),
    (500_000, "0.0005"),
    (1_000_000, "0.001"),
    (2_000_000, "0.002"),
    (5_000_000, "0.005"),
    (10_000_000, "0.01"),
    (20_000_000, "0.02"),
    (50_000_000, "0.05"),
    (100_000_000, "0.1"),
    (200_000_000, "0.2"),
    (500_000_000, "0.5"),
    (1_000_000_000, "1"),
    (10_000_000_000, "10"),
];

/// The API and the format of a response, as the label `format` shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseFormat {
    /// gRPC.
    Grpc,
    /// HTTP with newline-delimited JSON.
    HttpNdjson,
    /// HTTP with server-sent events.
    HttpSse,
    /// HTTP with a single JSON body. All its tokens are sent together, so only the engine stage is recorded.
    HttpUnary,
}

/// A stage of a token's path from the device to the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From the token's emission by the device until the request's stream receives it.
    Engine,
    /// From the start of the frontend's write until the token's line or message is written.
    Frontend,
    /// From the write until the connection is flushed to its socket.
    Socket,
}

impl ResponseFormat {
    const ALL: [Self; 4] = [Self::Grpc, Self::HttpNdjson, Self::HttpSse, Self::HttpUnary];

    fn label(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::HttpNdjson => "http_ndjson",
            Self::HttpSse => "http_sse",
            Self::HttpUnary => "http_unary",
        }
    }

    fn histograms(self, latency: &TokenLatency) -> &StageHistograms {
        match self {
            Self::Grpc => &latency.grpc,
            Self::HttpNdjson => &latency.http_ndjson,
            Self::HttpSse => &latency.http_sse,
            Self::HttpUnary => &latency.http_unary,
        }
    }
}

impl Stage {
    const ALL: [Self; 3] = [Self::Engine, Self::Frontend, Self::Socket];

    fn label(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Frontend => "frontend",
            Self::Socket => "socket",
        }
    }
}

/// The histograms of all formats and stages.
#[derive(Default)]
pub(super) struct TokenLatency {
    grpc: StageHistograms,
    http_ndjson: StageHistograms,
    http_sse: StageHistograms,
    http_unary: StageHistograms,
}

#[derive(Default)]
struct StageHistograms {
    engine: Arc<Histogram>,
    frontend: Arc<Histogram>,
    socket: Arc<Histogram>,
}

impl StageHistograms {
    fn of(&self, stage: Stage) -> &Arc<Histogram> {
        match stage {
            Stage::Engine => &self.engine,
            Stage::Frontend => &self.frontend,
            Stage::Socket => &self.socket,
        }
    }
}

#[derive(Default)]
struct Histogram {
    /// One bucket per bound, and one for latencies above all bounds.
    buckets: [AtomicU64; BUCKET_BOUNDS.len() + 1],
    sum_ns: AtomicU64,
}

/// Returns the index of the bucket for a latency.
fn bucket(ns: u64) -> usize {
    BUCKET_BOUNDS.partition_point(|(bound, _)| *bound < ns)
}

impl Histogram {
    /// Adds `tokens` tokens to a bucket. `sum_ns` is the sum of their latencies.
    fn add(&self, bucket: usize, tokens: u64, sum_ns: u64) {
        self.buckets[bucket].fetch_add(tokens, Ordering::Relaxed);
        self.sum_ns.fetch_add(sum_ns, Ordering::Relaxed);
    }

    /// Writes the histogram in Prometheus's text format.
    fn write(&self, labels: &str, out: &mut String) -> fmt::Result {
        let bounds = BUCKET_BOUNDS.iter().map(|(_, seconds)| *seconds);
        let mut count = 0;
        for (bucket, bound) in self.buckets.iter().zip(bounds.chain(["+Inf"])) {
            count += bucket.load(Ordering::Relaxed);
            writeln!(
                out,
                "{METRIC_NAME}_bucket{{{labels},le=\"{bound}\"}} {count}"
            )?;
        }
        let sum_ns = self.sum_ns.load(Ordering::Relaxed);
        let (seconds, rest) = (sum_ns / 1_000_000_000, sum_ns % 1_000_000_000);
        writeln!(out, "{METRIC_NAME}_sum{{{labels}}} {seconds}.{rest:09}")?;
        writeln!(out, "{METRIC_NAME}_count{{{labels}}} {count}")
    }
}

impl TokenLatency {
    /// Creates the recorder of one request's latencies in a stage.
    pub(super) fn times(&self, format: ResponseFormat, stage: Stage) -> StageTimes {
        StageTimes {
            histogram: Arc::clone(format.histograms(self).of(stage)),
            tokens: AtomicU64::new(0),
            sum_ns: AtomicU64::new(0),
            longest_ns: AtomicU64::new(0),
        }
    }

    /// Writes all histograms in Prometheus's text format.
    pub(super) fn write(&self, out: &mut String) -> fmt::Result {
        writeln!(
            out,
            "# HELP {METRIC_NAME} {METRIC_HELP}\n# TYPE {METRIC_NAME} histogram"
        )?;
        for format in ResponseFormat::ALL {
            for stage in Stage::ALL {
                let (format_label, stage_label) = (format.label(), stage.label());
                let labels = format!("format=\"{format_label}\",stage=\"{stage_label}\"");
                format.histograms(self).of(stage).write(&labels, out)?;
            }
        }
        Ok(())
    }
}

/// Records the latencies of one request's tokens in one stage. Each latency is also added to the histogram of all
/// requests.
pub struct StageTimes {
    histogram: Arc<Histogram>,
    tokens: AtomicU64,
    sum_ns: AtomicU64,
    longest_ns: AtomicU64,
}

/// The latencies of a request's tokens in a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageSummary {
    /// The number of recorded tokens.
    pub tokens: u64,
    /// The mean latency, in nanoseconds.
    pub mean_ns: u64,
    /// The longest latency, in nanoseconds.
    pub longest_ns: u64,
}

impl StageTimes {
    /// Records `tokens` tokens with a latency of `ns` nanoseconds each.
    pub fn record(&self, tokens: u64, ns: u64) {
        let sum_ns = ns.saturating_mul(tokens);
        self.histogram.add(bucket(ns), tokens, sum_ns);
        self.add(tokens, sum_ns, ns);
    }

    /// Records one token per latency. Consecutive latencies that fall into the same bucket, as is common in a batch,
    /// are added to the histogram together.
    pub(crate) fn record_each(&self, times_ns: impl IntoIterator<Item = u64>) {
        let (mut tokens, mut sum_ns, mut longest_ns) = (0, 0_u64, 0);
        let mut run = LatencyRun::new(0);
        for ns in times_ns {
            if !run.contains(ns) {
                run.add_to(&self.histogram);
                tokens += run.tokens;
                sum_ns = sum_ns.saturating_add(run.sum_ns);
                run = LatencyRun::new(bucket(ns));
            }
            run.tokens += 1;
            run.sum_ns = run.sum_ns.saturating_add(ns);
            longest_ns = longest_ns.max(ns);
        }
        run.add_to(&self.histogram);
        let sum_ns = sum_ns.saturating_add(run.sum_ns);
        self.add(tokens + run.tokens, sum_ns, longest_ns);
    }

    fn add(&self, tokens: u64, sum_ns: u64, longest_ns: u64) {
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
        self.sum_ns.fetch_add(sum_ns, Ordering::Relaxed);
        self.longest_ns.fetch_max(longest_ns, Ordering::Relaxed);
    }

    /// Returns the latencies recorded so far.
    #[must_use]
    pub fn summary(&self) -> StageSummary {
        let tokens = self.tokens.load(Ordering::Relaxed);
        StageSummary {
            tokens,
            mean_ns: self.sum_ns.load(Ordering::Relaxed) / tokens.max(1),
            longest_ns: self.longest_ns.load(Ordering::Relaxed),
        }
    }
}

/// Consecutive latencies that fall into the same bucket.
struct LatencyRun {
    bucket: usize,
    /// The shortest and longest latency that the bucket contains.
    from_ns: u64,
    to_ns: u64,
    tokens: u64,
    sum_ns: u64,
}

impl LatencyRun {
    fn new(bucket: usize) -> Self {
        let bound = |bucket: usize| BUCKET_BOUNDS.get(bucket).map(|(bound, _)| *bound);
        let previous = bucket.checked_sub(1).and_then(bound);
        Self {
            bucket,
            from_ns: previous.map_or(0, |bound| bound + 1),
            to_ns: bound(bucket).unwrap_or(u64::MAX),
            tokens: 0,
            sum_ns: 0,
        }
    }

    fn contains(&self, ns: u64) -> bool {
        self.from_ns <= ns && ns <= self.to_ns
    }

    fn add_to(&self, histogram: &Histogram) {
        if self.tokens > 0 {
            histogram.add(self.bucket, self.tokens, self.sum_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_counted_by_bucket_and_summed() {
        let latency = TokenLatency::default();
        let times = latency.times(ResponseFormat::HttpSse, Stage::Frontend);
        times.record(2, 1_000);
        times.record(1, 1_001);
        times.record(1, u64::MAX / 2);
        let mut text = String::new();
        latency.write(&mut text).unwrap();
        for line in [
            "_bucket{format=\"http_sse\",stage=\"frontend\",le=\"0.000001\"} 2",
            "_bucket{format=\"http_sse\",stage=\"frontend\",le=\"0.000002\"} 3",
            "_bucket{format=\"http_sse\",stage=\"frontend\",le=\"10\"} 3",
            "_bucket{format=\"http_sse\",stage=\"frontend\",le=\"+Inf\"} 4",
            "_count{format=\"http_sse\",stage=\"frontend\"} 4",
            "_count{format=\"http_sse\",stage=\"socket\"} 0",
        ] {
            assert!(
                text.contains(&format!("{METRIC_NAME}{line}\n")),
                "{line}\n{text}"
            );
        }
    }

    #[test]
    fn record_each_fills_the_same_buckets_as_record() {
        let bounds = BUCKET_BOUNDS.iter().map(|(bound, _)| *bound);
        let around = bounds.flat_map(|bound| [bound - 1, bound, bound, bound + 1]);
        let mut times_ns: Vec<_> = around.chain([0, 0, 3_000, 1_000_000]).collect();
        times_ns.extend(times_ns.clone().iter().rev());
        let (together, alone) = (TokenLatency::default(), TokenLatency::default());
        let each = alone.times(ResponseFormat::Grpc, Stage::Engine);
        for ns in &times_ns {
            each.record(1, *ns);
        }
        let all = together.times(ResponseFormat::Grpc, Stage::Engine);
        all.record_each(times_ns);
        assert_eq!(all.summary(), each.summary());
        let text = |latency: &TokenLatency| {
            let mut text = String::new();
            latency.write(&mut text).unwrap();
            text
        };
        assert_eq!(text(&together), text(&alone));
    }

    #[test]
    fn a_summary_has_the_mean_and_the_longest_latency_of_one_request() {
        let latency = TokenLatency::default();
        let (mine, _other) = (
            latency.times(ResponseFormat::Grpc, Stage::Engine),
            latency
                .times(ResponseFormat::Grpc, Stage::Engine)
                .record(5, 1_000_000),
        );
        assert_eq!(mine.summary(), StageSummary::default());
        mine.record(3, 1_500_000_000);
        mine.record(1, 500_000_000);
        let expected = StageSummary {
            tokens: 4,
            mean_ns: 1_250_000_000,
            longest_ns: 1_500_000_000,
        };
        assert_eq!(mine.summary(), expected);
        let mut text = String::new();
        latency.write(&mut text).unwrap();
        let sum = format!("{METRIC_NAME}_sum{{format=\"grpc\",stage=\"engine\"}} 5.005000000\n");
        assert!(text.contains(&sum), "{text}");
    }
}
