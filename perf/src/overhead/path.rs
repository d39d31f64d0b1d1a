//! The measured paths: ways from the test runner to a client, through the product's APIs and through the
//! floors beneath them.

use clap::ValueEnum;

use crate::serve::Role;
use crate::stream::Format;

/// One way from the device to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub(crate) enum MeasuredPath {
    /// Channel of a worker in the client's own process.
    Mpsc,
    /// Lines over a raw socket.
    RawTcp,
    /// tonic with one handler over the worker.
    BareTonic,
    /// axum with one handler over the worker.
    BareAxum,
    /// gRPC API.
    Grpc,
    /// HTTP API, as NDJSON.
    Ndjson,
    /// HTTP API, as server-sent events.
    Sse,
    /// HTTP API, as NDJSON, without spans and access log.
    Unlogged,
    /// HTTP API, with the worker in a process of its own.
    Child,
    /// HTTP API of a gateway, in front of an engine over TCP.
    TwoTcp,
    /// HTTP API of a gateway, in front of an engine over a Unix socket.
    TwoUnix,
}

impl MeasuredPath {
    /// Name in reports.
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
        }
    }

    /// Name on the command line and in JSON.
    pub(crate) fn name(self) -> String {
        let value = self.to_possible_value().expect("no path is hidden");
        value.get_name().to_owned()
    }

    /// Floor with which it is compared.
    pub(crate) fn floor(self) -> Option<Self> {
        match self.server()? {
            (Role::Tcp | Role::Tonic | Role::Axum, _) => None,
            (_, Format::Grpc) => Some(Self::BareTonic),
            (_, Format::Raw | Format::Ndjson | Format::Sse) => Some(Self::BareAxum),
        }
    }

    /// Format of the stream between its server and the client; `None` without a server.
    pub(super) fn format(self) -> Option<Format> {
        self.server().map(|(_, format)| format)
    }

    /// Process that serves it, and the format of its stream; `None` without a server. A gateway has an engine too.
    pub(super) fn server(self) -> Option<(Role, Format)> {
        let server = match self {
            Self::Mpsc => return None,
            Self::RawTcp => (Role::Tcp, Format::Raw),
            Self::BareTonic => (Role::Tonic, Format::Grpc),
            Self::BareAxum => (Role::Axum, Format::Ndjson),
            Self::Grpc => (Role::Product, Format::Grpc),
            Self::Ndjson => (Role::Product, Format::Ndjson),
            Self::Sse => (Role::Product, Format::Sse),
            Self::Unlogged => (Role::Unlogged, Format::Ndjson),
            Self::Child => (Role::Isolated, Format::Ndjson),
            Self::TwoTcp | Self::TwoUnix => (Role::Gateway, Format::Ndjson),
        };
        Some(server)
    }
}
