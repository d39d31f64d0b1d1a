//! Access to the Hub: its address, the token, the cache folder and the policy for broken downloads.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use http::header::HeaderValue;
use http::uri::Scheme;

/// Address of the Hugging Face Hub.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Access to the Hub, or to another server with the same API.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Address of the Hub.
    pub endpoint: Endpoint,
    /// Token of a user, for private and gated repositories.
    pub token: Option<HubToken>,
    /// Folder of the cache, such as `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// True if only the cache may be used.
    pub is_offline: bool,
    /// Delay after the first failure of a download, shortened by a random jitter. It doubles with each further failure
    /// until new bytes arrive.
    pub retry_delay: Duration,
}

impl HubOptions {
    /// Creates options for this address and this cache folder, without a token.
    #[must_use]
    pub fn new(endpoint: Endpoint, cache: PathBuf) -> Self {
        Self {
            endpoint,
            token: None,
            cache,
            is_offline: false,
            retry_delay: Duration::from_secs(1),
        }
    }
}

/// Address of the Hub: an `http` or `https` URL, with the scheme in lower case and without a slash at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(String);

impl Endpoint {
    /// Parses an address.
    ///
    /// # Errors
    /// The text is not an `http` or `https` URL, or has a user name, a password, a query or a fragment. The error does
    /// not repeat the text, which may contain a password.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim_end_matches('/');
        let problem =
            "must be an address such as https://huggingface.co, without user name and password";
        let uri: Uri = text.parse().map_err(|_| problem.to_owned())?;
        let is_http = [Some(&Scheme::HTTP), Some(&Scheme::HTTPS)].contains(&uri.scheme());
        let host = uri.host().unwrap_or_default();
        // The authority is the host with a valid port, or the host alone. `http` has no port for numbers above 65,535.
        let authority = uri.authority().map_or("", |it| it.as_str());
        let has_valid_port = uri.port_u16().is_some() || authority == host;
        if !is_http || host.is_empty() || !has_valid_port || text.contains(['@', '?', '#']) {
            return Err(problem.to_owned());
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| problem.to_owned())?;
        // The check of redirects compares schemes as text.
        Ok(Self(format!("{}://{rest}", scheme.to_ascii_lowercase())))
    }

    /// The address as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A user's token. It appears in no log line and no error.
#[derive(Clone)]
pub struct HubToken(HeaderValue);

impl HubToken {
    /// Parses a token. Returns `None` if the text is blank.
    ///
    /// # Errors
    /// The token contains characters that a header cannot contain.
    pub fn parse(text: &str) -> Result<Option<Self>, &'static str> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(None);
        }
        let problem = "must be printable ASCII characters on one line";
        if !text.is_ascii() {
            return Err(problem);
        }
        let header = HeaderValue::try_from(format!("Bearer {text}"));
        let mut header = header.map_err(|_| problem)?;
        header.set_sensitive(true);
        Ok(Some(Self(header)))
    }

    /// Returns the value of the `Authorization` header.
    #[must_use]
    pub fn authorization(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl fmt::Debug for HubToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HubToken(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_an_http_url_without_a_password() {
        for (text, expected) in [
            ("https://huggingface.co/", "https://huggingface.co"),
            (
                "http://127.0.0.1:8080/mirror//",
                "http://127.0.0.1:8080/mirror",
            ),
            ("HTTPS://Hub.example/Mirror", "https://Hub.example/Mirror"),
        ] {
            assert_eq!(Endpoint::parse(text).unwrap().as_str(), expected);
        }
        for text in [
            "",
            "huggingface.co",
            "ftp://a",
            "https://u:secret@a",
            "https://a?x",
            "https://",
            "http://a:65536",
        ] {
            let error = Endpoint::parse(text).expect_err(text);
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_token_is_not_shown() {
        let token = HubToken::parse(" hf_secret\n").unwrap().unwrap();
        assert_eq!(token.authorization(), "Bearer hf_secret");
        let shown = format!("{token:?} {:?}", token.authorization());
        assert!(!shown.contains("secret"), "{shown}");
        assert!(HubToken::parse(" \n").unwrap().is_none());
        assert!(HubToken::parse("a\nb").is_err());
        assert!(HubToken::parse("tök").is_err());
    }
}
