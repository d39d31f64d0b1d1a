//! Parses and compares host names and origins, from headers and settings.
//!
//! As in browsers, comparisons ignore case, a trailing dot and the scheme's default port.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Maximum length of a host name, in bytes (RFC 1035, section 2.3.4).
const MAX_NAME_BYTES: usize = 253;

/// Maximum length of a label of a host name, in bytes (RFC 1035, section 2.3.4).
const MAX_LABEL_BYTES: usize = 63;

/// Host part of an authority or origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// Lowercase name without a trailing dot.
    Name(String),
    Address(IpAddr),
}

/// Host and optional port, as in `Host` and `:authority`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Authority {
    pub(super) host: Host,
    /// The port. `None` stands for the scheme's default port.
    pub(super) port: Option<u16>,
}

impl Authority {
    /// Parses `name`, `name:port`, `1.2.3.4:port` or `[::1]:port`. Returns `None` for anything else.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (host, port) = match text.strip_prefix('[') {
            Some(bracketed) => {
                let (address, rest) = bracketed.split_once(']')?;
                let port = match rest {
                    "" => "",
                    _ => rest.strip_prefix(':')?,
                };
                (Host::Address(parse_ipv6(address)?), port)
            }
            None => {
                let (host, port) = text.split_once(':').unwrap_or((text, ""));
                (Host::parse(host)?, port)
            }
        };
        let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
        let port = match port {
            "" => None,
            _ if is_number => Some(port.parse().ok()?),
            _ => return None,
        };
        Some(Self { host, port })
    }

    /// Compares two authorities. A missing port equals the default port of `scheme`.
    pub(super) fn is_same(&self, other: &Self, scheme: &str) -> bool {
        let port = |authority: &Self| authority.port.or_else(|| default_port(scheme));
        self.host == other.host && port(self) == port(other)
    }
}

impl Host {
    fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Some(Self::Address(address.into()));
        }
        let is_label = |label: &str| {
            let mut bytes = label.bytes();
            (1..=MAX_LABEL_BYTES).contains(&label.len())
                && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        (text.len() <= MAX_NAME_BYTES && text.split('.').all(is_label))
            .then(|| Self::Name(text.to_ascii_lowercase()))
    }
}

/// Parses the address between brackets. A zone (`%eth0`) only selects a network interface, so it is ignored.
fn parse_ipv6(text: &str) -> Option<IpAddr> {
    let address = text.split_once('%').map_or(text, |(address, _)| address);
    address.parse::<Ipv6Addr>().ok().map(IpAddr::V6)
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// Origin of a web page: scheme, host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) scheme: String,
    pub(super) authority: Authority,
}

impl Origin {
    /// Parses `scheme://host` or `scheme://host:port`. Returns `None` for anything else, including `null`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (scheme, authority) = text.split_once("://")?;
        let mut bytes = scheme.bytes();
        let is_scheme = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic())
            && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'));
        let scheme = is_scheme.then(|| scheme.to_ascii_lowercase())?;
        let authority = Authority::parse(authority)?;
        Some(Self { scheme, authority })
    }

    fn is_same(&self, other: &Self) -> bool {
        self.scheme == other.scheme && self.authority.is_same(&other.authority, &self.scheme)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority.host)?;
        self.authority
            .port
            .map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// An entry of `--allowed-hosts`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedHost {
    pattern: HostPattern,
    /// The port. `None` allows any port.
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum HostPattern {
    Any,
    Exact(Host),
    /// Subdomains of a name, stored with a leading dot.
    Subdomains(String),
    /// A name and its subdomains, stored with a leading dot.
    WithSubdomains(String),
}

impl AllowedHost {
    /// The entry `*`, which allows every host.
    pub(super) const ANY: Self = Self {
        pattern: HostPattern::Any,
        port: None,
    };

    /// Returns true if this entry allows requests for `authority`.
    pub(super) fn allows(&self, authority: &Authority) -> bool {
        let is_subdomain = |suffix: &str| match &authority.host {
            Host::Name(name) => name.ends_with(suffix),
            Host::Address(_) => false,
        };
        let matches_host = match &self.pattern {
            HostPattern::Any => true,
            HostPattern::Exact(host) => authority.host == *host,
            HostPattern::Subdomains(suffix) => is_subdomain(suffix),
            HostPattern::WithSubdomains(suffix) => {
                let name = suffix.strip_prefix('.').map(str::to_owned);
                is_subdomain(suffix) || name.is_some_and(|name| authority.host == Host::Name(name))
            }
        };
        let is_default = |port: u16| authority.port.is_none() && matches!(port, 80 | 443);
        let matches_port = |port| authority.port == Some(port) || is_default(port);
        matches_host && self.port.is_none_or(matches_port)
    }
}

impl FromStr for AllowedHost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || {
            format!(
                "'{text}' must be a host name with an optional port, such as gateway.example.com; \
                 .example.com also allows its subdomains, and * allows every host"
            )
        };
        if text == "*" {
            return Ok(Self::ANY);
        }
        let without_star = text.strip_prefix('*').unwrap_or(text);
        let has_star = without_star.len() < text.len();
        let parent = without_star.strip_prefix('.');
        if has_star && parent.is_none() {
            return Err(invalid());
        }
        let authority = Authority::parse(parent.unwrap_or(without_star)).ok_or_else(invalid)?;
        let pattern = match (authority.host, parent) {
            (host, None) => HostPattern::Exact(host),
            (Host::Name(name), Some(_)) if has_star => HostPattern::Subdomains(format!(".{name}")),
            (Host::Name(name), Some(_)) => HostPattern::WithSubdomains(format!(".{name}")),
            (Host::Address(_), Some(_)) => return Err(invalid()),
        };
        Ok(Self {
            pattern,
            port: authority.port,
        })
    }
}

/// An entry of `--cors-origins`. `None` is the entry `*`, which allows every origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedOrigin(Option<Origin>);

impl AllowedOrigin {
    /// Returns true if this entry allows pages of `origin`. `None` stands for an origin that cannot be parsed, such
    /// as `null`.
    pub(super) fn allows(&self, origin: Option<&Origin>) -> bool {
        match (&self.0, origin) {
            (None, _) => true,
            (Some(allowed), Some(origin)) => allowed.is_same(origin),
            (Some(_), None) => false,
        }
    }
}

impl FromStr for AllowedOrigin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self(None));
        }
        let origin = Origin::parse(text).ok_or_else(|| {
            format!(
                "'{text}' must be an origin without a path, such as http://localhost:3000, or * for \
                 every origin"
            )
        });
        Ok(Self(Some(origin?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority(text: &str) -> Authority {
        Authority::parse(text).unwrap_or_else(|| panic!("{text} must parse"))
    }

    #[test]
    fn host_parsing_ignores_case_and_a_trailing_dot() {
        let name = |name: &str, port| Authority {
            host: Host::Name(name.to_owned()),
            port,
        };
        let address = |address: &str, port| Authority {
            host: Host::Address(address.parse().expect("the IP address is valid")),
            port,
        };
        for (text, expected) in [
            ("localhost", name("localhost", None)),
            ("LocalHost.:8000", name("localhost", Some(8_000))),
            ("a-b.Example_1.com:", name("a-b.example_1.com", None)),
            ("127.0.0.1:80", address("127.0.0.1", Some(80))),
            ("10.0.0.7.", address("10.0.0.7", None)),
            ("[::1]", address("::1", None)),
            ("[::1]:8000", address("::1", Some(8_000))),
            ("[fe80::1%eth0]:8000", address("fe80::1", Some(8_000))),
        ] {
            assert_eq!(Authority::parse(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn an_invalid_host_is_not_parsed() {
        let long = "a".repeat(64);
        let longest = vec!["a"; 128].join(".");
        for text in [
            "",
            ".",
            ":80",
            "a..b",
            "a b",
            "a/b",
            "user@host",
            "host:port",
            "host:80:80",
            "host:+80",
            "host:65536",
            "::1",
            "[::1",
            "[::1]80",
            "[localhost]",
            "[]",
            "é.example",
            "a,b",
            "\"a\"",
            &long,
            &longest,
        ] {
            assert_eq!(Authority::parse(text), None, "{text}");
        }
    }

    #[test]
    fn an_allowed_host_entry_matches_only_its_hosts() {
        for (entry, allowed, rejected) in [
            ("example.com", "example.com", "a.example.com"),
            ("example.com", "EXAMPLE.com.:8000", "example.com.evil"),
            ("example.com:8000", "example.com:8000", "example.com:8001"),
            ("example.com:443", "example.com", "example.com:80"),
            (".example.com", "example.com", "notexample.com"),
            (".example.com", "a.b.example.com:8000", "example.com.evil"),
            ("*.example.com", "a.example.com", "example.com"),
            ("*.example.com:8000", "a.example.com:8000", "a.example.com"),
            ("[::1]:8000", "[::1]:8000", "[::1]:8001"),
        ] {
            let parsed: AllowedHost = entry.parse().expect(entry);
            assert!(parsed.allows(&authority(allowed)), "{entry} {allowed}");
            assert!(!parsed.allows(&authority(rejected)), "{entry} {rejected}");
        }
        let any: AllowedHost = "*".parse().expect("`*` is valid");
        assert!(any.allows(&authority("anything:1")));
    }

    #[test]
    fn an_invalid_allowed_host_is_rejected_and_quoted() {
        for entry in [
            "",
            "http://example.com",
            "example.com/",
            "*example.com",
            "a.*.com",
            "*:8000",
            "*.127.0.0.1",
            "..a",
            "bücher.example",
        ] {
            let error = entry.parse::<AllowedHost>().expect_err(entry);
            assert!(
                error.contains(&format!("'{entry}' must be a host name")),
                "{error}"
            );
        }
    }

    #[test]
    fn origin_comparison_ignores_case_and_default_ports() {
        for (entry, allowed, rejected) in [
            (
                "http://localhost:3000",
                "http://localhost:3000",
                "http://localhost:3001",
            ),
            (
                "http://localhost:3000",
                "HTTP://LOCALHOST:3000",
                "https://localhost:3000",
            ),
            (
                "https://example.com",
                "https://example.com:443",
                "http://example.com",
            ),
            (
                "https://example.com:443",
                "https://example.com",
                "https://a.example.com",
            ),
            ("app://obsidian.md", "app://obsidian.md", "app://other"),
        ] {
            let parsed: AllowedOrigin = entry.parse().expect(entry);
            let is_allowed = |origin| parsed.allows(Origin::parse(origin).as_ref());
            assert!(is_allowed(allowed), "{entry} {allowed}");
            assert!(!is_allowed(rejected), "{entry} {rejected}");
            assert!(!is_allowed("null"), "{entry}");
        }
        let any: AllowedOrigin = "*".parse().expect("`*` is valid");
        assert!(any.allows(None));
    }

    #[test]
    fn an_invalid_origin_is_rejected_and_quoted() {
        for entry in [
            "",
            "null",
            "localhost:3000",
            "http://",
            "http://a/",
            "http://a/b",
            "://a",
            "http://*.a",
        ] {
            let error = entry.parse::<AllowedOrigin>().expect_err(entry);
            assert!(
                error.contains(&format!("'{entry}' must be an origin")),
                "{error}"
            );
        }
    }
}
