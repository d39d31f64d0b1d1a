//! Results of a comparison, server by server.

use serde::Serialize;
use serde_json::{Value, json};

use super::consumer::Check;
use super::servers::Server;
use crate::figures::{Figures, Stamps, Times};
use crate::load::Load;
use crate::report::Machine;
use crate::statistics::{Spread, count};

/// One run of `compare`.
pub(super) struct Comparison {
    pub(super) machine: Machine,
    pub(super) load: Load,
    pub(super) model: Option<String>,
    pub(super) check: Check,
    pub(super) servers: Vec<ServerResults>,
}

/// Rounds of one server.
pub(super) struct ServerResults {
    pub(super) server: Server,
    /// In the order in which they were measured.
    pub(super) rounds: Vec<Round>,
    /// Times of all rounds.
    pub(super) times: Times,
    pub(super) stamps: Stamps,
    /// Distinct faults of each round, with its number.
    pub(super) faults: Vec<String>,
}

/// Result of one round.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Round {
    pub(super) tokens: u64,
    /// Requests whose streams were complete.
    pub(super) requests: u64,
    /// Requests that were refused, broke off, or had wrong tokens.
    pub(super) lost_requests: u64,
    pub(super) tokens_per_second: f64,
    pub(super) requests_per_second: f64,
    pub(super) tokens_per_read: f64,
    pub(super) bytes_per_token: f64,
}

/// Version of the JSON file's format.
const FORMAT: u32 = 1;

impl Comparison {
    /// All measurements, for the JSON file.
    pub(super) fn json(&self) -> Value {
        let servers = self.servers.iter().map(|results| {
            json!({
                "name": results.server.name,
                "address": results.server.address.to_string(),
                "stamps": results.stamps,
                "rounds": results.rounds,
                "histograms": results.times,
                "faults": results.faults,
            })
        });
        json!({
            "format": FORMAT,
            "machine": self.machine,
            "load": {
                "streams": self.load.streams,
                "requests": self.load.requests,
                "tokens": self.load.tokens,
                "model": self.model,
                "expect_test_runner": self.check == Check::TestRunner,
            },
            "servers": servers.collect::<Vec<_>>(),
        })
    }

    /// Title of the load in reports.
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

    /// Faults of all servers, with their names.
    pub(super) fn faults(&self) -> Vec<String> {
        let servers = self.servers.iter();
        let faults = servers.flat_map(|results| {
            let name = &results.server.name;
            results
                .faults
                .iter()
                .map(move |fault| format!("{name}, {fault}"))
        });
        faults.collect()
    }
}

impl ServerResults {
    pub(super) fn new(server: &Server) -> Self {
        Self {
            server: server.clone(),
            rounds: Vec::new(),
            times: Times::new(),
            stamps: Stamps::NotRequested,
            faults: Vec::new(),
        }
    }

    /// Adds the next round.
    pub(super) fn add(&mut self, figures: &Figures, load: &Load) {
        let number = self.rounds.len() + 1;
        let listed = u32::try_from(figures.faults.len()).unwrap_or(0);
        let faults = figures.faults.iter();
        self.faults
            .extend(faults.map(|fault| format!("round {number}: {fault}")));
        let unlisted = figures.fault_count - listed;
        if unlisted > 0 {
            self.faults.push(format!("round {number}: {unlisted} more"));
        }
        self.times.add(&figures.times);
        self.rounds.push(Round::of(figures, load));
        self.stamps = match (load.timed, self.stamps, figures.stamps()) {
            (false, ..) => Stamps::NotRequested,
            (true, Stamps::ForeignClock, _) | (true, _, Stamps::ForeignClock) => {
                Stamps::ForeignClock
            }
            (true, ..) if self.times.one_way.is_empty() => Stamps::Absent,
            (true, ..) => Stamps::Known,
        };
    }

    /// Spread of a value over the rounds.
    pub(super) fn spread(&self, value: fn(&Round) -> f64) -> Option<Spread> {
        Spread::of(self.rounds.iter().map(value).collect())
    }

    /// Number of lost requests in all rounds.
    pub(super) fn lost_requests(&self) -> u64 {
        self.rounds.iter().map(|round| round.lost_requests).sum()
    }

    /// Reason why one-way latency is unknown; `None` if it is known.
    pub(super) fn why_unknown(&self) -> Option<&'static str> {
        match self.stamps {
            Stamps::NotRequested => Some("no stamps were requested (--stamps)"),
            Stamps::Absent => Some("--stamps requested stamps, and the server sends none"),
            Stamps::ForeignClock => Some("the server's stamps are not of this machine's clock"),
            Stamps::Known => None,
        }
    }
}

impl Round {
    fn of(figures: &Figures, load: &Load) -> Self {
        let made = u64::from(load.streams) * u64::from(load.requests);
        let (tokens, seconds) = (count(figures.tokens), count(figures.elapsed_ns) / 1e9);
        Self {
            tokens: figures.tokens,
            requests: figures.requests,
            lost_requests: made.saturating_sub(figures.requests),
            tokens_per_second: tokens / seconds,
            requests_per_second: count(figures.requests) / seconds,
            tokens_per_read: tokens / count(figures.reads),
            bytes_per_token: count(figures.bytes) / tokens,
        }
    }
}
