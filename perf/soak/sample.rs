//! What the server holds at a moment: memory, descriptors and threads as Linux counts them, and what
//! its own gauges say.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http::header::{CONNECTION, HOST};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use super::Fault;
use super::connection::{Connection, Protocol, Room};
use crate::arguments::ServerUrl;
use crate::process::Holdings;

/// The server's gauges, by their names in `src/telemetry.rs`.
const SEQUENCES: &str = "tokenway_sequences_running";
const QUEUE_DEPTH: &str = "tokenway_requests_queued";
const CONNECTIONS: &str = "tokenway_connections_open";
const IN_FLIGHT: &str = "tokenway_requests_in_flight";

/// A server that does not answer within this cannot be watched.
const ANSWER: Duration = Duration::from_secs(10);

/// How often a server that is to become idle is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What a server holds, and what its clients have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Sample {
    /// Since the beginning.
    pub(super) seconds: f64,
    pub(super) rss_bytes: u64,
    pub(super) descriptors: u64,
    pub(super) threads: u64,
    /// Slots that are taken.
    pub(super) sequences: u64,
    pub(super) queued: u64,
    /// But for the one that asks.
    pub(super) connections: u64,
    pub(super) in_flight: u64,
    pub(super) streams_done: u64,
    pub(super) faults: u64,
}

/// The server that is watched.
pub(super) struct Watched {
    pub(super) http: ServerUrl,
    pub(super) process: u32,
    pub(super) began: Instant,
}

impl Watched {
    /// Looks once.
    pub(super) async fn sample(&self) -> Result<Sample, Fault> {
        let holdings = Holdings::of(self.process).map_err(Fault::Gone)?;
        let gauges = timeout(ANSWER, self.gauges()).await;
        let gauges = gauges.unwrap_or(Err(Fault::Hangs))?;
        let gauge = |name| sum(&gauges, name).ok_or_else(|| Fault::Malformed(name.to_owned()));
        Ok(Sample {
            seconds: self.began.elapsed().as_secs_f64(),
            rss_bytes: holdings.rss_bytes,
            descriptors: holdings.descriptors,
            threads: holdings.threads,
            sequences: gauge(SEQUENCES)?,
            queued: gauge(QUEUE_DEPTH)?,
            connections: gauge(CONNECTIONS)?.saturating_sub(1),
            in_flight: gauge(IN_FLIGHT)?,
            streams_done: 0,
            faults: 0,
        })
    }

    /// Looks until this is true of what the server holds, but no longer than this; the last look.
    pub(super) async fn wait(
        &self,
        at_most: Duration,
        is_there: impl Fn(&Sample) -> bool,
    ) -> Result<Sample, Fault> {
        let until = Instant::now() + at_most;
        loop {
            let sample = self.sample().await?;
            if is_there(&sample) || Instant::now() >= until {
                return Ok(sample);
            }
            sleep(LOOK).await;
        }
    }

    /// The text at `/metrics`, over a connection that does not stay open.
    async fn gauges(&self) -> Result<String, Fault> {
        let request = Request::get(format!("{}/metrics", self.http))
            .header(HOST, &self.http.authority)
            .header(CONNECTION, "close")
            .body(Bytes::new())
            .expect("it is a whole request");
        let mut connection = Connection::open(&self.http, Protocol::Http1, Room::Wide).await?;
        let answer = connection.send(request).await?;
        if !answer.status.is_success() {
            return Err(Fault::answer("the metrics", answer.status.to_string()));
        }
        let text = answer.body.whole().await?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl Sample {
    /// Whether nobody has anything of the server's.
    pub(super) fn is_idle(&self) -> bool {
        self.sequences + self.queued + self.connections + self.in_flight == 0
    }
}

/// The sum of a gauge over its labels; `None` where there is no such gauge.
fn sum(text: &str, name: &str) -> Option<u64> {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let is_whole_name = rest.starts_with([' ', '{']);
        is_whole_name.then(|| rest.rsplit(' ').next())?
    });
    values
        .map(|value| value.parse::<u64>().ok())
        .reduce(|sum, value| Some(sum? + value?))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_is_summed_over_its_labels() {
        let text = "# TYPE a gauge\na{door=\"grpc\"} 2\na{door=\"http\"} 3\nab 7\n";
        assert_eq!(sum(text, "a"), Some(5));
        assert_eq!(sum(text, "ab"), Some(7));
        assert_eq!(sum(text, "b"), None);
    }

    #[test]
    fn who_holds_anything_is_not_idle() {
        let idle = Sample::default();
        assert!(idle.is_idle());
        for held in [
            Sample {
                sequences: 1,
                ..idle
            },
            Sample { queued: 1, ..idle },
            Sample {
                connections: 1,
                ..idle
            },
            Sample {
                in_flight: 1,
                ..idle
            },
        ] {
            assert!(!held.is_idle(), "{held:?}");
        }
    }
}
