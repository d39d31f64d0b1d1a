//! A circuit breaker: keeps requests away from an engine that fails them.
//!
//! Only faults of the engine count. A request that the engine rejects because of its contents shows that the engine
//! works, and so does a rejection because of load.

use std::time::Duration;

use tokio::time::Instant;

use super::recent_count::RecentCount;

/// Number of faults within ten seconds that opens the breaker: in a row, or if there are at least as many faults as
/// successes.
const FAULTS_TO_OPEN: u32 = 5;
/// Time for which the breaker stays open the first time. It doubles with each probe that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest time for which the breaker stays open. It is short, so that an engine that works again gets requests within
/// seconds.
const MAX_PAUSE: Duration = Duration::from_secs(4);

/// The breaker of one engine.
#[derive(Debug)]
pub(in crate::cluster) struct Breaker {
    state: State,
    successes: RecentCount,
    faults: RecentCount,
    /// Number of faults since the last success.
    faults_in_a_row: u32,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Closed,
    Open {
        until: Instant,
        pause: Duration,
    },
    /// One request at a time tests the engine.
    HalfOpen {
        /// Start of the test that runs.
        probe: Option<Instant>,
        pause: Duration,
    },
}

/// State of a breaker, as the log and the metrics show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BreakerState {
    /// Requests pass.
    Closed,
    /// No request passes.
    Open,
    /// One request at a time passes, to test the engine.
    HalfOpen,
}

/// The answer of a breaker to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cluster) enum Passage {
    /// The request may be sent.
    Pass,
    /// The request may be sent, and tests the engine from this time on. [`Breaker::record`] or
    /// [`Breaker::abandon_probe`] must follow.
    Probe(Instant),
    /// The request must not be sent before this time.
    Refused(Instant),
}

/// Result of a request, as far as the breaker is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cluster) enum EngineResult {
    /// The engine works: it sent a token, or it rejected the request for a reason of its own.
    Works,
    /// The engine failed before its first token.
    Fault,
    /// The engine failed after its first token. Streams that run at the same time often break together, so they do not
    /// count as faults in a row.
    Cut,
}

impl BreakerState {
    /// Returns the value of the label `state`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

impl Breaker {
    pub(in crate::cluster) fn new(now: Instant) -> Self {
        Self {
            state: State::Closed,
            successes: RecentCount::new(now),
            faults: RecentCount::new(now),
            faults_in_a_row: 0,
        }
    }

    pub(in crate::cluster) fn state(&self) -> BreakerState {
        match self.state {
            State::Closed => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// Returns the time from which a request may be sent. `None` if it may be sent now.
    pub(in crate::cluster) fn blocked_until(&self, now: Instant) -> Option<Instant> {
        let until = match self.state {
            State::Closed | State::HalfOpen { probe: None, .. } => None,
            State::Open { until, .. } => Some(until),
            // A test that hangs does not keep the next one away for long.
            State::HalfOpen {
                probe: Some(since), ..
            } => Some(since + MAX_PAUSE),
        };
        until.filter(|until| *until > now)
    }

    /// Asks to send a request.
    pub(in crate::cluster) fn pass(&mut self, now: Instant) -> Passage {
        if let Some(until) = self.blocked_until(now) {
            return Passage::Refused(until);
        }
        match self.state {
            State::Closed => Passage::Pass,
            State::Open { pause, .. } | State::HalfOpen { pause, .. } => {
                self.state = State::HalfOpen {
                    probe: Some(now),
                    pause,
                };
                Passage::Probe(now)
            }
        }
    }

    /// Records the result of a request that passed. `passage` is what [`Self::pass`] returned for it.
    pub(in crate::cluster) fn record(
        &mut self,
        passage: Passage,
        result: EngineResult,
        now: Instant,
    ) {
        match (self.state, passage, result) {
            (State::Closed, _, EngineResult::Works) => {
                self.faults_in_a_row = 0;
                self.successes.add(now);
            }
            (State::Closed, _, EngineResult::Fault | EngineResult::Cut) => {
                self.faults.add(now);
                self.faults_in_a_row += u32::from(result == EngineResult::Fault);
                let faults = self.faults.get(now);
                let prevail =
                    faults >= self.successes.get(now) || self.faults_in_a_row >= FAULTS_TO_OPEN;
                if faults >= FAULTS_TO_OPEN && prevail {
                    self.open(FIRST_PAUSE, now);
                }
            }
            (
                State::HalfOpen {
                    probe: Some(current),
                    pause,
                },
                Passage::Probe(since),
                result,
            ) if since == current => match result {
                EngineResult::Fault | EngineResult::Cut => {
                    self.open((pause * 2).min(MAX_PAUSE), now);
                }
                EngineResult::Works => *self = Self::new(now),
            },
            // A request from before the breaker opened says nothing about the engine now.
            (State::Open { .. } | State::HalfOpen { .. }, _, _) => {}
        }
    }

    /// Records that the probe of this time has ended without a result, for example because its client has left.
    pub(in crate::cluster) fn abandon_probe(&mut self, since: Instant) {
        if let State::HalfOpen { probe, .. } = &mut self.state
            && *probe == Some(since)
        {
            *probe = None;
        }
    }

    fn open(&mut self, pause: Duration, now: Instant) {
        self.state = State::Open {
            until: now + pause,
            pause,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(breaker: &mut Breaker, now: Instant, times: u32) {
        for _ in 0..times {
            let passage = breaker.pass(now);
            breaker.record(passage, EngineResult::Fault, now);
        }
    }

    fn open_breaker(now: Instant) -> Breaker {
        let mut breaker = Breaker::new(now);
        fail(&mut breaker, now, 5);
        assert_eq!(breaker.state(), BreakerState::Open);
        breaker
    }

    #[test]
    fn five_faults_open_it_in_a_row_or_if_there_are_fewer_successes() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        for _ in 0..100 {
            breaker.record(Passage::Pass, EngineResult::Works, now);
        }
        fail(&mut breaker, now, 4);
        breaker.record(Passage::Pass, EngineResult::Works, now);
        fail(&mut breaker, now, 4);
        assert_eq!(breaker.pass(now), Passage::Pass, "most requests succeed");
        fail(&mut breaker, now, 1);
        let until = now + Duration::from_secs(1);
        assert_eq!(breaker.pass(now), Passage::Refused(until), "five in a row");

        let mut breaker = Breaker::new(now);
        for _ in 0..4 {
            breaker.record(Passage::Pass, EngineResult::Works, now);
            fail(&mut breaker, now, 1);
        }
        assert_eq!(breaker.pass(now), Passage::Pass);
        fail(&mut breaker, now, 1);
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn streams_that_break_together_are_no_faults_in_a_row() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        for _ in 0..20 {
            breaker.record(Passage::Pass, EngineResult::Works, now);
        }
        for _ in 0..19 {
            breaker.record(Passage::Pass, EngineResult::Cut, now);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
        breaker.record(Passage::Pass, EngineResult::Cut, now);
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn faults_of_the_past_are_forgotten() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        fail(&mut breaker, now, 4);
        fail(&mut breaker, now + Duration::from_secs(11), 4);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn one_probe_at_a_time_closes_it_or_opens_it_for_longer() {
        let now = Instant::now();
        let mut breaker = open_breaker(now);
        let second = now + Duration::from_secs(1);
        assert_eq!(breaker.pass(second), Passage::Probe(second));
        assert!(matches!(breaker.pass(second), Passage::Refused(_)));
        breaker.record(Passage::Probe(second), EngineResult::Fault, second);
        assert_eq!(
            breaker.pass(second),
            Passage::Refused(second + Duration::from_secs(2))
        );
        let third = second + Duration::from_secs(2);
        assert_eq!(breaker.pass(third), Passage::Probe(third));
        breaker.record(Passage::Probe(third), EngineResult::Works, third);
        assert_eq!(breaker.pass(third), Passage::Pass);
        fail(&mut breaker, third, 4);
        assert_eq!(breaker.state(), BreakerState::Closed, "it starts afresh");
    }

    #[test]
    fn the_pause_never_exceeds_four_seconds() {
        let mut now = Instant::now();
        let mut breaker = open_breaker(now);
        for _ in 0..10 {
            now += MAX_PAUSE;
            assert_eq!(breaker.pass(now), Passage::Probe(now));
            breaker.record(Passage::Probe(now), EngineResult::Fault, now);
        }
    }

    #[test]
    fn a_probe_without_a_result_makes_room_for_the_next() {
        let now = Instant::now();
        let mut breaker = open_breaker(now);
        let later = now + Duration::from_secs(1);
        assert_eq!(breaker.pass(later), Passage::Probe(later));
        breaker.abandon_probe(later);
        assert_eq!(breaker.pass(later), Passage::Probe(later));
    }

    #[test]
    fn a_probe_that_hangs_is_followed_by_another_and_its_late_result_ignored() {
        let now = Instant::now();
        let mut breaker = open_breaker(now);
        let hanging = now + Duration::from_secs(1);
        assert_eq!(breaker.pass(hanging), Passage::Probe(hanging));
        let next = hanging + MAX_PAUSE;
        assert_eq!(breaker.pass(next), Passage::Probe(next));
        breaker.record(Passage::Probe(hanging), EngineResult::Fault, next);
        breaker.abandon_probe(hanging);
        assert!(matches!(breaker.pass(next), Passage::Refused(_)));
        breaker.record(Passage::Probe(next), EngineResult::Works, next);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn a_late_result_of_an_earlier_request_does_not_close_it() {
        let now = Instant::now();
        let mut breaker = open_breaker(now);
        breaker.record(Passage::Pass, EngineResult::Works, now);
        assert_eq!(breaker.state(), BreakerState::Open);
        let later = now + Duration::from_secs(1);
        assert_eq!(breaker.pass(later), Passage::Probe(later));
        breaker.record(Passage::Pass, EngineResult::Fault, later);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
    }
}
