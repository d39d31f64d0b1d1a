//! The messages that a session receives from its worker, and the start and the crash of a generation.

use std::sync::Arc;
use std::time::Duration;

use super::Session;
use super::loaded_state::{LoadedState, SessionHistory};
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message as WorkerMessage;
use crate::runner::{PrefixCacheStats, monotonic_ns};
use crate::worker::attached::remote_tokenizer::RemoteModel;
use crate::worker::attached::sequences::Sequences;
use crate::worker::attached::session_end::SessionEnd;
use crate::worker::attached::tokenizer_calls::TokenizerCalls;
use crate::worker::wire::{self, ReadyReport, Violation};
use crate::worker::{Generation, ServedModel, WorkerEvent};

impl Session {
    /// Handles one message of the worker. `loaded` is the state of the current generation, if there is one.
    pub(super) async fn handle_message(
        &mut self,
        message: WorkerMessage,
        loaded: &mut Option<LoadedState>,
        history: &mut SessionHistory,
    ) -> Result<(), SessionEnd> {
        match (message, loaded.as_mut()) {
            (WorkerMessage::Heartbeat(heartbeat), loaded) => {
                self.handle_heartbeat(heartbeat, loaded)
            }
            (WorkerMessage::Loading(proto::Loading { fraction }), None) => {
                let fraction = if fraction.is_finite() { fraction } else { 0.0 };
                // Progress is only informative. If the queue is full, this report is dropped and the next one
                // replaces it.
                let event = WorkerEvent::Loading {
                    worker: self.worker,
                    fraction: fraction.clamp(0.0, 1.0),
                };
                let _ = self.events.try_send(event);
                Ok(())
            }
            (WorkerMessage::Ready(ready), None) => {
                *loaded = Some(self.handle_ready(ready, history).await?);
                Ok(())
            }
            (WorkerMessage::LoadFailed(proto::LoadFailed { reason }), None) => {
                let reason = wire::sanitize(&reason);
                self.report(WorkerEvent::LoadFailed {
                    worker: self.worker,
                    reason,
                })
                .await
            }
            (WorkerMessage::Crashed(proto::Crashed { reason }), Some(crashed)) => {
                self.handle_crash(crashed, history);
                *loaded = None;
                let reason = wire::sanitize(&reason);
                self.report(WorkerEvent::Lost {
                    worker: self.worker,
                    reason,
                })
                .await
            }
            (WorkerMessage::Accepted(accepted), Some(loaded)) => {
                loaded
                    .sequences
                    .handle_accepted(accepted)
                    .map_err(SessionEnd::Violation)?;
                self.apply_effects(loaded).await
            }
            (WorkerMessage::Refused(refused), Some(loaded)) => {
                loaded.sequences.handle_refused(refused);
                self.apply_effects(loaded).await
            }
            (WorkerMessage::Step(step), Some(loaded)) => {
                loaded
                    .sequences
                    .handle_step(step, monotonic_ns())
                    .map_err(SessionEnd::Violation)?;
                self.apply_effects(loaded).await
            }
            (WorkerMessage::Answer(answer), Some(loaded)) => {
                loaded.calls.close(answer).map_err(SessionEnd::Violation)
            }
            (message, loaded) => Err(violation(out_of_order(&message, loaded.is_some()))),
        }
    }

    /// Records the state of the worker's prefix cache, and checks the duration of its current step.
    fn handle_heartbeat(
        &self,
        heartbeat: proto::Heartbeat,
        loaded: Option<&mut LoadedState>,
    ) -> Result<(), SessionEnd> {
        if let (Some(loaded), Some(stats)) = (loaded, heartbeat.prefix_cache) {
            let proto::PrefixCache { bytes, evictions } = stats;
            let stats = PrefixCacheStats { bytes, evictions };
            loaded.prefix_cache.record(stats);
        }
        let step = Duration::from_millis(heartbeat.step_ms.into());
        match self.timeouts.step_limit {
            Some(limit) if step > limit => Err(SessionEnd::StepTimeout),
            _ => Ok(()),
        }
    }

    /// Checks a worker's `ready`, and starts the next generation.
    async fn handle_ready(
        &self,
        ready: proto::Ready,
        history: &mut SessionHistory,
    ) -> Result<LoadedState, SessionEnd> {
        let ready =
            wire::ready_report(ready, &self.registration.name).map_err(SessionEnd::Violation)?;
        if ready.generation <= history.last.generation {
            return Err(violation(
                "ready.generation must be higher than in the previous ready",
            ));
        }
        history.generations += 1;
        history.last.generation = ready.generation;
        self.start_generation(ready, history).await
    }

    /// Ends the current generation because the worker's device has crashed.
    fn handle_crash(&self, crashed: &mut LoadedState, history: &mut SessionHistory) {
        crashed.sequences.crash_all();
        history.last.number = crashed.sequences.last_number();
        history.last_call = crashed.calls.last_number();
        self.end_generation(crashed);
        self.telemetry.workers_lost.increment(1);
    }

    /// Starts a generation, after the worker has loaded its model.
    async fn start_generation(
        &self,
        ready: ReadyReport,
        history: &SessionHistory,
    ) -> Result<LoadedState, SessionEnd> {
        self.registration
            .check_facts(&ready)
            .map_err(SessionEnd::Violation)?;
        let ReadyReport { facts, slots, .. } = ready;
        let generation = Generation(history.generations);
        let slow_reader_ns =
            u64::try_from(self.registration.slow_reader_timeout.as_nanos()).unwrap_or(u64::MAX);
        let vocabulary_size = facts.vocabulary_size;
        let model = Arc::new(RemoteModel {
            facts,
            tokenizers: Arc::clone(&self.registration.tokenizers),
            call_timeout: self.timeouts.tokenizer_call_timeout,
        });
        let loaded = LoadedState {
            generation,
            sequences: Sequences::new(slots, slow_reader_ns, history.last)
                .with_vocabulary(vocabulary_size),
            call_requests: self.registration.tokenizers.add(self.worker),
            calls: TokenizerCalls::new(
                vocabulary_size,
                history.last_call,
                self.timeouts.unresponsive_timeout,
            ),
            counted: 0.0,
            prefix_cache: self.telemetry.prefix_cache.meter(),
        };
        if let Some(child) = &self.child {
            child.state.set_ready();
        }
        let served = ServedModel { model, slots };
        self.report(WorkerEvent::Ready {
            worker: self.worker,
            generation,
            served,
        })
        .await?;
        Ok(loaded)
    }
}

/// Returns the rule that a message violates because it comes too early or too late.
fn out_of_order(message: &WorkerMessage, is_loaded: bool) -> &'static str {
    match (message, is_loaded) {
        (WorkerMessage::Hello(_), _) => "hello must be sent only once",
        (_, true) => "loading, ready and load_failed must be sent before ready or after crashed",
        (_, false) => "accepted, refused, step, answer and crashed must be sent after ready",
    }
}

fn violation(rule: &str) -> SessionEnd {
    SessionEnd::Violation(Violation(rule.to_owned()))
}
