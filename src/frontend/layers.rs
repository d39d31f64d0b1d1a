//! The state that all layers of one API share.

use std::sync::Arc;
use std::time::Duration;

use super::authentication::Authenticator;
use crate::caller::PrefixSharing;
use crate::gateway::BrowserCheck;
use crate::request_memory::RequestMemory;
use crate::telemetry::{Api, Telemetry};

/// Settings of the layers.
#[derive(Clone)]
pub(crate) struct LayerSettings {
    /// Metrics of the server.
    pub telemetry: Telemetry,
    /// Timeout of a request whose client sets none.
    pub request_timeout: Duration,
    /// True if each request that ends is logged in the access log.
    pub access_log: bool,
    /// Authenticates requests; `None` if no request needs a key.
    pub authenticator: Option<Arc<Authenticator>>,
    /// Memory for large request bodies.
    pub request_memory: RequestMemory,
    /// Requests that may share computed prompt tokens.
    pub prefix_sharing: PrefixSharing,
}

/// State of the layers of one API.
#[derive(Clone)]
pub(super) struct Layers {
    pub(super) api: Api,
    /// Checks of `Host` and `Origin`; `None` for an API that browsers cannot use.
    pub(super) browser_check: Option<BrowserCheck>,
    pub(super) settings: LayerSettings,
}
