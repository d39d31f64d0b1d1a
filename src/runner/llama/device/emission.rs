//! Turns logits into emissions: the tokens of scored prompts, and the next token of every sequence that has finished
//! its prompt.

use llama_cpp_2::context::LlamaContext;

use super::batch::BatchPart;
use super::{LlamaRunner, model_failed};
use crate::request::TokenId;
use crate::runner::llama::logprobs;
use crate::runner::llama::model::GgufModel;
use crate::runner::llama::sampling::Sampler;
use crate::runner::llama::sequence::ActiveSequence;
use crate::runner::{Emission, ModelError, Slot, Step, Token};
use crate::tokens::{Logprobs, TopLogprob};

impl LlamaRunner {
    /// Samples the next token of every sequence that has finished its prompt. Emits these tokens and those of scored
    /// prompts, as far as the sequences have credit.
    pub(super) fn emit_tokens(&mut self, step: &mut Step<'_>) {
        let (slots, sampler, model) = (&mut self.slots, &mut self.sampler, &self.model);
        let buffers = &mut self.logits_buffers;
        let (parts, reuses_prefixes) = (&self.parts, self.reuses_prefixes);
        self.context.with_dependent_mut(|_, context| {
            for part in parts {
                let Some(sequence) = slots.sequence_mut(part.slot) else {
                    continue;
                };
                let mut queued = Ok(());
                if sequence.is_scoring() {
                    queued = queue_prompt_tokens(part, sequence, model, context);
                }
                sequence.advance(part.rows);
                if part.samples && queued.is_ok() {
                    let logits = part.logits(context, part.rows - 1);
                    if reuses_prefixes {
                        sequence.keep_first_logits(logits, buffers);
                    }
                    queued = next_token(sampler, logits, sequence, model)
                        .map(|token| queue_next(part.slot, sequence, model, token));
                }
                send_or_fail(queued, part.slot, sequence, step);
            }
        });
    }

    /// Samples the first token of every sequence that reuses all its tokens. Returns true if there were any.
    pub(super) fn sample_reused(&mut self, step: &mut Step<'_>) -> bool {
        let (sampler, model) = (&mut self.sampler, &self.model);
        let mut any = false;
        for (slot, sequence) in self.slots.active_mut() {
            let Some(reused) = sequence.reused_logits(step.credit(slot)).cloned() else {
                continue;
            };
            let queued = next_token(sampler, &reused.logits, sequence, model)
                .map(|token| queue_next(slot, sequence, model, token));
            send_or_fail(queued, slot, sequence, step);
            any = true;
        }
        any
    }
}

/// Emits the queued tokens of a sequence, or fails it.
fn send_or_fail(
    queued: Result<(), ModelError>,
    slot: Slot,
    sequence: &mut ActiveSequence,
    step: &mut Step<'_>,
) {
    match queued {
        Ok(()) => sequence.send(slot, step),
        Err(error) => {
            sequence.forget_computed();
            step.fail(slot, error);
        }
    }
}

/// Queues the tokens of a scored prompt. The logits of each row give the log probabilities of the next token.
fn queue_prompt_tokens(
    part: &BatchPart,
    sequence: &mut ActiveSequence,
    model: &GgufModel,
    context: &LlamaContext<'_>,
) -> Result<(), ModelError> {
    if sequence.computed() == 0
        && let Some(id) = sequence.prompt_token(0)
    {
        let logprobs = Logprobs {
            token_bytes: model.full_bytes(id),
            ..Logprobs::default()
        };
        let token = token_with_logprobs(model, id, Some(logprobs))?;
        sequence.queue_emission(Emission::Prompt(part.slot, token));
    }
    for offset in 0..part.rows {
        let Some(id) = sequence.prompt_token(sequence.computed() + offset + 1) else {
            continue;
        };
        let logprobs = logprobs(model, part.logits(context, offset), id, sequence)?;
        let token = token_with_logprobs(model, id, logprobs)?;
        sequence.queue_emission(Emission::Prompt(part.slot, token));
    }
    Ok(())
}

/// Samples the next token of a sequence.
fn next_token(
    sampler: &mut Sampler,
    logits: &[f32],
    sequence: &ActiveSequence,
    model: &GgufModel,
) -> Result<Token, ModelError> {
    let id = sampler.sample(
        logits,
        &sequence.sampling,
        &sequence.history,
        sequence.logit_adjustments(),
        sequence.draw_key(),
    );
    let id = id.map_err(|error| model_failed(error.to_string()))?;
    let logprobs = logprobs(model, logits, id, sequence)?;
    token_with_logprobs(model, id, logprobs)
}

/// Queues the next token of a sequence.
fn queue_next(slot: Slot, sequence: &mut ActiveSequence, model: &GgufModel, token: Token) {
    let id = token.id;
    let is_end_token = model.end_tokens().contains(&id);
    sequence.push(id);
    let emission = if sequence.ends_with(id, is_end_token) {
        Emission::EndOfSequence(slot, token)
    } else {
        Emission::Token(slot, token)
    };
    sequence.queue_emission(emission);
}

/// Computes the log probabilities of this token, if the sequence asks for them.
fn logprobs(
    model: &GgufModel,
    logits: &[f32],
    id: TokenId,
    sequence: &ActiveSequence,
) -> Result<Option<Logprobs>, ModelError> {
    let Some(top) = sequence.logprobs else {
        return Ok(None);
    };
    let position = logprobs::position_logprobs(logits, id, top)
        .map_err(|error| model_failed(error.to_string()))?;
    let top = position.top.into_iter().map(|(id, logprob)| TopLogprob {
        id,
        token_bytes: model.full_bytes(id),
        logprob,
    });
    Ok(Some(Logprobs {
        logprob: Some(position.logprob),
        token_bytes: model.full_bytes(id),
        top: top.collect(),
    }))
}

fn token_with_logprobs(
    model: &GgufModel,
    id: TokenId,
    logprobs: Option<Logprobs>,
) -> Result<Token, ModelError> {
    let unknown = || model_failed(format!("Token id {id} is not in this model's vocabulary."));
    Ok(Token {
        id,
        bytes: model.visible_bytes(id).ok_or_else(unknown)?,
        due_ns: 0,
        emitted_ns: 0,
        logprobs: logprobs.map(Box::new),
    })
}
