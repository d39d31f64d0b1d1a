//! The step loop of a worker's device: admits submitted sequences, calls the runner step by step, and sends the tokens
//! of each step to their token channels.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Worker;
use crate::logging::REQUEST_SPAN_TARGET;
use crate::request::FinishReason;
use crate::runner::{
    Emission, NextStep, Runner, Sequence, SequenceStart, Slot, Step, StepError, Token, monotonic_ns,
};
use crate::telemetry::PrefixCacheMeter;
use crate::worker::slots::{FreedSlot, RunnableSequence, Slots};
use crate::worker::token_channel::{Failure, SendOutcome};
use crate::worker::{Assignment, AssignmentId, WorkerEvent};

/// Time in nanoseconds before a scheduled step at which the thread stops sleeping and spins. The kernel wakes a
/// sleeping thread tens of microseconds late.
const SPIN_NS: u64 = 50_000;

/// The device of one generation, and its sequences. If it is dropped with sequences left, their token channels close
/// without an end. The streams then treat the sequences as lost.
pub(super) struct Device<'a> {
    worker: &'a mut Worker,
    runner: Box<dyn Runner>,
    slots: Slots,
    /// The sequence for which the runner is choosing a slot.
    without_slot: Option<RunnableSequence>,
    emissions: Vec<Emission>,
    prefix_cache: PrefixCacheMeter,
    /// True if the generation ended without a crash.
    has_stopped: bool,
}

impl<'a> Device<'a> {
    /// Creates the device of the worker's current generation.
    pub(super) fn new(worker: &'a mut Worker, runner: Box<dyn Runner>) -> Self {
        let options = &worker.options;
        let slow_reader_ns =
            u64::try_from(options.slow_reader_timeout.as_nanos()).unwrap_or(u64::MAX);
        Self {
            slots: Slots::new(options.slots, slow_reader_ns),
            without_slot: None,
            emissions: Vec::new(),
            prefix_cache: options.telemetry.prefix_cache.meter(),
            has_stopped: false,
            worker,
            runner,
        }
    }

    /// Runs sequences until the worker is stopped or drained, or its device fails.
    pub(super) fn run(&mut self) -> Result<(), StepError> {
        loop {
            let now_ns = monotonic_ns();
            let attention = self.worker.flags.attention.swap(false, Ordering::SeqCst);
            if attention || self.slots.sweep_is_due(now_ns) {
                for freed in self.slots.end_overdue(now_ns) {
                    self.release(&freed);
                }
                self.admit_submitted();
                self.flush();
                if self.worker.flags.stopping.load(Ordering::SeqCst) {
                    self.fail_all();
                }
                if self.is_done() {
                    self.has_stopped = true;
                    return Ok(());
                }
            }
            match self.runner.next_step(&self.slots) {
                NextStep::Now => self.step(now_ns)?,
                NextStep::At(due_ns) if due_ns <= now_ns => self.step(now_ns)?,
                NextStep::At(due_ns) => self.wait_until(due_ns.min(self.slots.next_sweep_ns())),
                NextStep::Idle => self.wait_until(self.slots.next_sweep_ns()),
            }
        }
    }

    fn is_done(&self) -> bool {
        let flags = &self.worker.flags;
        flags.stopping.load(Ordering::SeqCst)
            || (flags.draining.load(Ordering::SeqCst) && self.slots.is_empty())
    }

    /// Fails all sequences because the server is shutting down.
    fn fail_all(&mut self) {
        for freed in self.slots.fail_all(&Failure::Draining) {
            self.release(&freed);
        }
    }

    /// Sleeps until shortly before `until_ns`, and spins for the rest of the time. Returns early when the worker is
    /// woken.
    fn wait_until(&self, until_ns: u64) {
        loop {
            if self.worker.flags.attention.load(Ordering::SeqCst) {
                return;
            }
            let left = until_ns.saturating_sub(monotonic_ns());
            if left == 0 {
                return;
            }
            if left > SPIN_NS {
                std::thread::park_timeout(Duration::from_nanos(left - SPIN_NS));
            } else {
                std::thread::yield_now();
            }
        }
    }

    fn admit_submitted(&mut self) {
        while let Ok(submission) = self.worker.commands.try_recv() {
            // The scheduler counts submissions to an earlier generation as lost.
            if submission.generation == self.worker.generation {
                self.admit(submission.assignment);
            }
        }
    }

    fn admit(&mut self, assignment: Assignment) {
        let (assignment_id, is_suspect) = (assignment.id, assignment.is_suspect);
        let Some(runnable) = assignment.into_runnable() else {
            return self.report_not_run(assignment_id, is_suspect);
        };
        // The runner's log lines in this call carry the id of this request.
        let assignment = &runnable.assignment;
        let id = assignment.sequence.request_id.0.clone();
        let _span = request_span(&id).entered();
        let sequence = assignment.sequence.clone();
        // If the runner panics in one of the next two calls, this sequence is a crash suspect. The device must
        // therefore own the sequence during both calls.
        self.without_slot = Some(runnable);
        let slot = self.choose_slot(&sequence);
        let runnable = self.without_slot.take();
        let Some((slot, runnable)) = slot.zip(runnable) else {
            tracing::error!("the scheduler assigned a sequence to a worker without a free slot");
            return self.report_not_run(assignment_id, is_suspect);
        };
        self.slots.occupy(slot, runnable);
        let telemetry = &self.worker.options.telemetry;
        telemetry.sequences_running.increment(1.0);
        match self.runner.admit(slot, sequence) {
            Ok(SequenceStart { cached_tokens }) => {
                tracing::debug!(slot = slot.0, cached_tokens, "a sequence starts");
                telemetry.prefix_cache.count_start(cached_tokens);
                if self.slots.accept(slot, cached_tokens) != Some(SendOutcome::Delivered) {
                    self.worker.flags.attention.store(true, Ordering::SeqCst);
                }
            }
            Err(error) => {
                // A token channel carries a failure only after the acceptance.
                let _ = self.slots.accept(slot, 0);
                self.slots.fail(slot, Failure::Model(error));
                telemetry.sequences_running.decrement(1.0);
                self.report_cleared_suspects();
                self.report_released(assignment_id);
            }
        }
        self.record_prefix_cache();
    }

    /// Lets the runner choose among the free slots. If no slot is free, first frees the slots of sequences that were
    /// cancelled since the last sweep.
    fn choose_slot(&mut self, sequence: &Sequence) -> Option<Slot> {
        if self.slots.free().is_empty() {
            for freed in self.slots.end_overdue(monotonic_ns()) {
                self.release(&freed);
            }
        }
        let free = self.slots.free();
        if free.is_empty() {
            return None;
        }
        let slot = self.runner.choose_slot(sequence, free);
        assert!(
            free.contains(&slot),
            "the runner chose slot {}, which is not free",
            slot.0
        );
        Some(slot)
    }

    /// Copies the state of the runner's prefix cache to the metrics.
    fn record_prefix_cache(&mut self) {
        let stats = self.runner.prefix_cache();
        self.prefix_cache.record(stats);
        self.worker.flags.set_prefix_cache(stats);
    }

    fn step(&mut self, started_ns: u64) -> Result<(), StepError> {
        let step_started_ns = &self.worker.flags.step_started_ns;
        step_started_ns.store(started_ns, Ordering::Relaxed);
        self.runner
            .step(&mut Step::new(&self.slots, &mut self.emissions))?;
        step_started_ns.store(0, Ordering::Relaxed);
        let mut emissions = std::mem::take(&mut self.emissions);
        let mut tokens = 0;
        // Emission time of every token for which the runner has set no time.
        let now_ns = monotonic_ns();
        for emission in emissions.drain(..) {
            let freed = match emission {
                Emission::Prompt(slot, token) => self.slots.send_prompt_token(slot, token),
                Emission::Token(slot, token) => {
                    tokens += 1;
                    self.slots.send_token(slot, with_timestamp(token, now_ns))
                }
                Emission::EndOfSequence(slot, token) => {
                    tokens += 1;
                    let token = with_timestamp(token, now_ns);
                    self.slots.finish(slot, Some(token), FinishReason::Stop)
                }
                Emission::Failed(slot, error) => self.slots.fail(slot, Failure::Model(error)),
            };
            if let Some(freed) = freed {
                self.release(&freed);
            }
        }
        self.emissions = emissions;
        self.worker
            .options
            .telemetry
            .tokens_generated
            .increment(tokens);
        self.flush();
        self.report_cleared_suspects();
        Ok(())
    }

    /// Sends the collected tokens to the engine, if the engine is in another process.
    fn flush(&self) {
        if let Some(after_step) = &self.worker.options.after_step {
            after_step();
        }
    }

    /// Reports that an assigned sequence has ended before it got a slot.
    fn report_not_run(&self, assignment: AssignmentId, is_suspect: bool) {
        if is_suspect {
            self.report_suspect_cleared();
        }
        self.report_released(assignment);
    }

    fn report_cleared_suspects(&mut self) {
        for _ in 0..self.slots.take_cleared_suspects() {
            self.report_suspect_cleared();
        }
    }

    fn report_suspect_cleared(&self) {
        self.report(WorkerEvent::SuspectCleared {
            worker: self.worker.options.id,
            generation: self.worker.generation,
        });
    }

    fn release(&mut self, freed: &FreedSlot) {
        // The runner's log lines in this call carry the id of the slot's last request.
        request_span(&freed.request_id.0).in_scope(|| self.runner.release(freed.slot));
        self.record_prefix_cache();
        let telemetry = &self.worker.options.telemetry;
        telemetry.sequences_running.decrement(1.0);
        self.report_cleared_suspects();
        self.report_released(freed.assignment);
    }

    fn report_released(&self, assignment: AssignmentId) {
        self.report(WorkerEvent::Released {
            worker: self.worker.options.id,
            generation: self.worker.generation,
            assignment,
        });
    }

    fn report(&self, event: WorkerEvent) {
        if !self.worker.report(event) {
            // The scheduler has ended, so this worker will get no more sequences.
            self.worker.flags.stopping.store(true, Ordering::SeqCst);
            self.worker.flags.attention.store(true, Ordering::SeqCst);
        }
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        let left = self.slots.count();
        self.worker
            .options
            .telemetry
            .sequences_running
            .decrement(left);
        if !self.has_stopped {
            if let Some(runnable) = self.without_slot.take() {
                runnable.assignment.token_channel.crash();
            }
            self.slots.crash_all();
        }
        self.worker
            .flags
            .step_started_ns
            .store(0, Ordering::Relaxed);
    }
}

/// Creates the tracing span for a call of the runner about one sequence.
fn request_span(id: &str) -> tracing::Span {
    tracing::error_span!(target: REQUEST_SPAN_TARGET, "request", id)
}

fn with_timestamp(mut token: Token, now_ns: u64) -> Token {
    if token.emitted_ns == 0 {
        token.emitted_ns = now_ns;
    }
    token
}
