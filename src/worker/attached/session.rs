//! The session of one worker, from its `welcome` to its end. It forwards the worker's tokens to their token channels.
//! It sends submissions, credit, cancellations and tokenizer calls to the worker.
//!
//! A session waits only for its worker, and never longer than the heartbeat timeout.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tonic::{Code, Status, Streaming};

use self::loaded_state::{LoadedState, SessionHistory};
use super::heartbeat::HeartbeatMonitor;
use super::remote_tokenizer::{RemoteModel, TokenizerRequest};
use super::sequences::{Effects, Sequences};
use super::session_end::SessionEnd;
use super::timeouts::SessionTimeouts;
use super::tokenizer_calls::TokenizerCalls;
use super::{ChildRegistration, ExitKind, Registration};
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message as WorkerMessage;
use crate::proto::worker::attach_response::Message as EngineMessage;
use crate::runner::monotonic_ns;
use crate::telemetry::Telemetry;
use crate::worker::token_channel::Failure;
use crate::worker::wire::{self, ReadyReport, Violation};
use crate::worker::{Flags, Generation, ServedModel, Submission, WorkerEvent, WorkerId};

mod loaded_state;

/// The session of an accepted worker.
pub(super) struct Session {
    pub(super) worker: WorkerId,
    /// The child worker's registration. `None` if the engine did not start the worker.
    pub(super) child: Option<ChildRegistration>,
    pub(super) registration: Arc<Registration>,
    pub(super) timeouts: SessionTimeouts,
    pub(super) flags: Arc<Flags>,
    /// Notified when a token channel or a flag has changed.
    pub(super) wake: Arc<Notify>,
    pub(super) commands: mpsc::Receiver<Submission>,
    pub(super) outbound: mpsc::Sender<Result<proto::AttachResponse, Status>>,
    pub(super) events: mpsc::Sender<WorkerEvent>,
    pub(super) telemetry: Telemetry,
}

/// The next event of a session.
enum SessionEvent {
    Message(WorkerMessage),
    Submit(Submission),
    TokenizerCall(TokenizerRequest),
    Woken,
    /// The timer has fired.
    Timer,
    End(SessionEnd),
}

impl Session {
    /// Runs the session to its end.
    pub(super) async fn run(mut self, mut inbound: Streaming<proto::AttachRequest>) -> SessionEnd {
        let mut loaded = None;
        let mut history = SessionHistory::default();
        let mut heartbeat = HeartbeatMonitor::new(&self.timeouts, Instant::now());
        // Resetting the timer at each message would be costly. It is reset only after it has fired, or when it must
        // fire earlier.
        let mut timer = pin!(sleep_until(heartbeat.next_check(Instant::now())));
        let mut end = loop {
            if let Some(check) = loaded.as_ref().and_then(LoadedState::next_check)
                && check < timer.deadline()
            {
                timer.as_mut().reset(check);
            }
            let event = self.next_event(&mut inbound, loaded.as_mut(), timer.as_mut());
            let result = match event.await {
                SessionEvent::Message(message) => {
                    heartbeat.message_received(Instant::now());
                    self.handle_message(message, &mut loaded, &mut history)
                        .await
                }
                SessionEvent::Submit(submission) => self.submit(submission, loaded.as_mut()).await,
                SessionEvent::TokenizerCall(request) => {
                    self.call_tokenizer(request, loaded.as_mut()).await
                }
                SessionEvent::Woken => self.sweep(loaded.as_mut()).await,
                SessionEvent::Timer => {
                    let now = Instant::now();
                    let has_expired = heartbeat.has_expired(timer.deadline(), now);
                    timer.as_mut().reset(heartbeat.next_check(now));
                    if has_expired {
                        Err(SessionEnd::HeartbeatTimeout)
                    } else if self.acceptance_is_overdue(loaded.as_ref()) {
                        Err(SessionEnd::AcceptanceTimeout)
                    } else if loaded.as_ref().is_some_and(LoadedState::is_unresponsive) {
                        Err(SessionEnd::Unresponsive)
                    } else {
                        self.sweep(loaded.as_mut()).await
                    }
                }
                SessionEvent::End(end) => Err(end),
            };
            if let Err(end) = result {
                break end;
            }
        };
        if let Some(mut loaded) = loaded {
            let has_crashed = match &mut end {
                SessionEnd::StepTimeout => true,
                SessionEnd::Disconnected(reason) => self.has_crashed(reason).await,
                SessionEnd::Stopped
                | SessionEnd::HeartbeatTimeout
                | SessionEnd::AcceptanceTimeout
                | SessionEnd::Unresponsive
                | SessionEnd::Violation(_)
                | SessionEnd::Panicked => false,
            };
            if has_crashed {
                loaded.sequences.crash_all();
            }
            self.end_generation(&loaded);
        }
        end
    }

    /// Returns true if a worker whose stream has ended has crashed. Only the exit status of a child's process shows a
    /// crash. The description of the exit then replaces `reason`, which is less precise.
    async fn has_crashed(&mut self, reason: &mut String) -> bool {
        let Some(child) = &mut self.child else {
            return false;
        };
        let Some(exit) = child.wait_for_exit().await else {
            return false;
        };
        *reason = exit.reason;
        exit.kind == ExitKind::Crashed
    }

    async fn next_event(
        &mut self,
        inbound: &mut Streaming<proto::AttachRequest>,
        loaded: Option<&mut LoadedState>,
        timer: Pin<&mut Sleep>,
    ) -> SessionEvent {
        let call_request = async {
            match loaded {
                Some(loaded) if loaded.calls.has_room() => loaded.call_requests.recv().await,
                Some(_) | None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = inbound.message() => match message {
                // tonic returns this code for a message above the size limit.
                Err(status) if status.code() == Code::OutOfRange => {
                    SessionEvent::End(violation(status.message()))
                }
                Err(status) => {
                    let reason = format!("the worker's stream broke: {}", status.message());
                    SessionEvent::End(SessionEnd::Disconnected(reason))
                }
                Ok(None) => {
                    SessionEvent::End(SessionEnd::Disconnected("the worker ended its stream".to_owned()))
                }
                // A message of a later protocol version.
                Ok(Some(proto::AttachRequest { message: None })) => SessionEvent::Woken,
                Ok(Some(proto::AttachRequest { message: Some(message) })) => {
                    SessionEvent::Message(message)
                }
            },
            command = self.commands.recv() => match command {
                Some(submission) => SessionEvent::Submit(submission),
                None => SessionEvent::End(SessionEnd::Stopped),
            },
            Some(request) = call_request => SessionEvent::TokenizerCall(request),
            () = self.wake.notified() => SessionEvent::Woken,
            () = timer => SessionEvent::Timer,
        }
    }

    /// Returns true if the worker has left a sequence neither accepted nor rejected for too long.
    fn acceptance_is_overdue(&self, loaded: Option<&LoadedState>) -> bool {
        let since = loaded.and_then(|loaded| loaded.sequences.oldest_unaccepted_ns());
        since
            .zip(self.timeouts.acceptance_timeout)
            .is_some_and(|(since, limit)| {
                u128::from(monotonic_ns().saturating_sub(since)) > limit.as_nanos()
            })
    }

    async fn handle_message(
        &mut self,
        message: WorkerMessage,
        loaded: &mut Option<LoadedState>,
        history: &mut SessionHistory,
    ) -> Result<(), SessionEnd> {
        match (message, loaded.as_mut()) {
            (WorkerMessage::Hello(_), _) => Err(violation("hello must be sent only once")),
            (WorkerMessage::Heartbeat(proto::Heartbeat { step_ms }), _) => {
                let step = Duration::from_millis(step_ms.into());
                let limit = self.timeouts.step_limit;
                if limit.is_some_and(|limit| step > limit) {
                    return Err(SessionEnd::StepTimeout);
                }
                Ok(())
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
                let ready = wire::ready_report(ready, &self.registration.name)
                    .map_err(SessionEnd::Violation)?;
                if ready.generation <= history.last.generation {
                    return Err(violation(
                        "ready.generation must be higher than in the previous ready",
                    ));
                }
                history.generations += 1;
                history.last.generation = ready.generation;
                *loaded = Some(self.start_generation(ready, history).await?);
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
                crashed.sequences.crash_all();
                history.last.number = crashed.sequences.last_number();
                history.last_call = crashed.calls.last_number();
                self.end_generation(crashed);
                *loaded = None;
                self.telemetry.workers_lost.increment(1);
                let reason = wire::sanitize(&reason);
                self.report(WorkerEvent::Lost {
                    worker: self.worker,
                    reason,
                })
                .await
            }
            (WorkerMessage::Accepted(proto::Accepted { sequence }), Some(loaded)) => {
                loaded.sequences.accepted(sequence);
                Ok(())
            }
            (WorkerMessage::Refused(refused), Some(loaded)) => {
                loaded.sequences.refused(refused);
                self.apply_effects(loaded).await
            }
            (WorkerMessage::Step(step), Some(loaded)) => {
                loaded
                    .sequences
                    .step(step, monotonic_ns())
                    .map_err(SessionEnd::Violation)?;
                self.apply_effects(loaded).await
            }
            (WorkerMessage::Answer(answer), Some(loaded)) => {
                loaded.calls.close(answer).map_err(SessionEnd::Violation)
            }
            (
                WorkerMessage::Ready(_) | WorkerMessage::Loading(_) | WorkerMessage::LoadFailed(_),
                Some(_),
            ) => Err(violation(
                "loading, ready and load_failed must be sent before ready or after crashed",
            )),
            (
                WorkerMessage::Accepted(_)
                | WorkerMessage::Refused(_)
                | WorkerMessage::Step(_)
                | WorkerMessage::Answer(_)
                | WorkerMessage::Crashed(_),
                None,
            ) => Err(violation(
                "accepted, refused, step, answer and crashed must be sent after ready",
            )),
        }
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

    async fn submit(
        &self,
        submission: Submission,
        loaded: Option<&mut LoadedState>,
    ) -> Result<(), SessionEnd> {
        let Submission {
            generation,
            assignment,
        } = submission;
        // The scheduler counts submissions to an earlier generation as lost.
        let Some(loaded) = loaded.filter(|loaded| loaded.generation == generation) else {
            return Ok(());
        };
        if let Some(submit) = loaded.sequences.submit(assignment) {
            self.send(EngineMessage::Submit(submit)).await?;
        }
        self.apply_effects(loaded).await
    }

    async fn call_tokenizer(
        &self,
        request: TokenizerRequest,
        loaded: Option<&mut LoadedState>,
    ) -> Result<(), SessionEnd> {
        let Some(loaded) = loaded else {
            return Ok(());
        };
        let question = loaded.calls.open(request);
        self.send(EngineMessage::Question(question)).await
    }

    /// Checks the flags of the worker's handle, and sweeps the sequences.
    async fn sweep(&self, loaded: Option<&mut LoadedState>) -> Result<(), SessionEnd> {
        self.flags.attention.store(false, Ordering::SeqCst);
        let is_stopping = self.flags.stopping.load(Ordering::SeqCst);
        if let Some(loaded) = loaded {
            loaded.sequences.sweep(monotonic_ns());
            if is_stopping {
                loaded.sequences.fail_all(&Failure::Draining);
            }
            self.apply_effects(loaded).await?;
        }
        if is_stopping {
            // When the engine stops, only a child worker stops with it. Any other worker reconnects to the next
            // engine.
            if self.child.is_some() {
                let _ = self.send(EngineMessage::Drain(proto::Drain {})).await;
            }
            return Err(SessionEnd::Stopped);
        }
        Ok(())
    }

    /// Applies the effects of the last change: sends messages to the worker, reports to the scheduler and updates the
    /// metrics.
    async fn apply_effects(&self, loaded: &mut LoadedState) -> Result<(), SessionEnd> {
        let Effects {
            grants,
            cancelled,
            released,
            cleared,
            tokens,
        } = loaded.sequences.take_effects();
        self.telemetry.tokens_generated.increment(tokens);
        let count = loaded.sequences.count();
        let change = count - std::mem::replace(&mut loaded.counted, count);
        if change != 0.0 {
            self.telemetry.sequences_running.increment(change);
        }
        for _ in 0..cleared {
            self.report(WorkerEvent::SuspectCleared {
                worker: self.worker,
                generation: loaded.generation,
            })
            .await?;
        }
        if !cancelled.is_empty() {
            let sequences = cancelled;
            self.send(EngineMessage::Cancel(proto::Cancel { sequences }))
                .await?;
        }
        for max_tokens in released {
            let event = WorkerEvent::Released {
                worker: self.worker,
                generation: loaded.generation,
                max_tokens,
            };
            self.report(event).await?;
        }
        if !grants.is_empty() {
            self.send(EngineMessage::Credit(proto::Credit { grants }))
                .await?;
        }
        Ok(())
    }

    /// Ends a generation: the worker gets no more tokenizer calls, and the gauge no longer counts its sequences.
    fn end_generation(&self, loaded: &LoadedState) {
        self.registration.tokenizers.remove(self.worker);
        self.telemetry.sequences_running.decrement(loaded.counted);
    }

    async fn send(&self, message: EngineMessage) -> Result<(), SessionEnd> {
        let message = Some(message);
        let sent = self.outbound.send(Ok(proto::AttachResponse { message }));
        match timeout(self.timeouts.heartbeat_timeout, sent).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(SessionEnd::Disconnected(
                "the worker's stream broke".to_owned(),
            )),
            // The queue of messages is full, so the worker has stopped reading.
            Err(_) => Err(SessionEnd::HeartbeatTimeout),
        }
    }

    async fn report(&self, event: WorkerEvent) -> Result<(), SessionEnd> {
        // This does not block for long: the scheduler never waits for a worker while it receives events.
        let sent = self.events.send(event).await;
        sent.map_err(|_| SessionEnd::Stopped)
    }
}

fn violation(rule: &str) -> SessionEnd {
    SessionEnd::Violation(Violation(rule.to_owned()))
}
