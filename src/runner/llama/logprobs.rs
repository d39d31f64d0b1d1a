//! What a row of logits says of a token: its log probability, and those of the likeliest. It must not
//! know how the token was chosen.

use std::cmp::Ordering;

use super::sampling::InvalidLogits;
use crate::request::TokenId;
use crate::tokens::MIN_LOGPROB;

/// The log probabilities of one position.
#[derive(Debug, PartialEq)]
pub(super) struct Position {
    /// That of the token that was asked for.
    pub(super) logprob: f32,
    /// The likeliest tokens with theirs, the likeliest first and the lower id of equals.
    pub(super) top: Vec<(TokenId, f32)>,
}

/// The log probability of this token and those of the `top` likeliest, by the logits of the whole
/// vocabulary in the order of its ids.
///
/// # Errors
/// When the logits are no distribution.
pub(super) fn of(logits: &[f32], token: TokenId, top: u32) -> Result<Position, InvalidLogits> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
        return Err(InvalidLogits);
    }
    let total: f64 = logits
        .iter()
        .map(|logit| f64::from(logit - max).exp())
        .sum();
    let total = narrowed(total.ln());
    let logprob = |logit: f32| (logit - max - total).max(MIN_LOGPROB);
    let own = usize::try_from(token).ok().and_then(|at| logits.get(at));
    let likeliest = likeliest(logits, usize::try_from(top).unwrap_or(usize::MAX));
    Ok(Position {
        logprob: own.map_or(MIN_LOGPROB, |logit| logprob(*logit)),
        top: likeliest
            .into_iter()
            .map(|(id, logit)| (id, logprob(logit)))
            .collect(),
    })
}

/// The `count` largest logits in order. `count` is small.
fn likeliest(logits: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let mut best: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
    for (id, &logit) in (0..).zip(logits) {
        let is_among_them =
            best.len() < count || best.last().is_some_and(|(_, least)| logit > *least);
        if is_among_them && count > 0 {
            let at = best.partition_point(|(_, better)| better.total_cmp(&logit) != Ordering::Less);
            best.insert(at, (id, logit));
            best.truncate(count);
        }
    }
    best
}

#[expect(
    clippy::as_conversions,
    reason = "there is no other way to round a float"
)]
fn narrowed(number: f64) -> f32 {
    number as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(probabilities: &[f32]) -> Vec<f32> {
        // Moved by a constant: only differences count.
        probabilities.iter().map(|p| p.ln() + 3.0).collect()
    }

    fn assert_near(position: &Position, probability: f32, top: &[(TokenId, f32)]) {
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
        assert_near(&of(&logits, 3, 0).unwrap(), 0.15, &[]);
        let top = [(1, 0.5), (2, 0.25), (3, 0.15)];
        assert_near(&of(&logits, 1, 3).unwrap(), 0.5, &top);
        assert_eq!(of(&logits, 1, 20).unwrap().top.len(), 4);
    }

    #[test]
    fn ties_are_ordered_by_token_id() {
        let logits = logits(&[0.2, 0.3, 0.2, 0.3]);
        assert_near(
            &of(&logits, 0, 3).unwrap(),
            0.2,
            &[(1, 0.3), (3, 0.3), (0, 0.2)],
        );
    }

    #[test]
    fn an_impossible_token_has_a_finite_logprob() {
        let position = of(&[0.0, f32::NEG_INFINITY], 1, 2).unwrap();
        assert_eq!(position.logprob, MIN_LOGPROB);
        assert_eq!(position.top, [(0, 0.0), (1, MIN_LOGPROB)]);
    }

    #[test]
    fn invalid_logits_are_an_error() {
        assert!(of(&[0.0, f32::NAN], 0, 0).is_err());
        assert!(of(&[f32::NEG_INFINITY; 2], 0, 0).is_err());
        assert!(of(&[], 0, 0).is_err());
    }
}
