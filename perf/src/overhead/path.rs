//! The measured paths: ways from the test runner to a client, through Tokenway's APIs and through the floors (minimal
//! servers) with which they are compared.

use clap::ValueEnum;

use super::scenario::Scenario;
use crate::serve::Role;
use crate::stream::Format;

/// Protection of a server: keys and TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protection {
    None,
    /// API keys with limits that no client reaches.
    Keys,
    /// API keys with limits that no client reaches, and TLS.
    KeysAndTls,
}

/// A way of a token from the device to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub(crate) enum MeasuredPath {
    /// Token channel of a worker in the client's own process.
    Mpsc,
    /// NDJSON lines over a raw socket.
    RawTcp,
    /// tonic with one handler that reads from the worker.
    BareTonic,
    /// axum with one handler that reads from the worker.
    BareAxum,
    /// Tokenway's gRPC API.
    Grpc,
    /// Tokenway's HTTP API, as NDJSON.
    Ndjson,
    /// Tokenway's HTTP API, as server-sent events.
    Sse,
    /// Tokenway's HTTP API, as NDJSON, without spans and access log.
    Unlogged,
    /// Tokenway's HTTP API, with the worker in its own process.
    Child,
    /// HTTP API of a gateway that reaches its engine over TCP.
    TwoTcp,
    /// HTTP API of a gateway that reaches its engine over a Unix socket.
    TwoUnix,
    /// Tokenway's HTTP API, as NDJSON, with keys and limits.
    KeysNdjson,
    /// Tokenway's gRPC API, with keys and limits.
    KeysGrpc,
    /// Tokenway's HTTP API, as NDJSON, with keys, limits and TLS.
    TlsNdjson,
    /// Tokenway's gRPC API, with keys, limits and TLS.
    TlsGrpc,
}

impl MeasuredPath {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Mpsc => "channel (mpsc)",
            Self::RawTcp => "raw TCP",
            Self::BareTonic => "bare tonic",
            Self::BareAxum => "bare axum",
            Self::Grpc => "gRPC",
            Self::Ndjson => "HTTP NDJSON",
            Self::Sse => "HTTP SSE",
            Self::Unlogged => "HTTP NDJSON, log off",
            Self::Child => "HTTP NDJSON, worker process",
            Self::TwoTcp => "gateway | engine, TCP",
            Self::TwoUnix => "gateway | engine, Unix socket",
            Self::KeysNdjson => "HTTP NDJSON, keys",
            Self::KeysGrpc => "gRPC, keys",
            Self::TlsNdjson => "HTTP NDJSON, keys and TLS",
            Self::TlsGrpc => "gRPC, keys and TLS",
        }
    }

    /// Returns the name of the path on the command line and in JSON.
    pub(crate) fn name(self) -> String {
        let value = self.to_possible_value().expect("no path is hidden");
        value.get_name().to_owned()
    }

    pub(crate) fn floor(self) -> Option<Self> {
        match self.server()? {
            (Role::Tcp | Role::Tonic | Role::Axum, _) => None,
            (_, Format::Grpc) => Some(Self::BareTonic),
            (_, Format::Raw | Format::Ndjson | Format::Sse) => Some(Self::BareAxum),
        }
    }

    /// Returns the protection of the path's server.
    pub(super) fn protection(self) -> Protection {
        match self {
            Self::KeysNdjson | Self::KeysGrpc => Protection::Keys,
            Self::TlsNdjson | Self::TlsGrpc => Protection::KeysAndTls,
            Self::Mpsc
            | Self::RawTcp
            | Self::BareTonic
            | Self::BareAxum
            | Self::Grpc
            | Self::Ndjson
            | Self::Sse
            | Self::Unlogged
            | Self::Child
            | Self::TwoTcp
            | Self::TwoUnix => Protection::None,
        }
    }

    /// Returns true if a whole run measures the path under this load. The cost of keys and TLS is judged under three
    /// loads only.
    pub(super) fn is_measured_under(self, scenario: Scenario) -> bool {
        let is_judged = matches!(
            scenario,
            Scenario::Paced(64) | Scenario::Full(64) | Scenario::OpenLoop
        );
        is_judged || self.protection() == Protection::None
    }

    /// Returns the format of the stream between the path's server and the client, or `None` without a server.
    pub(super) fn stream_format(self) -> Option<Format> {
        self.server().map(|(_, format)| format)
    }

    /// Returns the role of the process that serves the path and the format of its stream, or `None` without a server.
    /// The engine behind a gateway is not included.
    pub(super) fn server(self) -> Option<(Role, Format)> {
        let server = match self {
            Self::Mpsc => return None,
            Self::RawTcp => (Role::Tcp, Format::Raw),
            Self::BareTonic => (Role::Tonic, Format::Grpc),
            Self::BareAxum => (Role::Axum, Format::Ndjson),
            Self::Grpc | Self::KeysGrpc | Self::TlsGrpc => (Role::Product, Format::Grpc),
            Self::Ndjson | Self::KeysNdjson | Self::TlsNdjson => (Role::Product, Format::Ndjson),
            Self::Sse => (Role::Product, Format::Sse),
            Self::Unlogged => (Role::Unlogged, Format::Ndjson),
            Self::Child => (Role::Isolated, Format::Ndjson),
            Self::TwoTcp | Self::TwoUnix => (Role::Gateway, Format::Ndjson),
        };
        Some(server)
    }
}
