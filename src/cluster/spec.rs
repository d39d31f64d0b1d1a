//! The engines and routes of a gateway, as its settings describe them. This module must not know how an engine is
//! reached.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;

use super::address::EngineAddress;
use crate::certificates::ClientTls;

/// The engines of a gateway, and the routes to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterSpec {
    /// Engines. Their names differ, and so do their addresses.
    pub engines: Vec<EngineSpec>,
    /// Routes, one per model. Without routes, each engine's models are served under their own names.
    pub routes: Vec<RouteSpec>,
    /// Choice among engines of equal preference.
    pub placement: PlacementPolicy,
}

/// Choice of an engine for a request among engines of equal preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlacementPolicy {
    /// The engine with the fewest outstanding tokens for its weight.
    LeastLoad,
    /// The engine that has computed the longest prefix of the prompt, unless its outstanding tokens exceed those of
    /// another engine by more than the tokens it would reuse.
    CacheAware {
        /// Maximum number of blocks of prompts that the gateway remembers. A block is up to 512 bytes of a message.
        max_blocks: NonZeroU32,
    },
}

/// An engine behind a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineSpec {
    /// Name of the engine in routes, in the log and in metrics.
    pub name: Arc<str>,
    /// Address, which also names the protocol.
    pub address: EngineAddress,
    /// Key that the gateway sends to the engine (`Authorization: Bearer`).
    pub api_key: Option<ApiKey>,
    /// Certificates for an `https` address.
    pub tls: ClientTls,
    /// Kind of an OpenAI-compatible server. `None` if the engine's list of models tells.
    pub server: Option<ServerKind>,
    /// Context length of the engine's models in tokens. `None` if the engine reports it.
    pub context_length: Option<u32>,
}

/// Kind of an OpenAI-compatible server. The kinds differ in the request fields that they support.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerKind {
    /// vLLM's HTTP server.
    Vllm,
    /// llama.cpp's server.
    LlamaCpp,
    /// Any other server. Only OpenAI's own fields are sent to it.
    OpenAi,
}

/// Key for an engine. It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(Arc<str>);

/// The engines that serve one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSpec {
    /// Name of the model in clients' requests.
    pub model: String,
    /// Targets that share the requests, at least one.
    pub targets: Vec<TargetSpec>,
    /// Targets that get a request, in this order, if none of `targets` can take it.
    pub fallback: Vec<TargetSpec>,
    /// Limits of the requests of this route.
    pub policy: RoutePolicy,
}

/// A model of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetSpec {
    /// Name of the engine.
    pub engine: Arc<str>,
    /// Name under which the engine knows the model. `None` if it is the name of the route.
    pub model: Option<String>,
    /// Share of the requests relative to the other targets of the route, at least 1.
    pub weight: u32,
}

/// Limits of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutePolicy {
    /// Maximum number of times that a request is sent to an engine without receiving a token, at least 1.
    pub tries: u32,
    /// Maximum wait for the first token, if another target can take over.
    pub first_token_timeout: Duration,
    /// Maximum wait for each further token.
    pub stall_timeout: Duration,
    /// Maximum number of requests that each target runs at the same time. Further requests wait in the queue.
    pub max_concurrency: Option<u32>,
    /// Maximum number of requests that wait for a target. Further requests are rejected with `queue_full`.
    pub queue_depth: u32,
}

impl Default for RoutePolicy {
    fn default() -> Self {
        Self {
            tries: 3,
            first_token_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(10),
            max_concurrency: None,
            queue_depth: 1_024,
        }
    }
}

impl PlacementPolicy {
    /// Returns the policy that remembers at most this number of blocks. With 0, requests are placed by load alone.
    #[must_use]
    pub fn remembering(max_blocks: u32) -> Self {
        let max_blocks = NonZeroU32::new(max_blocks);
        max_blocks.map_or(Self::LeastLoad, |max_blocks| Self::CacheAware {
            max_blocks,
        })
    }
}

impl Default for PlacementPolicy {
    fn default() -> Self {
        Self::remembering(65_536)
    }
}

impl EngineSpec {
    /// Creates an engine without a key. Its name is its address.
    #[must_use]
    pub fn at(address: EngineAddress) -> Self {
        Self {
            name: address.as_str().into(),
            address,
            api_key: None,
            tls: ClientTls::default(),
            server: None,
            context_length: None,
        }
    }

    /// Returns true if both reach the same server with the same key, certificates and overrides, whatever their names.
    pub(super) fn is_same_server(&self, other: &Self) -> bool {
        self.address == other.address
            && self.api_key == other.api_key
            && self.tls == other.tls
            && self.server == other.server
            && self.context_length == other.context_length
    }
}

impl FromIterator<EngineAddress> for ClusterSpec {
    /// Creates the cluster of the engines at these addresses, without routes.
    fn from_iter<I: IntoIterator<Item = EngineAddress>>(addresses: I) -> Self {
        Self {
            engines: addresses.into_iter().map(EngineSpec::at).collect(),
            ..Self::default()
        }
    }
}

impl ApiKey {
    /// Wraps a key. Returns `None` if it is empty or cannot be sent in a header.
    #[must_use]
    pub fn new(key: &str) -> Option<Self> {
        let is_valid = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
        is_valid.then(|| Self(key.into()))
    }

    /// Returns the value of the `Authorization` header.
    pub(crate) fn authorization(&self) -> HeaderValue {
        let value = HeaderValue::try_from(format!("Bearer {}", self.0));
        let mut value = value.expect("a key consists of visible ASCII characters");
        value.set_sensitive(true);
        value
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}
