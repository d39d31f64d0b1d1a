//! A server's metrics, as `GET /metrics` shows them.

use super::TestServer;

/// A snapshot of a server's metrics, in Prometheus's text format.
#[derive(Debug)]
pub struct MetricsSnapshot(pub String);

impl MetricsSnapshot {
    /// Takes a snapshot of the server's metrics.
    pub fn take(server: &TestServer) -> Self {
        Self(server.telemetry().render())
    }

    /// Returns the value of a series, which is given as `name{labels}`. Returns 0 if the series does not exist.
    pub fn get(&self, metric: &str) -> f64 {
        let value = self
            .0
            .lines()
            .find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
        value.map_or(0.0, |value| {
            value.parse().expect("a metric value is a number")
        })
    }

    /// Returns the number of requests of an API that have ended with this outcome, on all routes together.
    pub fn ended_requests(&self, api: &str, outcome: &str) -> f64 {
        let series = format!("tokenway_requests_total{{api=\"{api}\",");
        let outcome = format!("outcome=\"{outcome}\"}} ");
        let lines = self.0.lines().filter(|line| line.starts_with(&series));
        let values = lines.filter_map(|line| line.split_once(&outcome));
        values
            .map(|(_, value)| value.parse::<f64>().expect("a metric value is a number"))
            .sum()
    }

    /// Asserts that every gauge of running work is zero.
    pub fn assert_all_gauges_are_zero(&self) {
        for gauge in [
            "tokenway_requests_in_flight{api=\"grpc\"}",
            "tokenway_requests_in_flight{api=\"http\"}",
            "tokenway_requests_lingering{api=\"grpc\"}",
            "tokenway_requests_lingering{api=\"http\"}",
            "tokenway_connections_open{listener=\"grpc\"}",
            "tokenway_connections_open{listener=\"http\"}",
            "tokenway_sequences_running",
            "tokenway_requests_queued",
            "tokenway_workers{state=\"ready\"}",
        ] {
            assert_eq!(self.get(gauge), 0.0, "{gauge}\n{}", self.0);
        }
    }
}
