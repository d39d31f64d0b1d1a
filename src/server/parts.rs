//! What a server is made of, as the settings or an embedding program say. It must not know how the parts are put together.

use std::time::Duration;

use super::engine::EngineParts;
use crate::gateway::{OriginPolicy, StreamFormat, UnknownFields};
use crate::listen::{Address, Limits};

/// How long a streamed request waits in the queue, by default, before its headers are sent: less than the 60 s after
/// which load balancers give up a silent answer.
const HEADERS_AFTER: Duration = Duration::from_secs(30);

/// What a server is made of.
#[derive(Clone)]
pub struct ServerParts {
    /// Where tokens come from.
    pub source: Source,
    /// The HTTP door, if there is one.
    pub http: Option<HttpFrontend>,
    /// Where the gRPC door listens, if there is one. It needs an engine of this process.
    pub grpc: Option<Address>,
    /// What both doors put up with.
    pub limits: Limits,
    /// How long a request may take where its client does not say.
    pub request_timeout: Duration,
    /// How the server ends.
    pub drain: Drain,
}

/// Where a server's tokens come from.
#[derive(Clone)]
pub enum Source {
    /// An engine in this process.
    Engine(EngineParts),
    /// Engines elsewhere, by their addresses.
    Remote(Vec<String>),
}

/// The HTTP door.
#[derive(Clone)]
pub struct HttpFrontend {
    /// Where it listens.
    pub listen: Address,
    /// The form of a stream whose client has no preference.
    pub stream_format: StreamFormat,
    /// What happens to fields of a request that are unknown.
    pub unknown_fields: UnknownFields,
    /// How long a streamed request waits in the queue before its headers are sent; `None` is without end.
    pub headers_after: Option<Duration>,
    /// Under which host names, and for pages of which origins, requests are taken.
    pub origins: OriginPolicy,
}

impl HttpFrontend {
    /// The HTTP API at this address, with the defaults of the command line: NDJSON, unknown fields are refused, headers
    /// after 30 s in the queue, and no host names or origins besides the server's own.
    #[must_use]
    pub fn at(listen: Address) -> Self {
        Self {
            listen,
            stream_format: StreamFormat::Ndjson,
            unknown_fields: UnknownFields::Refuse,
            headers_after: Some(HEADERS_AFTER),
            origins: OriginPolicy::default(),
        }
    }

    /// Whether other machines reach the HTTP API, but no host name that they may use is allowed.
    pub(super) fn rejects_host_names(&self) -> bool {
        !self.listen.is_loopback() && self.origins.allowed_hosts.is_empty()
    }

    /// The policy at the address where it listens. Browsers do not reach a Unix socket, so its host names are not checked.
    pub(super) fn origins(&self) -> OriginPolicy {
        match self.listen {
            Address::Tcp(_) => self.origins.clone(),
            Address::Unix(_) => self.origins.clone().without_host_check(),
        }
    }
}

/// How a server ends.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// How long it goes on answering 'not ready' before it closes its listeners, so that load
    /// balancers notice.
    pub grace: Duration,
    /// How long running streams may take to end.
    pub timeout: Duration,
}
