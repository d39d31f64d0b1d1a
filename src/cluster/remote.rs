//! A remote Tokenway engine as an upstream: its connections and its calls.

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::transport::Endpoint;
use tonic::{Request, Status};

use super::failure::Failure;
use super::health::{Health, HealthPublisher};
use super::ladder::Abilities;
use super::spec::EngineSpec;
use super::upstream::{AddressedCompletion, BoxedEventStream, Upstream};
use super::via::GatewayId;
use crate::critical::CriticalTasks;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::inference_client::InferenceClient;
use crate::request::Parameter;

pub(super) mod connections;
mod list_models;
pub(super) mod read_ahead;
pub(super) mod watch_health;

pub(super) use connections::EngineChannel;
use connections::{Connections, connect, with_options};
use list_models::TokenwayModels;
use watch_health::HealthWatch;

/// A remote engine. Each stream is read into a buffer of its own. Otherwise an unread stream would use up the
/// flow-control window that all streams of its connection share.
pub(super) struct RemoteUpstream {
    connections: Connections,
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
        let endpoint = with_options(endpoint(engine));
        let (publisher, health) = HealthPublisher::new(engine);
        let api_key = engine.api_key.as_ref();
        let channel = connect(&endpoint, api_key);
        let watching = HealthWatch {
            models: TokenwayModels::new(channel.clone(), self.gateway.clone()),
            health: publisher,
        }
        .run(channel);
        let stop = self.stop.child_token();
        let watch = stop.clone().drop_guard();
        self.critical.spawn("engine watch", async move {
            stop.run_until_cancelled_owned(watching).await;
        });
        RemoteUpstream {
            connections: Connections::new(&endpoint, api_key),
            health,
            tasks: self.critical.tracker().clone(),
            _watch: watch,
        }
    }
}

/// Returns the endpoint of an engine, with TLS if its address says so.
fn endpoint(engine: &EngineSpec) -> Endpoint {
    let endpoint = engine.address.endpoint();
    match engine.address.uses_tls() {
        true => endpoint
            .tls_config(engine.tls.tonic_config())
            .expect("the certificates and the name of the host were checked when they were read"),
        false => endpoint,
    }
}

impl RemoteUpstream {
    /// Creates an engine for tests, with this connection and this health.
    #[cfg(test)]
    pub(super) fn scripted(channel: EngineChannel, health: watch::Receiver<Health>) -> Self {
        Self {
            connections: Connections::scripted(channel),
            health,
            tasks: TaskTracker::new(),
            _watch: CancellationToken::new().drop_guard(),
        }
    }

    fn client(&self) -> InferenceClient<EngineChannel> {
        InferenceClient::new(self.connections.next())
    }
}

/// Converts the rejection of the gateway's own key to an error of the engine. The client's key is not at fault.
fn hide_key_error(status: Status) -> Status {
    let kind = Error::from(&status).kind;
    if ![ErrorKind::InvalidApiKey, ErrorKind::InsufficientScope].contains(&kind) {
        return status;
    }
    tracing::warn!(
        reason = status.message(),
        "an engine rejected the gateway's key"
    );
    let message = "The engine did not accept the gateway's key.";
    Error::new(ErrorKind::UpstreamError, message).into()
}

#[tonic::async_trait]
impl Upstream for RemoteUpstream {
    async fn complete(
        &self,
        request: Request<AddressedCompletion>,
    ) -> Result<BoxedEventStream, Failure> {
        let channel = self.connections.next();
        let mut client = InferenceClient::new(channel.clone());
        let request = request.map(AddressedCompletion::into_message);
        let response = client.complete(request).await;
        let response = response.map_err(|status| Failure::rejection(&hide_key_error(status)))?;
        let events = response.into_inner();
        Ok(read_ahead::start(events, channel, &self.tasks))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<v1::ListModelsResponse, Status> {
        let response = self.client().list_models(request).await;
        Ok(response.map_err(hide_key_error)?.into_inner())
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<v1::GetModelResponse, Status> {
        let response = self.client().get_model(request).await;
        Ok(response.map_err(hide_key_error)?.into_inner())
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<v1::TokenizeResponse, Status> {
        let response = self.client().tokenize(request).await;
        Ok(response.map_err(hide_key_error)?.into_inner())
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<v1::DetokenizeResponse, Status> {
        let response = self.client().detokenize(request).await;
        Ok(response.map_err(hide_key_error)?.into_inner())
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

    fn knows_deadline(&self) -> bool {
        true
    }

    /// A Tokenway engine has only runners. One of an older version would even ignore these fields, because protobuf
    /// drops fields that it does not know.
    fn unsupported(&self) -> &[Parameter] {
        &Parameter::PASSED_ON
    }
}
