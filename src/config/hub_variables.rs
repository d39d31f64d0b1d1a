//! The environment variables of the Hugging Face Hub, which other programs read too.

use std::env::VarError;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::ConfigError;
use crate::hub::{DEFAULT_ENDPOINT, Endpoint, HubOptions, HubToken};

/// Lists the models in the cache, for `tokenway models`.
#[cfg(feature = "llama-cpp")]
pub(super) fn list_models() -> Result<String, ConfigError> {
    use crate::hub::{cached_models, render_models};

    let cache = HubVariables::new(|name: &str| std::env::var(name))?.cache()?;
    let models = cached_models(&cache);
    let models = models.map_err(|error| {
        let cache = cache.display();
        ConfigError::Invalid(format!(
            "the cache {cache} cannot be read: {error}; set HF_HUB_CACHE to a readable folder"
        ))
    })?;
    Ok(render_models(&cache, &models))
}

/// Reads the environment variables of the Hub. They have the same meaning as for `huggingface_hub`, except that
/// variables within paths are not expanded.
///
/// # Errors
/// A variable is invalid, or no variable gives the folder of the cache. The error does not repeat a token.
pub(super) fn hub_options(
    variable: impl Fn(&str) -> Result<String, VarError>,
) -> Result<HubOptions, ConfigError> {
    let variables = HubVariables::new(variable)?;
    let endpoint = variables.text("HF_ENDPOINT")?;
    let endpoint = endpoint.unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
    let endpoint = Endpoint::parse(&endpoint)
        .map_err(|problem| ConfigError::Invalid(format!("HF_ENDPOINT {problem}")))?;
    let mut options = HubOptions::new(endpoint, variables.cache()?);
    options.is_offline = variables.is_true("HF_HUB_OFFLINE")?;
    if !options.is_offline {
        options.token = variables.token()?;
    }
    Ok(options)
}

/// The environment variables of the Hub. An empty variable counts as one that is not set.
struct HubVariables<V> {
    variable: V,
    user_home: Option<PathBuf>,
}

impl<V: Fn(&str) -> Result<String, VarError>> HubVariables<V> {
    fn new(variable: V) -> Result<Self, ConfigError> {
        let mut variables = Self {
            variable,
            user_home: None,
        };
        variables.user_home = variables.text("HOME")?.map(PathBuf::from);
        Ok(variables)
    }

    fn text(&self, name: &str) -> Result<Option<String>, ConfigError> {
        match (self.variable)(name) {
            Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
            Err(VarError::NotPresent) => Ok(None),
            Err(VarError::NotUnicode(_)) => {
                Err(ConfigError::Invalid(format!("{name} must be valid UTF-8")))
            }
        }
    }

    fn path(&self, name: &str) -> Result<Option<PathBuf>, ConfigError> {
        let path = self.text(name)?;
        path.map(|path| expand_home(name, &path, self.user_home.as_deref()))
            .transpose()
    }

    fn is_true(&self, name: &str) -> Result<bool, ConfigError> {
        let value = self.text(name)?.unwrap_or_default().to_ascii_uppercase();
        Ok(["1", "ON", "YES", "TRUE"].contains(&&*value))
    }

    /// The folder of the Hub's programs, with the stored token and the cache. `None` if no variable gives it.
    fn home(&self) -> Result<Option<PathBuf>, ConfigError> {
        if let Some(folder) = self.path("HF_HOME")? {
            return Ok(Some(folder));
        }
        let cache_home = match self.path("XDG_CACHE_HOME")? {
            Some(folder) => Some(folder),
            None => self.user_home.as_ref().map(|home| home.join(".cache")),
        };
        Ok(cache_home.map(|folder| folder.join("huggingface")))
    }

    /// Returns the cache's absolute path, so that messages show the real folder if `HF_HUB_CACHE` is relative.
    fn cache(&self) -> Result<PathBuf, ConfigError> {
        let cache = match self.path("HF_HUB_CACHE")? {
            Some(folder) => Some(folder),
            None => self.home()?.map(|home| home.join("hub")),
        };
        let cache = cache.ok_or_else(|| {
            let problem =
                "HF_HUB_CACHE or HOME must be set: there is no folder for downloaded models";
            ConfigError::Invalid(problem.to_owned())
        })?;
        Ok(std::path::absolute(&cache).unwrap_or(cache))
    }

    fn token(&self) -> Result<Option<HubToken>, ConfigError> {
        if self.is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN")? {
            return Ok(None);
        }
        if let Some(token) = self.text("HF_TOKEN")? {
            return HubToken::parse(&token)
                .map_err(|problem| ConfigError::Invalid(format!("HF_TOKEN {problem}")));
        }
        let file = match self.path("HF_TOKEN_PATH")? {
            Some(file) => Some(file),
            None => self.home()?.map(|home| home.join("token")),
        };
        read_token(file)
    }
}

/// Replaces `~` at the start of a variable's path by the user's home folder. `~user` is not replaced.
fn expand_home(variable: &str, path: &str, home: Option<&Path>) -> Result<PathBuf, ConfigError> {
    let rest = path.strip_prefix('~');
    let Some(rest) = rest.filter(|rest| rest.is_empty() || rest.starts_with('/')) else {
        return Ok(PathBuf::from(path));
    };
    let home = home.ok_or_else(|| {
        ConfigError::Invalid(format!(
            "{variable} starts with ~, but HOME is not set; write the whole path (got {path})"
        ))
    })?;
    Ok(home.join(rest.trim_start_matches('/')))
}

/// Maximum length of a stored token that is read, in bytes.
const MAX_TOKEN_BYTES: u64 = 64 * 1024;

/// Reads at most [`MAX_TOKEN_BYTES`] of a file, which may be an endless device.
fn read_start(file: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let file = std::fs::File::open(file)?;
    file.take(MAX_TOKEN_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// Reads the token that `hf auth login` has stored.
fn read_token(file: Option<PathBuf>) -> Result<Option<HubToken>, ConfigError> {
    let Some(file) = file else {
        return Ok(None);
    };
    let invalid = |problem: String| ConfigError::Invalid(format!("{}: {problem}", file.display()));
    match read_start(&file) {
        Ok(token) => {
            HubToken::parse(&token).map_err(|problem| invalid(format!("the token {problem}")))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(invalid(format!(
            "{error}; make the stored token readable, or set HF_HUB_DISABLE_IMPLICIT_TOKEN=1 to send none"
        ))),
    }
}
