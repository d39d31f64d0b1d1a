//! Remote engines: their connections, their health, and the tasks that read their streams.

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
use super::events::BufferedEvent;
use crate::backoff::{Backoff, BackoffPolicy};
use crate::critical::CriticalTasks;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::proto::v1::inference_client::InferenceClient;

/// Number of connections to each engine. With a single one, all streams would wait for one socket.
const CONNECTIONS_PER_ENGINE: usize = 2;

/// Maximum number of events in the read-ahead buffer of a stream.
const READ_AHEAD_EVENTS: usize = 64;
/// Maximum number of tokens in the read-ahead buffer of a stream.
const READ_AHEAD_TOKENS: u32 = 256;

/// Flow-control window of a connection, in bytes. h2 charges small unread frames, such as tokens, to the connection,
/// and closes the connection when they use up half of its window. This window is larger than the unread data of all
/// streams can become.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Flow-control window of a stream, in bytes. It is small to limit the unread data.
const STREAM_WINDOW: u32 = 64 * 1024;

/// Number of reset streams that a connection remembers. h2 ignores frames that the engine still sends on such a stream.
const REMEMBERED_RESET_STREAMS: usize = 10_000;

/// Maximum wait for the trailers of a stream after its last event.
const TRAILERS_TIMEOUT: Duration = Duration::from_secs(1);

/// Ping interval, and also the maximum wait for the reply. A hung engine is detected within their sum, one second.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);

/// Maximum wait for the model list of an engine that came up.
const LIST_MODELS_TIMEOUT: Duration = Duration::from_secs(1);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Delays before the next health check of an engine that is down. The maximum is short, because requests for the models
/// of that engine fail until then.
const HEALTH_CHECK_BACKOFF: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(250),
    max: Duration::from_secs(1),
    jitter: 0.5,
};

/// Current health and models of one engine.
#[derive(Clone)]
pub(super) struct Health {
    state: watch::Receiver<State>,
    /// Models that the engine listed when it last came up.
    models: watch::Receiver<Vec<v1::Model>>,
}

/// Availability of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The engine has not answered yet. It counts as up, so that requests try it.
    Unknown,
    Up,
    Down,
}

impl Health {
    /// Returns the health of the engine in this process. It always counts as up, because it rejects requests itself.
    pub(super) fn always_up() -> Self {
        Self {
            state: watch::channel(State::Up).1,
            models: watch::channel(Vec::new()).1,
        }
    }

    /// Returns the health of an engine that is down and had these models when it was up.
    #[cfg(test)]
    pub(super) fn down(models: Vec<v1::Model>) -> Self {
        Self {
            state: watch::channel(State::Down).1,
            models: watch::channel(models).1,
        }
    }

    /// Returns true unless the engine is known to be down.
    pub(super) fn is_up(&self) -> bool {
        *self.state.borrow() != State::Down
    }

    /// Waits until the engine reports that it accepts requests.
    pub(super) async fn wait_until_up(mut self) {
        // An error means that the watch task has ended because the server is shutting down.
        let _ = self.state.wait_for(|state| *state == State::Up).await;
    }

    /// Returns the models that the engine listed when it last came up.
    pub(super) fn models(&self) -> watch::Ref<'_, Vec<v1::Model>> {
        self.models.borrow()
    }
}

/// The connections to an engine, and its health.
pub(super) struct RemoteEngine {
    pub(super) channels: Vec<EngineChannel>,
    pub(super) health: Health,
}

/// Creates the connections to an engine, and starts a task that watches its health. The engine may be started later.
pub(super) fn connect(
    address: &str,
    critical: &CriticalTasks,
    stop: &CancellationToken,
) -> Result<RemoteEngine, String> {
    let endpoint = endpoint(address)?;
    let channel = || -> EngineChannel {
        EngineChannel::new(
            endpoint
                .connect_lazy()
                .map_err(|error| Status::from_error(error.into())),
        )
    };
    let (state_sender, state) = watch::channel(State::Unknown);
    let (models_sender, models) = watch::channel(Vec::new());
    let watch = EngineWatch {
        address: address.to_owned(),
        state: state_sender,
        models: models_sender,
    };
    let watching = watch.run(endpoint.connect_lazy());
    let stop = stop.clone();
    critical.spawn("engine watch", async move {
        stop.run_until_cancelled_owned(watching).await;
    });
    let channels = (0..CONNECTIONS_PER_ENGINE).map(|_| channel()).collect();
    Ok(RemoteEngine {
        channels,
        health: Health { state, models },
    })
}

/// Parses the address of an engine, and sets the options of its connections.
pub(super) fn endpoint(address: &str) -> Result<Endpoint, String> {
    let has_known_scheme = ["http://", "unix:/"]
        .iter()
        .any(|scheme| address.starts_with(scheme));
    // gRPC defines the path of a call, so tonic would ignore a path in the address.
    let has_path = address
        .strip_prefix("http://")
        .is_some_and(|rest| rest.trim_end_matches('/').contains('/'));
    let endpoint = Endpoint::from_shared(address.to_owned())
        .ok()
        .filter(|_| has_known_scheme && !has_path);
    let endpoint = endpoint.ok_or_else(|| {
        format!("'{address}' is not a valid engine address; use http://host:port or unix:/path")
    })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // An engine may still send on a stream that the gateway has reset. For a stream that h2 no longer remembers
        // this is a local error, and too many of them close the connection. Clients that disconnect could then end
        // the streams of all other clients, so the limit is off. Engines are trusted.
        .http2_max_concurrent_reset_streams(REMEMBERED_RESET_STREAMS)
        .http2_max_local_error_reset_streams(None)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_INTERVAL)
        .keep_alive_while_idle(true))
}

/// The watch of one engine's health.
struct EngineWatch {
    address: String,
    state: watch::Sender<State>,
    models: watch::Sender<Vec<v1::Model>>,
}

impl EngineWatch {
    /// Watches the health service of the engine, and keeps `state` and `models` up to date. Never returns.
    async fn run(self, channel: Channel) {
        let mut health = HealthClient::new(channel.clone());
        let mut inference = InferenceClient::new(channel);
        let mut backoff = Backoff::new(HEALTH_CHECK_BACKOFF);
        loop {
            if let Ok(response) = health.watch(HealthCheckRequest::default()).await {
                let mut reports = response.into_inner();
                while let Ok(Some(report)) = reports.message().await {
                    backoff.reset();
                    let reported = match report.status() {
                        ServingStatus::Serving => State::Up,
                        ServingStatus::Unknown
                        | ServingStatus::NotServing
                        | ServingStatus::ServiceUnknown => State::Down,
                    };
                    if reported == State::Up {
                        self.update_models(&mut inference).await;
                    }
                    self.set_state(reported);
                }
            }
            self.set_state(State::Down);
            sleep(backoff.next_delay()).await;
        }
    }

    /// Reads the engine's list of models. Keeps the old list if the engine does not answer in time.
    async fn update_models(&self, inference: &mut InferenceClient<Channel>) {
        let listing = inference.list_models(v1::ListModelsRequest {});
        if let Ok(Ok(listed)) = timeout(LIST_MODELS_TIMEOUT, listing).await {
            self.models.send_replace(listed.into_inner().models);
        }
    }

    /// Sets the state of the engine, and logs a change.
    fn set_state(&self, new: State) {
        if self.state.send_replace(new) == new {
            return;
        }
        let engine = &self.address;
        if new == State::Up {
            tracing::info!(engine, "an engine is up");
        } else {
            tracing::warn!(engine, "an engine is down");
        }
    }
}

/// Starts a task that reads a stream into a bounded buffer, and pauses while the buffer is full. Dropping the receiver
/// ends the task and cancels the RPC.
pub(super) fn read_ahead(
    mut stream: Streaming<v1::CompletionEvent>,
    guard: InFlightGuard,
    tasks: &TaskTracker,
) -> mpsc::Receiver<BufferedEvent> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD_EVENTS);
    let permits = Arc::new(Semaphore::new(
        usize::try_from(READ_AHEAD_TOKENS).unwrap_or(Semaphore::MAX_PERMITS),
    ));
    tasks.spawn(async move {
        let _guard = guard;
        loop {
            let event = tokio::select! {
                event = stream.message() => event.transpose(),
                () = sender.closed() => return,
            };
            let Some(event) = event else { return };
            let is_last = is_last(&event);
            // This cannot hang without a reader: dropping the receiver drops the buffered events and frees their
            // permits.
            let permit = Arc::clone(&permits).acquire_many_owned(permits_of(&event));
            let permit = permit.await.expect("the semaphore is never closed");
            let buffered = BufferedEvent {
                event,
                _permit: permit,
            };
            let has_reader = sender.send(buffered).await.is_ok();
            if is_last {
                // Only the trailers are left. Dropping the stream before they arrive would reset it.
                let _ = timeout(TRAILERS_TIMEOUT, stream.message()).await;
            }
            if is_last || !has_reader {
                return;
            }
        }
    });
    receiver
}

/// Returns true for the last event of a stream: a summary or an error.
fn is_last(event: &Result<v1::CompletionEvent, Status>) -> bool {
    let event = event.as_ref().map(|event| &event.event);
    matches!(event, Ok(Some(Event::Summary(_))) | Err(_))
}

/// Returns the number of read-ahead permits that an event takes: its token count, clamped to 1..=READ_AHEAD_TOKENS so
/// that acquiring them can always succeed.
fn permits_of(event: &Result<v1::CompletionEvent, Status>) -> u32 {
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

    async fn wait_for_state(health: &mut Health, expected: State) {
        let changed = health.state.wait_for(|state| *state == expected);
        let changed = timeout(Duration::from_secs(10), changed).await;
        changed
            .expect("the state changes in time")
            .expect("the engine is watched");
    }

    #[tokio::test]
    async fn an_engine_is_up_while_it_reports_serving_and_is_reachable() {
        let (reporter, service) = health_reporter();
        // The engine has a runtime of its own, so that shutting the runtime down closes its connections.
        let engine = Runtime::new().unwrap();
        let bound = engine.spawn(TcpListener::bind("127.0.0.1:0"));
        let listener = bound.await.unwrap().unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let incoming = TcpListenerStream::new(listener);
        let server = Server::builder().add_service(service);
        engine.spawn(server.serve_with_incoming(incoming));
        let (critical, stop) = (CriticalTasks::default(), CancellationToken::new());
        let mut health = connect(&address, &critical, &stop).unwrap().health;
        assert!(health.is_up(), "an unknown state counts as up");
        let not_serving = tonic_health::ServingStatus::NotServing;
        reporter.set_service_status("", not_serving).await;
        wait_for_state(&mut health, State::Down).await;
        let serving = tonic_health::ServingStatus::Serving;
        reporter.set_service_status("", serving).await;
        wait_for_state(&mut health, State::Up).await;
        engine.shutdown_background();
        wait_for_state(&mut health, State::Down).await;
        stop.cancel();
    }
}
