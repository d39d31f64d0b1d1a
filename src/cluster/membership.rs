//! The engines and routes of a cluster over time. A source of changing lists, such as a settings file that is reloaded,
//! creates a [`Membership`] from its own stream.

use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::Stream;

use super::member::Member;
use super::route::RoutingTable;
use super::spec::{ClusterSpec, EngineSpec};
use super::upstream::Upstream;
use crate::telemetry::Telemetry;

/// A stream of snapshots of the cluster's engines and routes. The cluster connects to engines that a snapshot adds, and
/// sends no more requests to engines that a snapshot leaves out. When the stream ends, the last snapshot stays in
/// force.
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

/// The current members of a cluster and the routes to them. It is a pure struct; the cluster's task applies snapshots
/// to it.
pub(super) struct Members<C> {
    connect: C,
    telemetry: Telemetry,
    members: Vec<(EngineSpec, Arc<Member>)>,
    table: Arc<RoutingTable>,
}

impl<C: Fn(&EngineSpec) -> Arc<dyn Upstream>> Members<C> {
    /// Creates an empty list of members. `connect` creates the upstream of a new member.
    pub(super) fn new(connect: C, telemetry: &Telemetry) -> Self {
        Self {
            connect,
            telemetry: telemetry.clone(),
            members: Vec::new(),
            table: Arc::default(),
        }
    }

    /// Applies a snapshot: keeps the members that are in it, adds new ones, and drops the others. A dropped member
    /// still finishes its streams.
    pub(super) fn apply(&mut self, snapshot: ClusterSpec) -> Arc<RoutingTable> {
        let mut before = std::mem::take(&mut self.members);
        for engine in snapshot.engines {
            if self
                .members
                .iter()
                .any(|(it, _)| it.is_same_server(&engine))
            {
                continue;
            }
            let kept = before
                .iter()
                .position(|(it, _)| it.is_same_server(&engine) && it.name == engine.name);
            let member = match kept {
                Some(at) => before.swap_remove(at).1,
                None => {
                    tracing::debug!(engine = &*engine.name, "an engine joins the cluster");
                    let upstream = (self.connect)(&engine);
                    Arc::new(Member::new(&engine.name, upstream, &self.telemetry))
                }
            };
            self.members.push((engine, member));
        }
        for (engine, _) in before {
            tracing::info!(engine = &*engine.name, "an engine leaves the cluster");
        }
        let members = self.members.iter().map(|(_, member)| Arc::clone(member));
        let table = RoutingTable::new(
            members.collect(),
            snapshot.routes,
            snapshot.placement,
            &self.table,
        );
        self.table = Arc::new(table);
        Arc::clone(&self.table)
    }
}
