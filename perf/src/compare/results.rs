//! Results of a comparison, server by server.

use serde::Serialize;

use super::servers::Server;
use crate::load::Load;
use crate::load_stats::{LatencyHistograms, LoadStats, Rates, TimestampStatus};
use crate::report::Machine;
use crate::statistics::Spread;

pub(super) const JSON_FORMAT_VERSION: u32 = 1;

/// Results of one run of `compare`, as the JSON file contains them.
#[derive(Serialize)]
pub(super) struct Comparison {
    pub(super) format: u32,
    pub(super) machine: Machine,
    pub(super) load: Load,
    pub(super) servers: Vec<ServerResults>,
}

/// Results of one server.
#[derive(Serialize)]
pub(super) struct ServerResults {
    #[serde(flatten)]
    pub(super) server: Server,
    /// Rounds in the order in which they were measured.
    pub(super) rounds: Vec<Round>,
    /// Token times of all rounds together.
    #[serde(rename = "histograms")]
    pub(super) times: LatencyHistograms,
    stamps: TimestampStatus,
    /// Distinct faults of each round, each with the number of its round.
    faults: Vec<String>,
}

/// Result of one round of one server.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Round {
    #[serde(flatten)]
    pub(super) rates: Rates,
    /// Number of requests whose streams were complete.
    requests: u64,
    /// Number of requests that were refused, broke off, or had wrong tokens.
    lost_requests: u64,
}

impl Comparison {
    /// Returns a description of the load, as the title of reports.
    pub(super) fn title(&self) -> String {
        let some = |number: u32, what: &str| match number {
            1 => format!("1 {what}"),
            number => format!("{number} {what}s"),
        };
        format!(
            "{} at once, {} of {} each",
            some(self.load.streams, "stream"),
            some(self.load.requests, "request"),
            some(self.load.tokens, "token")
        )
    }

    pub(super) fn faults(&self) -> Vec<String> {
        let of_server = |results: &ServerResults| {
            let name = results.server.name.clone();
            let faults = results.faults.clone().into_iter();
            faults.map(move |fault| format!("{name}, {fault}"))
        };
        self.servers.iter().flat_map(of_server).collect()
    }
}

impl ServerResults {
    pub(super) fn new(server: &Server) -> Self {
        Self {
            server: server.clone(),
            rounds: Vec::new(),
            times: LatencyHistograms::default(),
            stamps: TimestampStatus::NotRequested,
            faults: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, stats: &LoadStats, load: &Load) {
        let number = self.rounds.len() + 1;
        let listed = u32::try_from(stats.faults.len()).unwrap_or(0);
        let unlisted = stats.fault_count - listed;
        let more = (unlisted > 0).then(|| format!("{unlisted} more"));
        let faults = stats.faults.iter().cloned().chain(more);
        let faults = faults.map(|fault| format!("round {number}: {fault}"));
        self.faults.extend(faults);
        self.times.add(&stats.times);
        let made = u64::from(load.streams) * u64::from(load.requests);
        self.rounds.push(Round {
            rates: stats.rates(),
            requests: stats.requests,
            lost_requests: made.saturating_sub(stats.requests),
        });
        self.stamps = match (
            load.request_timestamps,
            self.stamps,
            stats.timestamp_status(),
        ) {
            (false, ..) => TimestampStatus::NotRequested,
            (true, TimestampStatus::ForeignClock, _) | (true, _, TimestampStatus::ForeignClock) => {
                TimestampStatus::ForeignClock
            }
            (true, ..) if self.times.one_way.is_empty() => TimestampStatus::Absent,
            (true, ..) => TimestampStatus::Known,
        };
    }

    pub(super) fn spread(&self, value: fn(&Rates) -> f64) -> Option<Spread> {
        let rates = self.rounds.iter().map(|round| &round.rates);
        Spread::from_values(rates.map(value).collect())
    }

    pub(super) fn lost_requests(&self) -> u64 {
        self.rounds.iter().map(|round| round.lost_requests).sum()
    }

    pub(super) fn why_latency_unknown(&self) -> Option<&'static str> {
        match self.stamps {
            TimestampStatus::NotRequested => Some("timestamps were not requested (use --stamps)"),
            TimestampStatus::Absent => Some("timestamps were requested, but the server sends none"),
            TimestampStatus::ForeignClock => {
                Some("the server's timestamps come from another machine's clock")
            }
            TimestampStatus::Known => None,
        }
    }
}
