//! How a choice whose worker was lost goes on: from its prompt and the tokens that its stream has, before all
//! that is new. Its stream asks for it, because that alone knows what it has.

use std::pin::Pin;

use tokio::time::{Instant, sleep};

use super::{Scheduler, Submission, Work};
use crate::error::{Error, ErrorKind};
use crate::request::TokenId;
use crate::runner::Sequence;
use crate::worker::lane::LaneReceiver;

/// How many crashes in a row, with no token in between, a choice may have been there for: the second time it was
/// alone among those who had been there before, and so it is the cause.
const CRASHES_IN_A_ROW: u32 = 2;

/// How many crashes a choice may have been there for at all, whatever it made in between.
const CRASHES: u32 = 8;

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
pub struct Lost {
    in_a_row: u32,
    crashes_in_a_row: u32,
    crashes: u32,
}

/// A choice on its way to another worker.
pub struct Resuming {
    /// Where its tokens come from now on.
    pub lane: LaneReceiver,
    /// Ends when no worker has taken it in time. It is to be polled until one has.
    pub in_vain: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Lost {
    /// The choice has made a token.
    pub fn went_on(&mut self) {
        self.in_a_row = 0;
        self.crashes_in_a_row = 0;
    }

    /// The choice's worker was lost, by a crash or otherwise.
    pub fn again(&mut self, by_crash: bool) {
        let crash = u32::from(by_crash);
        self.in_a_row += 1;
        self.crashes_in_a_row += crash;
        self.crashes += crash;
    }

    /// Whether the choice may go on elsewhere.
    fn may_go_on(&self, max_resumptions: u32) -> bool {
        self.in_a_row <= max_resumptions
            && self.crashes_in_a_row < CRASHES_IN_A_ROW
            && self.crashes < CRASHES
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
        lost: &Lost,
    ) -> Result<Resuming, Error> {
        if self.scheduler.stopping.is_cancelled() {
            let message = "The server is shutting down and could not wait for this request to end.";
            return Err(Error::new(ErrorKind::Draining, message));
        }
        if !lost.may_go_on(self.scheduler.resumption.max_in_a_row) {
            return Err(worker_lost());
        }
        let sequence = Sequence {
            choice,
            delivered: delivered.to_vec(),
            scores_prompt,
            ..self.sequence.clone()
        };
        let (mut assignment, lane) = self.scheduler.assignment(sequence, self.deadline);
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
        let patience = self.scheduler.resumption.patience;
        let in_vain = Box::pin(async move {
            // A scheduler that has ended drops it, and the lane closes.
            let _ = submissions.send(submission).await;
            sleep(patience).await;
        });
        Ok(Resuming { lane, in_vain })
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

    fn lost(crashes: &[bool]) -> Lost {
        let mut lost = Lost::default();
        for by_crash in crashes {
            lost.again(*by_crash);
        }
        lost
    }

    #[test]
    fn a_choice_goes_on_so_often_in_a_row_and_as_often_again_once_it_has_made_a_token() {
        assert!(lost(&[false, false]).may_go_on(2));
        let mut unlucky = lost(&[false, false, false]);
        assert!(!unlucky.may_go_on(2));
        unlucky.went_on();
        unlucky.again(false);
        assert!(unlucky.may_go_on(2));
    }

    #[test]
    fn a_choice_that_was_there_for_two_crashes_in_a_row_does_not_go_on() {
        assert!(lost(&[true]).may_go_on(2));
        assert!(!lost(&[true, true]).may_go_on(2));
        assert!(!lost(&[true, false, true]).may_go_on(9));
    }

    #[test]
    fn a_choice_that_crashes_worker_after_worker_is_ended_whatever_it_makes_in_between() {
        let mut lost = Lost::default();
        for _ in 0..7 {
            lost.again(true);
            assert!(lost.may_go_on(2));
            lost.went_on();
        }
        lost.again(true);
        assert!(!lost.may_go_on(2));
    }
}
