//! Behaviors of clients, good and bad, and the frequency of each.

use clap::ValueEnum;
use rand::Rng;
use rand::seq::SliceRandom;
use serde::Serialize;

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
}

impl Behavior {
    pub(super) fn all() -> &'static [Self] {
        Self::value_variants()
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
        }
    }
}

/// Shuffled deck from which a client draws its behaviors. It contains each behavior as often as its weight.
pub(super) struct BehaviorDeck {
    left: Vec<Behavior>,
}

impl BehaviorDeck {
    pub(super) fn starting_with(first: Behavior) -> Self {
        Self { left: vec![first] }
    }

    pub(super) fn draw(&mut self, random: &mut impl Rng) -> Behavior {
        loop {
            if let Some(behavior) = self.left.pop() {
                return behavior;
            }
            for behavior in Behavior::all() {
                self.left.extend(vec![*behavior; behavior.weight()]);
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
        let mut deck = BehaviorDeck::starting_with(Behavior::Garbage);
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
    fn every_behavior_is_drawn() {
        let drawn = draws(3);
        for behavior in Behavior::all() {
            assert!(drawn.contains(behavior), "{behavior:?}");
        }
    }
}
