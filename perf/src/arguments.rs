//! Values of command-line arguments: server addresses, and times.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use http::Uri;
use http::uri::Scheme;

use crate::access::Access;

/// Address of a server's HTTP or gRPC API, and the prefix of its paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerUrl {
    /// `host:port`.
    pub(crate) authority: String,
    /// Prefix of every path, without a slash at its end.
    base_path: String,
    /// Key and TLS that the server requires.
    pub(crate) access: Access,
}

impl ServerUrl {
    /// Returns the URL of the server at this `host:port`.
    pub(crate) fn from_authority(authority: &str) -> Self {
        Self {
            authority: authority.to_owned(),
            base_path: String::new(),
            access: Access::default(),
        }
    }

    pub(crate) fn with_access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    pub(crate) fn path(&self, path: &str) -> String {
        format!("{}{path}", self.base_path)
    }
}

impl FromStr for ServerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "use a URL like http://127.0.0.1:8000";
        let uri = Uri::from_str(text).map_err(|error| format!("{error}; {example}"))?;
        match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => {}
            Some(scheme) => return Err(format!("{scheme} is not supported; {example}")),
            None => return Err(format!("the URL does not start with http://; {example}")),
        }
        let authority = uri.authority();
        let authority = authority.ok_or_else(|| format!("the URL has no host; {example}"))?;
        let port = authority.port_u16().unwrap_or(80);
        Ok(Self {
            authority: format!("{}:{port}", authority.host()),
            base_path: uri.path().trim_end_matches('/').to_owned(),
            access: Access::default(),
        })
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.access.scheme();
        write!(f, "{scheme}://{}{}", self.authority, self.base_path)
    }
}

/// Parses a gRPC address, with or without `http://` before it.
pub(crate) fn parse_grpc_address(text: &str) -> Result<ServerUrl, String> {
    if text.contains("://") {
        text.parse()
    } else {
        format!("http://{text}").parse()
    }
}

/// Parses a time in milliseconds, which may have a fraction.
pub(crate) fn parse_duration_ms(text: &str) -> Result<Duration, String> {
    let ms = parse_ms(text)?;
    Duration::try_from_secs_f64(ms / 1e3)
        .map_err(|_| "it must be a number of milliseconds, 0 or more".to_owned())
}

/// Parses a number of seconds, which may have a fraction.
pub(crate) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok();
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    duration.ok_or_else(|| "it must be a number of seconds, 0 or more".to_owned())
}

/// Parses a number of milliseconds that may be negative.
pub(crate) fn parse_ms(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|number: &f64| number.is_finite())
        .ok_or_else(|| "it must be a number of milliseconds".to_owned())
}

/// Writes a time as [`parse_duration_ms`] parses it.
pub(crate) fn format_ms(duration: Duration) -> String {
    (duration.as_secs_f64() * 1e3).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_an_authority_and_a_prefix_of_paths() {
        let url: ServerUrl = "http://example.org/base/".parse().unwrap();
        assert_eq!(url.authority, "example.org:80");
        assert_eq!(url.path("/v1/completions"), "/base/v1/completions");
        for text in ["[::1]:50051", "http://[::1]:50051"] {
            assert_eq!(
                parse_grpc_address(text).unwrap(),
                ServerUrl::from_authority("[::1]:50051")
            );
        }
    }

    #[test]
    fn a_url_without_http_is_refused() {
        for text in ["https://a.org", "a.org:80", "/v1", "", "http://"] {
            assert!(text.parse::<ServerUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_time_may_have_a_fraction_and_is_never_negative() {
        assert_eq!(parse_duration_ms("0.25"), Ok(Duration::from_micros(250)));
        assert_eq!(format_ms(Duration::from_micros(250)), "0.25");
        for text in ["-1", "NaN", "inf", "1e300", "fast"] {
            assert!(parse_duration_ms(text).is_err(), "{text}");
        }
        assert_eq!(parse_ms("-1000"), Ok(-1000.0));
    }
}
