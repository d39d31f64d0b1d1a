//! The settings of the HTTP API.

use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use super::loopback;
use super::values::Seconds;
use crate::gateway::{AllowedHost, AllowedOrigin, OriginPolicy, StreamFormat, UnknownFields};
use crate::listen::Address;
use crate::server::HttpFrontend;

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct HttpSettings {
    /// Address on which the HTTP API listens: `host:port` (port 0 chooses a free port) or `unix:/path`
    /// [default: 127.0.0.1:8000]
    #[arg(long, env = "TOKENWAY_HTTP_LISTEN", value_name = "ADDRESS")]
    http_listen: Option<Address>,
    /// Format of streamed completions for clients whose `Accept` header allows any format: `ndjson` or
    /// `sse`. Chat streams default to SSE [default: ndjson]
    #[arg(long, env = "TOKENWAY_STREAM_FORMAT", value_name = "FORMAT")]
    stream_format: Option<StreamFormat>,
    /// Action for unknown fields in a request: `refuse` rejects the request with status 400; `ignore` drops
    /// the fields and lists them in the response header x-ignored-fields [default: refuse]
    #[arg(long, env = "TOKENWAY_UNKNOWN_FIELDS", value_name = "ACTION")]
    unknown_fields: Option<UnknownFields>,
    /// Time in seconds after which a streamed request that still waits in the queue gets its response
    /// headers, so that proxies do not time out. A later error is a record in the stream instead of a status
    /// code. 0: headers are sent only once a worker has started the request [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_HEADERS_AFTER",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    headers_after: Option<Seconds>,
    /// Host names that clients may use besides localhost, its subdomains and IP addresses: `name`,
    /// `name:port`, `.name` (with its subdomains) or `*.name` (its subdomains only). Separate several with
    /// commas, or repeat the flag. `*` allows every name and disables the protection against DNS rebinding
    /// [default: none]
    #[arg(
        long,
        env = "TOKENWAY_ALLOWED_HOSTS",
        value_delimiter = ',',
        value_name = "HOST"
    )]
    allowed_hosts: Option<Vec<AllowedHost>>,
    /// Origins whose web pages may use the HTTP API from a browser, such as `http://localhost:3000`. Separate
    /// several with commas, or repeat the flag. `*` allows every origin [default: the server's own origin
    /// only]
    #[arg(
        long,
        env = "TOKENWAY_CORS_ORIGINS",
        value_delimiter = ',',
        value_name = "ORIGIN"
    )]
    cors_origins: Option<Vec<AllowedOrigin>>,
}

impl HttpSettings {
    pub(super) fn or(self, file: Self) -> Self {
        Self {
            http_listen: self.http_listen.or(file.http_listen),
            stream_format: self.stream_format.or(file.stream_format),
            unknown_fields: self.unknown_fields.or(file.unknown_fields),
            headers_after: self.headers_after.or(file.headers_after),
            allowed_hosts: self.allowed_hosts.or(file.allowed_hosts),
            cors_origins: self.cors_origins.or(file.cors_origins),
        }
    }

    pub(super) fn frontend(self) -> HttpFrontend {
        let listen = self.http_listen.unwrap_or_else(|| loopback(8_000));
        let default = HttpFrontend::at(listen);
        let headers_after = match self.headers_after {
            None => default.headers_after,
            Some(after) => Some(Duration::from(after)).filter(|after| !after.is_zero()),
        };
        HttpFrontend {
            stream_format: self.stream_format.unwrap_or(default.stream_format),
            unknown_fields: self.unknown_fields.unwrap_or(default.unknown_fields),
            headers_after,
            origins: OriginPolicy {
                allowed_hosts: self.allowed_hosts.unwrap_or_default(),
                cors_origins: self.cors_origins.unwrap_or_default(),
            },
            ..default
        }
    }
}
