use std::time::Duration;

use super::*;
use crate::gateway::{OriginPolicy, UnknownFieldPolicy};

#[test]
fn unknown_fields_and_headers_after_are_http_settings() {
    let http = |line: &[&str]| server_parts(line).http.expect("the HTTP API is enabled");
    let ignoring = http(&["--unknown-fields", "ignore", "--headers-after", "0.05"]);
    assert_eq!(ignoring.unknown_fields, UnknownFieldPolicy::Ignore);
    assert_eq!(ignoring.headers_after, Some(Duration::from_millis(50)));
    let gateway = http(&["gateway", "--engine", "http://a:1", "--headers-after", "0"]);
    assert_eq!(gateway.headers_after, None);
    let (_folder, path) = settings_file("unknown_fields = \"ignore\"\nheaders_after = 2");
    let by_file = http(&["--config", &path]);
    assert_eq!(by_file.unknown_fields, UnknownFieldPolicy::Ignore);
    assert_eq!(by_file.headers_after, Some(Duration::from_secs(2)));
    let error = error_of(&["--unknown-fields", "drop"]);
    assert!(error.contains("must be refuse or ignore"), "{error}");
}

#[test]
fn hosts_and_origins_are_lists_in_flags_and_in_the_file() {
    let origins = |hosts: &[&str], origins: &[&str]| OriginPolicy {
        allowed_hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
        cors_origins: origins.iter().map(|it| it.parse().unwrap()).collect(),
    };
    let text = "allowed_hosts = [\"a.example\", \".b.example:80\"]\n\
                cors_origins = [\"http://c.example\"]";
    let (_folder, path) = settings_file(text);
    let of = |arguments: &[&str]| server_parts(arguments).http.unwrap().origins;
    assert_eq!(of(&[]), OriginPolicy::default());
    assert_eq!(
        of(&["--config", &path]),
        origins(&["a.example", ".b.example:80"], &["http://c.example"])
    );
    let flags = [
        "--allowed-hosts",
        "d,e",
        "--allowed-hosts",
        "*",
        "--config",
        &path,
    ];
    assert_eq!(of(&flags), origins(&["d", "e", "*"], &["http://c.example"]));
    let error = error_of(&["--cors-origins", "http://a,b"]);
    assert!(error.contains("'b' must be an origin"), "{error}");
    let error = error_of(&["--allowed-hosts", "http://a"]);
    assert!(error.contains("'http://a' must be a host name"), "{error}");
}
