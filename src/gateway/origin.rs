//! Which web pages may use the HTTP API, as long as no keys are asked for.
//!
//! A browser sends requests of any page to any address, this machine's own included. Two things tell such requests
//! apart from those of an operator's own programs. `Host` is the name under which the server was reached: a page whose
//! name has been pointed at this machine's address (DNS rebinding) is of the same origin to its browser, but not a name
//! that this server has. `Origin` is the page itself, wherever it sends its request.
//!
//! It must not know what the requests are about.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::header::{HOST, HeaderName, ORIGIN};
use axum::http::{HeaderMap, HeaderValue, Method, Uri};
use axum::middleware::Next;
use axum::response::Response;
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

use super::error_response::ErrorResponse;
pub use super::host::{AllowedHost, AllowedOrigin};
use super::host::{Authority, Host, Origin};
use crate::error::{Error, ErrorKind};

/// The name of this machine to itself (RFC 6761, section 6.3), with the dot of its subdomains.
const LOCALHOST: &str = ".localhost";

/// Routes that answer under every host name: probes and load balancers come by names of their own, and the answers tell
/// nothing but the state of the server.
const HEALTH_ROUTES: [&str; 3] = ["/livez", "/readyz", "/health"];

/// How long a browser may keep the answer to a preflight. A restart with other settings is noticed after it.
const PREFLIGHT_LIFETIME: Duration = Duration::from_secs(600);

/// Which host names the server answers to, and pages of which origins may use it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OriginPolicy {
    /// Host names besides `localhost`, its subdomains and IP addresses.
    pub allowed_hosts: Vec<AllowedHost>,
    /// Origins besides the server's own.
    pub cors_origins: Vec<AllowedOrigin>,
}

impl OriginPolicy {
    /// The policy of a listener that no browser reaches by a name, such as a Unix socket: every host name is allowed.
    /// A proxy may still pass on a page's `Origin`.
    #[must_use]
    pub fn without_host_check(mut self) -> Self {
        self.allowed_hosts = vec![AllowedHost::ANY];
        self
    }

    /// What lets browsers read answers from pages of the allowed origins; `None` where there are none.
    pub(super) fn cors(&self) -> Option<CorsLayer> {
        if self.cors_origins.is_empty() {
            return None;
        }
        let policy = self.clone();
        let origins = AllowOrigin::predicate(move |origin, _| policy.lists(origin));
        let cors = CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST])
            // Whatever the page wants to send: an unknown header steers nothing.
            .allow_headers(AllowHeaders::mirror_request())
            // All headers. Credentials are never allowed, so browsers take the `*`.
            .expose_headers(Any)
            .allow_private_network(true)
            .max_age(PREFLIGHT_LIFETIME);
        Some(cors)
    }

    /// Whether `--cors-origins` has this origin.
    fn lists(&self, origin: &HeaderValue) -> bool {
        let origin = origin.to_str().ok().and_then(Origin::parse);
        let origin = origin.as_ref();
        self.cors_origins.iter().any(|entry| entry.allows(origin))
    }

    /// # Errors
    /// When the request came under a name, or from a page, that is not allowed.
    fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Error> {
        let hosts = hosts(uri, headers);
        if !HEALTH_ROUTES.contains(&uri.path()) {
            hosts.iter().try_for_each(|host| self.check_host(host))?;
        }
        let mut origins = headers.get_all(ORIGIN).iter();
        origins.try_for_each(|origin| self.check_origin(origin, &hosts))
    }

    fn check_host(&self, host: &[u8]) -> Result<(), Error> {
        if self.allowed_hosts.contains(&AllowedHost::ANY) {
            return Ok(());
        }
        let Some(authority) = parse_authority(host) else {
            let message = "The Host header must be a host name with or without a port.";
            return Err(refused(&HOST, message));
        };
        let is_own = match &authority.host {
            // Rebinding needs a name that somebody else can point at this address.
            Host::Address(_) => true,
            Host::Name(name) => name == &LOCALHOST[1..] || name.ends_with(LOCALHOST),
        };
        if is_own || self.allowed_hosts.iter().any(|it| it.allows(&authority)) {
            return Ok(());
        }
        let name = &authority.host;
        let message = format!(
            "This server does not answer to the host name {name}. Use localhost or an IP address, or start the \
             server with --allowed-hosts {name}."
        );
        Err(refused(&HOST, message))
    }

    fn check_origin(&self, origin: &HeaderValue, hosts: &[&[u8]]) -> Result<(), Error> {
        if self.lists(origin) {
            return Ok(());
        }
        let Some(origin) = origin.to_str().ok().and_then(Origin::parse) else {
            let message = "Requests of web pages without an origin of their own are not allowed, unless the \
                           server is started with --cors-origins '*'.";
            return Err(refused(&ORIGIN, message));
        };
        let is_own = |host: &&[u8]| {
            parse_authority(host)
                .is_some_and(|host| origin.authority.is_same(&host, &origin.scheme))
        };
        // With two hosts nobody knows which of them the browser meant.
        if !hosts.is_empty() && hosts.iter().all(is_own) {
            return Ok(());
        }
        let message = format!(
            "Web pages of {origin} may not use this server. Start it with --cors-origins {origin} to let them."
        );
        Err(refused(&ORIGIN, message))
    }
}

/// Refuses requests of web pages that may not use the server.
pub(super) async fn check(
    State(policy): State<Arc<OriginPolicy>>,
    request: Request,
    next: Next,
) -> Result<Response, ErrorResponse> {
    policy.check(request.uri(), request.headers())?;
    Ok(next.run(request).await)
}

/// Every host that the request names: HTTP/2's `:authority`, or the one of an absolute URI, and `Host`. Old clients,
/// and those on Unix sockets, may name none or an empty one; browsers always name one.
fn hosts<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Vec<&'a [u8]> {
    let authority = uri.authority().map(|it| it.as_str().as_bytes());
    let headers = headers.get_all(HOST).iter().map(HeaderValue::as_bytes);
    let hosts = authority.into_iter().chain(headers);
    hosts.filter(|host| !host.is_empty()).collect()
}

fn parse_authority(host: &[u8]) -> Option<Authority> {
    Authority::parse(std::str::from_utf8(host).ok()?)
}

fn refused(header: &HeaderName, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::HostNotAllowed, message).with_param(header.as_str())
}
