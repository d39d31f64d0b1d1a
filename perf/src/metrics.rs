//! A server's own metrics, in Prometheus's text format.

use bytes::Bytes;
use http::Request;
use http::header::{CONNECTION, HOST};
use http_body_util::BodyExt;

use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::stream::{Connection, Protocol};

/// Snapshot of a server's metrics.
#[derive(Default)]
pub(crate) struct Metrics(String);

impl Metrics {
    pub(crate) async fn fetch(url: &ServerUrl) -> Result<Self, Fault> {
        let request = Request::get(format!("{url}/metrics"))
            .header(HOST, &url.authority)
            .header(CONNECTION, "close")
            .body(Bytes::new())
            .expect("the request is valid");
        let mut connection = Connection::open(url, Protocol::Http1).await?;
        let response = connection.send(request).await?;
        if !response.status().is_success() {
            return Err(Fault::unexpected("/metrics", response.status().to_string()));
        }
        let text = response.collect().await?.to_bytes();
        Ok(Self(String::from_utf8_lossy(&text).into_owned()))
    }

    /// Returns the sum of a metric over its labels, or `None` if there is no such metric.
    pub(crate) fn sum(&self, name: &str) -> Option<u64> {
        let values = self.0.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let is_whole_name = rest.starts_with([' ', '{']);
            is_whole_name.then(|| rest.rsplit(' ').next())?
        });
        values
            .map(|value| value.parse::<u64>().ok())
            .reduce(|sum, value| Some(sum? + value?))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_summed_over_its_labels() {
        let text = "# TYPE a gauge\na{api=\"grpc\"} 2\na{api=\"http\"} 3\nab 7\n";
        let metrics = Metrics(text.to_owned());
        let sums = ["a", "a{api=\"http\"}", "ab", "b"].map(|name| metrics.sum(name));
        assert_eq!(sums, [Some(5), Some(3), Some(7), None]);
    }
}
