//! Fuzz target of PEM files.

use std::path::PathBuf;

use super::{ClientTls, PemFile};

/// Input: a PEM file with certificates, with a key, or with both. Errors name the file, and repeat none of its lines,
/// because a line may be a part of a key. Every client can use certificates that are accepted.
pub(crate) fn pem_file(data: &[u8]) {
    let file = PemFile {
        path: PathBuf::from("server.pem"),
        contents: data.into(),
    };
    let certificates = file.certificates().map(|certificates| certificates.len());
    let errors = [
        certificates.as_ref().err(),
        file.authorities().as_ref().err(),
        file.key().as_ref().err(),
    ]
    .map(|error| error.map(ToString::to_string));
    for error in errors.into_iter().flatten() {
        assert!(error.starts_with("server.pem: "), "{error}");
        let text = String::from_utf8_lossy(data);
        let mut lines = text
            .lines()
            .filter(|line| is_base64(line) && line.len() >= 32);
        assert!(!lines.any(|line| error.contains(line)), "{error}");
    }
    assert_ne!(certificates.ok(), Some(0));
    let tls = ClientTls {
        ca: Some(file.clone()),
        identity: Some((file.clone(), file)),
    };
    if tls.try_config().is_ok() {
        let _ = tls.config();
        let _ = tls.tonic_config();
    }
}

fn is_base64(line: &str) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
    line.bytes().all(is_digit)
}
