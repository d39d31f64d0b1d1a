//! Behaviors of clients, good and bad, and the frequency of each.

use clap::ValueEnum;
use rand::Rng;
use rand::seq::SliceRandom;
use serde::Serialize;

/// The clients of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(super) enum Load {
    /// Good and bad clients of the test runner
    Mixed,
    /// Chats with a real model; some clients leave in the middle of a reply
    Chats,
}

/// One action of a client, such as reading a stream or sending a bad request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(super) enum Behavior {
    WholeNdjson,
    WholeSse,
    WholeHttp2,
    WholeGrpc,
    Unary,
    CloseHttp,
    ResetHttp,
    ResetHttp2,
    ResetGrpc,
    SlowHttp,
    StallHttp2,
    StallGrpc,
    BadRequest,
    BadMessage,
    LongHeaders,
    Garbage,
    HalfRequest,
    OpenClose,
    WholeChat,
    LeftChat,
    RepeatedChat,
}

impl Behavior {
    /// Returns the behaviors of a load.
    pub(super) fn of_load(load: Load) -> Vec<Self> {
        let all = Self::value_variants().iter().copied();
        all.filter(|behavior| behavior.load() == load).collect()
    }

    fn load(self) -> Load {
        match self {
            Self::WholeChat | Self::LeftChat | Self::RepeatedChat => Load::Chats,
            Self::WholeNdjson
            | Self::WholeSse
            | Self::WholeHttp2
            | Self::WholeGrpc
            | Self::Unary
            | Self::CloseHttp
            | Self::ResetHttp
            | Self::ResetHttp2
            | Self::ResetGrpc
            | Self::SlowHttp
            | Self::StallHttp2
            | Self::StallGrpc
            | Self::BadRequest
            | Self::BadMessage
            | Self::LongHeaders
            | Self::Garbage
            | Self::HalfRequest
            | Self::OpenClose => Load::Mixed,
        }
    }

    pub(super) fn name(self) -> String {
        let value = self.to_possible_value();
        let value = value.expect("no behavior is hidden");
        value.get_name().to_owned()
    }

    /// Returns the relative frequency of the behavior. Behaviors that take long are rare.
    fn weight(self) -> usize {
        match self {
            Self::Unary => 12,
            Self::WholeNdjson | Self::WholeSse | Self::WholeHttp2 | Self::WholeGrpc => 6,
            Self::BadRequest | Self::OpenClose => 6,
            Self::CloseHttp | Self::ResetHttp | Self::ResetHttp2 | Self::ResetGrpc => 4,
            Self::BadMessage => 4,
            Self::LongHeaders | Self::Garbage => 2,
            Self::HalfRequest | Self::SlowHttp | Self::StallHttp2 | Self::StallGrpc => 1,
            Self::WholeChat => 4,
            Self::LeftChat | Self::RepeatedChat => 1,
        }
    }
}

/// Shuffled deck from which a client draws the behaviors of a load. It contains each behavior as often as its weight.
pub(super) struct BehaviorDeck {
    load: Load,
    left: Vec<Behavior>,
}

impl BehaviorDeck {
    pub(super) fn starting_with(first: Behavior) -> Self {
        Self {
            load: first.load(),
            left: vec![first],
        }
    }

    pub(super) fn draw(&mut self, random: &mut impl Rng) -> Behavior {
        loop {
            if let Some(behavior) = self.left.pop() {
                return behavior;
            }
            for behavior in Behavior::of_load(self.load) {
                self.left.extend(vec![behavior; behavior.weight()]);
            }
            self.left.shuffle(random);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn draws(seed: u64) -> Vec<Behavior> {
        draws_after(Behavior::Garbage, seed)
    }

    fn draws_after(first: Behavior, seed: u64) -> Vec<Behavior> {
        let mut deck = BehaviorDeck::starting_with(first);
        let mut random = StdRng::seed_from_u64(seed);
        (0..101).map(|_| deck.draw(&mut random)).collect()
    }

    #[test]
    fn the_same_seed_draws_the_same_behaviors() {
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        assert_eq!(draws(2)[0], Behavior::Garbage);
    }

    #[test]
    fn every_behavior_of_the_load_is_drawn_and_no_other() {
        for first in [Behavior::Garbage, Behavior::WholeChat] {
            let drawn = draws_after(first, 3);
            for behavior in Behavior::value_variants() {
                let is_of_load = behavior.load() == first.load();
                assert_eq!(drawn.contains(behavior), is_of_load, "{behavior:?}");
            }
        }
    }
}
