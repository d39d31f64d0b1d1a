//! The test runner of the reference system. It emits `token_0`, `token_1`, … at a fixed interval until `max_tokens`
//! or a stop token. The prompt and the sampling fields do not change the output.
//!
//! Log probabilities are made up: at each position the emitted token has probability 1/2, the token with the next id
//! 1/4, and so on.
//!
//! The emission times of a sequence are fixed when it starts. After a delay, the sequence catches up with them
//! instead of shifting them. [`TestRunnerOptions`] makes the device slow, stalled, failing or panicking for tests.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::f32::consts::LN_2;
use std::sync::Arc;
use std::time::Duration;

use super::{
    LoadError, LoadedModel, Loader, ModelError, NextStep, PrefixCacheStats, Runner, Sequence,
    SequenceStart, Slot, SlotCredit, Step, StepError, Token, TokenBytes, monotonic_ns,
};
use crate::request::{StopTokens, TokenId};
use crate::tokens::{Logprobs, TopLogprob};
use model::TestModel;
use prompt_work::PromptWork;

mod model;
mod prompt_work;

/// Value of `--runner` for this runner, and the default name of its model.
pub(crate) const LLM_TEST: &str = "llm_test";

/// Context length of every sequence, in tokens.
pub const CONTEXT_LENGTH: u32 = 1_048_576;

/// Maximum number of tokens that a sequence emits in one step, if the interval between tokens is 0.
const MAX_BURST: usize = 32;

/// Settings of the test runner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRunnerOptions {
    /// Time between two tokens of a sequence. 0 emits tokens as fast as the client reads them.
    pub interval: Duration,
    /// Additional delay of the first token, which simulates a long prefill.
    pub first_token_delay: Duration,
    /// Additional delay of the first token, for each prompt token that no earlier sequence on the device has computed.
    /// If the delay is 0, the device reuses no prefixes.
    pub prompt_token_delay: Duration,
    /// Index of the token before which every sequence stops emitting, without ending. `None`: never.
    pub silent_at: Option<u32>,
    /// Index of the token in whose place every sequence fails. `None`: never.
    pub fail_at: Option<u32>,
    /// Index of the token in whose place the device panics. `None`: never.
    pub panic_at: Option<u32>,
}

impl Default for TestRunnerOptions {
    fn default() -> Self {
        Self {
            interval: Duration::from_millis(20),
            first_token_delay: Duration::ZERO,
            prompt_token_delay: Duration::ZERO,
            silent_at: None,
            fail_at: None,
            panic_at: None,
        }
    }
}

/// Creates test runners with the same options.
pub struct TestRunnerLoader {
    options: TestRunnerOptions,
}

impl TestRunnerLoader {
    /// Creates a loader of test runners with these options.
    #[must_use]
    pub fn new(options: TestRunnerOptions) -> Self {
        Self { options }
    }
}

impl Loader for TestRunnerLoader {
    fn load(&self, slots: usize, _progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        Ok(LoadedModel {
            model: Arc::new(TestModel::new(&self.options)),
            runner: Box::new(TestRunner::new(self.options.clone(), slots)),
        })
    }

    fn name(&self) -> &'static str {
        LLM_TEST
    }
}

/// The test runner's device: emits each sequence's tokens at their scheduled times.
struct TestRunner {
    options: TestRunnerOptions,
    interval_ns: u64,
    sequences: Vec<Option<TestSequence>>,
    /// The next emission of each sequence: (time in nanoseconds, slot, sequence number). The entry of a released
    /// sequence is dropped when it becomes the earliest.
    deadlines: BinaryHeap<Reverse<(u64, Slot, u64)>>,
    /// Sequences whose next token is due, but which have no credit.
    waiting: Vec<Slot>,
    admitted: u64,
    prompt_work: PromptWork,
}

struct TestSequence {
    /// Distinguishes the sequence from earlier sequences in the same slot.
    number: u64,
    next_index: u32,
    max_tokens: u32,
    due_ns: u64,
    timestamps: bool,
    stop_tokens: StopTokens,
    logprobs: Option<u32>,
    /// Prompt tokens still to be emitted.
    prompt: VecDeque<TokenId>,
    has_emitted_prompt_token: bool,
}

impl TestSequence {
    /// Returns the time of the next emission. Prompt tokens are due at once.
    fn next_due_ns(&self) -> u64 {
        if self.prompt.is_empty() {
            self.due_ns
        } else {
            0
        }
    }

    /// Takes the next prompt token, if there is one.
    fn next_prompt_token(&mut self) -> Option<Token> {
        let id = self.prompt.pop_front()?;
        // The first token of a prompt has no log probability, because no token precedes it.
        let has_logprob = std::mem::replace(&mut self.has_emitted_prompt_token, true);
        let logprobs = logprobs(id, self.logprobs.filter(|_| has_logprob).unwrap_or(0));
        Some(Token {
            id,
            bytes: token_text(id),
            due_ns: 0,
            emitted_ns: 0,
            logprobs: Some(Box::new(Logprobs {
                logprob: logprobs.logprob.filter(|_| has_logprob),
                ..logprobs
            })),
        })
    }

    /// Returns true if the token with this index ends the sequence.
    fn ends_with(&self, index: u32) -> bool {
        index >= self.stop_tokens.min_tokens && self.stop_tokens.ids.contains(&index)
    }
}

impl TestRunner {
    fn new(options: TestRunnerOptions, slots: usize) -> Self {
        Self {
            interval_ns: nanoseconds(options.interval),
            prompt_work: PromptWork::new(options.prompt_token_delay, slots),
            options,
            sequences: (0..slots).map(|_| None).collect(),
            deadlines: BinaryHeap::new(),
            waiting: Vec::new(),
            admitted: 0,
        }
    }

    /// Moves the sequences that have credit again from `waiting` to `deadlines`.
    fn reschedule_waiting(&mut self, credit: &dyn SlotCredit) {
        let (sequences, deadlines) = (&self.sequences, &mut self.deadlines);
        self.waiting.retain(|&slot| {
            let Some(sequence) = &sequences[slot.0] else {
                return false;
            };
            let has_room = credit.credit(slot) > 0;
            if has_room {
                deadlines.push(Reverse((sequence.next_due_ns(), slot, sequence.number)));
            }
            !has_room
        });
    }

    /// Returns the earliest emission time of a running sequence, and its slot.
    fn next_deadline(&mut self) -> Option<(u64, Slot)> {
        while let Some(&Reverse((due_ns, slot, number))) = self.deadlines.peek() {
            if self.sequences[slot.0]
                .as_ref()
                .is_some_and(|sequence| sequence.number == number)
            {
                return Some((due_ns, slot));
            }
            self.deadlines.pop();
        }
        None
    }

    /// Emits one token of a sequence. If the options say so, the sequence fails or the device panics instead. Returns
    /// false if the sequence has ended.
    fn emit(&mut self, slot: Slot, step: &mut Step<'_>) -> bool {
        let Some(sequence) = &mut self.sequences[slot.0] else {
            return false;
        };
        if let Some(token) = sequence.next_prompt_token() {
            step.emit_prompt(slot, token);
            return true;
        }
        let index = sequence.next_index;
        if self.options.panic_at == Some(index) {
            panic!("the test runner panics at token {index}, as configured");
        }
        if self.options.fail_at == Some(index) {
            let message = format!("The test runner fails at token {index}, as configured.");
            step.fail(slot, ModelError::Failed(message));
            return false;
        }
        let emitted_ns = if sequence.timestamps {
            monotonic_ns()
        } else {
            0
        };
        let due_ns = if self.interval_ns == 0 {
            emitted_ns
        } else {
            sequence.due_ns
        };
        sequence.next_index += 1;
        sequence.due_ns += self.interval_ns;
        let token = Token {
            id: index,
            bytes: token_text(index),
            due_ns,
            emitted_ns,
            logprobs: sequence.logprobs.map(|top| Box::new(logprobs(index, top))),
        };
        if sequence.ends_with(index) {
            step.end(slot, token);
            return false;
        }
        step.emit(slot, token);
        true
    }

    /// Schedules the next token of a sequence, unless the options make the sequence stall before that token.
    fn schedule(&mut self, slot: Slot) {
        let Some(sequence) = &self.sequences[slot.0] else {
            return;
        };
        if self.options.silent_at != Some(sequence.next_index) {
            self.deadlines
                .push(Reverse((sequence.next_due_ns(), slot, sequence.number)));
        }
    }

    /// Returns the number of tokens that a sequence with this credit emits in one step.
    fn burst_size(&self, slot: Slot, credit: usize) -> usize {
        let Some(sequence) = &self.sequences[slot.0] else {
            return 0;
        };
        if !sequence.prompt.is_empty() {
            return credit.min(MAX_BURST).min(sequence.prompt.len());
        }
        if self.interval_ns > 0 {
            return credit.min(1);
        }
        let until = |index: u32| {
            usize::try_from(index.saturating_sub(sequence.next_index)).unwrap_or(MAX_BURST)
        };
        let left = self.options.silent_at.map_or(MAX_BURST, until);
        credit
            .min(MAX_BURST)
            .min(left)
            .min(until(sequence.max_tokens))
    }
}

impl Runner for TestRunner {
    fn choose_slot(&self, sequence: &Sequence, free: &[Slot]) -> Slot {
        self.prompt_work.choose_slot(sequence, free)
    }

    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<SequenceStart, ModelError> {
        self.admitted += 1;
        let cached = self.prompt_work.admit(slot, &sequence);
        let prompt_delay = self.prompt_work.duration(&sequence, cached);
        let first_token = self
            .interval_ns
            .saturating_add(nanoseconds(self.options.first_token_delay))
            .saturating_add(nanoseconds(prompt_delay));
        self.sequences[slot.0] = Some(TestSequence {
            number: self.admitted,
            next_index: u32::try_from(sequence.delivered.len()).unwrap_or(u32::MAX),
            max_tokens: sequence.max_tokens,
            due_ns: monotonic_ns().saturating_add(first_token),
            timestamps: sequence.options.timestamps,
            stop_tokens: sequence.options.stop_tokens,
            logprobs: sequence.options.logprobs,
            prompt: if sequence.scores_prompt {
                sequence.prompt.iter().copied().collect()
            } else {
                VecDeque::new()
            },
            has_emitted_prompt_token: false,
        });
        self.schedule(slot);
        Ok(SequenceStart {
            cached_tokens: u32::try_from(cached).unwrap_or(u32::MAX),
        })
    }

    fn release(&mut self, slot: Slot) {
        if let Some(sequence) = self.sequences[slot.0].take() {
            self.prompt_work.release(slot, sequence.next_index);
        }
        self.waiting.retain(|waiting| *waiting != slot);
    }

    fn next_step(&mut self, credit: &dyn SlotCredit) -> NextStep {
        self.reschedule_waiting(credit);
        self.next_deadline()
            .map_or(NextStep::Idle, |(due_ns, _)| NextStep::At(due_ns))
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        let now_ns = monotonic_ns();
        let mut emitted = Vec::new();
        while let Some((due_ns, slot)) = self.next_deadline()
            && due_ns <= now_ns
        {
            self.deadlines.pop();
            match self.burst_size(slot, step.credit(slot)) {
                0 => self.waiting.push(slot),
                burst => {
                    if (0..burst).all(|_| self.emit(slot, step)) {
                        emitted.push(slot);
                    }
                }
            }
        }
        // The next emissions are scheduled after the loop, so that a late sequence does not starve the others.
        for slot in emitted {
            self.schedule(slot);
        }
        Ok(())
    }

    fn prefix_cache(&self) -> PrefixCacheStats {
        self.prompt_work.stats()
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn token_text(id: TokenId) -> TokenBytes {
    let mut bytes = TokenBytes::new();
    bytes.extend_from_slice(b"token_");
    let mut digits = itoa::Buffer::new();
    bytes.extend_from_slice(digits.format(id).as_bytes());
    bytes
}

/// Made-up log probabilities: the token with this id has probability 1/2, the token with the next id 1/4, and so on.
fn logprobs(id: TokenId, top: u32) -> Logprobs {
    let mut logprob = 0.0;
    let top = (0..top).map_while(|rank| {
        logprob -= LN_2;
        let id = id.checked_add(rank)?;
        Some(TopLogprob {
            id,
            token_bytes: token_text(id).into_vec(),
            logprob,
        })
    });
    Logprobs {
        logprob: Some(-LN_2),
        token_bytes: token_text(id).into_vec(),
        top: top.collect(),
    }
}

#[cfg(test)]
mod tests;
