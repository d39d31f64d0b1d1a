//! Protects the HTTP API from web pages: checks `Host` and `Origin`, and adds CORS headers.
//!
//! A browser lets any page send requests to any address, including loopback addresses, and the API may need no key.
//! Two headers identify such requests:
//!
//! - `Origin` names the page. Only the server's own origin and those in `--cors-origins` are allowed.
//! - `Host` names the server as the client addressed it. In a DNS rebinding attack, a page's host name resolves to this
//!   machine, so the browser treats the page and the server as one origin. Then `Host` has the attacker's name, which
//!   is not an allowed host.
//!
//! This module must not know the API's routes (except the health routes) or bodies.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::header::{HOST, HeaderName, ORIGIN};
use axum::http::{HeaderMap, HeaderValue, Method, Uri};
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

pub use super::host::{AllowedHost, AllowedOrigin};
use super::host::{Authority, Host, Origin};
use crate::error::{Error, ErrorKind};

/// Suffix of subdomains of `localhost`, which always resolve to this machine (RFC 6761, section 6.3).
const LOCALHOST_SUFFIX: &str = ".localhost";

/// Routes without a check of the host. Probes and load balancers use host names of their own, and the responses
/// contain only the server's state.
const HEALTH_ROUTES: [&str; 3] = ["/livez", "/readyz", "/health"];

/// Time for which a browser may cache the response to a preflight request. A change of `--cors-origins` may take this
/// long to reach a browser.
const PREFLIGHT_LIFETIME: Duration = Duration::from_secs(600);

/// Allowed host names of the server and allowed origins of web pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OriginPolicy {
    /// Allowed hosts besides IP addresses, `localhost` and its subdomains.
    pub allowed_hosts: Vec<AllowedHost>,
    /// Allowed origins besides the server's own.
    pub cors_origins: Vec<AllowedOrigin>,
}

impl OriginPolicy {
    /// Allows every host name. This is for a listener that browsers cannot reach by name, such as a Unix socket.
    /// Origins are still checked, because a proxy may forward `Origin`.
    #[must_use]
    pub fn without_host_check(mut self) -> Self {
        self.allowed_hosts = vec![AllowedHost::ANY];
        self
    }

    /// Returns the CORS layer that lets pages of the allowed origins read responses; `None` if no origins are configured.
    fn cors(&self) -> Option<CorsLayer> {
        if self.cors_origins.is_empty() {
            return None;
        }
        let policy = self.clone();
        let origins = AllowOrigin::predicate(move |origin, _| policy.is_listed(origin));
        let cors = CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST])
            // Any request header is safe, because the server ignores headers that it does not know.
            .allow_headers(AllowHeaders::mirror_request())
            // Sends `*`, which browsers accept because credentials are never allowed.
            .expose_headers(Any)
            .allow_private_network(true)
            .max_age(PREFLIGHT_LIFETIME);
        Some(cors)
    }

    /// Returns true if an entry of `--cors-origins` allows this origin.
    fn is_listed(&self, origin: &HeaderValue) -> bool {
        let origin = origin.to_str().ok().and_then(Origin::parse);
        let origin = origin.as_ref();
        self.cors_origins.iter().any(|entry| entry.allows(origin))
    }

    /// Checks the host and the origin of a request.
    ///
    /// # Errors
    /// The host name or the origin is not allowed.
    pub(super) fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Error> {
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
            let message =
                "The Host header must be a host name or IP address with an optional port.";
            return Err(rejected(&HOST, message));
        };
        let is_own = match &authority.host {
            // DNS rebinding needs a host name that the attacker controls, so IP addresses are safe.
            Host::Address(_) => true,
            Host::Name(name) => name == &LOCALHOST_SUFFIX[1..] || name.ends_with(LOCALHOST_SUFFIX),
        };
        if is_own
            || self
                .allowed_hosts
                .iter()
                .any(|entry| entry.allows(&authority))
        {
            return Ok(());
        }
        let name = &authority.host;
        let message = format!(
            "The host name {name} is not allowed. Use localhost or an IP address, or start the server with \
             --allowed-hosts {name}."
        );
        Err(rejected(&HOST, message))
    }

    fn check_origin(&self, origin: &HeaderValue, hosts: &[&[u8]]) -> Result<(), Error> {
        if self.is_listed(origin) {
            return Ok(());
        }
        let Some(origin) = origin.to_str().ok().and_then(Origin::parse) else {
            let message = "The Origin header does not name an origin. To allow requests from such web pages \
                           on the HTTP API, start the server with --cors-origins '*'.";
            return Err(rejected(&ORIGIN, message));
        };
        let is_own = |host: &&[u8]| {
            parse_authority(host)
                .is_some_and(|host| origin.authority.is_same(&host, &origin.scheme))
        };
        // If the request names several hosts, the origin must match each of them: it is ambiguous which one the
        // browser meant.
        if !hosts.is_empty() && hosts.iter().all(is_own) {
            return Ok(());
        }
        let message = format!(
            "Web pages of {origin} are not allowed. To allow them on the HTTP API, start the server with \
             --cors-origins {origin}."
        );
        Err(rejected(&ORIGIN, message))
    }
}

/// Checks the requests of browsers, and has the CORS headers for the responses.
#[derive(Clone)]
pub(crate) struct BrowserCheck {
    policy: Arc<OriginPolicy>,
    /// The CORS layer. `None` if no origins are configured.
    cors: Option<CorsLayer>,
}

impl BrowserCheck {
    pub(crate) fn new(policy: OriginPolicy) -> Self {
        Self {
            cors: policy.cors(),
            policy: Arc::new(policy),
        }
    }

    /// Checks the host name and the origin of a request.
    ///
    /// # Errors
    /// The host name or the origin is not allowed.
    pub(crate) fn check(&self, request: &Request) -> Result<(), Error> {
        self.policy.check(request.uri(), request.headers())
    }

    /// Returns the layer that adds CORS headers. `None` if no origins are configured.
    pub(crate) fn cors(&self) -> Option<&CorsLayer> {
        self.cors.as_ref()
    }
}

/// Collects every host that the request names: in HTTP/2's `:authority` or an absolute URI, and in `Host`. Old clients
/// and clients on Unix sockets may send no host or an empty one; browsers always send one.
fn hosts<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Vec<&'a [u8]> {
    let authority = uri.authority().map(|host| host.as_str().as_bytes());
    let headers = headers.get_all(HOST).iter().map(HeaderValue::as_bytes);
    let hosts = authority.into_iter().chain(headers);
    hosts.filter(|host| !host.is_empty()).collect()
}

fn parse_authority(host: &[u8]) -> Option<Authority> {
    Authority::parse(std::str::from_utf8(host).ok()?)
}

fn rejected(header: &HeaderName, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::HostNotAllowed, message).with_param(header.as_str())
}
