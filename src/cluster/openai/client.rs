//! The HTTP/1.1 client for one engine, with a pool of connections.
//!
//! Dropping a response before its end closes its connection. The engine then stops the request, and no later request
//! can read the rest of the response.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HeaderValue};
use http::uri::{PathAndQuery, Scheme};
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::cluster::failure::Failure;
use crate::cluster::spec::ApiKey;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time after which an idle connection is closed. It is shorter than the idle timeouts of common servers, so that a
/// request is rarely sent on a connection that the server closes at the same moment.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Maximum number of idle connections to one engine.
const MAX_IDLE_CONNECTIONS: usize = 256;

/// A client for one engine. Clones share the connections.
#[derive(Clone)]
pub(super) struct EngineClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    base_url: Uri,
    /// The `Authorization` header of every request. `None` for an engine without a key.
    authorization: Option<HeaderValue>,
}

impl EngineClient {
    /// Creates a client for the API at this URL, such as `http://127.0.0.1:8000/v1`. Connects when it is first used.
    pub(super) fn new(base_url: Uri, api_key: Option<&ApiKey>) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls_config(&base_url))
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
            .build(connector);
        Self {
            client,
            base_url,
            authorization: api_key.map(ApiKey::authorization),
        }
    }

    /// Returns the URL of a path below the base URL, such as `/models`.
    pub(super) fn uri(&self, path: &str) -> Uri {
        self.uri_below(self.base_path(), path)
    }

    /// Returns the URL of a path beside `/v1`, such as `/tokenize`.
    pub(super) fn root_uri(&self, path: &str) -> Uri {
        let base = self.base_path();
        self.uri_below(base.strip_suffix("/v1").unwrap_or(base), path)
    }

    fn base_path(&self) -> &str {
        self.base_url.path().trim_end_matches('/')
    }

    fn uri_below(&self, base: &str, path: &str) -> Uri {
        let mut parts = self.base_url.clone().into_parts();
        let path = PathAndQuery::try_from(format!("{base}{path}"));
        parts.path_and_query = Some(path.expect("the base URL is valid"));
        Uri::from_parts(parts).expect("the base URL is valid")
    }

    /// Sends a request, and waits for the head of its response. Sends it once more if the connection breaks before the
    /// head: some servers close a connection after a response without announcing it, so a request on a connection of the
    /// pool may fail.
    ///
    /// # Errors
    /// The engine cannot be reached, or both connections broke before the head.
    pub(super) async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Failure> {
        if let Some(authorization) = &self.authorization {
            let headers = request.headers_mut();
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        let response = match self.client.request(request.clone()).await {
            Err(error) if !error.is_connect() => {
                tracing::debug!(%error, "the connection to an engine broke before its response");
                self.client.request(request).await
            }
            answered => answered,
        };
        response.map_err(|error| {
            tracing::debug!(%error, "an engine did not answer");
            Failure::unreachable()
        })
    }
}

/// Returns the TLS configuration for an engine. `https` trusts the certificate authorities of this machine, or those of
/// the file in the environment variable `SSL_CERT_FILE`.
fn tls_config(base_url: &Uri) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    if base_url.scheme() == Some(&Scheme::HTTPS) {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        for error in found.errors {
            tracing::warn!(%error, "cannot read a certificate authority");
        }
        if roots.is_empty() {
            tracing::error!("this machine has no certificate authority; set SSL_CERT_FILE");
        }
    }
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider supports the default versions")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paths_of_openais_api_are_below_the_base_url_and_others_beside_v1() {
        for (base, uri, root) in [
            (
                "http://a:1/v1",
                "http://a:1/v1/models",
                "http://a:1/tokenize",
            ),
            (
                "http://a:1/v1/",
                "http://a:1/v1/models",
                "http://a:1/tokenize",
            ),
            ("http://a:1", "http://a:1/models", "http://a:1/tokenize"),
            (
                "http://a/x/v1",
                "http://a/x/v1/models",
                "http://a/x/tokenize",
            ),
        ] {
            let client = EngineClient::new(base.parse().expect("a URL"), None);
            assert_eq!(client.uri("/models"), uri);
            assert_eq!(client.root_uri("/tokenize"), root);
        }
    }
}
