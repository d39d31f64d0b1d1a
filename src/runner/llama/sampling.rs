//! How the next token is chosen from a row of logits: arithmetic that depends on its arguments only,
//! so that a choice has the same tokens alone and in a batch. It must not know the device.
//!
//! The order is: bias, penalties, bans, temperature, top-k, top-p (of what top-k kept), min-p, one random draw.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::request::{Sampling, TokenId};

/// The model's numbers are no distribution: one is NaN, or the largest is infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model's logits are not a distribution")]
pub(super) struct InvalidLogits;

/// What a random draw is keyed by, and nothing else.
#[derive(Clone, Copy, Debug)]
pub(super) struct DrawKey {
    pub(super) seed: u64,
    pub(super) choice: u32,
    /// The index of the token within its choice.
    pub(super) position: u32,
}

impl DrawKey {
    /// A number from 0 up to, not including, 1: 52 bits of a counter-based hash, which is the
    /// finalizer of SplitMix64 (Steele, Lea and Flood, 2014; its constants are Stafford's mix 13)
    /// applied once for each part of the key.
    fn uniform(self) -> f64 {
        let seed = mix(self.seed);
        let choice = mix(seed.wrapping_add(u64::from(self.choice)));
        let bits = mix(choice.wrapping_add(u64::from(self.position)));
        // The bits are the fraction of a number from 1 to 2.
        f64::from_bits(0x3FF0_0000_0000_0000 | (bits >> 12)) - 1.0
    }
}

fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Which tokens a sequence has seen, for its penalties. A sequence without penalties keeps nothing.
pub(super) struct History {
    /// How often each token stands in the completion: 0 for one that stands in the prompt only.
    seen: Option<HashMap<TokenId, u32>>,
}

impl History {
    /// The history of a sequence with this prompt and the completion so far.
    pub(super) fn new(sampling: &Sampling, prompt: &[TokenId], completion: &[TokenId]) -> Self {
        let neutral = sampling.repetition_penalty == 1.0
            && sampling.presence_penalty == 0.0
            && sampling.frequency_penalty == 0.0;
        let mut history = Self {
            seen: (!neutral).then(|| prompt.iter().map(|id| (*id, 0)).collect()),
        };
        for id in completion {
            history.push(*id);
        }
        history
    }

    /// Notes a token of the completion.
    pub(super) fn push(&mut self, id: TokenId) {
        if let Some(seen) = &mut self.seen {
            *seen.entry(id).or_default() += 1;
        }
    }
}

/// What a request does to the logits besides its penalties.
#[derive(Clone, Copy, Default)]
pub(super) struct LogitAdjustments<'a> {
    /// Added to the logits of these tokens.
    pub(super) bias: &'a [(TokenId, f32)],
    /// Tokens that must not come now.
    pub(super) banned: &'a [TokenId],
}

impl LogitAdjustments<'_> {
    fn is_nothing(&self) -> bool {
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

/// A token that may be drawn.
struct Candidate {
    id: TokenId,
    logit: f32,
    /// Its probability relative to the likeliest token, which has 1.
    weight: f32,
}

/// Chooses tokens; its buffers are used again for each of them.
#[derive(Default)]
pub(super) struct Sampler {
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// The next token of a sequence, by the logits of the whole vocabulary in the order of its ids.
    ///
    /// # Errors
    /// When the logits are no distribution.
    pub(super) fn sample(
        &mut self,
        logits: &[f32],
        sampling: &Sampling,
        history: &History,
        moved: LogitAdjustments<'_>,
        draw: DrawKey,
    ) -> Result<TokenId, InvalidLogits> {
        if logits.iter().any(|logit| logit.is_nan()) {
            return Err(InvalidLogits);
        }
        let logits = if history.seen.is_none() && moved.is_nothing() {
            logits
        } else {
            let adjusted = &mut self.adjusted;
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            moved.add_bias(adjusted);
            if let Some(seen) = &history.seen {
                penalize(adjusted, seen, sampling);
            }
            moved.ban(adjusted);
            adjusted
        };
        let (greedy, max) = likeliest(logits).ok_or(InvalidLogits)?;
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
        Ok(drawn(candidates, draw.uniform()).unwrap_or(greedy))
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

    /// The likelier first; of two as likely, the lower id.
    fn order(&self, other: &Self) -> Ordering {
        let by_logit = other.logit.total_cmp(&self.logit);
        by_logit.then(self.id.cmp(&other.id))
    }
}

/// The repetition penalty counts the prompt, the two others do not: as in OpenAI's API and vLLM.
fn penalize(logits: &mut [f32], seen: &HashMap<TokenId, u32>, sampling: &Sampling) {
    for (id, count) in seen {
        let Some(logit) = logit_of(logits, *id) else {
            continue;
        };
        if *logit > 0.0 {
            *logit /= sampling.repetition_penalty;
        } else {
            *logit *= sampling.repetition_penalty;
        }
        if *count > 0 {
            // Beyond 65,535 of one token the penalty no longer grows.
            let count = u16::try_from(*count).map_or(f32::from(u16::MAX), f32::from);
            *logit -= sampling.frequency_penalty * count + sampling.presence_penalty;
        }
        // A penalty near zero must not make an infinity, which would be taken for the model's fault.
        *logit = logit.clamp(f32::MIN, f32::MAX);
    }
}

fn logit_of(logits: &mut [f32], id: TokenId) -> Option<&mut f32> {
    logits.get_mut(usize::try_from(id).ok()?)
}

/// The token with the largest logit, the lowest id among equals; `None` when that is no number.
fn likeliest(logits: &[f32]) -> Option<(TokenId, f32)> {
    let mut best: Option<(TokenId, f32)> = None;
    for (id, &logit) in (0..).zip(logits) {
        if best.is_none_or(|(_, largest)| logit > largest) {
            best = Some((id, logit));
        }
    }
    best.filter(|(_, logit)| logit.is_finite())
}

/// Keeps the `top_k` likeliest, in order; 0 keeps all as they are.
fn keep_top_k(candidates: &mut Vec<Candidate>, top_k: u32) {
    let Some(top_k) = usize::try_from(top_k).ok().filter(|top_k| *top_k > 0) else {
        return;
    };
    if top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k, Candidate::order);
        candidates.truncate(top_k);
    }
    candidates.sort_unstable_by(Candidate::order);
}

/// Keeps the fewest of the likeliest that together have at least `top_p` of the probability.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let (total, top_p) = (total(candidates), f64::from(top_p));
    // All that are below this bound have less than 1 - top_p together, so the nucleus needs none of
    // them; what is left to sort is short.
    let count = u32::try_from(candidates.len()).unwrap_or(u32::MAX);
    let bound = total * (1.0 - top_p) / f64::from(count);
    candidates.retain(|candidate| f64::from(candidate.weight) >= bound);
    candidates.sort_unstable_by(Candidate::order);
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

/// The candidate at this fraction of the probability.
fn drawn(candidates: &[Candidate], uniform: f64) -> Option<TokenId> {
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
