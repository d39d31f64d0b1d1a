//! The settings of the HTTP API.

use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::values::{ParsedText, Seconds};
use crate::gateway::{AllowedHost, AllowedOrigin, OriginPolicy, StreamFormat, UnknownFieldPolicy};
use crate::listen::Address;
use crate::server::HttpFrontend;

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "HTTP API")]
pub(super) struct HttpSettings {
    /// Address on which the HTTP API listens: `host:port` (port 0 chooses a free port) or `unix:/path`
    #[arg(
        long,
        env = "TOKENWAY_HTTP_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:8000"
    )]
    http_listen: ParsedText<Address>,
    /// Format of streamed completions for clients whose `Accept` header allows any format: `ndjson` or
    /// `sse`. Chat streams default to SSE
    #[arg(
        long,
        env = "TOKENWAY_STREAM_FORMAT",
        value_name = "FORMAT",
        default_value = "ndjson"
    )]
    stream_format: ParsedText<StreamFormat>,
    /// Action for unknown fields in a request: `refuse` rejects the request with status 400; `ignore` drops
    /// the fields and lists them in the response header x-ignored-fields
    #[arg(
        long,
        env = "TOKENWAY_UNKNOWN_FIELDS",
        value_name = "ACTION",
        default_value = "refuse"
    )]
    unknown_fields: ParsedText<UnknownFieldPolicy>,
    /// Time in seconds after which a streamed request that still waits in the queue gets its response
    /// headers, so that proxies do not time out. A later error is a record in the stream instead of a status
    /// code. 0: headers are sent only once a worker has started the request
    #[arg(
        long,
        env = "TOKENWAY_HEADERS_AFTER",
        value_name = "SECONDS",
        default_value = "30"
    )]
    headers_after: Seconds,
    /// Origins whose web pages may use the HTTP API from a browser, such as `http://localhost:3000`. Separate
    /// several with commas, or repeat the flag. `*` allows every origin [default: the server's own origin
    /// only]
    #[arg(
        long,
        env = "TOKENWAY_CORS_ORIGINS",
        value_delimiter = ',',
        value_name = "ORIGIN"
    )]
    cors_origins: Vec<ParsedText<AllowedOrigin>>,
}

impl HttpSettings {
    pub(super) fn frontend(self, allowed_hosts: Vec<AllowedHost>) -> HttpFrontend {
        let after = Duration::from(self.headers_after);
        let origins = self.cors_origins;
        HttpFrontend {
            listen: self.http_listen.value,
            stream_format: self.stream_format.value,
            unknown_fields: self.unknown_fields.value,
            headers_after: Some(after).filter(|after| !after.is_zero()),
            origins: OriginPolicy {
                allowed_hosts,
                cors_origins: origins.into_iter().map(|origin| origin.value).collect(),
            },
        }
    }
}
