//! One worker's stream, from its welcome to its end: what it sends goes into lanes, what the scheduler and
//! the lanes say goes to it.
//!
//! It waits for nobody but the worker, and for the worker only as long as its heartbeat timeout.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tonic::{Code, Status, Streaming};

use super::heartbeat::HeartbeatMonitor;
use super::remote_tokenizer::{RemoteModel, TokenizerRequest};
use super::sequences::{Effects, Sequences};
use super::session_end::End;
use super::timeouts::SessionTimeouts;
use super::tokenizer_calls::TokenizerCalls;
use super::{ChildRegistration, Exit, Registration};
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message as Said;
use crate::proto::worker::attach_response::Message;
use crate::runner::monotonic_ns;
use crate::telemetry::Telemetry;
use crate::worker::token_channel::Failure;
use crate::worker::wire::{self, ReadyReport, SequenceId, Violation};
use crate::worker::{Assignment, Flags, Generation, ServedModel, WorkerEvent, WorkerId};

/// A worker that was taken on.
pub(super) struct Session {
    pub(super) worker: WorkerId,
    /// Set where the engine has started it: it is to end with the engine.
    pub(super) child: Option<ChildRegistration>,
    pub(super) seat: Arc<Registration>,
    pub(super) timeouts: SessionTimeouts,
    pub(super) flags: Arc<Flags>,
    /// Rung when a token_channel, or a flag, is to be looked at.
    pub(super) attention: Arc<Notify>,
    pub(super) commands: mpsc::Receiver<(Generation, Assignment)>,
    pub(super) outbound: mpsc::Sender<Result<proto::AttachResponse, Status>>,
    pub(super) events: mpsc::Sender<WorkerEvent>,
    pub(super) telemetry: Telemetry,
}

/// What a worker has while its model is loaded.
struct Running {
    life: Generation,
    sequences: Sequences,
    asked: mpsc::Receiver<TokenizerRequest>,
    questions: TokenizerCalls,
    /// How many sequences the gauge counts.
    counted: f64,
}

/// What is known of the worker's lives so far.
#[derive(Default)]
struct Past {
    /// How many there were.
    lives: u64,
    /// What the worker called the last one, and the number of the last sequence.
    last: SequenceId,
    /// The number of the last question.
    last_question: u64,
}

/// What happened next.
enum Next {
    Said(Said),
    Submit(Generation, Assignment),
    TokenizerRequest(TokenizerRequest),
    Attention,
    /// It is time to look at the clock.
    Alarm,
    End(End),
}

impl Session {
    /// Serves a worker to its end.
    pub(super) async fn run(mut self, mut inbound: Streaming<proto::AttachRequest>) -> End {
        let mut running = None;
        let mut past = Past::default();
        let mut silence = HeartbeatMonitor::new(&self.timeouts, Instant::now());
        // It is set anew only where it is to ring earlier, or has rung: not at every message.
        let mut alarm = pin!(sleep_until(silence.next_look(Instant::now())));
        let mut end = loop {
            if let Some(look) = running.as_ref().and_then(Running::next_look)
                && look < alarm.deadline()
            {
                alarm.as_mut().reset(look);
            }
            let next = self.next(&mut inbound, running.as_mut(), alarm.as_mut());
            let ended = match next.await {
                Next::Said(said) => {
                    silence.broken(Instant::now());
                    self.hear(said, &mut running, &mut past).await
                }
                Next::Submit(of, assignment) => self.submit(of, assignment, running.as_mut()).await,
                Next::TokenizerRequest(asked) => self.ask(asked, running.as_mut()).await,
                Next::Attention => self.attend(running.as_mut()).await,
                Next::Alarm => {
                    let now = Instant::now();
                    let is_silent = silence.is_too_long(alarm.deadline(), now);
                    alarm.as_mut().reset(silence.next_look(now));
                    if is_silent {
                        Err(End::Silent)
                    } else if self.is_idle(running.as_ref()) {
                        Err(End::Idle)
                    } else if running.as_ref().is_some_and(Running::owes_an_answer) {
                        Err(End::Unanswered)
                    } else {
                        self.attend(running.as_mut()).await
                    }
                }
                Next::End(end) => Err(end),
            };
            if let Err(end) = ended {
                break end;
            }
        };
        if let Some(mut running) = running {
            let has_crashed = match &mut end {
                End::Stuck => true,
                End::Gone(how) => self.has_crashed(how).await,
                End::Stopped
                | End::Silent
                | End::Idle
                | End::Unanswered
                | End::Broke(_)
                | End::Panicked => false,
            };
            if has_crashed {
                running.sequences.crash_all();
            }
            self.forget(&running);
        }
        end
    }

    /// Whether a worker whose stream is gone has crashed: the process of a child has ended or is about to, and says why
    /// better than the stream.
    async fn has_crashed(&mut self, how: &mut String) -> bool {
        let Some(child) = &mut self.child else {
            return false;
        };
        let Some(ended) = child.ended().await else {
            return false;
        };
        *how = ended.reason;
        ended.kind == Exit::Crashed
    }

    async fn next(
        &mut self,
        inbound: &mut Streaming<proto::AttachRequest>,
        running: Option<&mut Running>,
        alarm: Pin<&mut Sleep>,
    ) -> Next {
        let questions = async {
            match running {
                Some(running) if running.questions.has_room() => running.asked.recv().await,
                Some(_) | None => std::future::pending().await,
            }
        };
        tokio::select! {
            said = inbound.message() => match said {
                // tonic says so of a message that is too large.
                Err(status) if status.code() == Code::OutOfRange => {
                    Next::End(broke(status.message()))
                }
                Err(status) => Next::End(End::Gone(format!("its stream broke: {}", status.message()))),
                Ok(None) => Next::End(End::Gone("it ended its stream".to_owned())),
                Ok(Some(proto::AttachRequest { message: None })) => Next::Attention,
                Ok(Some(proto::AttachRequest { message: Some(said) })) => Next::Said(said),
            },
            command = self.commands.recv() => match command {
                Some((life, assignment)) => Next::Submit(life, assignment),
                None => Next::End(End::Stopped),
            },
            Some(asked) = questions => Next::TokenizerRequest(asked),
            () = self.attention.notified() => Next::Attention,
            () = alarm => Next::Alarm,
        }
    }

    /// Whether the worker has left a sequence neither accepted nor refused for too long.
    fn is_idle(&self, running: Option<&Running>) -> bool {
        let since = running.and_then(|running| running.sequences.waits_since_ns());
        since
            .zip(self.timeouts.acceptance_timeout)
            .is_some_and(|(since, limit)| {
                u128::from(monotonic_ns().saturating_sub(since)) > limit.as_nanos()
            })
    }

    async fn hear(
        &mut self,
        said: Said,
        running: &mut Option<Running>,
        past: &mut Past,
    ) -> Result<(), End> {
        match (said, running.as_mut()) {
            (Said::Hello(_), _) => Err(broke("hello comes once")),
            (Said::Heartbeat(proto::Heartbeat { step_ms }), _) => {
                let lasts = Duration::from_millis(step_ms.into());
                let limit = self.timeouts.step_limit;
                if limit.is_some_and(|limit| lasts > limit) {
                    return Err(End::Stuck);
                }
                Ok(())
            }
            (Said::Loading(proto::Loading { fraction }), None) => {
                let fraction = if fraction.is_finite() { fraction } else { 0.0 };
                // Progress is for the eye: where nobody keeps up, the next one says more.
                let event = WorkerEvent::Loading(self.worker, fraction.clamp(0.0, 1.0));
                let _ = self.events.try_send(event);
                Ok(())
            }
            (Said::Ready(ready), None) => {
                let offer = wire::offer(ready, &self.seat.name).map_err(End::Broke)?;
                if offer.life <= past.last.life {
                    return Err(broke("ready.life must be higher than the one before"));
                }
                past.lives += 1;
                past.last.life = offer.life;
                *running = Some(self.begin(offer, past).await?);
                Ok(())
            }
            (Said::LoadFailed(proto::LoadFailed { reason }), None) => {
                let reason = wire::cut(&reason);
                self.tell(WorkerEvent::LoadFailed(self.worker, reason))
                    .await
            }
            (Said::Crashed(proto::Crashed { reason }), Some(crashed)) => {
                crashed.sequences.crash_all();
                past.last.number = crashed.sequences.last_number();
                past.last_question = crashed.questions.last_number();
                self.forget(crashed);
                *running = None;
                self.telemetry.workers_lost.increment(1);
                let reason = wire::cut(&reason);
                self.tell(WorkerEvent::Lost(self.worker, reason)).await
            }
            (Said::Accepted(proto::Accepted { sequence }), Some(running)) => {
                running.sequences.accepted(sequence);
                Ok(())
            }
            (Said::Refused(refused), Some(running)) => {
                running.sequences.refused(refused);
                self.settle(running).await
            }
            (Said::Step(step), Some(running)) => {
                running
                    .sequences
                    .step(step, monotonic_ns())
                    .map_err(End::Broke)?;
                self.settle(running).await
            }
            (Said::Answer(answer), Some(running)) => {
                running.questions.answer(answer).map_err(End::Broke)
            }
            (Said::Ready(_) | Said::Loading(_) | Said::LoadFailed(_), Some(_)) => {
                Err(broke("ready comes once, and again only after crashed"))
            }
            (
                Said::Accepted(_)
                | Said::Refused(_)
                | Said::Step(_)
                | Said::Answer(_)
                | Said::Crashed(_),
                None,
            ) => Err(broke("ready comes before anything about sequences")),
        }
    }

    /// The worker has loaded its model.
    async fn begin(&self, offer: ReadyReport, past: &Past) -> Result<Running, End> {
        self.seat.agree(&offer).map_err(End::Broke)?;
        let ReadyReport { facts, slots, .. } = offer;
        let life = Generation(past.lives);
        let slow_reader_ns =
            u64::try_from(self.seat.slow_reader_timeout.as_nanos()).unwrap_or(u64::MAX);
        let vocabulary_size = facts.vocabulary_size;
        let model = Arc::new(RemoteModel {
            facts,
            interpreters: Arc::clone(&self.seat.interpreters),
            patience: self.timeouts.tokenizer_call_timeout,
        });
        let running = Running {
            life,
            sequences: Sequences::new(slots, slow_reader_ns, past.last).of(vocabulary_size),
            asked: self.seat.interpreters.add(self.worker),
            questions: TokenizerCalls::new(
                vocabulary_size,
                past.last_question,
                self.timeouts.unresponsive_timeout,
            ),
            counted: 0.0,
        };
        if let Some(child) = &self.child {
            child.watch.is_ready();
        }
        let served = ServedModel { model, slots };
        self.tell(WorkerEvent::Ready(self.worker, life, served))
            .await?;
        Ok(running)
    }

    async fn submit(
        &self,
        life: Generation,
        assignment: Assignment,
        running: Option<&mut Running>,
    ) -> Result<(), End> {
        // What was sent to an earlier life was counted against slots that are gone: it is lost.
        let Some(running) = running.filter(|running| running.life == life) else {
            return Ok(());
        };
        if let Some(submit) = running.sequences.submit(assignment) {
            self.send(Message::Submit(submit)).await?;
        }
        self.settle(running).await
    }

    async fn ask(&self, asked: TokenizerRequest, running: Option<&mut Running>) -> Result<(), End> {
        let Some(running) = running else {
            return Ok(());
        };
        let question = running.questions.ask(asked);
        self.send(Message::Question(question)).await
    }

    /// Looks at the flags and the lanes.
    async fn attend(&self, running: Option<&mut Running>) -> Result<(), End> {
        self.flags.attention.store(false, Ordering::SeqCst);
        let is_stopping = self.flags.stopping.load(Ordering::SeqCst);
        if let Some(running) = running {
            running.sequences.look(monotonic_ns());
            if is_stopping {
                running.sequences.fail_all(&Failure::Draining);
            }
            self.settle(running).await?;
        }
        if is_stopping {
            // Any other dials again, and finds the engine that comes next.
            if self.child.is_some() {
                let _ = self.send(Message::Drain(proto::Drain {})).await;
            }
            return Err(End::Stopped);
        }
        Ok(())
    }

    /// Tells what has come of the last change.
    async fn settle(&self, running: &mut Running) -> Result<(), End> {
        let Effects {
            grants,
            cancelled,
            released,
            cleared,
            tokens,
        } = running.sequences.take_effects();
        self.telemetry.tokens.increment(tokens);
        let count = running.sequences.count();
        let more = count - std::mem::replace(&mut running.counted, count);
        if more != 0.0 {
            self.telemetry.sequences_running.increment(more);
        }
        for _ in 0..cleared {
            self.tell(WorkerEvent::SuspectCleared(self.worker, running.life))
                .await?;
        }
        if !cancelled.is_empty() {
            let sequences = cancelled;
            self.send(Message::Cancel(proto::Cancel { sequences }))
                .await?;
        }
        for max_tokens in released {
            let event = WorkerEvent::Released(self.worker, running.life, max_tokens);
            self.tell(event).await?;
        }
        if !grants.is_empty() {
            self.send(Message::Credit(proto::Credit { grants })).await?;
        }
        Ok(())
    }

    /// Nothing more is asked of a life that is over.
    fn forget(&self, running: &Running) {
        self.seat.interpreters.remove(self.worker);
        self.telemetry.sequences_running.decrement(running.counted);
    }

    async fn send(&self, message: Message) -> Result<(), End> {
        let message = Some(message);
        let sent = self.outbound.send(Ok(proto::AttachResponse { message }));
        match timeout(self.timeouts.heartbeat_timeout, sent).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Gone("its stream broke".to_owned())),
            // It does not read what it is sent.
            Err(_) => Err(End::Silent),
        }
    }

    async fn tell(&self, event: WorkerEvent) -> Result<(), End> {
        // The scheduler takes events without ever waiting for a worker.
        let told = self.events.send(event).await;
        told.map_err(|_| End::Stopped)
    }
}

impl Running {
    /// Whether a question has been open for too long.
    fn owes_an_answer(&self) -> bool {
        self.questions
            .due()
            .is_some_and(|due| due <= Instant::now())
    }

    /// When the clock is to be looked at for a sequence or a question; `None` is not before everything else.
    fn next_look(&self) -> Option<Instant> {
        let looks = [self.next_look_at_sequences(), self.questions.due()];
        looks.into_iter().flatten().min()
    }

    fn next_look_at_sequences(&self) -> Option<Instant> {
        let at_ns = self.sequences.next_look_ns();
        if at_ns == u64::MAX {
            return None;
        }
        let left_ns = at_ns.saturating_sub(monotonic_ns());
        Instant::now().checked_add(Duration::from_nanos(left_ns))
    }
}

fn broke(rule: &str) -> End {
    End::Broke(Violation(rule.to_owned()))
}
