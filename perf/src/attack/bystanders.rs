//! Bystanders: one stream on each API of a model that emits a token every 5 ms. The longest time between two tokens of a
//! stream shows how much an attack disturbs other clients.
//! Each stream has its own thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use tokenway::runner::monotonic_ns;
use tokio::runtime::Builder;
use tokio::time::sleep;

use super::server::PACED_MODEL;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::order;
use crate::stream::{CompletionRequest, Connection, Event, Format, Stream, StreamOptions};

/// Number of tokens of a bystander's stream, which lasts longer than any attack.
const TOKENS: u32 = 1_000_000;
/// Interval at which a bystander checks if the measurement is over.
const STOP_POLL: Duration = Duration::from_millis(20);

pub(super) struct Bystanders {
    pub(super) http: Bystander,
    pub(super) grpc: Bystander,
}

/// A stream that another thread reads.
pub(super) struct Bystander {
    gauge: Arc<Gauge>,
}

/// Measurements of a stream, recorded by the stream's thread.
#[derive(Default)]
struct Gauge {
    last_ns: AtomicU64,
    longest_gap_ns: AtomicU64,
    longest_delay_ns: AtomicU64,
    lost: AtomicU64,
    fault: Mutex<Option<String>>,
    is_over: AtomicBool,
}

/// The effect of an attack on a bystander.
#[derive(Debug, Default, Serialize)]
pub(super) struct Disturbance {
    /// Longest time between two tokens.
    pub(super) longest_gap_ms: f64,
    /// Longest time from the device's emission of a token to its arrival. A long gap without such a delay means that
    /// the device's thread had to wait.
    pub(super) longest_delay_ms: f64,
    pub(super) lost_tokens: u64,
    /// Reason why the stream ended, if it did.
    pub(super) fault: Option<String>,
}

impl Bystanders {
    pub(super) fn start(http: &ServerUrl, grpc: &ServerUrl) -> anyhow::Result<Self> {
        Ok(Self {
            http: Bystander::start(http, Format::Ndjson)?,
            grpc: Bystander::start(grpc, Format::Grpc)?,
        })
    }

    pub(super) fn forget_gaps(&self) {
        for bystander in [&self.http, &self.grpc] {
            let gauge = &bystander.gauge;
            gauge.longest_gap_ns.store(0, Ordering::Relaxed);
            gauge.longest_delay_ns.store(0, Ordering::Relaxed);
        }
    }
}

impl Bystander {
    fn start(url: &ServerUrl, format: Format) -> anyhow::Result<Self> {
        let gauge = Arc::new(Gauge::default());
        let (shared, url) = (Arc::clone(&gauge), url.clone());
        let runtime = Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new()
            .name(format!("bystander-{format:?}"))
            .spawn(move || {
                shared.last_ns.store(monotonic_ns(), Ordering::Relaxed);
                runtime.block_on(async {
                    tokio::select! {
                        read = read_stream(&url, format, &shared) => shared.record_fault(read),
                        () = shared.wait_for_end() => {}
                    }
                });
            })?;
        Ok(Self { gauge })
    }

    /// Ends the stream.
    pub(super) fn stop(&self) -> Disturbance {
        let gauge = &self.gauge;
        // The time since the last token counts, too.
        gauge.record_gap(monotonic_ns());
        gauge.is_over.store(true, Ordering::Relaxed);
        let fault = gauge.fault.lock().unwrap_or_else(PoisonError::into_inner);
        Disturbance {
            longest_gap_ms: milliseconds(&gauge.longest_gap_ns),
            longest_delay_ms: milliseconds(&gauge.longest_delay_ns),
            lost_tokens: gauge.lost.load(Ordering::Relaxed),
            fault: fault.clone(),
        }
    }
}

impl Gauge {
    fn record_gap(&self, now_ns: u64) {
        let gap = now_ns.saturating_sub(self.last_ns.load(Ordering::Relaxed));
        self.longest_gap_ns.fetch_max(gap, Ordering::Relaxed);
    }

    fn record_fault(&self, ended: Result<(), Fault>) {
        let fault = match ended {
            Ok(()) => "the stream ended".to_owned(),
            Err(fault) => fault.to_string(),
        };
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
    }

    async fn wait_for_end(&self) {
        while !self.is_over.load(Ordering::Relaxed) {
            sleep(STOP_POLL).await;
        }
    }
}

async fn read_stream(url: &ServerUrl, format: Format, gauge: &Gauge) -> Result<(), Fault> {
    let mut connection = Connection::open(url, format.protocol()).await?;
    let completion = CompletionRequest {
        model: Some(PACED_MODEL),
        stream_options: Some(StreamOptions::IncludeStamps(true)),
        ..CompletionRequest::of_tokens(TOKENS)
    };
    let mut stream = Stream::open(&mut connection, format, &completion).await?;
    let mut next = 0;
    let ended = stream.read_to_end(|event, received_ns| {
        let token = match event {
            Event::Token(token) => token,
            Event::BytesRead(_)
            | Event::Started
            | Event::FinishReason
            | Event::EndOfStream
            | Event::Error(_)
            | Event::Usage(_)
            | Event::Other => return Ok(()),
        };
        let index = order::check_index(&token.text, token.index)?;
        let lost = u64::from(index.saturating_sub(next));
        gauge.lost.fetch_add(lost, Ordering::Relaxed);
        next = index + 1;
        gauge.record_gap(received_ns);
        gauge.last_ns.store(received_ns, Ordering::Relaxed);
        if let Some(stamp) = token.stamp {
            let delay = received_ns.saturating_sub(stamp.emitted_ns);
            gauge.longest_delay_ns.fetch_max(delay, Ordering::Relaxed);
        }
        Ok(())
    });
    ended.await?.complete(next)
}

fn milliseconds(nanoseconds: &AtomicU64) -> f64 {
    Duration::from_nanos(nanoseconds.load(Ordering::Relaxed)).as_secs_f64() * 1e3
}
