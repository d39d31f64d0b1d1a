//! The engines of a gateway: their checks, and their replacement while the gateway runs.

use futures_util::stream::unfold;
use tokio::sync::watch;

use super::parts::Source;
use super::{Listener, Server, StartError, addresses};
use crate::cluster::{ClusterSpec, Membership, find_conflicts};

/// Reason why the engines and routes of a server were not replaced.
#[derive(Debug, thiserror::Error)]
pub enum SetClusterError {
    /// The server has an engine of its own.
    #[error("the server is not a gateway, so it has no engines to replace")]
    NotAGateway,
    /// A remote engine is listed twice, or is this server itself.
    #[error("{0}")]
    Engine(String),
}

/// The engines and routes of a gateway over time. Its cluster follows them.
pub(super) struct RemoteEngines {
    current: watch::Sender<Snapshot>,
    /// Number of the last snapshot that the cluster has applied.
    applied: watch::Receiver<u64>,
}

#[derive(Clone)]
struct Snapshot {
    number: u64,
    spec: ClusterSpec,
}

impl RemoteEngines {
    /// Starts with these engines and routes. Also returns the membership for the cluster.
    pub(super) fn new(spec: ClusterSpec) -> (Self, Membership) {
        let (current, mut snapshots) = watch::channel(Snapshot { number: 0, spec });
        let (has_applied, applied) = watch::channel(0);
        snapshots.mark_changed();
        let stream = unfold((snapshots, None), move |(mut snapshots, last)| {
            // The cluster asks for the next snapshot when it has applied the last one.
            if let Some(last) = last {
                has_applied.send_replace(last);
            }
            async move {
                snapshots.changed().await.ok()?;
                let Snapshot { number, spec } = snapshots.borrow_and_update().clone();
                Some((spec, (snapshots, Some(number))))
            }
        });
        (Self { current, applied }, Membership::new(stream))
    }

    /// Replaces the engines and routes. Returns when the cluster has applied the new ones, or has stopped.
    async fn replace(&self, spec: ClusterSpec) {
        let mut number = 0;
        self.current.send_modify(|snapshot| {
            number = snapshot.number + 1;
            *snapshot = Snapshot { number, spec };
        });
        let mut applied = self.applied.clone();
        // An error means that the cluster has stopped, and so has the server.
        let _ = applied.wait_for(|applied| *applied >= number).await;
    }

    fn spec(&self) -> ClusterSpec {
        self.current.borrow().spec.clone()
    }
}

impl Server {
    /// Replaces the engines and routes of a gateway. Requests that arrive after this has returned use the new ones.
    /// Running streams stay on their engines.
    ///
    /// # Errors
    /// The server is not a gateway, an engine is listed twice, or an engine is this server itself. The engines and
    /// routes then stay as they are.
    pub async fn set_cluster(&self, spec: ClusterSpec) -> Result<(), SetClusterError> {
        let Some(engines) = &self.remote_engines else {
            return Err(SetClusterError::NotAGateway);
        };
        let http = self.http_addresses.iter();
        let http = http.map(|address| ("http-listen", address.to_string()));
        let grpc = self.grpc_addresses.iter();
        let grpc = grpc.map(|address| ("grpc-listen", address.to_string()));
        let admin = self.admin_addresses.iter();
        let admin = admin.map(|address| ("admin-listen", address.to_string()));
        let listeners: Vec<_> = http.chain(grpc).chain(admin).collect();
        if let Some(conflict) = find_conflicts(&spec.engines, &listeners).first() {
            return Err(SetClusterError::Engine(conflict.message(&spec.engines)));
        }
        engines.replace(spec).await;
        Ok(())
    }

    /// Returns the engines and routes of a gateway. Returns `None` if the server has an engine of its own.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterSpec> {
        self.remote_engines.as_ref().map(RemoteEngines::spec)
    }
}

/// Checks that no remote engine is listed twice, and that none is the server itself, which has bound these listeners.
pub(super) fn check_engines(
    source: &Source,
    listeners: [(&str, &Option<Listener>); 3],
) -> Result<(), StartError> {
    let Source::Remote(ClusterSpec { engines, .. }) = source else {
        return Ok(());
    };
    let bound = listeners.into_iter().flat_map(|(setting, listener)| {
        let addresses = addresses(listener.as_ref()).into_iter();
        addresses.map(move |address| (setting, address.to_string()))
    });
    match find_conflicts(engines, &bound.collect::<Vec<_>>()).first() {
        None => Ok(()),
        Some(conflict) => Err(StartError::Engine(conflict.message(engines))),
    }
}
