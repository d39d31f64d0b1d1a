//! Keys for engines, read from an environment variable or a file.
//!
//! No error repeats the value of the setting, because a user may have written the key itself there.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::cluster::ApiKey;

/// Maximum size of a file with a key, so that a wrong path does not fill the memory.
const MAX_FILE_BYTES: u64 = 65_536;

/// Place of a key.
#[derive(Clone, Copy)]
pub(in crate::config) enum KeySource<'a> {
    /// The environment variable with this name.
    Variable(&'a str),
    /// The file with this path.
    File(&'a Path),
}

/// Reads a key. The error does not name the setting.
pub(in crate::config) type ReadKey<'a> = dyn Fn(KeySource<'_>) -> Result<ApiKey, String> + 'a;

/// Reads a key from the environment of this process, or from a file.
pub(in crate::config) fn read(source: KeySource<'_>) -> Result<ApiKey, String> {
    match source {
        KeySource::Variable(name) => read_variable(name, |name| std::env::var_os(name)),
        KeySource::File(path) => read_file(path),
    }
}

fn read_variable(name: &str, lookup: impl Fn(&str) -> Option<OsString>) -> Result<ApiKey, String> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if name.is_empty() || !name.bytes().all(is_allowed) {
        return Err(
            "must be the name of an environment variable (letters, digits and `_`), not the key itself"
                .to_owned(),
        );
    }
    let value = lookup(name).ok_or("this environment variable is not set")?;
    if value.is_empty() {
        return Err("this environment variable is empty".to_owned());
    }
    let key = value.to_str().and_then(ApiKey::new);
    key.ok_or_else(|| invalid_characters("the value of this environment variable"))
}

fn read_file(path: &Path) -> Result<ApiKey, String> {
    let mut text = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text));
    let size = read.map_err(|error| format!("cannot read this file: {error}"))?;
    if u64::try_from(size).is_ok_and(|size| size > MAX_FILE_BYTES) {
        return Err(format!(
            "this file is larger than {MAX_FILE_BYTES} bytes; it must contain the key only"
        ));
    }
    let line = text.strip_suffix(b"\n").unwrap_or(&text);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.is_empty() {
        return Err("this file is empty; it must contain the key".to_owned());
    }
    if line.contains(&b'\n') {
        return Err("this file has several lines; it must contain the key only".to_owned());
    }
    let key = std::str::from_utf8(line).ok().and_then(ApiKey::new);
    key.ok_or_else(|| invalid_characters("this file"))
}

fn invalid_characters(place: &str) -> String {
    format!(
        "{place} contains characters that a key cannot have; a key consists of visible ASCII characters without spaces"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(read: Result<ApiKey, String>) -> String {
        read.expect_err("the key is rejected")
    }

    #[test]
    fn a_key_comes_from_a_variable_that_is_set_and_valid() {
        let variable = |value: &str| read_variable("A_KEY", |_| Some(value.into()));
        assert_eq!(variable("sk-1"), Ok(ApiKey::new("sk-1").unwrap()));
        let unset = error(read_variable("A_KEY", |_| None));
        assert_eq!(unset, "this environment variable is not set");
        assert_eq!(error(variable("")), "this environment variable is empty");
        for invalid in ["a b", "a\n", "é"] {
            let error = error(variable(invalid));
            assert!(error.contains("visible ASCII"), "{error}");
        }
    }

    #[test]
    fn a_key_in_place_of_a_variables_name_is_not_repeated() {
        for key in ["sk-secret", "", "a=b"] {
            let error = error(read_variable(key, |_| None));
            assert!(error.contains("not the key itself"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_key_comes_from_a_file_of_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret.key");
        let file = |text: &[u8]| {
            std::fs::write(&path, text).unwrap();
            read_file(&path)
        };
        for text in ["sk-1", "sk-1\n", "sk-1\r\n"] {
            assert_eq!(file(text.as_bytes()), Ok(ApiKey::new("sk-1").unwrap()));
        }
        let large = vec![b'a'; 65_537];
        for (text, expected) in [
            (&b""[..], "this file is empty"),
            (b"\n", "this file is empty"),
            (b"a\nb", "several lines"),
            (b"a\n\n", "several lines"),
            (b"a b\n", "visible ASCII"),
            (b"\xff", "visible ASCII"),
            (&large, "larger than 65536 bytes"),
        ] {
            let error = error(file(text));
            assert!(error.contains(expected), "{error}");
        }
        let missing = error(read_file(&folder.path().join("secret")));
        assert!(missing.starts_with("cannot read this file: "), "{missing}");
        assert!(!missing.contains("secret"), "{missing}");
    }
}
