//! The keys of `[[engine]]` and `[[route]]` tables. `docs/configuration.md` describes each of them.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use crate::cluster::{EngineAddress, RoutePolicy, ServerKind};
use crate::config::nested_tables::Nested;
use crate::config::values::{EngineName, ModelName, ParsedText, PositiveInteger, PositiveSeconds};

/// Keys that users may expect, but that must not exist: (key, explanation).
pub(super) const FORBIDDEN_KEYS: [(&str, &str); 1] = [(
    "api_key",
    "write api_key_env or api_key_file; a key must not stand in the settings file",
)];

/// A table with its position in the file.
pub(super) type Located<T> = Spanned<Nested<T>>;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ClusterTables {
    pub(super) engine: Vec<Located<EngineTable>>,
    pub(super) route: Vec<Located<RouteTable>>,
}

/// An `[[engine]]` table.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct EngineTable {
    /// Name of the engine in routes, in the log and in metrics. Required, and different for each engine.
    pub(super) name: Option<Spanned<EngineName>>,
    /// Address, whose scheme names the protocol. Required.
    pub(super) address: Option<Spanned<ParsedText<EngineAddress>>>,
    /// Environment variable with the key that the gateway sends to the engine. Default: no key.
    pub(super) api_key_env: Option<Spanned<String>>,
    /// File with the key that the gateway sends to the engine, instead of `api_key_env`.
    pub(super) api_key_file: Option<Spanned<PathBuf>>,
    /// CA certificates (PEM file) that verify the certificate of an engine with an `https` address. Default: those of
    /// `--engine-tls-ca`, or else those of this machine.
    pub(super) tls_ca: Option<Spanned<PathBuf>>,
    /// Certificate (PEM file) that the gateway presents to the engine. Default: that of `--engine-tls-cert`, or else
    /// none.
    pub(super) tls_cert: Option<Spanned<PathBuf>>,
    /// Private key (PEM file) of the certificate in `tls_cert`.
    pub(super) tls_key: Option<Spanned<PathBuf>>,
    /// Kind of an OpenAI-compatible server. Default: what the engine's list of models tells.
    pub(super) server: Option<Spanned<ParsedText<ServerKind>>>,
    /// Context length of the engine's models in tokens, at least 1. Default: what the engine reports.
    pub(super) context_length: Option<PositiveInteger<u32>>,
}

/// A `[[route]]` table.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RouteTable {
    /// Name of the model in clients' requests. Required, and different for each route.
    pub(super) model: Option<Spanned<ModelName>>,
    /// Targets that share the requests. Required, at least one.
    pub(super) targets: Option<Spanned<Vec<Located<TargetTable>>>>,
    /// Targets that get a request, in this order, if none of `targets` can take it. Default: none.
    pub(super) fallback: Vec<Located<TargetTable>>,
    /// Limits of the route's requests.
    pub(super) policy: Nested<PolicyTable>,
}

/// An item of `targets` or `fallback`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct TargetTable {
    /// Name of the engine. Required.
    pub(super) engine: Option<Spanned<EngineName>>,
    /// Name under which the engine knows the model. Default: the route's `model`.
    pub(super) model: Option<ModelName>,
    /// Share of the requests relative to the other targets, at least 1. Default: 1. Not allowed in `fallback`.
    pub(super) weight: Option<Spanned<PositiveInteger<u32>>>,
}

/// The table `policy` of a route. The defaults are those of [`RoutePolicy`].
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct PolicyTable {
    /// Maximum number of times that a request is sent to an engine without receiving a token, at least 1.
    tries: Option<PositiveInteger<u32>>,
    /// Maximum wait for the first token in seconds, above 0.
    first_token_timeout: Option<PositiveSeconds>,
    /// Maximum wait for each further token in seconds, above 0.
    stall_timeout: Option<PositiveSeconds>,
    /// Maximum number of requests that each target runs at the same time, at least 1. Default: no limit.
    max_concurrency: Option<PositiveInteger<u32>>,
    /// Maximum number of requests that wait for a target.
    queue_depth: Option<u32>,
}

impl PolicyTable {
    pub(super) fn policy(&self) -> RoutePolicy {
        let default = RoutePolicy::default();
        let seconds = |set: Option<PositiveSeconds>, default| set.map_or(default, Into::into);
        RoutePolicy {
            tries: self.tries.map_or(default.tries, Into::into),
            first_token_timeout: seconds(self.first_token_timeout, default.first_token_timeout),
            stall_timeout: seconds(self.stall_timeout, default.stall_timeout),
            max_concurrency: self
                .max_concurrency
                .map(Into::into)
                .or(default.max_concurrency),
            queue_depth: self.queue_depth.unwrap_or(default.queue_depth),
        }
    }
}
