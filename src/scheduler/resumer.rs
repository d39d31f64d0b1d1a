//! Resumes a choice on another worker after its worker was lost.
//!
//! The new worker continues from the prompt and the tokens received so far. A resumed choice is placed before new
//! requests. The completion's stream starts the resumption, because only it knows which tokens were received.
//!
//! `scheduler` and this file use each other: an admitted request holds a [`Resumer`], which submits to the scheduler.

use std::pin::Pin;
use std::sync::Arc;

use tokio::time::{Instant, sleep};

use super::Scheduler;
use super::plan::CallerShare;
use super::submission::{SchedulerMessage, SubmittedWork};
use crate::error::{Error, ErrorKind};
use crate::models::ModelId;
use crate::prefix_index::PromptBlocks;
use crate::request::TokenId;
use crate::runner::Sequence;
use crate::worker::token_channel::TokenReceiver;

/// A choice fails after this many crashes in a row without a token in between.
///
/// After the first crash the choice is a crash suspect, and a worker runs at most one crash suspect. After a second
/// crash, the choice is therefore the likely cause.
const MAX_CONSECUTIVE_CRASHES: u32 = 2;

/// A choice fails after this many crashes, even if it received tokens in between.
const MAX_CRASHES: u32 = 8;

/// A choice fails after this many resumptions since it last received [`MIN_PROGRESS_TOKENS`] tokens from one worker.
/// `--max-resumptions` raises the limit if it is larger.
///
/// The limit stops a choice whose workers are always lost soon after they resume it, because the next worker would
/// probably be lost too. A client waits for at most about eight heartbeat timeouts.
const MAX_RESUMPTIONS_WITHOUT_PROGRESS: u32 = 8;

/// Number of tokens from one worker that count as progress. A long stream receives that many between two losses that
/// it did not cause: at 20 tokens per second, 16 tokens take less than a second.
const MIN_PROGRESS_TOKENS: u32 = 16;

/// Resumes the choices of one request on other workers.
pub(crate) struct Resumer {
    pub(super) scheduler: Arc<Scheduler>,
    pub(super) model: ModelId,
    pub(super) caller: CallerShare,
    pub(super) priority: i32,
    /// Sequence of choice 0 as it was first submitted. The sequences of all resumed choices are copies of it.
    pub(super) sequence: Sequence,
    pub(super) prompt_blocks: Arc<PromptBlocks>,
    pub(super) deadline: Instant,
}

/// The losses of one choice's workers so far. They decide whether the choice may be resumed again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LossHistory {
    /// Losses since the last token. Losses before the worker accepted the choice do not count.
    consecutive: u32,
    /// Crashes since the last token.
    consecutive_crashes: u32,
    crashes: u32,
    /// Losses since one worker last sent [`MIN_PROGRESS_TOKENS`] tokens.
    without_progress: u32,
    /// Number of tokens that the choice had at the last loss.
    tokens_at_last_loss: u32,
}

/// The way in which a choice's worker was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WorkerLoss {
    /// The worker did not crash, and had not accepted the choice yet.
    BeforeAcceptance,
    /// The worker did not crash, and had accepted the choice.
    AfterAcceptance,
    /// The worker crashed, possibly because of this choice.
    Crash,
}

/// A choice that waits for another worker.
pub(crate) struct PendingResumption {
    /// Channel that carries the choice's remaining tokens.
    pub token_channel: TokenReceiver,
    /// Submits the choice, and completes if no worker accepts it in time. Must be polled until a worker accepts the
    /// choice.
    pub acceptance_timeout: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl LossHistory {
    /// Records that the choice received a token.
    pub(crate) fn record_progress(&mut self) {
        self.consecutive = 0;
        self.consecutive_crashes = 0;
    }

    /// Records the loss of the choice's worker when the choice had `tokens` tokens.
    pub(crate) fn record_loss(&mut self, loss: WorkerLoss, tokens: u32) {
        if tokens.saturating_sub(self.tokens_at_last_loss) >= MIN_PROGRESS_TOKENS {
            self.without_progress = 0;
        }
        self.tokens_at_last_loss = tokens;
        self.without_progress += 1;
        // A worker that was killed or unreachable before it accepted the choice was not lost because of the choice. A
        // crash before acceptance may be.
        self.consecutive += u32::from(loss != WorkerLoss::BeforeAcceptance);
        let crash = u32::from(loss == WorkerLoss::Crash);
        self.consecutive_crashes += crash;
        self.crashes += crash;
    }

    /// Returns true if the choice may be resumed once more.
    fn may_resume(&self, max_resumptions: u32) -> bool {
        self.consecutive <= max_resumptions
            && self.without_progress <= max_resumptions.max(MAX_RESUMPTIONS_WITHOUT_PROGRESS)
            && self.consecutive_crashes < MAX_CONSECUTIVE_CRASHES
            && self.crashes < MAX_CRASHES
    }
}

impl Resumer {
    /// Resumes a choice after the tokens `delivered`. If `scores_prompt` is true, the new worker also sends the
    /// prompt's log probabilities.
    ///
    /// # Errors
    /// Returns an error if the server is shutting down or the choice has lost too many workers.
    pub(crate) fn resume(
        &self,
        choice: u32,
        delivered: &[TokenId],
        scores_prompt: bool,
        losses: &LossHistory,
    ) -> Result<PendingResumption, Error> {
        if self.scheduler.stopping.is_cancelled() {
            let message = "The server is shutting down and could not wait for this request to end.";
            return Err(Error::new(ErrorKind::Draining, message));
        }
        if !losses.may_resume(self.scheduler.resumption.max_consecutive) {
            return Err(worker_lost_error());
        }
        let sequence = Sequence {
            choice,
            delivered: delivered.to_vec(),
            scores_prompt,
            ..self.sequence.clone()
        };
        let (mut assignment, token_channel) = self.scheduler.assignment(sequence, self.deadline);
        assignment.prompt_blocks = Arc::clone(&self.prompt_blocks);
        assignment.is_suspect = losses.consecutive_crashes > 0;
        self.scheduler.resumptions.increment(1);
        let replayed = u64::try_from(delivered.len()).unwrap_or(u64::MAX);
        self.scheduler.tokens_replayed.increment(replayed);
        let submission = SchedulerMessage {
            model: self.model,
            caller: self.caller.clone(),
            priority: self.priority,
            work: SubmittedWork::Resumed(Box::new(assignment)),
        };
        let submissions = self.scheduler.submissions.clone();
        let acceptance_timeout = self.scheduler.resumption.acceptance_timeout;
        let acceptance_timeout = Box::pin(async move {
            // If the scheduler has stopped, the submission is dropped, and the choice's token channel closes.
            let _ = submissions.send(submission).await;
            sleep(acceptance_timeout).await;
        });
        Ok(PendingResumption {
            token_channel,
            acceptance_timeout,
        })
    }
}

/// Creates the error of a choice that cannot be resumed.
#[must_use]
pub fn worker_lost_error() -> Error {
    let message = "The worker that ran this request was lost, and the request could not be resumed on another worker.";
    Error::new(ErrorKind::WorkerLost, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    use WorkerLoss::{AfterAcceptance, BeforeAcceptance, Crash};

    fn history(losses: &[WorkerLoss]) -> LossHistory {
        let mut history = LossHistory::default();
        for loss in losses {
            history.record_loss(*loss, 0);
        }
        history
    }

    /// Returns how often a choice is resumed if every worker sends `tokens` tokens and is then lost in this way.
    fn resumptions(loss: WorkerLoss, tokens: u32, max_resumptions: u32) -> u32 {
        let mut history = LossHistory::default();
        for resumptions in 0..10_000 {
            if tokens > 0 {
                history.record_progress();
            }
            history.record_loss(loss, (resumptions + 1) * tokens);
            if !history.may_resume(max_resumptions) {
                return resumptions;
            }
        }
        u32::MAX
    }

    #[test]
    fn a_choice_without_progress_between_losses_fails_and_a_long_stream_never_does() {
        assert_eq!(resumptions(AfterAcceptance, 1, 2), 8);
        assert_eq!(resumptions(AfterAcceptance, 15, 2), 8);
        assert_eq!(resumptions(AfterAcceptance, 16, 2), u32::MAX);
        assert_eq!(resumptions(AfterAcceptance, 1, 20), 20);
    }

    #[test]
    fn a_choice_that_no_worker_accepts_fails() {
        assert_eq!(resumptions(BeforeAcceptance, 0, 2), 8);
    }

    #[test]
    fn progress_is_counted_per_worker() {
        let mut history = LossHistory::default();
        for tokens in [0, 10, 20, 30, 40, 50, 60, 70] {
            history.record_loss(AfterAcceptance, tokens);
            history.record_progress();
        }
        assert!(history.may_resume(2));
        history.record_loss(AfterAcceptance, 80);
        history.record_progress();
        assert!(!history.may_resume(2));
        history.record_loss(AfterAcceptance, 96);
        assert!(history.may_resume(2));
    }

    #[test]
    fn a_token_resets_the_count_of_consecutive_losses() {
        assert!(history(&[AfterAcceptance; 2]).may_resume(2));
        let mut losses = history(&[AfterAcceptance; 3]);
        assert!(!losses.may_resume(2));
        losses.record_progress();
        losses.record_loss(AfterAcceptance, 1);
        assert!(losses.may_resume(2));
    }

    #[test]
    fn a_choice_fails_after_two_consecutive_crashes() {
        assert!(history(&[Crash]).may_resume(2));
        assert!(!history(&[Crash, Crash]).may_resume(2));
        assert!(!history(&[Crash, AfterAcceptance, Crash]).may_resume(9));
    }

    #[test]
    fn a_choice_fails_after_eight_crashes_even_with_progress() {
        let mut history = LossHistory::default();
        for number in 1..8 {
            history.record_loss(Crash, number * 100);
            assert!(history.may_resume(2));
            history.record_progress();
        }
        history.record_loss(Crash, 800);
        assert!(!history.may_resume(2));
    }
}
