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
    /// Where the HTTP door listens: `host:port` (port 0 takes a free one) or `unix:/path`
    /// [default: 127.0.0.1:8000]
    #[arg(long, env = "TOKENWAY_HTTP_LISTEN", value_name = "ADDRESS")]
    http_listen: Option<Address>,
    /// The form of a completion's stream whose client accepts anything: `ndjson` or `sse`
    /// [default: ndjson]
    #[arg(long, env = "TOKENWAY_STREAM_FORMAT", value_name = "FORMAT")]
    stream_format: Option<StreamFormat>,
    /// Fields of a request that are unknown: `refuse` answers 400; `ignore` drops them and names them in the
    /// response header x-ignored-fields [default: refuse]
    #[arg(long, env = "TOKENWAY_UNKNOWN_FIELDS", value_name = "ACTION")]
    unknown_fields: Option<UnknownFields>,
    /// How long a streamed request waits in the queue before its headers are sent, in seconds, so that proxies do
    /// not time out: a refusal after it is a record in the stream. 0 waits without end [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_HEADERS_AFTER",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    headers_after: Option<Seconds>,
    /// Host names that the HTTP API answers to besides localhost, its subdomains and IP addresses: `name`,
    /// `name:port`, `.name` with its subdomains, `*.name` for these alone; several by commas or by repeating the
    /// flag. `*` is any name, and gives up the protection against DNS rebinding [default: none]
    #[arg(
        long,
        env = "TOKENWAY_ALLOWED_HOSTS",
        value_delimiter = ',',
        value_name = "HOST"
    )]
    allowed_hosts: Option<Vec<AllowedHost>>,
    /// Origins whose web pages may use the HTTP API from a browser, such as `http://localhost:3000`; several by
    /// commas or by repeating the flag. `*` is every page [default: none but the server's own]
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

    pub(super) fn door(self) -> HttpFrontend {
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
