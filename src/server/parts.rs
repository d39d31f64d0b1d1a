//! The settings of a server, filled in by `config` or by a program that embeds Tokenway. This module must not know
//! how a server is built from them.

use std::time::Duration;

use super::engine::EngineParts;
use crate::caller::PrefixSharing;
use crate::cluster::{ClusterSpec, EngineConflict, find_conflicts};
use crate::gateway::{AllowedHost, OperatorRoutes, OriginPolicy, StreamFormat, UnknownFieldPolicy};
use crate::keys::KeySources;
use crate::listen::{Address, Limits, ServerTls};

/// Default of [`HttpFrontend::headers_after`]. It is below 60 s, the common idle timeout of load balancers.
const DEFAULT_HEADERS_AFTER: Duration = Duration::from_secs(30);

/// Default of [`ServerParts::body_memory_bytes`].
pub(crate) const DEFAULT_BODY_MEMORY_BYTES: u64 = 64 * 1024 * 1024;

/// Settings of a server.
#[derive(Clone)]
pub struct ServerParts {
    /// Source of the tokens: an engine in this process, or remote engines.
    pub source: Source,
    /// Settings of the HTTP API; `None` disables the API.
    pub http: Option<HttpFrontend>,
    /// Address of the gRPC API; `None` disables the API.
    pub grpc: Option<Address>,
    /// Settings of the admin listener; `None` if the HTTP API has the routes for operators.
    pub admin: Option<AdminFrontend>,
    /// Connection limits of both APIs and of the admin listener. Connections to the admin listener are not counted in
    /// the number of connections.
    pub limits: Limits,
    /// Memory for large request bodies that are read, parsed or queued, in bytes.
    pub body_memory_bytes: u64,
    /// Timeout of a request whose client sets none.
    pub request_timeout: Duration,
    /// True if the server logs one line for each request that ends.
    pub access_log: bool,
    /// Requests that may share computed prompt tokens.
    pub prefix_sharing: PrefixSharing,
    /// Keys that requests need; `None` if requests need no key.
    pub keys: Option<KeySources>,
    /// TLS of both APIs and of the admin listener, except on Unix sockets. `None` if they do not use TLS.
    pub tls: Option<ServerTls>,
    /// Durations of the phases of a shutdown.
    pub drain: DrainDurations,
}

impl ServerParts {
    /// Creates a server of this source with the defaults of the command line, and without APIs.
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self {
            source,
            http: None,
            grpc: None,
            admin: None,
            limits: Limits::default(),
            body_memory_bytes: DEFAULT_BODY_MEMORY_BYTES,
            request_timeout: Duration::from_secs(600),
            access_log: true,
            prefix_sharing: PrefixSharing::All,
            keys: None,
            tls: None,
            drain: DrainDurations {
                grace: Duration::from_secs(1),
                timeout: Duration::from_secs(30),
            },
        }
    }

    /// Returns true if other machines can reach the HTTP API or the admin listener, but only by IP address because no
    /// host name is allowed.
    pub(super) fn rejects_host_names(&self) -> bool {
        let http = self.http.iter();
        let http = http.map(|http| (&http.listen, &http.origins.allowed_hosts));
        let admin = self.admin.iter();
        let admin = admin.map(|admin| (&admin.listen, &admin.allowed_hosts));
        let rejects = |(listen, hosts): (&Address, &Vec<AllowedHost>)| {
            !listen.is_loopback() && hosts.is_empty()
        };
        self.keys.is_none() && http.chain(admin).any(rejects)
    }

    /// Returns the routes for operators that the HTTP API has. Without keys, anyone could stop the server there.
    pub(super) fn operator_routes(&self) -> OperatorRoutes {
        match (&self.admin, &self.keys) {
            (Some(_), _) => OperatorRoutes::None,
            (None, None) => OperatorRoutes::Metrics,
            (None, Some(_)) => OperatorRoutes::All,
        }
    }

    /// Returns the addresses on which clients and operators connect, each with the name of its setting.
    pub(super) fn listen_addresses(&self) -> impl Iterator<Item = (&'static str, &Address)> {
        let http = self.http.iter().map(|http| ("http-listen", &http.listen));
        let grpc = self.grpc.iter().map(|address| ("grpc-listen", address));
        let admin = self.admin.iter();
        let admin = admin.map(|admin| ("admin-listen", &admin.listen));
        http.chain(grpc).chain(admin)
    }

    /// Returns the TLS of a listener at this address. A Unix socket has none.
    pub(super) fn tls_at(&self, address: &Address) -> Option<ServerTls> {
        match address {
            Address::Tcp(_) => self.tls.clone(),
            Address::Unix(_) => None,
        }
    }

    /// Finds the remote engines that are listed twice, and those that are this server itself.
    pub(crate) fn engine_conflicts(&self) -> Vec<EngineConflict> {
        let Source::Remote(ClusterSpec { engines, .. }) = &self.source else {
            return Vec::new();
        };
        let listeners = self.listen_addresses();
        let listeners = listeners.map(|(setting, address)| (setting, address.to_string()));
        find_conflicts(engines, &listeners.collect::<Vec<_>>())
    }
}

/// Source of a server's tokens.
#[derive(Clone)]
pub enum Source {
    /// An engine in this process.
    Engine(EngineParts),
    /// Remote engines.
    Remote(ClusterSpec),
}

/// Settings of the HTTP API.
#[derive(Clone)]
pub struct HttpFrontend {
    /// Address to listen on.
    pub listen: Address,
    /// Format of a stream whose client's `Accept` header allows several formats equally.
    pub stream_format: StreamFormat,
    /// Treatment of unknown request fields.
    pub unknown_fields: UnknownFieldPolicy,
    /// Maximum time in the queue before a streamed request gets its response headers. With `None`, the headers are
    /// sent only when a worker starts the request.
    pub headers_after: Option<Duration>,
    /// Host names and origins from which requests are accepted.
    pub origins: OriginPolicy,
}

impl HttpFrontend {
    /// Creates an HTTP API at this address with the defaults of the command line: NDJSON, unknown fields are rejected,
    /// headers after 30 s in the queue, and no host names or origins besides the server's own.
    #[must_use]
    pub fn listening_on(listen: Address) -> Self {
        Self {
            listen,
            stream_format: StreamFormat::Ndjson,
            unknown_fields: UnknownFieldPolicy::Refuse,
            headers_after: Some(DEFAULT_HEADERS_AFTER),
            origins: OriginPolicy::default(),
        }
    }

    /// Returns the origin policy of the HTTP API. `needs_key` is true if requests need a key.
    pub(super) fn origins(&self, needs_key: bool) -> OriginPolicy {
        policy_at(&self.listen, self.origins.clone(), needs_key)
    }
}

/// Settings of the admin listener, which has the routes for operators.
#[derive(Clone)]
pub struct AdminFrontend {
    /// Address to listen on.
    pub listen: Address,
    /// Host names from which requests are accepted, besides IP addresses and `localhost`.
    pub allowed_hosts: Vec<AllowedHost>,
}

impl AdminFrontend {
    /// Returns true if requests need a key. On a loopback address or a Unix socket they need none.
    pub(super) fn needs_key(&self, has_keys: bool) -> bool {
        has_keys && !self.listen.is_loopback()
    }

    /// Returns the origin policy. `--cors-origins` does not apply, so no web page can stop the server.
    pub(super) fn origins(&self, needs_key: bool) -> OriginPolicy {
        let policy = OriginPolicy {
            allowed_hosts: self.allowed_hosts.clone(),
            cors_origins: Vec::new(),
        };
        policy_at(&self.listen, policy, needs_key)
    }
}

/// Returns the origin policy of a listener at this address. A Unix socket needs no check of host names, because
/// browsers cannot connect to it. A listener that needs a key needs no such check either, because a page that uses DNS
/// rebinding has no key.
fn policy_at(listen: &Address, policy: OriginPolicy, needs_key: bool) -> OriginPolicy {
    match listen {
        Address::Tcp(_) if !needs_key => policy,
        Address::Tcp(_) | Address::Unix(_) => policy.without_host_check(),
    }
}

/// Durations of the two phases of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainDurations {
    /// Time during which the server still listens but reports that it is not ready, so that load balancers stop sending
    /// requests.
    pub grace: Duration,
    /// Maximum time for running streams to finish.
    pub timeout: Duration,
}
