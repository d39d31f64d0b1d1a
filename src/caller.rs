//! Identifies the caller of a request, so that prefix caches can isolate the prompts of different callers. It must not
//! store or show a caller's key.

use http::HeaderMap;
use http::header::AUTHORIZATION;
use ring::digest::{Context, Digest, SHA256, digest};

use crate::keys::KeyName;

/// Scope in which requests may share computed prompt tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixSharing {
    /// All requests with the same `cache_salt`.
    All,
    /// Only requests of one caller: those with the same key (or, if the server has no keys, the same `Authorization`
    /// header), the same `user` and the same `cache_salt`.
    Caller,
}

/// Identifies the sender of a request, by its key or its `Authorization` headers. It holds a hash instead of the key.
#[derive(Clone, Copy, Debug)]
pub struct Caller(Digest);

impl Caller {
    /// Identifies the caller by the headers of a request. All requests without an `Authorization` header have the same
    /// caller.
    pub(crate) fn from_headers(headers: &HeaderMap) -> Self {
        let mut hash = Context::new(&SHA256);
        // A proxy in front of the server may check any one of several `Authorization` headers, so all are hashed.
        for key in headers.get_all(AUTHORIZATION) {
            hash.update(&key.len().to_le_bytes());
            hash.update(key.as_bytes());
        }
        Self(hash.finish())
    }

    /// Identifies the caller by the name of its key.
    pub(crate) fn with_key(name: &KeyName) -> Self {
        Self(digest(&SHA256, name.as_str().as_bytes()))
    }

    /// Returns the salt for this caller's prompts with this `user` and `cache_salt`. If one of the three differs, the
    /// salt differs.
    pub(crate) fn cache_salt(&self, user: &str, cache_salt: &str) -> String {
        let mut hash = Context::new(&SHA256);
        hash.update(self.0.as_ref());
        // The length separates the two texts: "a" with "bc" differs from "ab" with "c".
        hash.update(&user.len().to_le_bytes());
        hash.update(user.as_bytes());
        hash.update(cache_salt.as_bytes());
        let hash = hash.finish();
        hash.as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn caller(key: &'static str) -> Caller {
        caller_with_keys(&[key])
    }

    fn caller_with_keys(keys: &[&'static str]) -> Caller {
        let keys = keys.iter().map(|key| HeaderValue::from_static(key));
        let headers = keys.map(|key| (AUTHORIZATION, key)).collect();
        Caller::from_headers(&headers)
    }

    #[test]
    fn only_the_same_caller_user_and_salt_give_the_same_salt() {
        let salt = caller("Bearer a").cache_salt("bob", "x");
        assert_eq!(salt, caller("Bearer a").cache_salt("bob", "x"));
        for other in [
            caller("Bearer b").cache_salt("bob", "x"),
            caller_with_keys(&["Bearer a", "Bearer b"]).cache_salt("bob", "x"),
            caller_with_keys(&["Bearer ", "a"]).cache_salt("bob", "x"),
            Caller::from_headers(&HeaderMap::new()).cache_salt("bob", "x"),
            caller("Bearer a").cache_salt("eve", "x"),
            caller("Bearer a").cache_salt("bob", "y"),
            caller("Bearer a").cache_salt("bobx", ""),
            caller("Bearer a").cache_salt("", "bobx"),
        ] {
            assert_ne!(other, salt);
        }
    }

    #[test]
    fn the_salt_does_not_contain_the_key() {
        let salt = caller("Bearer canary").cache_salt("canary", "canary");
        assert!(!salt.contains("canary") && salt.len() == 64);
        assert!(!format!("{:?}", caller("Bearer canary")).contains("canary"));
    }
}
