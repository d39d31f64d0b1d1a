//! The settings of the gRPC API.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::values::ParsedText;
use crate::listen::Address;

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "gRPC API")]
pub(super) struct GrpcSettings {
    /// Address on which the gRPC API listens: `host:port` (port 0 chooses a free port) or `unix:/path`. For a
    /// Unix socket, gRPC clients in Python, C++ and Java need the channel option
    /// `grpc.default_authority=localhost`
    #[arg(
        long,
        env = "TOKENWAY_GRPC_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:50051"
    )]
    grpc_listen: ParsedText<Address>,
}

impl GrpcSettings {
    pub(super) fn address(self) -> Address {
        self.grpc_listen.value
    }
}
