//! Results of a comparison, server by server.

use serde::Serialize;

use super::servers::Server;
use crate::figures::{Figures, Rates, Stamps, Times};
use crate::load::Load;
use crate::report::Machine;
use crate::statistics::Spread;

/// Version of the JSON file's format.
pub(super) const FORMAT: u32 = 1;

/// One run of `compare`, as it is in the JSON file.
#[derive(Serialize)]
pub(super) struct Comparison {
    pub(super) format: u32,
    pub(super) machine: Machine,
    pub(super) load: Load,
    pub(super) servers: Vec<ServerResults>,
}

/// Rounds of one server.
#[derive(Serialize)]
pub(super) struct ServerResults {
    #[serde(flatten)]
    pub(super) server: Server,
    /// In the order in which they were measured.
    pub(super) rounds: Vec<Round>,
    /// Times of all rounds.
    #[serde(rename = "histograms")]
    pub(super) times: Times,
    stamps: Stamps,
    /// Distinct faults of each round, with its number.
    faults: Vec<String>,
}

/// Result of one round.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Round {
    #[serde(flatten)]
    pub(super) rates: Rates,
    /// Requests whose streams were complete.
    requests: u64,
    /// Requests that were refused, broke off, or had wrong tokens.
    lost_requests: u64,
}

impl Comparison {
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
            times: Times::default(),
            stamps: Stamps::NotRequested,
            faults: Vec::new(),
        }
    }

    /// Adds the next round.
    pub(super) fn add(&mut self, figures: &Figures, load: &Load) {
        let number = self.rounds.len() + 1;
        let listed = u32::try_from(figures.faults.len()).unwrap_or(0);
        let unlisted = figures.fault_count - listed;
        let more = (unlisted > 0).then(|| format!("{unlisted} more"));
        let faults = figures.faults.iter().cloned().chain(more);
        let faults = faults.map(|fault| format!("round {number}: {fault}"));
        self.faults.extend(faults);
        self.times.add(&figures.times);
        let made = u64::from(load.streams) * u64::from(load.requests);
        self.rounds.push(Round {
            rates: figures.rates(),
            requests: figures.requests,
            lost_requests: made.saturating_sub(figures.requests),
        });
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
    pub(super) fn spread(&self, value: fn(&Rates) -> f64) -> Option<Spread> {
        let rates = self.rounds.iter().map(|round| &round.rates);
        Spread::of(rates.map(value).collect())
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
