//! What clients do to a server, well-behaved or not, and how often.

use rand::Rng;
use rand::seq::SliceRandom;
use serde::Serialize;

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
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

impl Kind {
    pub(super) const ALL: [Self; 18] = [
        Self::WholeNdjson,
        Self::WholeSse,
        Self::WholeHttp2,
        Self::WholeGrpc,
        Self::Unary,
        Self::CloseHttp,
        Self::ResetHttp,
        Self::ResetHttp2,
        Self::ResetGrpc,
        Self::SlowHttp,
        Self::StallHttp2,
        Self::StallGrpc,
        Self::BadRequest,
        Self::BadMessage,
        Self::LongHeaders,
        Self::Garbage,
        Self::HalfRequest,
        Self::OpenClose,
    ];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::WholeNdjson => "whole streams, NDJSON",
            Self::WholeSse => "whole streams, SSE",
            Self::WholeHttp2 => "whole streams, NDJSON on HTTP/2",
            Self::WholeGrpc => "whole streams, gRPC",
            Self::Unary => "unary requests",
            Self::CloseHttp => "streams left by FIN",
            Self::ResetHttp => "streams left by RST",
            Self::ResetHttp2 => "streams left by RST_STREAM, HTTP",
            Self::ResetGrpc => "streams left by RST_STREAM, gRPC",
            Self::SlowHttp => "readers that stand still, HTTP/1.1",
            Self::StallHttp2 => "stalled windows, HTTP/2",
            Self::StallGrpc => "stalled windows, gRPC",
            Self::BadRequest => "bad requests",
            Self::BadMessage => "bad messages, gRPC",
            Self::LongHeaders => "headers that are too large",
            Self::Garbage => "garbage",
            Self::HalfRequest => "half requests",
            Self::OpenClose => "connections without a request",
        }
    }

    /// How often it is done, beside the others. What takes long is seldom begun.
    fn weight(self) -> usize {
        match self {
            Self::WholeNdjson | Self::WholeSse | Self::WholeHttp2 | Self::WholeGrpc => 6,
            Self::Unary => 12,
            Self::CloseHttp | Self::ResetHttp | Self::ResetHttp2 | Self::ResetGrpc => 4,
            Self::BadRequest | Self::OpenClose => 6,
            Self::BadMessage => 4,
            Self::LongHeaders | Self::Garbage => 2,
            Self::HalfRequest | Self::SlowHttp | Self::StallHttp2 | Self::StallGrpc => 1,
        }
    }
}

/// What one client does, in a random order in which each kind has its share.
pub(super) struct Deck {
    left: Vec<Kind>,
}

impl Deck {
    /// A deck whose first card is this.
    pub(super) fn beginning_with(first: Kind) -> Self {
        Self { left: vec![first] }
    }

    pub(super) fn draw(&mut self, random: &mut impl Rng) -> Kind {
        loop {
            if let Some(kind) = self.left.pop() {
                return kind;
            }
            for kind in Kind::ALL {
                self.left.extend(vec![kind; kind.weight()]);
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

    fn draws(seed: u64) -> Vec<Kind> {
        let (mut deck, mut random) = (
            Deck::beginning_with(Kind::Garbage),
            StdRng::seed_from_u64(seed),
        );
        (0..101).map(|_| deck.draw(&mut random)).collect()
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        assert_eq!(draws(2)[0], Kind::Garbage);
    }

    #[test]
    fn every_kind_is_drawn() {
        let drawn = draws(3);
        for kind in Kind::ALL {
            assert!(drawn.contains(&kind), "{kind:?}");
        }
    }
}
