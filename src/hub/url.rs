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

/// Resolves `location`, the target of a redirect, against `address`, which was redirected. Returns `None` if the target
/// has a scheme other than `http` and `https`.
pub(super) fn join(address: &str, location: &str) -> Option<String> {
    let location = location.split('#').next().unwrap_or_default();
    let (scheme, rest) = address.split_once("://").unwrap_or(("https", address));
    if let Some((target_scheme, target)) = split_scheme(location) {
        let target_scheme = target_scheme.to_ascii_lowercase();
        let is_web = matches!(&*target_scheme, "http" | "https") && target.starts_with("//");
        return is_web.then(|| format!("{target_scheme}:{target}"));
    }
    if location.starts_with("//") {
        return Some(format!("{scheme}:{location}"));
    }
    let path_start = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(path_start);
    if location.starts_with('/') {
        return Some(format!("{scheme}://{authority}{location}"));
    }
    let path = path.split('?').next().unwrap_or_default();
    if location.is_empty() || location.starts_with('?') {
        return Some(format!("{scheme}://{authority}{path}{location}"));
    }
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    Some(format!("{scheme}://{authority}{folder}/{location}"))
}

/// Splits an address into its scheme and the rest after the colon. Returns `None` for a relative address, whose first
/// segment has no colon (RFC 3986, sections 3.1 and 4.2).
fn split_scheme(address: &str) -> Option<(&str, &str)> {
    let segment_end = address.find(['/', '?']).unwrap_or(address.len());
    let colon = address[..segment_end].find(':')?;
    Some((&address[..colon], &address[colon + 1..]))
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
            ("?z", "https://hub:1/a/b?z"),
            ("#f", "https://hub:1/a/b"),
            ("c/d:e?f:g", "https://hub:1/a/c/d:e?f:g"),
        ] {
            assert_eq!(join(address, location).as_deref(), Some(expected));
        }
        assert_eq!(join("http://hub", "c").as_deref(), Some("http://hub/c"));
    }

    #[test]
    fn a_redirect_to_another_scheme_has_no_address() {
        for location in [
            "file:///etc/passwd",
            "ftp://hub/c",
            "http+unix://socket/c",
            "data:text/plain,x",
            "https:c",
        ] {
            assert_eq!(join("https://hub/a/b", location), None, "{location}");
        }
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
