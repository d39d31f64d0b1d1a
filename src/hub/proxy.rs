//! Connections for downloads: direct, or through the proxy that the environment names.
//!
//! `HTTPS_PROXY` or `ALL_PROXY` applies to `https` addresses, except for the hosts in `NO_PROXY`. As in other programs,
//! the names may also be in lower case. `http` addresses are always reached directly: they are those of mirrors in the
//! local network.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::Uri;
use http::uri::Scheme;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower::{Service, ServiceExt};

/// Opens TCP connections to hosts, directly or as tunnels through a proxy.
#[derive(Clone)]
pub(super) struct ProxyConnector {
    direct: HttpConnector,
    proxies: Arc<Matcher>,
}

impl ProxyConnector {
    /// Creates a connector that uses the proxies of the environment.
    pub(super) fn from_environment() -> Self {
        Self::new(Matcher::from_env())
    }

    fn new(proxies: Matcher) -> Self {
        let mut direct = HttpConnector::new();
        direct.set_nodelay(true);
        direct.enforce_http(false);
        Self {
            direct,
            proxies: Arc::new(proxies),
        }
    }
}

type Connecting =
    Pin<Box<dyn Future<Output = Result<TokioIo<TcpStream>, Box<dyn Error + Send + Sync>>> + Send>>;

impl Service<Uri> for ProxyConnector {
    type Response = TokioIo<TcpStream>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = Connecting;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, address: Uri) -> Connecting {
        let direct = self.direct.clone();
        let is_https = address.scheme() == Some(&Scheme::HTTPS);
        let proxy = self.proxies.intercept(&address).filter(|_| is_https);
        Box::pin(async move {
            let Some(proxy) = proxy else {
                return Ok(direct.oneshot(address).await?);
            };
            if proxy.uri().scheme() != Some(&Scheme::HTTP) {
                return Err(
                    "the proxy in HTTPS_PROXY or ALL_PROXY must have an http:// address".into(),
                );
            }
            let mut tunnel = Tunnel::new(proxy.uri().clone(), direct);
            if let Some(authorization) = proxy.basic_auth() {
                tunnel = tunnel.with_auth(authorization.clone());
            }
            Ok(tunnel.oneshot(address).await?)
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpListener;

    use super::*;

    /// A proxy that accepts one tunnel. Returns its address, and the request line and the headers of the tunnel.
    async fn start_proxy() -> (String, tokio::task::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!(
            "http://user:secret@{}",
            listener.local_addr().expect("a port")
        );
        let request = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("a connection");
            let mut stream = BufReader::new(stream);
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                stream.read_line(&mut line).await.expect("a line");
                if line == "\r\n" {
                    break;
                }
                lines.push(line.trim_end().to_owned());
            }
            let accepted = b"HTTP/1.1 200 OK\r\n\r\n";
            stream
                .write_all(accepted)
                .await
                .expect("the response is written");
            lines
        });
        (address, request)
    }

    #[tokio::test]
    async fn an_https_address_is_reached_through_the_proxy_with_its_password() {
        let (proxy, request) = start_proxy().await;
        let connector = ProxyConnector::new(Matcher::builder().https(proxy).build());
        let address = Uri::from_static("https://hub.example/x");
        connector.oneshot(address).await.expect("a tunnel");
        let lines = request.await.expect("the proxy does not panic");
        assert_eq!(lines[0], "CONNECT hub.example:443 HTTP/1.1");
        let authorization = "proxy-authorization: basic dxnlcjpzzwnyzxq=";
        let sent = lines
            .iter()
            .any(|line| line.to_lowercase() == authorization);
        assert!(sent, "{lines:?}");
    }

    #[tokio::test]
    async fn http_addresses_and_excluded_hosts_are_reached_directly() {
        let target = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = target.local_addr().expect("a port").port();
        for (scheme, excluded) in [("http", ""), ("https", "127.0.0.1")] {
            // Nothing listens on the proxy's port.
            let proxies = Matcher::builder().all("http://127.0.0.1:1").no(excluded);
            let connector = ProxyConnector::new(proxies.build());
            let address: Uri = format!("{scheme}://127.0.0.1:{port}")
                .parse()
                .expect("a URL");
            connector.oneshot(address).await.expect("a connection");
        }
    }
}
