//! The settings that `serve`, `engine` and `gateway` share: request timeout, connections and shutdown.

use std::time::Duration;

use clap::{ArgAction, Args};
use serde::{Deserialize, Serialize};

use super::admin::AdminSettings;
use super::error::ConfigError;
use super::grpc::GrpcSettings;
use super::http::HttpSettings;
use super::keys::KeySettings;
use super::log::LogSettings;
use super::settings::Settings;
use super::tls::ServerTlsSettings;
use super::values::{ParsedText, PositiveInteger, PositiveSeconds, Seconds};
use crate::caller::PrefixSharing;
use crate::gateway::AllowedHost;
use crate::listen::{Address, Limits};
use crate::server::{AdminFrontend, DrainDurations, ServerParts, Source};

/// The smallest memory for large bodies, in MiB: enough for one body of the maximum size.
const MIN_BODY_MEMORY_MIB: u32 = 4;

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Queue and limits")]
pub(super) struct ServerSettings {
    /// Time limit in seconds for a request whose client sets none. Above 0
    #[arg(
        long,
        env = "TOKENWAY_REQUEST_TIMEOUT",
        value_name = "SECONDS",
        default_value = "600"
    )]
    request_timeout: PositiveSeconds,
    /// Requests that may share computed prompt tokens: `all`, or `caller` (only requests with the same API key or
    /// Authorization header, `user` and `cache_salt`). With `caller`, a client cannot learn from response times which
    /// prompts other callers have sent
    #[arg(
        long,
        env = "TOKENWAY_PREFIX_SHARING",
        value_name = "SCOPE",
        default_value = "all"
    )]
    prefix_sharing: ParsedText<PrefixSharing>,
    #[command(flatten)]
    #[serde(flatten)]
    keys: KeySettings,
    #[command(flatten)]
    #[serde(flatten)]
    tls: ServerTlsSettings,
    #[command(flatten)]
    #[serde(flatten)]
    admin: AdminSettings,
    #[command(flatten)]
    #[serde(flatten)]
    connections: ConnectionSettings,
    #[command(flatten)]
    #[serde(flatten)]
    shutdown: ShutdownSettings,
    #[command(flatten)]
    #[serde(flatten)]
    log: LogSettings,
}

/// Limits and timeouts of client connections. The timeouts cannot be disabled, because a client that stops halfway
/// would hold its connection forever.
#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Connections")]
struct ConnectionSettings {
    /// Maximum number of open connections to both APIs together. Further connections are closed at once. At least 1
    #[arg(
        long,
        env = "TOKENWAY_MAX_CONNECTIONS",
        value_name = "COUNT",
        default_value = "10000"
    )]
    max_connections: PositiveInteger<u32>,
    /// Maximum number of open connections from one IPv4 address or IPv6 /64 network, except from loopback
    /// addresses. Set it higher if all clients come through a proxy on another machine. At least 1
    #[arg(
        long,
        env = "TOKENWAY_MAX_CONNECTIONS_PER_ADDRESS",
        value_name = "COUNT",
        default_value = "2000"
    )]
    max_connections_per_address: PositiveInteger<u32>,
    /// Time in seconds for which an idle connection is kept open. Set it longer than the idle timeout of a
    /// load balancer in front. Above 0
    #[arg(
        long,
        env = "TOKENWAY_KEEP_ALIVE_TIMEOUT",
        value_name = "SECONDS",
        default_value = "75"
    )]
    keep_alive_timeout: PositiveSeconds,
    /// Time limit in seconds for a client to send a request's headers, and the first bytes of a new
    /// connection. Above 0
    #[arg(
        long,
        env = "TOKENWAY_HEADER_TIMEOUT",
        value_name = "SECONDS",
        default_value = "10"
    )]
    header_timeout: PositiveSeconds,
    /// Time in seconds after which a request ends if its body makes no progress. The server waits this time for the
    /// whole body, and a second more for each 500 bytes received. Above 0
    #[arg(
        long,
        env = "TOKENWAY_BODY_TIMEOUT",
        value_name = "SECONDS",
        default_value = "30"
    )]
    body_timeout: PositiveSeconds,
    /// Time in seconds after which a connection is closed if its client reads nothing of the response. An HTTP/2
    /// client must read at least 16 KiB of a stream in this time, and 100 bytes per second on average. Set it longer
    /// than the slow reader timeout of the engine, after which a stream ends with an error. Above 0
    #[arg(
        long,
        env = "TOKENWAY_WRITE_TIMEOUT",
        value_name = "SECONDS",
        default_value = "30"
    )]
    write_timeout: PositiveSeconds,
    /// Memory in MiB for the bodies of large requests (over 64 KiB), on both APIs together. Large requests that wait in
    /// the queue, and large responses without `stream`, each have as much memory again. A further large request waits
    /// up to 5 s, and is then rejected with `queue_full`. At least 4
    #[arg(
        long,
        env = "TOKENWAY_BODY_MEMORY_MIB",
        value_name = "MIB",
        default_value_t = 64
    )]
    body_memory_mib: u32,
    /// Allow listening without API keys on addresses that other machines can reach: everyone who can reach the
    /// address can use the model
    #[arg(long, env = "TOKENWAY_INSECURE", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", default_value = "false", action = ArgAction::Set)]
    insecure: bool,
    /// Host names that clients of the HTTP API and of the admin listener may use besides localhost, its subdomains and
    /// IP addresses: `name`, `name:port`, `.name` (with its subdomains) or `*.name` (its subdomains only). Separate
    /// several with commas, or repeat the flag. `*` allows every name and disables the protection against DNS
    /// rebinding [default: none]
    #[arg(
        long,
        env = "TOKENWAY_ALLOWED_HOSTS",
        value_delimiter = ',',
        value_name = "HOST"
    )]
    allowed_hosts: Vec<ParsedText<AllowedHost>>,
}

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Shutdown")]
struct ShutdownSettings {
    /// Time in seconds between the start of a shutdown and the closing of the listeners. New requests are
    /// answered with the error `draining` in this time. Set it longer than a load balancer needs to notice.
    /// 0 closes the listeners at once
    #[arg(
        long,
        env = "TOKENWAY_DRAIN_GRACE",
        value_name = "SECONDS",
        default_value = "1"
    )]
    drain_grace: Seconds,
    /// Time in seconds that running streams get to finish after the listeners are closed. 0 ends them at
    /// once
    #[arg(
        long,
        env = "TOKENWAY_DRAIN_TIMEOUT",
        value_name = "SECONDS",
        default_value = "30"
    )]
    drain_timeout: Seconds,
}

impl ServerSettings {
    /// Builds the parts of a server that serves these APIs.
    pub(super) fn server_parts(
        self,
        source: Source,
        http: Option<HttpSettings>,
        grpc: Option<GrpcSettings>,
        settings: &Settings,
    ) -> Result<ServerParts, ConfigError> {
        let connections = self.connections;
        let hosts = connections.allowed_hosts.into_iter();
        let allowed_hosts: Vec<_> = hosts.map(|host| host.value).collect();
        let http = http.map(|http| http.frontend(allowed_hosts.clone()));
        let grpc = grpc.map(GrpcSettings::address);
        let admin = self.admin.address().map(|listen| AdminFrontend {
            listen,
            allowed_hosts,
        });
        if connections.body_memory_mib < MIN_BODY_MEMORY_MIB {
            let name = settings.name("body_memory_mib");
            let problem = format!(
                "{name} must be at least {MIN_BODY_MEMORY_MIB}, the size of the largest body (got {})",
                connections.body_memory_mib
            );
            return Err(settings.error("body_memory_mib", problem));
        }
        let keys = self.keys.sources()?;
        if keys.is_none() && !connections.insecure {
            let http = http.iter().map(|http| ("http_listen", &http.listen));
            let grpc = grpc.iter().map(|address| ("grpc_listen", address));
            let admin = admin.iter().map(|admin| ("admin_listen", &admin.listen));
            http.chain(grpc)
                .chain(admin)
                .try_for_each(|(key, address)| reject_public_address(key, address, settings))?;
        }
        Ok(ServerParts {
            source,
            http,
            grpc,
            admin,
            limits: Limits {
                max_connections: connections.max_connections.into(),
                max_connections_per_address: connections.max_connections_per_address.into(),
                keep_alive_timeout: connections.keep_alive_timeout.into(),
                header_timeout: connections.header_timeout.into(),
                body_timeout: connections.body_timeout.into(),
                write_timeout: connections.write_timeout.into(),
                ..Limits::default()
            },
            body_memory_bytes: u64::from(connections.body_memory_mib) * 1024 * 1024,
            request_timeout: self.request_timeout.into(),
            access_log: self.log.access_log(),
            prefix_sharing: self.prefix_sharing.value,
            keys,
            tls: self.tls.server_tls(settings)?,
            drain: DrainDurations {
                grace: Duration::from(self.shutdown.drain_grace),
                timeout: self.shutdown.drain_timeout.into(),
            },
        })
    }
}

/// Rejects a listen address that other machines can reach, unless `--insecure` is set: the server does not
/// authenticate clients.
fn reject_public_address(
    key: &str,
    address: &Address,
    settings: &Settings,
) -> Result<(), ConfigError> {
    if address.is_loopback() {
        return Ok(());
    }
    let name = settings.name(key);
    let problem = format!(
        "{name} {address} can be reached from other machines, and the server does not authenticate clients. Create a \
         key with `tokenway keys new` and set --keys-file; or use a loopback address or unix:/path; or set --insecure \
         to allow it."
    );
    Err(settings.error(key, problem))
}
