//! The HTTP/1.1 client for one engine, with a pool of connections.
//!
//! Dropping a response before its end closes its connection. The engine then stops the request, and no later request
//! can read the rest of the response.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST, HeaderValue};
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;
use tower::ServiceExt;

use crate::certificates::{self, ClientTls};
use crate::cluster::failure::Failure;
use crate::cluster::spec::ApiKey;

mod connection;
mod poll_waker;
mod pool;

use connection::Connection;
pub(super) use connection::ResponseBody;
use pool::ConnectionPool;

/// Maximum time for a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum time until a connection can take a request: with the resolution of the name, TCP and TLS.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// A client for one engine. Clones share the connections.
#[derive(Clone)]
pub(super) struct EngineClient {
    connector: HttpsConnector<HttpConnector>,
    pool: Arc<ConnectionPool>,
    base_url: Uri,
    /// The `Host` header of every request.
    host: HeaderValue,
    /// The `Authorization` header of every request. `None` for an engine without a key.
    authorization: Option<HeaderValue>,
}

impl EngineClient {
    /// Creates a client for the API at this URL, such as `http://127.0.0.1:8000/v1`. Connects when it is first used.
    /// `tls` is `None` if the URL is not an `https` URL.
    pub(super) fn new(base_url: Uri, api_key: Option<&ApiKey>, tls: Option<&ClientTls>) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls_config(tls))
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let authority = base_url.authority().map_or("", |it| it.as_str());
        let host = HeaderValue::from_str(authority);
        Self {
            connector,
            pool: Arc::default(),
            host: host.expect("the base URL is valid"),
            base_url,
            authorization: api_key.map(ApiKey::authorization),
        }
    }

    /// Returns the target of a request for a path below the base URL, such as `/models`.
    pub(super) fn target(&self, path: &str) -> String {
        format!("{}{path}", self.base_path())
    }

    /// Returns the target of a request for a path beside `/v1`, such as `/tokenize`.
    pub(super) fn root_target(&self, path: &str) -> String {
        let base = self.base_path();
        format!("{}{path}", base.strip_suffix("/v1").unwrap_or(base))
    }

    fn base_path(&self) -> &str {
        self.base_url.path().trim_end_matches('/')
    }

    /// Sends a request, and waits for the head of its response. If a connection of the pool breaks before the head, the
    /// request is sent once more on a new connection: some servers close a connection after a response without
    /// announcing it.
    ///
    /// # Errors
    /// The engine cannot be reached, or the new connection broke before the head.
    pub(super) async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<ResponseBody>, Failure> {
        let headers = request.headers_mut();
        headers.insert(HOST, self.host.clone());
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        if let Some(pooled) = self.pool.take()
            && let Some(response) = pooled.send(request.clone(), &self.pool).await
        {
            return Ok(response);
        }
        let connection = self.connect().await?;
        let response = connection.send(request, &self.pool).await;
        response.ok_or_else(Failure::broken_connection)
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let connecting = self.connector.clone().oneshot(self.base_url.clone());
        let connected = timeout(OPEN_TIMEOUT, connecting).await;
        let stream = match connected.map_err(|_| Failure::unreachable())? {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot connect to an engine");
                return Err(Failure::unreachable());
            }
        };
        let connection = Connection::open(stream).await;
        connection.ok_or_else(Failure::unreachable)
    }
}

fn tls_config(tls: Option<&ClientTls>) -> ClientConfig {
    tls.map_or_else(
        certificates::client_config_without_authorities,
        ClientTls::config,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paths_of_openais_api_are_below_the_base_url_and_others_beside_v1() {
        for (base, target, root) in [
            ("http://a:1/v1", "/v1/models", "/tokenize"),
            ("http://a:1/v1/", "/v1/models", "/tokenize"),
            ("http://a:1", "/models", "/tokenize"),
            ("http://a/x/v1", "/x/v1/models", "/x/tokenize"),
        ] {
            let client = EngineClient::new(base.parse().expect("a URL"), None, None);
            assert_eq!(client.target("/models"), target);
            assert_eq!(client.root_target("/tokenize"), root);
        }
    }
}
