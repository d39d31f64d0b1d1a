//! Which engines exist, and which of them takes the next request: the one of this process, or a list
//! of others.
//!
//! Membership only says where to ask. That an engine has failed is noticed by the stream itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::{join_all, select_all};
use http::{Request as HttpRequest, Response as HttpResponse};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::metadata::MetadataValue;
use tonic::{Request, Status};
use tower::util::BoxCloneSyncService;

use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::inference_client::InferenceClient;
use crate::request::RequestId;
use crate::telemetry::Lane;

mod events;
mod remote;
#[cfg(test)]
pub(crate) mod scripted;
#[cfg(test)]
mod tests;

pub use events::Events;

/// A way to call an engine: its service in this process, or a connection to another.
pub type EngineChannel = BoxCloneSyncService<HttpRequest<Body>, HttpResponse<Body>, Status>;

/// The engines. Clones share them.
#[derive(Clone)]
pub struct Cluster {
    engines: Arc<[Engine]>,
    /// Whether they are elsewhere: then a stream is read on into a buffer of its own, so that one
    /// that nobody reads takes nothing from the others of its connection.
    remote: bool,
    tasks: TaskTracker,
}

struct Engine {
    channels: Vec<EngineChannel>,
    next_channel: AtomicUsize,
    in_flight: Arc<AtomicUsize>,
    health: remote::Health,
}

impl Cluster {
    /// The engine of this process, called without a socket.
    #[must_use]
    pub fn local(channel: EngineChannel) -> Self {
        let engine = Engine::new(vec![channel], remote::Health::always());
        Self {
            engines: [engine].into(),
            remote: false,
            tasks: TaskTracker::new(),
        }
    }

    /// Engines elsewhere, each `http://host:port` or `unix:/path`. They may come up later. `tasks` watches
    /// them until `stop`.
    ///
    /// # Errors
    /// Names the address that is none.
    pub fn remote(
        addresses: &[String],
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Self, String> {
        let connect = |address: &String| {
            let (channels, health) = remote::connect(address, tasks, stop)?;
            Ok(Engine::new(channels, health))
        };
        let engines: Result<Vec<_>, String> = addresses.iter().map(connect).collect();
        Ok(Self {
            engines: engines?.into(),
            remote: true,
            tasks: tasks.clone(),
        })
    }

    /// Whether any engine takes requests, as far as is known.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.engines.iter().any(|engine| engine.health.is_up())
    }

    /// Waits until an engine has said that it takes requests.
    pub async fn up(&self) {
        let engines = self.engines.iter();
        let up = engines.map(|engine| Box::pin(engine.health.clone().up()));
        select_all(up).await;
    }

    /// Starts a completion: it has been admitted by an engine. An engine that cannot take it now is
    /// passed over for the next. `lane` says how its tokens will leave this process.
    ///
    /// # Errors
    /// What the last engine said that was asked; an engine without the model speaks for itself only.
    pub async fn complete(
        &self,
        message: &v1::CompletionRequest,
        id: &RequestId,
        timeout: std::time::Duration,
        lane: Lane,
    ) -> Result<Events, Error> {
        let choices = message.n.unwrap_or(1);
        let mut refusal = None;
        for engine in self.by_load() {
            let lease = engine.lease();
            let mut request = Request::new(message.clone());
            request.set_timeout(timeout);
            // It reaches an engine of this process; another process takes this door for its client.
            request.extensions_mut().insert(lane);
            if let Ok(id) = MetadataValue::try_from(&*id.0) {
                request.metadata_mut().insert("x-request-id", id);
            }
            match engine.client().complete(request).await {
                Ok(response) if self.remote => {
                    let events = remote::read_on(response.into_inner(), lease, &self.tasks);
                    return Ok(Events::buffered(events, choices));
                }
                Ok(response) => {
                    return Ok(Events::direct(response.into_inner(), lease, choices));
                }
                Err(status) => {
                    let refused = events::refusal(&status);
                    if !another_may_take(refused.kind) {
                        return Err(refused);
                    }
                    refusal = Some(more_telling(refusal, refused));
                }
            }
        }
        Err(refusal.unwrap_or_else(no_engine))
    }

    /// The models of all engines that answer, each name once.
    ///
    /// # Errors
    /// What the last engine said, when none answers.
    pub async fn list_models(&self) -> Result<Vec<v1::Model>, Error> {
        let asked = self.by_load().into_iter().map(|engine| async move {
            let answer = engine.client().list_models(v1::ListModelsRequest {}).await;
            answer.map(|response| response.into_inner().models)
        });
        let (mut models, mut refusal) = (BTreeMap::new(), Some(no_engine()));
        for answer in join_all(asked).await {
            match answer {
                Ok(listed) => {
                    models.extend(listed.into_iter().map(|model| (model.name.clone(), model)));
                    refusal = None;
                }
                Err(status) => refusal = refusal.map(|_| events::refusal(&status)),
            }
        }
        match refusal {
            None => Ok(models.into_values().collect()),
            Some(refusal) => Err(refusal),
        }
    }

    /// One model.
    ///
    /// # Errors
    /// When no engine has it, or none answers.
    pub async fn get_model(&self, model: &str) -> Result<v1::Model, Error> {
        let mut refusal = None;
        for engine in self.by_load() {
            let request = v1::GetModelRequest {
                model: model.to_owned(),
            };
            let answer = engine.client().get_model(request).await;
            match answer.map(|response| response.into_inner().model) {
                Ok(Some(model)) => return Ok(model),
                Ok(None) => refusal = Some(Error::internal()),
                Err(status) => refusal = Some(more_telling(refusal, events::refusal(&status))),
            }
        }
        Err(refusal.unwrap_or_else(no_engine))
    }

    /// The engines that are up, the least busy first; where none is known to be up, all of them.
    fn by_load(&self) -> Vec<&Engine> {
        let mut engines: Vec<_> = self
            .engines
            .iter()
            .filter(|engine| engine.health.is_up())
            .collect();
        if engines.is_empty() {
            engines = self.engines.iter().collect();
        }
        engines.sort_by_key(|engine| engine.in_flight.load(Ordering::Relaxed));
        engines
    }
}

impl Engine {
    fn new(channels: Vec<EngineChannel>, health: remote::Health) -> Self {
        Self {
            channels,
            next_channel: AtomicUsize::new(0),
            in_flight: Arc::new(AtomicUsize::new(0)),
            health,
        }
    }

    fn client(&self) -> InferenceClient<EngineChannel> {
        let turn = self.next_channel.fetch_add(1, Ordering::Relaxed);
        InferenceClient::new(self.channels[turn % self.channels.len()].clone())
    }

    fn lease(&self) -> Lease {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Lease {
            in_flight: Arc::clone(&self.in_flight),
        }
    }
}

/// Counts a stream towards its engine's load.
pub(crate) struct Lease {
    in_flight: Arc<AtomicUsize>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether this is an address that an engine can have.
///
/// # Errors
/// What is wrong with it.
pub fn check_address(address: &str) -> Result<(), String> {
    remote::endpoint(address).map(|_| ())
}

/// Whether another engine may take what this one refused.
fn another_may_take(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ModelNotFound
            | ErrorKind::NoWorker
            | ErrorKind::NotReady
            | ErrorKind::Draining
            | ErrorKind::QueueFull
            | ErrorKind::UpstreamError
            | ErrorKind::Internal
    )
}

/// What is told of two refusals: the later, but that an engine does not have the model says nothing of
/// an engine that may.
fn more_telling(earlier: Option<Error>, later: Error) -> Error {
    match earlier {
        Some(earlier) if later.kind == ErrorKind::ModelNotFound => earlier,
        Some(_) | None => later,
    }
}

fn no_engine() -> Error {
    Error::from(&Status::unavailable("no engine"))
}
