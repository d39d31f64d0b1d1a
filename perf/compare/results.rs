//! What all rounds of a comparison came to, server by server.

use serde::Serialize;

use super::Asked;
use super::servers::Server;
use crate::load::{Figures, Times};
use crate::overhead::statistics::{Spread, count};

/// One server's rounds.
pub(super) struct Measured {
    pub(super) server: Server,
    /// In the order in which they were measured.
    pub(super) rounds: Vec<Round>,
    /// The times of all rounds.
    pub(super) times: Times,
    pub(super) stamps: Stamps,
    /// What went wrong, with the round in which it did; of each round only the first that differ.
    pub(super) faults: Vec<String>,
}

/// What one round came to.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Round {
    pub(super) tokens: u64,
    /// Requests whose streams were whole.
    pub(super) requests: u64,
    /// Requests that were refused, broke off, or had tokens that were wrong.
    pub(super) lost_requests: u64,
    pub(super) tokens_per_second: f64,
    pub(super) requests_per_second: f64,
    pub(super) tokens_per_read: f64,
    pub(super) bytes_per_token: f64,
}

/// Whether a server's tokens say when they were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stamps {
    /// They were not asked for.
    NotAsked,
    /// They were, and did not come.
    Absent,
    /// They are of another machine's clock.
    ForeignClock,
    Known,
}

impl Measured {
    /// A server with nothing measured.
    pub(super) fn nothing_of(server: &Server) -> Self {
        Self {
            server: server.clone(),
            rounds: Vec::new(),
            times: Times::new(),
            stamps: Stamps::NotAsked,
            faults: Vec::new(),
        }
    }

    /// Adds what the next round came to.
    pub(super) fn add(&mut self, figures: &Figures, asked: &Asked) {
        let number = self.rounds.len() + 1;
        let told = figures.faults.len();
        let faults = figures.faults.iter();
        self.faults
            .extend(faults.map(|fault| format!("round {number}: {fault}")));
        let untold = figures.fault_count - u32::try_from(told).unwrap_or(0);
        if untold > 0 {
            self.faults.push(format!("round {number}: {untold} more"));
        }
        self.times.add(&figures.times);
        self.rounds.push(Round::of(figures, asked));
        self.stamps = match (asked.load.timed, self.stamps) {
            (false, _) => Stamps::NotAsked,
            (true, Stamps::ForeignClock) => Stamps::ForeignClock,
            (true, _) if figures.foreign_stamps > 0 => Stamps::ForeignClock,
            (true, _) if self.times.one_way.is_empty() => Stamps::Absent,
            (true, _) => Stamps::Known,
        };
    }

    /// A value over the rounds.
    pub(super) fn spread(&self, value: fn(&Round) -> f64) -> Option<Spread> {
        Spread::of(self.rounds.iter().map(value).collect())
    }

    /// How many requests were lost in all rounds.
    pub(super) fn lost_requests(&self) -> u64 {
        self.rounds.iter().map(|round| round.lost_requests).sum()
    }
}

impl Round {
    fn of(figures: &Figures, asked: &Asked) -> Self {
        let made = u64::from(asked.load.streams) * u64::from(asked.load.requests);
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

impl Stamps {
    /// Why nothing is known of a server's one-way latency; `None` where it is.
    pub(super) fn why_unknown(self) -> Option<&'static str> {
        match self {
            Self::NotAsked => Some("without stamps nobody can tell when a token left its device"),
            Self::Absent => Some("--stamps asked for stamps, and the server sends none"),
            Self::ForeignClock => Some("the server's stamps are not of this machine's clock"),
            Self::Known => None,
        }
    }
}
