//! The secret of a key, and the hash that is stored instead of it.

use std::fmt;
use std::str::FromStr;

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use ring::rand::{SecureRandom, SystemRandom};
use subtle::ConstantTimeEq;

/// Prefix of generated secrets. It lets people and secret scanners recognize a key of Tokenway.
const PREFIX: &str = "tw_";

/// Number of random bytes in a generated secret.
const RANDOM_BYTES: usize = 32;

/// Secret of a key. It is shown once, when it is generated, and never stored.
pub(crate) struct Secret(String);

impl Secret {
    /// Generates a secret: `tw_` and 32 random bytes in hexadecimal digits.
    ///
    /// # Errors
    /// The operating system has no random numbers.
    pub(crate) fn generate() -> Result<Self, NoRandomNumbers> {
        let mut bytes = [0; RANDOM_BYTES];
        let filled = SystemRandom::new().fill(&mut bytes);
        filled.map_err(|_| NoRandomNumbers)?;
        Ok(Self(format!("{PREFIX}{}", hex(&bytes))))
    }

    /// Returns the text that a client sends.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn hash(&self) -> SecretHash {
        SecretHash::of(self.0.as_bytes())
    }
}

/// Error for a random number generator that fails.
#[derive(Debug, thiserror::Error)]
#[error("the operating system's random number generator failed")]
pub struct NoRandomNumbers;

/// SHA-256 of a secret.
#[derive(Clone, Copy)]
pub struct SecretHash([u8; SHA256_OUTPUT_LEN]);

/// Error for a text that is not a hash. It does not repeat the text, which may be a secret.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be the SHA-256 of the key in 64 hexadecimal digits, not the key itself")]
pub struct InvalidHash;

impl SecretHash {
    /// Hashes what a client sent.
    pub(crate) fn of(secret: &[u8]) -> Self {
        let digest = digest(&SHA256, secret);
        let bytes = digest.as_ref().try_into();
        Self(bytes.expect("a SHA-256 digest has 32 bytes"))
    }

    /// Returns true if both are hashes of the same secret. Takes the same time wherever they differ.
    pub(crate) fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }

    /// Returns the bytes by which a table finds the hash. How long that takes tells an attacker nothing about the
    /// secret, because nobody can choose a secret by its hash.
    pub(crate) fn index(&self) -> [u8; 8] {
        let (index, _) = self.0.split_first_chunk().expect("a hash has 32 bytes");
        *index
    }
}

impl FromStr for SecretHash {
    type Err = InvalidHash;

    fn from_str(text: &str) -> Result<Self, InvalidHash> {
        let mut bytes = [0; SHA256_OUTPUT_LEN];
        let digits = text.as_bytes();
        if digits.len() != 2 * bytes.len() {
            return Err(InvalidHash);
        }
        for (byte, digits) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |at: usize| char::from(digits[at]).to_digit(16).ok_or(InvalidHash);
            let value = digit(0)? * 16 + digit(1)?;
            *byte = u8::try_from(value).map_err(|_| InvalidHash)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_secrets_have_32_random_bytes_and_differ() {
        let secrets = [(); 2].map(|()| Secret::generate().unwrap().as_str().to_owned());
        assert_ne!(secrets[0], secrets[1]);
        let digits = secrets[0].strip_prefix("tw_").unwrap();
        assert_eq!(digits.len(), 64);
        assert!(digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
    }

    #[test]
    fn a_hash_is_the_sha_256_of_the_whole_secret() {
        // `printf %s tw_abc | sha256sum`
        let expected = "85287d5ca4a3b817fe0d42208dbe925f71cad204281bd709c1ff78c945bfa42e";
        let hash = SecretHash::of(b"tw_abc");
        assert_eq!(hash.to_string(), expected);
        let parsed: SecretHash = hash.to_string().to_uppercase().parse().unwrap();
        assert!(parsed.matches(&hash));
        assert!(!parsed.matches(&SecretHash::of(b"tw_xyz")));
    }

    #[test]
    fn an_invalid_hash_is_not_repeated_in_its_error() {
        for text in ["", "tw_secret", &"0".repeat(63), &"g".repeat(64)] {
            let Err(error) = text.parse::<SecretHash>() else {
                panic!("{text} is no hash")
            };
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }
}
