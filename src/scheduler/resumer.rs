//! How a choice whose worker was lost goes on: from its prompt and the tokens that its stream has, before all
//! that is new. Its stream asks for it, because that alone knows what it has.

use std::pin::Pin;

use tokio::time::{Instant, sleep};

use super::{Scheduler, Submission, Work};
use crate::error::{Error, ErrorKind};
use crate::request::TokenId;
use crate::runner::Sequence;
use crate::worker::token_channel::TokenReceiver;

/// How many crashes in a row, with no token in between, a choice may have been there for: the second time it was
/// alone among those who had been there before, and so it is the cause.
const MAX_CONSECUTIVE_CRASHES: u32 = 2;

/// How many crashes a choice may have been there for at all, whatever it made in between.
const MAX_CRASHES: u32 = 8;

/// How often a choice is resumed without making [`MIN_PROGRESS_TOKENS`] on any one worker, or `--max-resumptions` times where that
/// is more. It ends a choice whose worker is lost shortly after each resumption, whether the choice made a token in
/// between or the worker had not even accepted it: its next worker would most likely be lost, too. A client waits for
/// about eight times the heartbeat timeout at most.
const MAX_RESUMPTIONS_WITHOUT_PROGRESS: u32 = 8;

/// How many tokens of one worker are progress. A long stream makes that many between two losses that have nothing to do
/// with it, however many there are: at 20 tokens a second it takes less than a second.
const MIN_PROGRESS_TOKENS: u32 = 16;

/// What it takes to go on with a request's choices elsewhere.
pub struct Resumer {
    pub(super) scheduler: Scheduler,
    pub(super) model: usize,
    pub(super) priority: i32,
    /// The first choice, as it was when it was placed first.
    pub(super) sequence: Sequence,
    pub(super) deadline: Instant,
}

/// How often a choice's workers were lost.
#[derive(Clone, Copy, Debug, Default)]
pub struct LossHistory {
    in_a_row: u32,
    crashes_in_a_row: u32,
    crashes: u32,
    without_progress: u32,
    /// The tokens of the choice when its worker was lost last.
    made: u32,
}

/// How the worker of a choice was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerLoss {
    /// It had not accepted the choice, and did not crash.
    BeforeAcceptance,
    /// It had accepted the choice, and did not crash.
    AfterAcceptance,
    /// It crashed, perhaps by this choice.
    Crash,
}

/// A choice on its way to another worker.
pub struct PendingResumption {
    /// Where its tokens come from now on.
    pub token_channel: TokenReceiver,
    /// Ends when no worker has taken it in time. It is to be polled until one has.
    pub acceptance_timeout: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl LossHistory {
    /// The choice has made a token.
    pub fn record_progress(&mut self) {
        self.in_a_row = 0;
        self.crashes_in_a_row = 0;
    }

    /// The choice's worker was lost when the choice had so many tokens.
    pub fn again(&mut self, loss: WorkerLoss, made: u32) {
        if made.saturating_sub(self.made) >= MIN_PROGRESS_TOKENS {
            self.without_progress = 0;
        }
        self.made = made;
        self.without_progress += 1;
        // A worker that was killed before it accepted the choice says nothing about the choice. One that crashed may
        // have done so by the choice before it could accept it.
        self.in_a_row += u32::from(loss != WorkerLoss::BeforeAcceptance);
        let crash = u32::from(loss == WorkerLoss::Crash);
        self.crashes_in_a_row += crash;
        self.crashes += crash;
    }

    /// Whether the choice may go on elsewhere.
    fn may_resume(&self, max_resumptions: u32) -> bool {
        self.in_a_row <= max_resumptions
            && self.without_progress <= max_resumptions.max(MAX_RESUMPTIONS_WITHOUT_PROGRESS)
            && self.crashes_in_a_row < MAX_CONSECUTIVE_CRASHES
            && self.crashes < MAX_CRASHES
    }
}

impl Resumer {
    /// Places a choice elsewhere, to go on behind these tokens; `scores_prompt` where its prompt's log
    /// probabilities are still to come.
    ///
    /// # Errors
    /// When it is not to go on.
    pub fn resume(
        &self,
        choice: u32,
        delivered: &[TokenId],
        scores_prompt: bool,
        lost: &LossHistory,
    ) -> Result<PendingResumption, Error> {
        if self.scheduler.stopping.is_cancelled() {
            let message = "The server is shutting down and could not wait for this request to end.";
            return Err(Error::new(ErrorKind::Draining, message));
        }
        if !lost.may_resume(self.scheduler.resumption.max_consecutive) {
            return Err(worker_lost());
        }
        let sequence = Sequence {
            choice,
            delivered: delivered.to_vec(),
            scores_prompt,
            ..self.sequence.clone()
        };
        let (mut assignment, token_channel) = self.scheduler.assignment(sequence, self.deadline);
        assignment.is_suspect = lost.crashes_in_a_row > 0;
        self.scheduler.resumptions.increment(1);
        let replayed = u64::try_from(delivered.len()).unwrap_or(u64::MAX);
        self.scheduler.tokens_replayed.increment(replayed);
        let submission = Submission {
            model: self.model,
            priority: self.priority,
            work: Work::Resumed(Box::new(assignment)),
        };
        let submissions = self.scheduler.submissions.clone();
        let acceptance_timeout = self.scheduler.resumption.acceptance_timeout;
        let acceptance_timeout = Box::pin(async move {
            // A scheduler that has ended drops it, and the token_channel closes.
            let _ = submissions.send(submission).await;
            sleep(acceptance_timeout).await;
        });
        Ok(PendingResumption {
            token_channel,
            acceptance_timeout,
        })
    }
}

/// What a client is told whose choice cannot go on.
#[must_use]
pub fn worker_lost() -> Error {
    let message =
        "The device that served this request was lost, and the request could not go on elsewhere.";
    Error::new(ErrorKind::WorkerLost, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    use WorkerLoss::{AfterAcceptance, BeforeAcceptance, Crash};

    fn lost(losses: &[WorkerLoss]) -> LossHistory {
        let mut lost = LossHistory::default();
        for loss in losses {
            lost.again(*loss, 0);
        }
        lost
    }

    /// How often a choice is resumed at most that makes so many tokens each time, by workers that are lost like this.
    fn resumptions(loss: WorkerLoss, tokens: u32, max_resumptions: u32) -> u32 {
        let mut lost = LossHistory::default();
        for resumptions in 0..10_000 {
            if tokens > 0 {
                lost.record_progress();
            }
            lost.again(loss, (resumptions + 1) * tokens);
            if !lost.may_resume(max_resumptions) {
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
        let mut lost = LossHistory::default();
        for made in [0, 10, 20, 30, 40, 50, 60, 70] {
            lost.again(AfterAcceptance, made);
            lost.record_progress();
        }
        assert!(lost.may_resume(2));
        lost.again(AfterAcceptance, 80);
        lost.record_progress();
        assert!(!lost.may_resume(2));
        lost.again(AfterAcceptance, 96);
        assert!(lost.may_resume(2));
    }

    #[test]
    fn a_token_resets_the_count_of_consecutive_losses() {
        assert!(lost(&[AfterAcceptance; 2]).may_resume(2));
        let mut unlucky = lost(&[AfterAcceptance; 3]);
        assert!(!unlucky.may_resume(2));
        unlucky.record_progress();
        unlucky.again(AfterAcceptance, 1);
        assert!(unlucky.may_resume(2));
    }

    #[test]
    fn a_choice_fails_after_two_consecutive_crashes() {
        assert!(lost(&[Crash]).may_resume(2));
        assert!(!lost(&[Crash, Crash]).may_resume(2));
        assert!(!lost(&[Crash, AfterAcceptance, Crash]).may_resume(9));
    }

    #[test]
    fn a_choice_fails_after_eight_crashes_even_with_progress() {
        let mut lost = LossHistory::default();
        for number in 1..8 {
            lost.again(Crash, number * 100);
            assert!(lost.may_resume(2));
            lost.record_progress();
        }
        lost.again(Crash, 800);
        assert!(!lost.may_resume(2));
    }
}
