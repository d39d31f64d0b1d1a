//! A measurement of one server in one round of one scenario: the figures, and the tokens that the server counted.

use std::collections::BTreeMap;
use std::iter::Sum;

use serde::Serialize;

use super::client::Reply;
use crate::fault::Fault;
use crate::statistics::Spread;

/// A quantity that a scenario measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Figure {
    DecodeRate,
    PromptRate,
    PromptTtft,
    FirstTurnTtft,
    SecondTurnTtft,
    LaterTurnsTtft,
    HotTurnTtft,
    RunningGapP99,
    RunningRate,
}

/// Result of one round of one scenario on one server.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Measurement {
    pub(super) figures: BTreeMap<Figure, f64>,
    pub(super) counts: Counts,
    /// Resident memory of the server after the scenario.
    pub(super) rss_bytes: Option<u64>,
}

/// Sums over the requests of a measurement. The numbers of tokens are the server's own counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    pub(super) requests: u64,
    pub(super) prompt_tokens: u64,
    /// Number of prompt tokens that the server reused from earlier requests. `None` if it does not report them.
    pub(super) cached_tokens: Option<u64>,
    pub(super) completion_tokens: u64,
    /// Number of texts that arrived. A token that ends in the middle of a character has no text of its own.
    pub(super) texts: u64,
}

impl Figure {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::DecodeRate => "rate",
            Self::PromptRate => "rate of the prompt",
            Self::PromptTtft => "TTFT of the prompt",
            Self::FirstTurnTtft => "TTFT of turn 1",
            Self::SecondTurnTtft => "TTFT of turn 2",
            Self::LaterTurnsTtft => "TTFT of the later turns",
            Self::HotTurnTtft => "TTFT of a hot turn",
            Self::RunningGapP99 => "inter-token latency p99",
            Self::RunningRate => "rate of the streams",
        }
    }

    pub(super) fn unit(self) -> &'static str {
        if self.is_rate() { "tokens/s" } else { "ms" }
    }

    /// Returns the exact definition, for the HTML page.
    pub(super) fn definition(self) -> &'static str {
        match self {
            Self::DecodeRate => {
                "(tokens − 1) / (time of the last token − time of the first token); the sum over streams that run at \
                 the same time, while all of them decode"
            }
            Self::PromptRate => "prompt tokens / TTFT",
            Self::PromptTtft => "time from the request with the long prompt to its first token",
            Self::FirstTurnTtft => {
                "TTFT of a conversation's first turn; the median over the conversations"
            }
            Self::SecondTurnTtft => {
                "TTFT of a conversation's second turn, which comes after the first turns of all others; the median \
                 over the conversations"
            }
            Self::LaterTurnsTtft => "mean TTFT of all turns after the first",
            Self::HotTurnTtft => {
                "TTFT of turns 3 to 7 of the last conversation, each of which directly follows the turn before; the \
                 median"
            }
            Self::RunningGapP99 => {
                "99th percentile of the running streams' inter-token latencies that overlap the time from the request \
                 with the long prompt to its first token"
            }
            Self::RunningRate => {
                "tokens per second of all running streams together, from the request with the long prompt to its \
                 first token"
            }
        }
    }

    /// Returns true if a higher value is better.
    pub(super) fn is_rate(self) -> bool {
        match self {
            Self::DecodeRate | Self::PromptRate | Self::RunningRate => true,
            Self::PromptTtft
            | Self::FirstTurnTtft
            | Self::SecondTurnTtft
            | Self::LaterTurnsTtft
            | Self::HotTurnTtft
            | Self::RunningGapP99 => false,
        }
    }
}

impl Measurement {
    pub(super) fn new<const N: usize>(figures: [(Figure, f64); N], counts: Counts) -> Self {
        Self {
            figures: figures.into(),
            counts,
            rss_bytes: None,
        }
    }

    /// Returns the measurement if each figure is a number.
    ///
    /// # Errors
    /// A figure is not finite, so it could not be compared. This happens if a server sends all tokens at once.
    pub(super) fn checked(self) -> Result<Self, Fault> {
        let undefined = self.figures.iter().find(|(_, value)| !value.is_finite());
        match undefined {
            None => Ok(self),
            Some((figure, value)) => Err(Fault::unexpected(
                "tokens that arrive one after the other",
                format!("a {} of {value} {}", figure.name(), figure.unit()),
            )),
        }
    }
}

impl Counts {
    pub(super) fn of_replies<'a>(replies: impl IntoIterator<Item = &'a Reply>) -> Self {
        let counts = replies.into_iter().map(|reply| Self {
            requests: 1,
            prompt_tokens: reply.usage.prompt_tokens.into(),
            cached_tokens: reply.usage.cached_tokens().map(u64::from),
            completion_tokens: reply.usage.completion_tokens.into(),
            texts: u64::try_from(reply.token_ns.len()).unwrap_or(u64::MAX),
        });
        counts.sum()
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        let none = Self {
            cached_tokens: Some(0),
            ..Self::default()
        };
        all.fold(none, |sum, more| Self {
            requests: sum.requests + more.requests,
            prompt_tokens: sum.prompt_tokens + more.prompt_tokens,
            cached_tokens: sum
                .cached_tokens
                .zip(more.cached_tokens)
                .map(|(sum, more)| sum + more),
            completion_tokens: sum.completion_tokens + more.completion_tokens,
            texts: sum.texts + more.texts,
        })
    }
}

/// Returns the median of the values, or NaN if there are none.
pub(super) fn median(values: Vec<f64>) -> f64 {
    Spread::from_values(values).map_or(f64::NAN, |spread| spread.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_that_is_not_a_number_is_a_fault() {
        let of = |value| Measurement::new([(Figure::DecodeRate, value)], Counts::default());
        assert!(of(0.5).checked().is_ok());
        for value in [f64::INFINITY, f64::NAN] {
            let fault = of(value).checked().expect_err("a fault").to_string();
            assert!(fault.contains("got a rate of"), "{fault}");
        }
    }

    #[test]
    fn cached_tokens_are_unknown_if_one_request_does_not_report_them() {
        let counts = |cached_tokens| Counts {
            requests: 1,
            cached_tokens,
            ..Counts::default()
        };
        let sum = |cached: &[Option<u64>]| -> Counts { cached.iter().copied().map(counts).sum() };
        assert_eq!(sum(&[Some(1), Some(2)]).cached_tokens, Some(3));
        assert_eq!(sum(&[Some(1), None]).cached_tokens, None);
        assert_eq!(sum(&[Some(1), None]).requests, 2);
    }
}
