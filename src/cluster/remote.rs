//! A remote Tokenway engine as an upstream: its connections and its calls.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{Request as HttpRequest, Response as HttpResponse};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::transport::Endpoint;
use tonic::{Request, Status};
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use super::failure::Failure;
use super::health::{Health, HealthPublisher};
use super::ladder::Abilities;
use super::spec::EngineSpec;
use super::upstream::{BoxedEventStream, Upstream};
use super::via::GatewayId;
use crate::critical::CriticalTasks;
use crate::proto::v1;
use crate::proto::v1::inference_client::InferenceClient;
use crate::request::Parameter;

mod read_ahead;
mod watch_health;

use watch_health::HealthWatch;

/// Number of connections to each engine. With only one, all streams would wait for the same socket.
const CONNECTIONS_PER_ENGINE: usize = 2;

/// HTTP/2 flow-control window of a connection, in bytes.
///
/// h2 charges small unread frames, such as tokens, to the connection. When they use up half of the window, h2 closes
/// the connection. This window is larger than the unread data of all streams can become.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Flow-control window of a stream, in bytes. It is small to limit the unread data.
const STREAM_WINDOW: u32 = 64 * 1024;

/// Number of reset streams that a connection remembers. h2 ignores late frames of a remembered stream.
const REMEMBERED_RESET_STREAMS: usize = 10_000;

/// Interval between pings, and also the timeout for the reply. Their sum, one second, is the time after which a hung
/// engine is detected.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection to a remote engine.
pub(super) type EngineChannel = BoxCloneSyncService<HttpRequest<Body>, HttpResponse<Body>, Status>;

/// A remote engine. Each stream is read into a buffer of its own. Otherwise an unread stream would use up the
/// flow-control window that all streams of its connection share.
pub(super) struct RemoteUpstream {
    /// Connections to the engine; calls take them in turn.
    channels: Vec<EngineChannel>,
    next_channel: AtomicUsize,
    health: watch::Receiver<Health>,
    /// Tracks the tasks that read the streams.
    tasks: TaskTracker,
    /// Ends the health watch when the engine is dropped. Running streams continue.
    _watch: DropGuard,
}

/// Creates the upstreams of remote engines. Clones share the same tasks.
#[derive(Clone)]
pub(super) struct Connector {
    pub(super) gateway: GatewayId,
    pub(super) critical: CriticalTasks,
    /// Cancelled when the server stops.
    pub(super) stop: CancellationToken,
}

impl Connector {
    /// Connects to an engine and starts to watch its health. The engine may be started later.
    pub(super) fn connect(&self, engine: &EngineSpec) -> RemoteUpstream {
        let endpoint = with_options(engine.address.endpoint());
        let channel = || {
            EngineChannel::new(
                endpoint
                    .connect_lazy()
                    .map_err(|error| Status::from_error(error.into())),
            )
        };
        let (publisher, health) = HealthPublisher::new(engine);
        let watching = HealthWatch {
            gateway: self.gateway.clone(),
            health: publisher,
        }
        .run(endpoint.connect_lazy());
        let stop = self.stop.child_token();
        let watch = stop.clone().drop_guard();
        self.critical.spawn("engine watch", async move {
            stop.run_until_cancelled_owned(watching).await;
        });
        RemoteUpstream {
            channels: (0..CONNECTIONS_PER_ENGINE).map(|_| channel()).collect(),
            next_channel: AtomicUsize::new(0),
            health,
            tasks: self.critical.tracker().clone(),
            _watch: watch,
        }
    }
}

impl RemoteUpstream {
    /// Creates an engine for tests, with this connection and this health.
    #[cfg(test)]
    pub(super) fn scripted(channel: EngineChannel, health: Health) -> Self {
        Self {
            channels: vec![channel],
            next_channel: AtomicUsize::new(0),
            health: watch::channel(health).1,
            tasks: TaskTracker::new(),
            _watch: CancellationToken::new().drop_guard(),
        }
    }

    /// Returns the connection for the next call.
    fn channel(&self) -> EngineChannel {
        let index = self.next_channel.fetch_add(1, Ordering::Relaxed) % self.channels.len();
        self.channels[index].clone()
    }

    fn client(&self) -> InferenceClient<EngineChannel> {
        InferenceClient::new(self.channel())
    }
}

#[tonic::async_trait]
impl Upstream for RemoteUpstream {
    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<BoxedEventStream, Failure> {
        let channel = self.channel();
        let mut client = InferenceClient::new(channel.clone());
        let response = client.complete(request).await;
        let response = response.map_err(|status| Failure::rejection(&status))?;
        let events = response.into_inner();
        Ok(read_ahead::start(events, channel, &self.tasks))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<v1::ListModelsResponse, Status> {
        Ok(self.client().list_models(request).await?.into_inner())
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<v1::GetModelResponse, Status> {
        Ok(self.client().get_model(request).await?.into_inner())
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<v1::TokenizeResponse, Status> {
        Ok(self.client().tokenize(request).await?.into_inner())
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<v1::DetokenizeResponse, Status> {
        Ok(self.client().detokenize(request).await?.into_inner())
    }

    fn health(&self) -> &watch::Receiver<Health> {
        &self.health
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            resumes: true,
            ..Abilities::default()
        }
    }

    fn reports_start(&self) -> bool {
        true
    }

    /// A Tokenway engine has only runners. One of an older version would even ignore these fields, because protobuf
    /// drops fields that it does not know.
    fn unsupported(&self) -> &[Parameter] {
        &Parameter::PASSED_ON
    }
}

/// Sets the options of the connections to an engine.
fn with_options(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // When a client disconnects, the gateway resets its stream, and the engine may still send frames on it. h2
        // ignores them as long as it remembers the stream.
        .http2_max_concurrent_reset_streams(REMEMBERED_RESET_STREAMS)
        // A frame on a forgotten stream is a local error, and too many of them would close the connection with the
        // streams of all other clients. The number is not limited, because engines are trusted.
        .http2_max_local_error_reset_streams(None)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_INTERVAL)
        .keep_alive_while_idle(true)
}
