//! Addresses of the Hub: paths, redirects and origins.

use http::Uri;

/// Percent-encodes a path for an address. Keeps slashes.
pub(super) fn encode_path(path: &str) -> String {
    let mut encoded = String::new();
    for byte in path.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                encoded.push(byte.into());
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// Resolves `location`, the target of a redirect, against `address`, which was redirected.
pub(super) fn join(address: &str, location: &str) -> String {
    let location = location.split('#').next().unwrap_or_default();
    let (scheme, rest) = address.split_once("://").unwrap_or(("https", address));
    let is_absolute = ["http://", "https://"].iter().any(|scheme| {
        let start = location.get(..scheme.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    });
    if is_absolute {
        let at = location.find("://").unwrap_or_default();
        let (scheme, rest) = location.split_at(at);
        return format!("{}{rest}", scheme.to_ascii_lowercase());
    }
    if location.starts_with("//") {
        return format!("{scheme}:{location}");
    }
    let path_start = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(path_start);
    if location.starts_with('/') {
        return format!("{scheme}://{authority}{location}");
    }
    let path = path.split('?').next().unwrap_or_default();
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    format!("{scheme}://{authority}{folder}/{location}")
}

/// Returns true if two addresses have the same scheme, host and port.
pub(super) fn has_same_origin(a: &str, b: &str) -> bool {
    let (a, b) = (origin(a), origin(b));
    a.is_some() && a == b
}

fn origin(address: &str) -> Option<(String, String, u16)> {
    let uri: Uri = address.parse().ok()?;
    let scheme = uri.scheme_str()?.to_owned();
    let default_port = if scheme == "https" { 443 } else { 80 };
    let host = uri.host()?.to_ascii_lowercase();
    Some((scheme, host, uri.port_u16().unwrap_or(default_port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_encoded_except_for_its_slashes() {
        assert_eq!(
            encode_path("Q8_0/a b+é?.gguf"),
            "Q8_0/a%20b%2B%C3%A9%3F.gguf"
        );
    }

    #[test]
    fn a_redirect_may_be_absolute_or_relative() {
        let address = "https://hub:1/a/b?x=/y";
        for (location, expected) in [
            ("http://cdn/c?sig=1#f", "http://cdn/c?sig=1"),
            ("HTTPS://CDN/c", "https://CDN/c"),
            ("//cdn/c", "https://cdn/c"),
            ("/c?z", "https://hub:1/c?z"),
            ("c", "https://hub:1/a/c"),
        ] {
            assert_eq!(join(address, location), expected);
        }
        assert_eq!(join("http://hub", "c"), "http://hub/c");
    }

    #[test]
    fn an_origin_is_the_scheme_the_host_and_the_port() {
        for (a, b) in [
            ("https://Hub/x", "https://hub:443"),
            ("http://hub:80/", "http://hub/a/b"),
        ] {
            assert!(has_same_origin(a, b), "{a} {b}");
        }
        for (a, b) in [
            ("https://hub", "http://hub"),
            ("https://hub", "https://hub.evil.example"),
            ("https://hub", "https://hub:444"),
            ("nonsense", "nonsense"),
        ] {
            assert!(!has_same_origin(a, b), "{a} {b}");
        }
    }
}
