//! The settings of the admin listener.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::values::ParsedText;
use crate::listen::Address;

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Admin listener")]
pub(super) struct AdminSettings {
    /// Address of a listener for operators: `host:port` (port 0 chooses a free port) or `unix:/path`. It serves
    /// /metrics, /admin/drain, /livez, /readyz and /health; the HTTP API then has no /metrics and no /admin/drain. On
    /// a loopback address or a Unix socket, requests to it need no key [default: none]
    #[arg(long, env = "TOKENWAY_ADMIN_LISTEN", value_name = "ADDRESS")]
    admin_listen: Option<ParsedText<Address>>,
}

impl AdminSettings {
    pub(super) fn address(self) -> Option<Address> {
        self.admin_listen.map(|address| address.value)
    }
}
