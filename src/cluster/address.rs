//! Addresses of remote engines. They are compared in normalized form.
//!
//! The scheme of an address names the protocol: `http://`, `grpc://`, `https://` and `unix:` are Tokenway's gRPC API,
//! `openai+http://` is an OpenAI-compatible HTTP API, and `vllm+grpc://` is vLLM's gRPC API.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use http::Uri;
use http::uri::Scheme;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::transport::Endpoint;

#[cfg(test)]
mod tests;

/// Port of an `http` address that names none.
const HTTP_PORT: u16 = 80;
/// Port of an `https` address that names none.
const HTTPS_PORT: u16 = 443;
/// Start of the address of a Tokenway engine with TLS.
const HTTPS_PREFIX: &str = "https://";
/// Another spelling of the start `http://` of the address of a Tokenway engine.
const GRPC_PREFIX: &str = "grpc://";
/// Start of the address of an OpenAI-compatible API. The rest is the base URL of the API.
const OPENAI_PREFIX: &str = "openai+";
/// Path of an OpenAI-compatible API whose address has none.
const OPENAI_PATH: &str = "/v1";
/// Start of the address of vLLM's gRPC API.
const VLLM_PREFIX: &str = "vllm+grpc://";

/// The forms of an address, for error messages.
const FORMS: &str = "use http://host:port, grpc://host:port, https://host:port (TLS) or unix:/path for a Tokenway \
                     engine, openai+http://host:port/v1 or openai+https://… for an OpenAI-compatible one, \
                     vllm+grpc://host:port for vLLM's gRPC API";

/// Address of a remote engine. Addresses are equal if they have the same host and port, or the same socket, even if
/// they are written differently.
#[derive(Clone, Debug)]
pub struct EngineAddress {
    text: String,
    protocol: EngineProtocol,
    target: Target,
}

/// The protocol of a remote engine.
#[derive(Clone, Debug)]
pub(super) enum EngineProtocol {
    /// Tokenway's gRPC API.
    Tokenway,
    /// An OpenAI-compatible HTTP API at this base URL, such as `http://host:8000/v1`.
    OpenAi(Uri),
    /// vLLM's gRPC API at this URL, such as `http://host:9000`.
    Vllm(Uri),
}

/// Normalized address.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Tcp { host: Host, port: u16 },
    Unix(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    /// Host name in lower case.
    Name(String),
    Ip(IpAddr),
}

impl EngineAddress {
    /// Returns the protocol of the engine.
    pub(super) fn protocol(&self) -> &EngineProtocol {
        &self.protocol
    }

    /// Returns the endpoint of the address of a Tokenway engine, without options.
    pub(super) fn endpoint(&self) -> Endpoint {
        Endpoint::from_shared(tokenway_url(&self.text).into_owned())
            .expect("an engine address is checked when it is parsed")
    }

    /// Returns true if the connections to the engine use TLS.
    pub(crate) fn uses_tls(&self) -> bool {
        match &self.protocol {
            EngineProtocol::Tokenway => self.text.starts_with(HTTPS_PREFIX),
            EngineProtocol::OpenAi(url) => url.scheme() == Some(&Scheme::HTTPS),
            EngineProtocol::Vllm(_) => false,
        }
    }

    /// Returns true if the engine is an OpenAI-compatible server.
    pub(crate) fn is_openai(&self) -> bool {
        matches!(self.protocol, EngineProtocol::OpenAi(_))
    }

    /// Returns the address as it was written.
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    /// Returns true if both addresses reach the same server.
    pub(super) fn reaches_same_server(&self, other: &Self) -> bool {
        match (&self.target, &other.target) {
            (
                Target::Tcp { host, port },
                Target::Tcp {
                    host: other,
                    port: other_port,
                },
            ) => port == other_port && (host.accepts(other) || other.accepts(host)),
            (one, other) => one == other,
        }
    }

    /// Returns true if a server that listens on `listen` can be reached at this address.
    pub(super) fn matches_listener(&self, listen: &str) -> bool {
        match (&self.target, listen.strip_prefix("unix:")) {
            (Target::Unix(path), Some(listen)) => *path == normalized(Path::new(listen)),
            (Target::Tcp { host, port }, None) => {
                let Some((listen_host, listen_port)) = listen.rsplit_once(':') else {
                    return false;
                };
                listen_port.parse() == Ok(*port) && Host::from(listen_host).accepts(host)
            }
            (Target::Unix(_), None) | (Target::Tcp { .. }, Some(_)) => false,
        }
    }
}

impl PartialEq for EngineAddress {
    fn eq(&self, other: &Self) -> bool {
        self.target == other.target
    }
}

impl Eq for EngineAddress {}

impl fmt::Display for EngineAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for EngineAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let openai = text.strip_prefix(OPENAI_PREFIX);
        let parsed = match (openai, text.strip_prefix(VLLM_PREFIX)) {
            (Some(url), _) => parse_openai_url(url),
            (None, Some(authority)) => parse_vllm_authority(authority),
            (None, None) => {
                let url = tokenway_url(text);
                parse_target(&url).and_then(|target| {
                    let endpoint = Endpoint::from_shared(url.into_owned());
                    let protocol = EngineProtocol::Tokenway;
                    endpoint.map(|_| (protocol, target)).map_err(|_| "")
                })
            }
        };
        let (protocol, target) = parsed.map_err(|problem| {
            let shown = without_secrets(text);
            format!("'{shown}' is not a valid engine address{problem}; {FORMS}")
        })?;
        Ok(Self {
            text: text.to_owned(),
            protocol,
            target,
        })
    }
}

/// Returns the address of a Tokenway engine as the URL that tonic connects to.
fn tokenway_url(text: &str) -> Cow<'_, str> {
    match text.strip_prefix(GRPC_PREFIX) {
        Some(rest) => Cow::Owned(format!("http://{rest}")),
        None => Cow::Borrowed(text),
    }
}

/// Parses the base URL of an OpenAI-compatible API. The error is that of [`parse_target`].
fn parse_openai_url(url: &str) -> Result<(EngineProtocol, Target), &'static str> {
    let (scheme, rest, default_port) =
        match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
            (Some(rest), _) => ("http", rest, HTTP_PORT),
            (None, Some(rest)) => ("https", rest, HTTPS_PORT),
            (None, None) => return Err(""),
        };
    let (authority, path) = match rest.split_once('/') {
        Some((authority, path)) => (authority, path.trim_matches('/')),
        None => (rest, ""),
    };
    let target = parse_authority(authority, default_port)?;
    let path = match path {
        "" => OPENAI_PATH.to_owned(),
        path => format!("/{path}"),
    };
    if path.contains(['?', '#']) {
        return Err(": it must not have a query string or a fragment");
    }
    let url = format!("{scheme}://{authority}{path}");
    Ok((EngineProtocol::OpenAi(url.parse().map_err(|_| "")?), target))
}

/// Parses the host and the port of vLLM's gRPC API. The error is that of [`parse_target`].
fn parse_vllm_authority(authority: &str) -> Result<(EngineProtocol, Target), &'static str> {
    let authority = authority.trim_end_matches('/');
    let target = parse_authority(authority, HTTP_PORT)?;
    let uri: Uri = format!("http://{authority}").parse().map_err(|_| "")?;
    if uri.port().is_none() {
        return Err(": it must have the port that `vllm serve` got as --grpc-port");
    }
    Ok((EngineProtocol::Vllm(uri), target))
}

/// Parses the address of a Tokenway engine. The error is appended to "… is not a valid engine address": it is empty,
/// or a colon and the reason.
fn parse_target(text: &str) -> Result<Target, &'static str> {
    if let Some(path) = text.strip_prefix("unix:") {
        let path = Path::new(path.strip_prefix("//").unwrap_or(path));
        let target = path.is_absolute().then(|| Target::Unix(normalized(path)));
        return target.ok_or(": the path must be absolute");
    }
    if let Some(rest) = text.strip_prefix(HTTPS_PREFIX) {
        let authority = rest.trim_end_matches('/');
        let target = parse_authority(authority, HTTPS_PORT)?;
        check_server_name(authority)?;
        return Ok(target);
    }
    let rest = text.strip_prefix("http://").ok_or("")?;
    parse_authority(rest.trim_end_matches('/'), HTTP_PORT)
}

/// Checks that a certificate can have the name of the host. The error is that of [`parse_target`].
fn check_server_name(authority: &str) -> Result<(), &'static str> {
    let uri: Uri = format!("https://{authority}").parse().map_err(|_| "")?;
    let host = uri.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host);
    name.map(|_| ())
        .map_err(|_| ": its host is not a valid name of a TLS server")
}

/// Parses the host and the port of an address. The error is that of [`parse_target`].
fn parse_authority(authority: &str, default_port: u16) -> Result<Target, &'static str> {
    // The clients would ignore a user name, a path, a query string and a fragment. gRPC itself defines the path of each
    // call.
    if authority.contains('@') {
        return Err(": it must not have a user name or a password");
    }
    if authority.contains(['?', '#']) {
        return Err(": it must not have a query string or a fragment");
    }
    if authority.contains('/') {
        return Err(": it must not have a path");
    }
    let uri: Uri = format!("http://{authority}").parse().map_err(|_| "")?;
    let host = uri.host().ok_or("")?;
    let port = match authority.strip_prefix(host).unwrap_or_default() {
        "" => default_port,
        _ => uri
            .port_u16()
            .ok_or(": the port must be a number from 0 to 65535")?,
    };
    Ok(Target::Tcp {
        host: Host::from(host),
        port,
    })
}

/// Returns an address for an error message. An address with a user name, a password or a query string is reduced to
/// its scheme.
pub(crate) fn without_secrets(address: &str) -> String {
    if !address.contains(['@', '?', '#']) {
        return address.to_owned();
    }
    let scheme = [
        "http://",
        "https://",
        GRPC_PREFIX,
        "unix:",
        "openai+http://",
        "openai+https://",
        VLLM_PREFIX,
    ]
    .into_iter()
    .find(|scheme| address.starts_with(scheme));
    format!("{}…", scheme.unwrap_or_default())
}

/// Removes `.` and repeated slashes from a path.
fn normalized(path: &Path) -> PathBuf {
    let components = path.components();
    components
        .filter(|component| *component != Component::CurDir)
        .collect()
}

impl From<&str> for Host {
    fn from(host: &str) -> Self {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        match bare.parse::<IpAddr>() {
            Ok(ip) => Self::Ip(ip.to_canonical()),
            Err(_) => Self::Name(bare.to_ascii_lowercase()),
        }
    }
}

impl Host {
    /// Returns true if a listener bound to this host accepts connections to `host` on the same machine.
    fn accepts(&self, host: &Self) -> bool {
        match (self, host) {
            (Self::Ip(listen), host) if listen.is_unspecified() => {
                host.is_loopback() || *self == *host
            }
            (Self::Ip(ip), Self::Name(name)) | (Self::Name(name), Self::Ip(ip)) => {
                name == "localhost" && (ip.is_loopback() && !is_unusual_loopback(*ip))
            }
            (listen, host) => listen == host,
        }
    }

    fn is_loopback(&self) -> bool {
        match self {
            Self::Name(name) => name == "localhost",
            Self::Ip(ip) => ip.is_loopback(),
        }
    }
}

/// Returns true for a loopback address to which `localhost` does not resolve, such as 127.0.0.2.
fn is_unusual_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip != std::net::Ipv4Addr::LOCALHOST,
        IpAddr::V6(_) => false,
    }
}
