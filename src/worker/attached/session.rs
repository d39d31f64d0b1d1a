//! The session of one worker, from its `welcome` to its end. It forwards the worker's tokens to their token channels.
//! It sends submissions, credit, cancellations and tokenizer calls to the worker.
//!
//! A session waits only for its worker, and never longer than the heartbeat timeout.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tonic::{Code, Status, Streaming};

use self::loaded_state::{LoadedState, SessionHistory};
use super::heartbeat::HeartbeatMonitor;
use super::registration::{ChildRegistration, ExitKind, Registration};
use super::remote_tokenizer::TokenizerCall;
use super::sequences::Effects;
use super::session_end::SessionEnd;
use super::timeouts::SessionTimeouts;
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message as WorkerMessage;
use crate::proto::worker::attach_response::Message as EngineMessage;
use crate::runner::monotonic_ns;
use crate::telemetry::Telemetry;
use crate::worker::token_channel::Failure;
use crate::worker::wire::Violation;
use crate::worker::{Flags, Submission, WorkerEvent, WorkerId};

mod loaded_state;
mod messages;

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
    TokenizerCall(TokenizerCall),
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
                    heartbeat.record_message(Instant::now());
                    self.handle_message(message, &mut loaded, &mut history)
                        .await
                }
                SessionEvent::Submit(submission) => self.submit(submission, loaded.as_mut()).await,
                SessionEvent::TokenizerCall(request) => {
                    self.call_tokenizer(request, loaded.as_mut()).await
                }
                SessionEvent::Woken => self.handle_wake(loaded.as_mut()).await,
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
                        self.handle_wake(loaded.as_mut()).await
                    }
                }
                SessionEvent::End(end) => Err(end),
            };
            if let Err(end) = result {
                break end;
            }
        };
        if let Some(mut loaded) = loaded {
            let check_exit_for_crash = match &mut end {
                SessionEnd::StepTimeout => true,
                SessionEnd::Disconnected(reason) => self.check_exit_for_crash(reason).await,
                SessionEnd::Stopped
                | SessionEnd::HeartbeatTimeout
                | SessionEnd::AcceptanceTimeout
                | SessionEnd::Unresponsive
                | SessionEnd::Violation(_)
                | SessionEnd::Panicked => false,
            };
            if check_exit_for_crash {
                loaded.sequences.crash_all();
            }
            self.end_generation(&loaded);
        }
        end
    }

    /// Returns true if a worker whose stream has ended has crashed. Only the exit status of a child's process shows a
    /// crash. The description of the exit then replaces `reason`, which is less precise.
    async fn check_exit_for_crash(&mut self, reason: &mut String) -> bool {
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
                    let violation = Violation(status.message().to_owned());
                    SessionEvent::End(SessionEnd::Violation(violation))
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
        request: TokenizerCall,
        loaded: Option<&mut LoadedState>,
    ) -> Result<(), SessionEnd> {
        let Some(loaded) = loaded else {
            return Ok(());
        };
        let question = loaded.calls.open(request);
        self.send(EngineMessage::Question(question)).await
    }

    /// Checks the flags of the worker's handle, and sweeps the sequences.
    async fn handle_wake(&self, loaded: Option<&mut LoadedState>) -> Result<(), SessionEnd> {
        self.flags.attention.store(false, Ordering::SeqCst);
        let is_stopping = self.flags.stopping.load(Ordering::SeqCst);
        if let Some(loaded) = loaded {
            loaded
                .sequences
                .end_overdue_and_grant_credit(monotonic_ns());
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
            cached_tokens,
        } = loaded.sequences.take_effects();
        self.telemetry.tokens_generated.increment(tokens);
        for cached_tokens in cached_tokens {
            self.telemetry.prefix_cache.count_start(cached_tokens);
        }
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
        for assignment in released {
            let event = WorkerEvent::Released {
                worker: self.worker,
                generation: loaded.generation,
                assignment,
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
