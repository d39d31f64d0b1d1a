//! The settings of API keys.

use std::ffi::OsString;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::values::FilePath;
use crate::cluster::ApiKey;
use crate::keys::{KeySources, SecretHash};

/// Environment variable with a key that a server accepts, and that `tokenway complete` sends. There is no flag for it,
/// because other users of the machine can see the flags of a process.
const KEY_VARIABLE: &str = "TOKENWAY_API_KEY";

/// Minimum length of a key in the environment, in bytes.
const MIN_KEY_BYTES: usize = 16;

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "API keys")]
pub(super) struct KeySettings {
    /// Path of a file with the API keys that requests need, which `tokenway keys` manages. The server applies a changed
    /// file within a few seconds. In addition or instead, the environment variable TOKENWAY_API_KEY can contain one
    /// key, which may do everything [default: requests need no key]
    #[arg(long, env = "TOKENWAY_KEYS_FILE", value_name = "FILE")]
    keys_file: Option<FilePath>,
    /// Path of a file in which the server stores how many tokens its keys have used. The server creates the file.
    /// Required if a key has a token budget. Each server needs its own file [default: none]
    #[arg(long, env = "TOKENWAY_USAGE_FILE", value_name = "FILE")]
    usage_file: Option<FilePath>,
}

impl KeySettings {
    /// Returns the sources of the keys; `None` if requests need no key.
    pub(super) fn sources(self) -> Result<Option<KeySources>, ConfigError> {
        let variable = read_key(std::env::var_os(KEY_VARIABLE))?;
        let file = self.keys_file.map(|file| file.value);
        let usage_file = self.usage_file.map(|file| file.value);
        if usage_file.is_some() && file.is_none() {
            let problem = "usage_file needs keys_file, because only keys of a file have budgets";
            return Err(ConfigError::Invalid(problem.to_owned()));
        }
        let has_keys = variable.is_some() || file.is_some();
        Ok(has_keys.then_some(KeySources {
            file,
            variable,
            usage_file,
        }))
    }
}

/// Returns the key that a client sends, if there is one.
pub(super) fn client_key() -> Result<Option<ApiKey>, ConfigError> {
    match std::env::var_os(KEY_VARIABLE).filter(|value| !value.is_empty()) {
        None => Ok(None),
        Some(key) => match key.to_str().and_then(ApiKey::new) {
            Some(key) => Ok(Some(key)),
            None => Err(invalid_characters()),
        },
    }
}

fn invalid_characters() -> ConfigError {
    let problem = "must consist of visible ASCII characters without spaces";
    ConfigError::Invalid(format!("{KEY_VARIABLE} {problem}"))
}

/// Checks the key in the environment. The error does not repeat it.
fn read_key(value: Option<OsString>) -> Result<Option<SecretHash>, ConfigError> {
    let Some(key) = value.filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let key = key.as_encoded_bytes();
    if key.len() < MIN_KEY_BYTES {
        return Err(ConfigError::Invalid(format!(
            "{KEY_VARIABLE} must have at least {MIN_KEY_BYTES} characters, so that nobody can guess it; \
             `openssl rand -hex 32` prints a good one"
        )));
    }
    match key.iter().all(u8::is_ascii_graphic) {
        true => Ok(Some(SecretHash::of(key))),
        false => Err(invalid_characters()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_in_the_environment_is_long_and_visible() {
        let read = |key: &str| read_key(Some(key.into()));
        assert!(read_key(None).unwrap().is_none());
        assert!(read("").unwrap().is_none());
        assert!(read("sixteen-letters!").unwrap().is_some());
        for (key, expected) in [
            ("fifteen-letters", "at least 16 characters"),
            ("sixteen letters!", "visible ASCII"),
            ("sixteen-letters\n", "visible ASCII"),
        ] {
            let Err(error) = read(key) else {
                panic!("{key} is accepted")
            };
            let error = error.to_string();
            assert!(error.starts_with("TOKENWAY_API_KEY must"), "{error}");
            assert!(
                error.contains(expected) && !error.contains("letters!"),
                "{error}"
            );
        }
    }
}
