//! Computes log probabilities from a row of logits, for one token and for the most likely tokens. This module must
//! not know how the token was sampled.

use std::cmp::Ordering;

use super::sampling::InvalidLogits;
use crate::request::TokenId;
use crate::tokens::MIN_LOGPROB;

/// Log probabilities at one position, as natural logarithms.
#[derive(Debug, PartialEq)]
pub(super) struct PositionLogprobs {
    /// Log probability of the sampled token, or of the prompt's token.
    pub(super) logprob: f32,
    /// The most likely tokens in descending order. Ties are ordered by id.
    pub(super) top: Vec<(TokenId, f32)>,
}

/// Computes the log probability of `token`, and of the `top` most likely tokens. `logits` has one entry per token of
/// the vocabulary, in the order of ids.
///
/// # Errors
/// A logit is NaN, or the largest logit is infinite.
pub(super) fn position_logprobs(
    logits: &[f32],
    token: TokenId,
    top: u32,
) -> Result<PositionLogprobs, InvalidLogits> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
        return Err(InvalidLogits);
    }
    let total: f64 = logits
        .iter()
        .map(|logit| f64::from(logit - max).exp())
        .sum();
    let total = to_f32(total.ln());
    let logprob = |logit: f32| (logit - max - total).max(MIN_LOGPROB);
    let own = usize::try_from(token).ok().and_then(|at| logits.get(at));
    let largest = largest_logits(logits, usize::try_from(top).unwrap_or(usize::MAX));
    Ok(PositionLogprobs {
        logprob: own.map_or(MIN_LOGPROB, |logit| logprob(*logit)),
        top: largest
            .into_iter()
            .map(|(id, logit)| (id, logprob(logit)))
            .collect(),
    })
}

/// Returns the `count` largest logits in descending order. Insertion sort is fast enough, because `count` is small.
fn largest_logits(logits: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let mut best: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
    for (id, &logit) in (0..).zip(logits) {
        let is_candidate =
            best.len() < count || best.last().is_some_and(|(_, least)| logit > *least);
        if is_candidate && count > 0 {
            let at = best.partition_point(|(_, better)| better.total_cmp(&logit) != Ordering::Less);
            best.insert(at, (id, logit));
            best.truncate(count);
        }
    }
    best
}

#[expect(
    clippy::as_conversions,
    reason = "`as` is the only conversion from f64 to f32"
)]
fn to_f32(number: f64) -> f32 {
    number as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(probabilities: &[f32]) -> Vec<f32> {
        // Adding a constant to all logits does not change the probabilities.
        probabilities.iter().map(|p| p.ln() + 3.0).collect()
    }

    fn assert_near(position: &PositionLogprobs, probability: f32, top: &[(TokenId, f32)]) {
        let is_near = |logprob: f32, probability: f32| (logprob.exp() - probability).abs() < 1e-6;
        assert!(is_near(position.logprob, probability), "{position:?}");
        assert_eq!(position.top.len(), top.len(), "{position:?}");
        for ((id, logprob), (expected, probability)) in position.top.iter().zip(top) {
            assert_eq!(id, expected, "{position:?}");
            assert!(is_near(*logprob, *probability), "{position:?}");
        }
    }

    #[test]
    fn logprobs_are_logarithms_of_the_probabilities() {
        let logits = logits(&[0.1, 0.5, 0.25, 0.15]);
        assert_near(&position_logprobs(&logits, 3, 0).unwrap(), 0.15, &[]);
        let top = [(1, 0.5), (2, 0.25), (3, 0.15)];
        assert_near(&position_logprobs(&logits, 1, 3).unwrap(), 0.5, &top);
        assert_eq!(position_logprobs(&logits, 1, 20).unwrap().top.len(), 4);
    }

    #[test]
    fn ties_are_ordered_by_token_id() {
        let logits = logits(&[0.2, 0.3, 0.2, 0.3]);
        assert_near(
            &position_logprobs(&logits, 0, 3).unwrap(),
            0.2,
            &[(1, 0.3), (3, 0.3), (0, 0.2)],
        );
    }

    #[test]
    fn an_impossible_token_has_a_finite_logprob() {
        let position = position_logprobs(&[0.0, f32::NEG_INFINITY], 1, 2).unwrap();
        assert_eq!(position.logprob, MIN_LOGPROB);
        assert_eq!(position.top, [(0, 0.0), (1, MIN_LOGPROB)]);
    }

    #[test]
    fn invalid_logits_are_an_error() {
        assert!(position_logprobs(&[0.0, f32::NAN], 0, 0).is_err());
        assert!(position_logprobs(&[f32::NEG_INFINITY; 2], 0, 0).is_err());
        assert!(position_logprobs(&[], 0, 0).is_err());
    }
}
