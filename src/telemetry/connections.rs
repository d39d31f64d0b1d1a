//! The metrics of the connections to the server's listeners.

use metrics::{Gauge, Recorder, Unit};
use metrics_exporter_prometheus::PrometheusRecorder;

use super::{GaugeGuard, ListenerKind, Telemetry};

const CONNECTIONS: &str = "tokenway_connections_open";
const CONNECTIONS_REFUSED: &str = "tokenway_connections_refused_total";

/// The limit that a refused connection exceeded, as the label `limit` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectionLimit {
    /// The number of connections in all.
    Total,
    /// The number of connections from one address.
    Address,
}

impl ConnectionLimit {
    fn label(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Address => "address",
        }
    }
}

pub(super) fn describe(recorder: &PrometheusRecorder) {
    recorder.describe_gauge(
        CONNECTIONS.into(),
        Some(Unit::Count),
        "Open connections, by listener.".into(),
    );
    recorder.describe_counter(
        CONNECTIONS_REFUSED.into(),
        Some(Unit::Count),
        "Connections that were closed at once because a limit was reached, by listener and limit."
            .into(),
    );
}

impl Telemetry {
    /// Counts a connection as open until the returned guard is dropped.
    #[must_use]
    pub(crate) fn track_connection(&self, listener: ListenerKind) -> GaugeGuard {
        GaugeGuard::new(self.connections(listener))
    }

    /// Counts a connection that was refused.
    pub(crate) fn count_refused_connection(&self, listener: ListenerKind, limit: ConnectionLimit) {
        let labels = [("listener", listener.label()), ("limit", limit.label())];
        self.labelled_counter(CONNECTIONS_REFUSED, &labels)
            .increment(1);
    }

    pub(super) fn connections(&self, listener: ListenerKind) -> Gauge {
        self.labelled_gauge(CONNECTIONS, &[("listener", listener.label())])
    }
}
