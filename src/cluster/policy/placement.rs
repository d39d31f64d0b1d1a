//! Chooses among targets of equal preference: by the load of their engines, and by the prefix of the prompt that each
//! engine has worked on before. The choice is a pure function.

use super::load::WeightedLoad;

#[cfg(test)]
mod tests;

/// A target that may get the request.
#[derive(Clone, Copy, Debug)]
pub(in crate::cluster) struct Candidate {
    /// Position of the target in the route.
    pub(in crate::cluster) target: usize,
    pub(in crate::cluster) load: WeightedLoad,
    /// Expected number of prompt tokens that the engine can reuse.
    pub(in crate::cluster) warm_tokens: u64,
}

/// Returns the target with the lowest score. If several are equal, returns the first.
///
/// ```text
/// score = outstanding tokens / weight − warm tokens / weight of the heaviest candidate
/// ```
///
/// All terms are tokens per unit of weight. With equal weights, the order is that of *outstanding tokens + prompt
/// tokens that are not warm on the engine*: the number of tokens that the engine has to work on before the request is
/// done. So a request goes to the engine on which most of its prompt is warm, unless its outstanding tokens exceed
/// those of another engine by more than the tokens it would reuse. A prompt that is warm on no engine, or equally warm
/// on all, is placed by load alone.
///
/// The warm tokens are divided by the heaviest weight, not by the candidate's own. With its own weight, a target of a
/// small weight would gain most from a prefix, and one popular prefix would pull it far above its share. With the
/// heaviest weight, a prefix that two targets have changes nothing, and a prefix that only one of them has moves the
/// balance by the same number of tokens in both directions.
///
/// The outstanding tokens of a running request include its whole prompt until its first token, as if the engine could
/// reuse nothing. The gateway can only estimate what an engine still has. So a wrong estimate does not make the
/// engine's load look too low.
pub(in crate::cluster) fn best_candidate(candidates: &[Candidate]) -> Option<usize> {
    let heaviest = candidates.iter().map(|it| it.load.weight).max()?;
    let best = candidates.iter().min_by(|one, other| {
        scaled_score(one, other, heaviest).cmp(&scaled_score(other, one, heaviest))
    });
    best.map(|best| best.target)
}

/// Returns the score of a candidate, multiplied by the weights of both candidates and by the heaviest weight, so that
/// scores are compared exactly, without division.
fn scaled_score(candidate: &Candidate, other: &Candidate, heaviest: u32) -> i128 {
    let (weight, other_weight) = (candidate.load.weight, other.load.weight);
    let load = i128::from(candidate.load.tokens) * i128::from(heaviest);
    let warm = i128::from(candidate.warm_tokens) * i128::from(weight);
    (load - warm).saturating_mul(other_weight.into())
}
