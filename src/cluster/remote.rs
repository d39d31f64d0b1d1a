//! Engines elsewhere: connections to them, whether they are up, and reading their streams.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tower::ServiceExt;

use super::engine::{EngineChannel, InFlightGuard};
use super::events::ReadAhead;
use crate::critical::CriticalTasks;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::proto::v1::inference_client::InferenceClient;

/// How many connections go to each engine: one would have all streams wait for one socket.
const CONNECTIONS_PER_ENGINE: usize = 2;

/// How many events of a stream are read ahead of its reader, and how many tokens they hold together.
const READ_AHEAD_EVENTS: usize = 64;
const READ_AHEAD_TOKENS: u32 = 256;

/// h2 counts unread small frames, such as tokens, against its connection and kills it when half the
/// connection's window is spent. A large window makes that budget larger than what can lie unread;
/// small ones for the streams keep that little.
const CONNECTION_WINDOW: u32 = 1 << 30;
const STREAM_WINDOW: u32 = 64 * 1024;

/// How many streams that were given up a connection remembers at once: for what an engine still sends on
/// these, nobody has to be told.
const REMEMBERED_RESET_STREAMS: usize = 10_000;

/// How long the trailers of a stream may take that has said its last.
const TRAILERS_TIMEOUT: Duration = Duration::from_secs(1);

/// A peer that has hung is noticed within a second.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);

/// How long an engine that comes up may take to list its models.
const LIST_MODELS_TIMEOUT: Duration = Duration::from_secs(1);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long to wait before an engine that is down is asked again.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// What is known of an engine, as it changes.
#[derive(Clone)]
pub(super) struct Health {
    state: watch::Receiver<State>,
    /// Its models, as it listed them when it last came up.
    models: watch::Receiver<Vec<v1::Model>>,
}

/// Whether an engine takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It has not answered yet: it is worth asking.
    Unknown,
    Up,
    Down,
}

impl Health {
    /// The health of the engine of this process, which says itself what it cannot do.
    pub(super) fn always() -> Self {
        Self {
            state: watch::channel(State::Up).1,
            models: watch::channel(Vec::new()).1,
        }
    }

    /// That of an engine that is down, and had these models when it was up.
    #[cfg(test)]
    pub(super) fn down(models: Vec<v1::Model>) -> Self {
        Self {
            state: watch::channel(State::Down).1,
            models: watch::channel(models).1,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        *self.state.borrow() != State::Down
    }

    /// Waits until the engine has said that it takes requests.
    pub(super) async fn up(mut self) {
        // Nobody watches any more once the server ends: then there is nothing to wait for either.
        let _ = self.state.wait_for(|state| *state == State::Up).await;
    }

    /// Its models, as far as is known.
    pub(super) fn models(&self) -> watch::Ref<'_, Vec<v1::Model>> {
        self.models.borrow()
    }
}

/// Connects to an engine, now or as soon as it is there, and watches its health.
pub(super) fn connect(
    address: &str,
    (tasks, critical): (&TaskTracker, &CriticalTasks),
    stop: &CancellationToken,
) -> Result<(Vec<EngineChannel>, Health), String> {
    let endpoint = endpoint(address)?;
    let channel = || -> EngineChannel {
        EngineChannel::new(
            endpoint
                .connect_lazy()
                .map_err(|error| Status::from_error(error.into())),
        )
    };
    let (state, state_seen) = watch::channel(State::Unknown);
    let (models, models_seen) = watch::channel(Vec::new());
    let engine = (address.to_owned(), endpoint.connect_lazy());
    let (follow, stop) = (follow(engine, state, models), stop.clone());
    critical.spawn(tasks, "engine watch", async move {
        stop.run_until_cancelled_owned(follow).await;
    });
    let channels = (0..CONNECTIONS_PER_ENGINE).map(|_| channel()).collect();
    let health = Health {
        state: state_seen,
        models: models_seen,
    };
    Ok((channels, health))
}

/// How an engine is reached.
pub(super) fn endpoint(address: &str) -> Result<Endpoint, String> {
    let is_known = ["http://", "unix:/"]
        .iter()
        .any(|form| address.starts_with(form));
    // The service has a path of its own, and a path before it would be passed over.
    let has_path = address
        .strip_prefix("http://")
        .is_some_and(|rest| rest.trim_end_matches('/').contains('/'));
    let endpoint = Endpoint::from_shared(address.to_owned())
        .ok()
        .filter(|_| is_known && !has_path);
    let endpoint = endpoint.ok_or_else(|| {
        format!("'{address}' is no engine's address; it must be http://host:port or unix:/path")
    })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // What an engine still sends on a stream that was given up is an error of the connection's, once
        // the stream is forgotten, and so many such errors end it: clients that go away would end the
        // streams of all others. An engine is no stranger.
        .http2_max_concurrent_reset_streams(REMEMBERED_RESET_STREAMS)
        .http2_max_local_error_reset_streams(None)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_INTERVAL)
        .keep_alive_while_idle(true))
}

/// Keeps `health` and `models` true to what the engine says of itself, for ever.
async fn follow(
    (address, channel): (String, Channel),
    health: watch::Sender<State>,
    models: watch::Sender<Vec<v1::Model>>,
) {
    let mut client = HealthClient::new(channel.clone());
    let mut inference = InferenceClient::new(channel);
    loop {
        if let Ok(response) = client.watch(HealthCheckRequest::default()).await {
            let mut answers = response.into_inner();
            while let Ok(Some(answer)) = answers.message().await {
                let state = match answer.status() {
                    ServingStatus::Serving => State::Up,
                    ServingStatus::Unknown
                    | ServingStatus::NotServing
                    | ServingStatus::ServiceUnknown => State::Down,
                };
                if state == State::Up
                    && let Ok(Ok(listed)) = timeout(
                        LIST_MODELS_TIMEOUT,
                        inference.list_models(v1::ListModelsRequest {}),
                    )
                    .await
                {
                    models.send_replace(listed.into_inner().models);
                }
                tell(&health, state, &address);
            }
        }
        tell(&health, State::Down, &address);
        sleep(RETRY_DELAY).await;
    }
}

/// Notes what an engine can do, and logs it where that has changed.
fn tell(health: &watch::Sender<State>, state: State, engine: &str) {
    if health.send_replace(state) == state {
        return;
    }
    if state == State::Up {
        tracing::info!(engine, "an engine is up");
    } else {
        tracing::warn!(engine, "an engine is down");
    }
}

/// Reads a stream on into a bounded buffer, and stops only while that is full. It ends at once when
/// nobody reads the buffer any more, and with it the RPC.
pub(super) fn read_ahead(
    mut stream: Streaming<v1::CompletionEvent>,
    guard: InFlightGuard,
    tasks: &TaskTracker,
) -> mpsc::Receiver<ReadAhead> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD_EVENTS);
    let shares = Arc::new(Semaphore::new(
        usize::try_from(READ_AHEAD_TOKENS).unwrap_or(Semaphore::MAX_PERMITS),
    ));
    tasks.spawn(async move {
        let _lease = guard;
        loop {
            let event = tokio::select! {
                event = stream.message() => event.transpose(),
                () = sender.closed() => return,
            };
            let Some(event) = event else { return };
            let is_last = is_last(&event);
            // When nobody reads any more, what was read ahead is dropped, and its shares come back.
            let share = Arc::clone(&shares).acquire_many_owned(tokens_of(&event));
            let share = share.await.expect("the semaphore is never closed");
            let read = ReadAhead {
                event,
                _share: share,
            };
            let is_read = sender.send(read).await.is_ok();
            if is_last {
                // The stream is over but for its trailers. Left without them it would be reset.
                let _ = timeout(TRAILERS_TIMEOUT, stream.message()).await;
            }
            if is_last || !is_read {
                return;
            }
        }
    });
    receiver
}

/// Whether nothing follows but the stream's end.
fn is_last(event: &Result<v1::CompletionEvent, Status>) -> bool {
    let event = event.as_ref().map(|event| &event.event);
    matches!(event, Ok(Some(Event::Summary(_))) | Err(_))
}

/// An event's share of the tokens that may be read ahead: no event's is larger than all of it.
fn tokens_of(event: &Result<v1::CompletionEvent, Status>) -> u32 {
    match event.as_ref().map(|event| &event.event) {
        Ok(Some(
            Event::Tokens(tokens)
            | Event::Prompt(v1::EchoedPrompt {
                tokens: Some(tokens),
                ..
            }),
        )) => {
            let count = u32::try_from(tokens.tokens.len()).unwrap_or(READ_AHEAD_TOKENS);
            count.clamp(1, READ_AHEAD_TOKENS)
        }
        Ok(_) | Err(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio::runtime::Runtime;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::transport::Server;
    use tonic_health::server::health_reporter;

    use super::*;

    async fn becomes(health: &mut Health, expected: State) {
        let known = health.state.wait_for(|state| *state == expected);
        let known = timeout(Duration::from_secs(10), known).await;
        known.expect("it is noticed").expect("it is watched");
    }

    #[tokio::test]
    async fn an_engine_is_up_while_it_reports_serving_and_is_reachable() {
        let (reporter, service) = health_reporter();
        // On a runtime of its own, with which its connections end.
        let engine = Runtime::new().unwrap();
        let bound = engine.spawn(TcpListener::bind("127.0.0.1:0"));
        let listener = bound.await.unwrap().unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let incoming = TcpListenerStream::new(listener);
        let server = Server::builder().add_service(service);
        engine.spawn(server.serve_with_incoming(incoming));
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let critical = CriticalTasks::default();
        let (_, mut health) = connect(&address, (&tasks, &critical), &stop).unwrap();
        assert!(health.is_up(), "until it is known it is worth asking");
        let not_serving = tonic_health::ServingStatus::NotServing;
        reporter.set_service_status("", not_serving).await;
        becomes(&mut health, State::Down).await;
        let serving = tonic_health::ServingStatus::Serving;
        reporter.set_service_status("", serving).await;
        becomes(&mut health, State::Up).await;
        engine.shutdown_background();
        becomes(&mut health, State::Down).await;
        stop.cancel();
    }
}
