//! Samples the next token from a row of logits. The result depends only on the arguments, so a choice has the same
//! tokens alone and in a batch. This module must not know the device.
//!
//! The steps in order are: bias, penalties, banned tokens, temperature, top-k, top-p (among the tokens that top-k
//! kept), min-p, and one random draw.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::request::{Sampling, TokenId};

/// Number of lanes in which [`largest`] compares.
const LANES: usize = 32;

/// Error: a logit is NaN, or the largest logit is infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The model computed invalid logits (NaN or infinity).")]
pub(super) struct InvalidLogits;

/// The key of a random draw. Equal keys give equal draws.
#[derive(Clone, Copy, Debug)]
pub(super) struct DrawKey {
    pub(super) seed: u64,
    pub(super) choice: u32,
    /// Index of the token within its choice.
    pub(super) position: u32,
}

impl DrawKey {
    /// Returns a pseudo-random number in [0, 1) with 52 random bits. Applies SplitMix64's finalizer (Steele, Lea and
    /// Flood, 2014; the constants are Stafford's mix 13) once per part of the key.
    fn uniform(self) -> f64 {
        let seed = mix(self.seed);
        let choice = mix(seed.wrapping_add(u64::from(self.choice)));
        let bits = mix(choice.wrapping_add(u64::from(self.position)));
        // The random bits become the mantissa of a number in [1, 2); subtracting 1 gives [0, 1).
        f64::from_bits(0x3FF0_0000_0000_0000 | (bits >> 12)) - 1.0
    }
}

fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// The tokens of a sequence, counted for the penalties. Empty for a sequence without penalties.
pub(super) struct PenaltyHistory {
    /// Number of occurrences of each token in the completion. A token that occurs only in the prompt has 0.
    counts: Option<HashMap<TokenId, u32>>,
}

impl PenaltyHistory {
    /// Counts the tokens of a prompt and of the completion so far.
    pub(super) fn new(sampling: &Sampling, prompt: &[TokenId], completion: &[TokenId]) -> Self {
        let neutral = sampling.repetition_penalty == 1.0
            && sampling.presence_penalty == 0.0
            && sampling.frequency_penalty == 0.0;
        let mut history = Self {
            counts: (!neutral).then(|| prompt.iter().map(|id| (*id, 0)).collect()),
        };
        for id in completion {
            history.push(*id);
        }
        history
    }

    /// Counts one more token of the completion.
    pub(super) fn push(&mut self, id: TokenId) {
        if let Some(counts) = &mut self.counts {
            *counts.entry(id).or_default() += 1;
        }
    }
}

/// Changes to the logits other than the penalties.
#[derive(Clone, Copy, Default)]
pub(super) struct LogitAdjustments<'a> {
    /// Values to add to the logits of these tokens.
    pub(super) bias: &'a [(TokenId, f32)],
    /// Tokens that must not be sampled.
    pub(super) banned: &'a [TokenId],
}

impl LogitAdjustments<'_> {
    fn is_empty(&self) -> bool {
        self.bias.is_empty() && self.banned.is_empty()
    }

    fn add_bias(&self, logits: &mut [f32]) {
        for (id, bias) in self.bias {
            if let Some(logit) = logit_of(logits, *id) {
                *logit += bias;
            }
        }
    }

    fn ban(&self, logits: &mut [f32]) {
        for id in self.banned {
            if let Some(logit) = logit_of(logits, *id) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// A token that may be sampled.
struct Candidate {
    id: TokenId,
    logit: f32,
    /// Probability relative to that of the most likely token, whose weight is 1.
    weight: f32,
}

/// Samples tokens. Reuses its buffers between calls.
#[derive(Default)]
pub(super) struct Sampler {
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Samples the next token of a sequence. `logits` has one entry per token of the vocabulary, in the order of ids.
    ///
    /// # Errors
    /// A logit is NaN, or the largest logit is infinite.
    pub(super) fn sample(
        &mut self,
        logits: &[f32],
        sampling: &Sampling,
        history: &PenaltyHistory,
        adjustments: LogitAdjustments<'_>,
        draw_key: DrawKey,
    ) -> Result<TokenId, InvalidLogits> {
        // Without a branch for each logit, the compiler uses vector instructions.
        if logits.iter().fold(false, |any, logit| any | logit.is_nan()) {
            return Err(InvalidLogits);
        }
        let logits = if history.counts.is_none() && adjustments.is_empty() {
            logits
        } else {
            let adjusted = &mut self.adjusted;
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            adjustments.add_bias(adjusted);
            if let Some(counts) = &history.counts {
                penalize(adjusted, counts, sampling);
            }
            adjustments.ban(adjusted);
            adjusted
        };
        let (greedy, max) = most_likely(logits).ok_or(InvalidLogits)?;
        if sampling.temperature <= 0.0 {
            return Ok(greedy);
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(
            (0..)
                .zip(logits)
                .map(|(id, &logit)| Candidate::new(id, logit)),
        );
        keep_top_k(candidates, sampling.top_k);
        for candidate in candidates.iter_mut() {
            candidate.weight = ((candidate.logit - max) / sampling.temperature).exp();
        }
        keep_top_p(candidates, sampling.top_p);
        candidates.retain(|candidate| candidate.weight >= sampling.min_p);
        Ok(draw(candidates, draw_key.uniform()).unwrap_or(greedy))
    }
}

impl Candidate {
    fn new(id: TokenId, logit: f32) -> Self {
        Self {
            id,
            logit,
            weight: 0.0,
        }
    }

    /// Compares two candidates: the larger logit first, then the lower id.
    fn compare(&self, other: &Self) -> Ordering {
        let by_logit = other.logit.total_cmp(&self.logit);
        by_logit.then(self.id.cmp(&other.id))
    }
}

/// Applies the penalties like OpenAI's API and vLLM: only the repetition penalty considers the prompt.
fn penalize(logits: &mut [f32], counts: &HashMap<TokenId, u32>, sampling: &Sampling) {
    for (id, count) in counts {
        let Some(logit) = logit_of(logits, *id) else {
            continue;
        };
        if *logit > 0.0 {
            *logit /= sampling.repetition_penalty;
        } else {
            *logit *= sampling.repetition_penalty;
        }
        if *count > 0 {
            // The frequency penalty stops growing after 65,535 occurrences of a token.
            let count = u16::try_from(*count).map_or(f32::from(u16::MAX), f32::from);
            *logit -= sampling.frequency_penalty * count + sampling.presence_penalty;
        }
        // A repetition penalty near zero must not make a logit infinite, because an infinite logit is an error.
        *logit = logit.clamp(f32::MIN, f32::MAX);
    }
}

fn logit_of(logits: &mut [f32], id: TokenId) -> Option<&mut f32> {
    logits.get_mut(usize::try_from(id).ok()?)
}

/// Returns the token with the largest logit, and the lowest id among equals. Returns `None` if the logit is infinite.
fn most_likely(logits: &[f32]) -> Option<(TokenId, f32)> {
    let max = largest(logits);
    if !max.is_finite() {
        return None;
    }
    let mut ids = (0..).zip(logits);
    ids.find_map(|(id, &logit)| (logit == max).then_some((id, max)))
}

/// Returns the largest number. The comparisons run in independent lanes, so that the compiler can use vector
/// instructions. With a single running maximum, each comparison would depend on the one before.
fn largest(numbers: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = numbers.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *number);
        }
    }
    let all = lanes.iter().chain(rest).copied();
    all.fold(f32::NEG_INFINITY, larger)
}

/// Keeps the `top_k` most likely candidates, sorted. 0 keeps all candidates, unsorted.
fn keep_top_k(candidates: &mut Vec<Candidate>, top_k: u32) {
    let Some(top_k) = usize::try_from(top_k).ok().filter(|top_k| *top_k > 0) else {
        return;
    };
    if top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k, Candidate::compare);
        candidates.truncate(top_k);
    }
    candidates.sort_unstable_by(Candidate::compare);
}

/// Keeps the smallest set of most likely candidates whose total probability is at least `top_p`.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let (total, top_p) = (total(candidates), f64::from(top_p));
    // The candidates below this bound together have less than 1 - top_p of the probability, so they cannot be in the
    // result. Dropping them first leaves few candidates to sort.
    let count = u32::try_from(candidates.len()).unwrap_or(u32::MAX);
    let bound = total * (1.0 - top_p) / f64::from(count);
    candidates.retain(|candidate| f64::from(candidate.weight) >= bound);
    candidates.sort_unstable_by(Candidate::compare);
    let mut mass = 0.0;
    let nucleus = candidates.iter().position(|candidate| {
        mass += f64::from(candidate.weight);
        mass >= top_p * total
    });
    if let Some(last) = nucleus {
        candidates.truncate(last + 1);
    }
}

fn total(candidates: &[Candidate]) -> f64 {
    let weights = candidates
        .iter()
        .map(|candidate| f64::from(candidate.weight));
    weights.sum()
}

/// Returns the candidate at the fraction `uniform` of the cumulative probability.
fn draw(candidates: &[Candidate], uniform: f64) -> Option<TokenId> {
    let target = uniform * total(candidates);
    let mut mass = 0.0;
    let drawn = candidates.iter().find(|candidate| {
        mass += f64::from(candidate.weight);
        mass > target
    });
    drawn.map(|candidate| candidate.id)
}

#[cfg(test)]
mod tests;
