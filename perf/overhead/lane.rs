//! The ways to the tokens of one and the same test runner: the product's doors, and the floors beneath
//! them.

use clap::ValueEnum;

use crate::load::Form;
use crate::serve::Role;

/// One way from the device to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub(crate) enum Lane {
    /// The channel of a worker in the client's own process.
    Mpsc,
    /// Lines over a bare socket.
    RawTcp,
    /// tonic with one handler over the worker.
    BareTonic,
    /// axum with one handler over the worker.
    BareAxum,
    /// The gRPC door.
    Grpc,
    /// The HTTP door, as NDJSON.
    Ndjson,
    /// The HTTP door, as server-sent events.
    Sse,
    /// The HTTP door, whose worker is a process of its own.
    Child,
    /// The HTTP door of a gateway, in front of an engine over TCP.
    TwoTcp,
    /// The HTTP door of a gateway, in front of an engine over a Unix socket.
    TwoUnix,
}

/// How a lane's client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaks {
    Channel,
    Http(Form),
    Grpc,
}

impl Lane {
    /// What reports call it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Mpsc => "channel (mpsc)",
            Self::RawTcp => "raw TCP",
            Self::BareTonic => "bare tonic",
            Self::BareAxum => "bare axum",
            Self::Grpc => "gRPC",
            Self::Ndjson => "HTTP NDJSON",
            Self::Sse => "HTTP SSE",
            Self::Child => "HTTP NDJSON, worker process",
            Self::TwoTcp => "gateway | engine, TCP",
            Self::TwoUnix => "gateway | engine, Unix socket",
        }
    }

    /// The short name, by which it is chosen and found in the JSON.
    pub(crate) fn name(self) -> String {
        let value = self.to_possible_value();
        value
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    /// The floor that it is compared with.
    pub(crate) fn floor(self) -> Option<Self> {
        match self {
            Self::Mpsc | Self::RawTcp | Self::BareTonic | Self::BareAxum => None,
            Self::Grpc => Some(Self::BareTonic),
            Self::Ndjson | Self::Sse | Self::Child | Self::TwoTcp | Self::TwoUnix => {
                Some(Self::BareAxum)
            }
        }
    }

    pub(super) fn speaks(self) -> Speaks {
        match self {
            Self::Mpsc => Speaks::Channel,
            Self::RawTcp => Speaks::Http(Form::Raw),
            Self::BareAxum | Self::Ndjson | Self::Child | Self::TwoTcp | Self::TwoUnix => {
                Speaks::Http(Form::Ndjson)
            }
            Self::Sse => Speaks::Http(Form::Sse),
            Self::BareTonic | Self::Grpc => Speaks::Grpc,
        }
    }

    /// Which process serves it; a lane of two processes has an engine besides.
    pub(super) fn role(self) -> Option<Role> {
        match self {
            Self::Mpsc => None,
            Self::RawTcp => Some(Role::Tcp),
            Self::BareTonic => Some(Role::Tonic),
            Self::BareAxum => Some(Role::Axum),
            Self::Grpc | Self::Ndjson | Self::Sse => Some(Role::Product),
            Self::Child => Some(Role::Isolated),
            Self::TwoTcp | Self::TwoUnix => Some(Role::Gateway),
        }
    }
}
