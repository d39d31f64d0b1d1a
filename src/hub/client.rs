//! An HTTP client for the Hub: `GET` requests, redirects, and bodies that arrive in chunks.
//!
//! The token is sent to the Hub's own address only. The Hub redirects downloads to other hosts with signed addresses.
//!
//! Each request has a connection of its own, and no task drives the connection: it makes progress only while the caller
//! waits for the response or reads the body.

use std::error::Error;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST, LOCATION, RANGE, USER_AGENT};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::Empty;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tower::ServiceExt;

use super::options::HubOptions;
use super::proxy::ProxyConnector;
use super::url;
use crate::certificates::ClientTls;

/// Timeout for opening a connection, including name resolution, TCP and TLS.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

/// Timeout for the headers of a response, and for each chunk of its body.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum number of redirects of one request.
const MAX_REDIRECTS: usize = 10;

const AGENT: &str = concat!("tokenway/", env!("CARGO_PKG_VERSION"));

/// Reason why a response did not arrive, or not completely.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// The connection could not be opened.
    #[error("cannot connect to {host}: {reason}")]
    Connect { host: String, reason: String },
    /// The connection broke, or nothing arrived in time.
    #[error("the connection to {host} broke: {reason}")]
    Broken { host: String, reason: String },
    /// A redirect that must not or cannot be followed.
    #[error("{host} redirects {reason}")]
    Redirect { host: String, reason: String },
    /// The response is longer than the caller allows.
    #[error("the response of {host} is longer than {max} bytes")]
    TooLong { host: String, max: usize },
}

/// A client for one Hub.
pub(super) struct HubClient {
    connector: HttpsConnector<ProxyConnector>,
    options: HubOptions,
}

/// The body of a response.
pub(super) struct ResponseBody {
    body: Incoming,
    driver: Driver,
    host: String,
}

/// Reads and writes the socket of a connection whenever it is polled. `None` once the connection has closed.
struct Driver(Option<http1::Connection<MaybeHttpsStream<TokioIo<TcpStream>>, Empty<Bytes>>>);

impl Driver {
    fn poll(&mut self, cx: &mut std::task::Context<'_>) {
        if let Some(connection) = &mut self.0
            && Pin::new(connection).poll(cx).is_ready()
        {
            self.0 = None;
        }
    }
}

impl HubClient {
    pub(super) fn new(options: &HubOptions) -> Self {
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(ClientTls::default().config())
            .https_or_http()
            .enable_http1()
            .wrap_connector(ProxyConnector::from_environment());
        Self {
            connector,
            options: options.clone(),
        }
    }

    /// Sends a `GET` request and follows redirects. With `from`, requests the contents from this byte on.
    ///
    /// # Errors
    /// There is no response, or a redirect cannot be followed. All other HTTP statuses are returned as responses.
    pub(super) async fn get(
        &self,
        path: &str,
        from: Option<u64>,
    ) -> Result<Response<ResponseBody>, ClientError> {
        let endpoint = self.options.endpoint.as_str();
        let mut address = format!("{endpoint}{path}");
        for _ in 0..=MAX_REDIRECTS {
            let (uri, host) = parse_address(&address)?;
            let response = self.send(&uri, &host, from).await?;
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION);
            let location = location.and_then(|it| it.to_str().ok());
            let redirect = |reason: &str| ClientError::Redirect {
                host: host.clone(),
                reason: reason.to_owned(),
            };
            let location = location.ok_or_else(|| redirect("without a target"))?;
            let target = url::join(&address, location)
                .ok_or_else(|| redirect("to an address that is not http or https"))?;
            if address.starts_with("https://") && !target.starts_with("https://") {
                return Err(redirect(
                    "from https to another scheme, which is not secure",
                ));
            }
            address = target;
        }
        let (_, host) = parse_address(endpoint)?;
        Err(ClientError::Redirect {
            host,
            reason: format!("more than {MAX_REDIRECTS} times"),
        })
    }

    async fn send(
        &self,
        uri: &Uri,
        host: &str,
        from: Option<u64>,
    ) -> Result<Response<ResponseBody>, ClientError> {
        let mut request = Request::get(uri.path_and_query().map_or("/", |it| it.as_str()))
            .header(HOST, host)
            .header(USER_AGENT, AGENT);
        if let Some(from) = from {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        let is_hub = url::has_same_origin(&uri.to_string(), self.options.endpoint.as_str());
        if let Some(token) = self.options.token.as_ref().filter(|_| is_hub) {
            request = request.header(AUTHORIZATION, token.authorization());
        }
        let broken = |reason: String| ClientError::Broken {
            host: host.to_owned(),
            reason,
        };
        let request = request
            .body(Empty::new())
            .map_err(|it| broken(it.to_string()))?;
        let connecting = self.connector.clone().oneshot(uri.clone());
        let connected = timeout(OPEN_TIMEOUT, connecting).await;
        let stream = match connected {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(reason(&*error)),
            Err(_) => Err(format!("no connection within {} s", OPEN_TIMEOUT.as_secs())),
        };
        let stream = stream.map_err(|reason| ClientError::Connect {
            host: host.to_owned(),
            reason,
        })?;
        let handshake = http1::handshake(stream).await;
        let (mut sender, driver) = handshake.map_err(|error| broken(reason(&error)))?;
        let mut driver = Driver(Some(driver));
        let mut response = pin!(sender.send_request(request));
        let response = poll_fn(|cx| {
            driver.poll(cx);
            response.as_mut().poll(cx)
        });
        match timeout(READ_TIMEOUT, response).await {
            Ok(Ok(response)) => Ok(response.map(|body| ResponseBody {
                body,
                driver,
                host: host.to_owned(),
            })),
            Ok(Err(error)) => Err(broken(reason(&error))),
            Err(_) => Err(broken(no_data())),
        }
    }
}

impl ResponseBody {
    /// Returns the next chunk, or `None` at the end.
    ///
    /// # Errors
    /// The connection broke before the end, or nothing has arrived for [`READ_TIMEOUT`].
    pub(super) async fn next_chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        let Self { body, driver, host } = self;
        let broken = |reason| ClientError::Broken {
            host: host.clone(),
            reason,
        };
        let next = poll_fn(|cx| {
            loop {
                driver.poll(cx);
                match Pin::new(&mut *body).poll_frame(cx) {
                    Poll::Ready(Some(Ok(frame))) => {
                        // A frame without data holds trailers, which are ignored.
                        if let Ok(chunk) = frame.into_data() {
                            return Poll::Ready(Ok(Some(chunk)));
                        }
                    }
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(reason(&error))),
                    Poll::Ready(None) => return Poll::Ready(Ok(None)),
                    Poll::Pending => return Poll::Pending,
                }
            }
        });
        let next = timeout(READ_TIMEOUT, next).await;
        next.unwrap_or_else(|_| Err(no_data())).map_err(broken)
    }

    /// Reads the whole body.
    ///
    /// # Errors
    /// Like [`Self::next_chunk`]; also if the body is longer than `max` bytes.
    pub(super) async fn read_all(mut self, max: usize) -> Result<Vec<u8>, ClientError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.next_chunk().await? {
            if bytes.len() + chunk.len() > max {
                let host = self.host;
                return Err(ClientError::TooLong { host, max });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

fn no_data() -> String {
    format!("no data for {} s", READ_TIMEOUT.as_secs())
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    )
}

/// Parses the address of a request. Also returns its host. The error does not repeat the address, whose query may
/// contain a signature.
fn parse_address(address: &str) -> Result<(Uri, String), ClientError> {
    let uri: Option<Uri> = address.parse().ok();
    let host = uri
        .as_ref()
        .and_then(Uri::authority)
        .map(ToString::to_string);
    uri.zip(host).ok_or_else(|| ClientError::Redirect {
        host: "the Hub".to_owned(),
        reason: "to an address that is not valid".to_owned(),
    })
}

/// Returns the messages of an error and of its causes. Leaves out messages that an earlier one contains.
fn reason(error: &(dyn Error + 'static)) -> String {
    let mut messages = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !messages.iter().any(|earlier| earlier.contains(&message)) {
            messages.push(message);
        }
        cause = error.source();
    }
    messages.join(": ")
}
