//! The engines of a cluster over time. Today the list of engines is fixed. A source of changing lists, such as DNS,
//! can create a [`Membership`] from its own stream.

use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::Stream;

use super::spec::{ClusterSpec, EngineSpec};
use super::upstream::Upstream;

/// A stream of snapshots of the cluster's engines. The cluster connects to engines that a snapshot adds, and sends no
/// more requests to engines that a snapshot leaves out. When the stream ends, the last snapshot stays in force.
pub struct Membership(Pin<Box<dyn Stream<Item = ClusterSpec> + Send>>);

impl Membership {
    /// Creates a membership that never changes.
    #[must_use]
    pub fn fixed(cluster: ClusterSpec) -> Self {
        Self::new(tokio_stream::once(cluster))
    }

    /// Creates a membership from a stream of snapshots.
    pub fn new(snapshots: impl Stream<Item = ClusterSpec> + Send + 'static) -> Self {
        Self(Box::pin(snapshots))
    }

    pub(super) fn into_stream(self) -> Pin<Box<dyn Stream<Item = ClusterSpec> + Send>> {
        self.0
    }
}

/// The upstreams of a cluster at one moment.
pub(super) type Upstreams = Arc<[Arc<dyn Upstream>]>;

/// The current members of a cluster. It is a pure struct; the cluster's task applies snapshots to it.
pub(super) struct Members<C> {
    connect: C,
    members: Vec<(EngineSpec, Arc<dyn Upstream>)>,
}

impl<C: Fn(&EngineSpec) -> Arc<dyn Upstream>> Members<C> {
    /// Creates an empty list of members. `connect` creates the upstream of a new member.
    pub(super) fn new(connect: C) -> Self {
        Self {
            connect,
            members: Vec::new(),
        }
    }

    /// Applies a snapshot: keeps the members that are in it, adds new ones, and drops the others. A dropped upstream
    /// still finishes its streams.
    pub(super) fn apply(&mut self, snapshot: ClusterSpec) -> Upstreams {
        let mut before = std::mem::take(&mut self.members);
        for engine in snapshot.engines {
            if self
                .members
                .iter()
                .any(|(it, _)| it.is_same_server(&engine))
            {
                continue;
            }
            let kept = before.iter().position(|(it, _)| it.is_same_server(&engine));
            let member = if let Some(at) = kept {
                (engine, before.swap_remove(at).1)
            } else {
                tracing::debug!(engine = &*engine.name, "an engine joins the cluster");
                let upstream = (self.connect)(&engine);
                (engine, upstream)
            };
            self.members.push(member);
        }
        for (engine, _) in before {
            tracing::info!(engine = &*engine.name, "an engine leaves the cluster");
        }
        let upstreams = self.members.iter().map(|(_, member)| Arc::clone(member));
        upstreams.collect()
    }
}
