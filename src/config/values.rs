//! Types for the values of settings: counts, times, texts and choices. Each type checks its value, and serializes to
//! the form that a settings file uses.

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::caller::PrefixSharing;
use crate::cluster::ServerKind;
use crate::gateway::{StreamFormat, UnknownFieldPolicy};
use crate::logging::LogFormat;
use crate::request::{MAX_MODEL_NAME_BYTES, MAX_TIMEOUT};

/// An integer of at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "i64", bound(deserialize = "N: TryFrom<i64>"))]
pub(super) struct PositiveInteger<N>(N);

impl From<PositiveInteger<u16>> for usize {
    fn from(count: PositiveInteger<u16>) -> Self {
        Self::from(count.0)
    }
}

impl From<PositiveInteger<u32>> for u32 {
    fn from(count: PositiveInteger<u32>) -> Self {
        count.0
    }
}

impl<N: TryFrom<i64>> TryFrom<i64> for PositiveInteger<N> {
    type Error = String;

    fn try_from(number: i64) -> Result<Self, String> {
        if number < 1 {
            return Err(format!("must be at least 1 (got {number})"));
        }
        let count = N::try_from(number).map(Self);
        count.map_err(|_| format!("{number} is too large"))
    }
}

impl<N: TryFrom<i64>> FromStr for PositiveInteger<N> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number: i64 = text.parse().map_err(|_| "must be an integer".to_owned())?;
        Self::try_from(number)
    }
}

/// A duration of at least `MIN` nanoseconds and at most ten years, given as a number of seconds such as
/// `0.5`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub(super) struct Seconds<const MIN: u64 = 0>(Duration);

/// A duration above 0 seconds.
pub(super) type PositiveSeconds = Seconds<1>;

impl<const MIN: u64> TryFrom<f64> for Seconds<MIN> {
    type Error = String;

    fn try_from(seconds: f64) -> Result<Self, String> {
        let time = Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|time| *time <= MAX_TIMEOUT)
            .ok_or_else(|| format!("must be from 0 seconds to ten years (got {seconds})"))?;
        let minimum = Duration::from_nanos(MIN);
        if time >= minimum {
            return Ok(Self(time));
        }
        Err(match MIN {
            1 => {
                format!("must be above 0 seconds (got {seconds}); set a large number for no limit")
            }
            _ => {
                let minimum = minimum.as_secs_f64();
                format!("must be at least {minimum} seconds (got {seconds})")
            }
        })
    }
}

impl<const MIN: u64> FromStr for Seconds<MIN> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let seconds: f64 = text
            .parse()
            .map_err(|_| "must be a number of seconds".to_owned())?;
        Self::try_from(seconds)
    }
}

impl<const MIN: u64> From<Seconds<MIN>> for Duration {
    fn from(seconds: Seconds<MIN>) -> Self {
        seconds.0
    }
}

impl<const MIN: u64> Serialize for Seconds<MIN> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match i64::try_from(self.0.as_secs()) {
            Ok(whole) if self.0.subsec_nanos() == 0 => serializer.serialize_i64(whole),
            _ => serializer.serialize_f64(self.0.as_secs_f64()),
        }
    }
}

/// A duration of at least 0, given as a number of milliseconds such as `0.5`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub(super) struct Milliseconds(Duration);

impl TryFrom<f64> for Milliseconds {
    type Error = String;

    fn try_from(milliseconds: f64) -> Result<Self, String> {
        Duration::try_from_secs_f64(milliseconds / 1_000.0)
            .map(Self)
            .map_err(|_| format!("must be at least 0 milliseconds (got {milliseconds})"))
    }
}

impl FromStr for Milliseconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let milliseconds: f64 = text
            .parse()
            .map_err(|_| "must be a number of milliseconds".to_owned())?;
        Self::try_from(milliseconds)
    }
}

impl From<Milliseconds> for Duration {
    fn from(milliseconds: Milliseconds) -> Self {
        milliseconds.0
    }
}

impl Serialize for Milliseconds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match i64::try_from(self.0.as_millis()) {
            Ok(whole) if self.0.subsec_nanos().is_multiple_of(1_000_000) => {
                serializer.serialize_i64(whole)
            }
            _ => serializer.serialize_f64(self.0.as_secs_f64() * 1e3),
        }
    }
}

/// A value that is parsed from text. It keeps the text, so that `config show` prints what the operator wrote.
#[derive(Clone, Debug)]
pub(super) struct ParsedText<T> {
    text: String,
    pub(super) value: T,
}

impl<T: FromStr> FromStr for ParsedText<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        let value = text.parse()?;
        let text = text.to_owned();
        Ok(Self { text, value })
    }
}

impl<T> Serialize for ParsedText<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de, T: FromStr<Err: Display>> Deserialize<'de> for ParsedText<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A path, which must be valid UTF-8.
pub(super) type FilePath = ParsedText<PathBuf>;

/// Name of an engine behind a gateway. The log and the metrics show it.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct EngineName(String);

impl EngineName {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for EngineName {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        if name.trim().is_empty() {
            return Err("must not be empty");
        }
        if name.chars().any(char::is_control) {
            return Err("must not contain line breaks or other control characters");
        }
        Ok(Self(name))
    }
}

/// Name of a model that requests can select.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct ModelName(String);

impl ModelName {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ModelName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        match name.len() {
            0 => Err("must not be empty".to_owned()),
            1..=MAX_MODEL_NAME_BYTES => Ok(Self(name)),
            length => Err(format!(
                "must be at most {MAX_MODEL_NAME_BYTES} bytes long (got {length})"
            )),
        }
    }
}

impl FromStr for ServerKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "vllm" => Ok(Self::Vllm),
            "llama.cpp" => Ok(Self::LlamaCpp),
            "openai" => Ok(Self::OpenAi),
            _ => Err("must be vllm, llama.cpp or openai".to_owned()),
        }
    }
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = [Self::Human, Self::Json].into_iter();
        let mut named = named.filter(|format| format.name() == text);
        named
            .next()
            .ok_or_else(|| "must be human or json".to_owned())
    }
}

impl FromStr for StreamFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "ndjson" => Ok(Self::Ndjson),
            "sse" => Ok(Self::Sse),
            _ => Err("must be ndjson or sse".to_owned()),
        }
    }
}

impl FromStr for PrefixSharing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            "caller" => Ok(Self::Caller),
            _ => Err("must be all or caller".to_owned()),
        }
    }
}

impl FromStr for UnknownFieldPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "ignore" => Ok(Self::Ignore),
            _ => Err("must be refuse or ignore".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::DeserializeOwned;

    use super::*;

    /// Writes a value to the text of a settings file, and reads it back.
    fn written_and_read<T: Serialize + DeserializeOwned>(value: &T) -> Result<T, String> {
        let text = toml::Value::try_from(value).map_err(|error| error.to_string())?;
        text.try_into()
            .map_err(|error: toml::de::Error| error.to_string())
    }

    proptest! {
        #[test]
        fn any_time_that_is_accepted_is_the_same_in_a_settings_file(
            seconds in prop_oneof![any::<f64>(), 0.0..4e8, 0.0..1e-6],
        ) {
            match Seconds::<1>::try_from(seconds) {
                Ok(time) => {
                    prop_assert!(!time.0.is_zero() && time.0 <= MAX_TIMEOUT);
                    prop_assert_eq!(written_and_read(&time), Ok(time));
                    prop_assert_eq!(seconds.to_string().parse(), Ok(time));
                }
                Err(problem) => prop_assert!(problem.starts_with("must be "), "{}", problem),
            }
            match Milliseconds::try_from(seconds) {
                Ok(time) => prop_assert_eq!(written_and_read(&time), Ok(time)),
                Err(problem) => prop_assert!(problem.starts_with("must be at least 0"), "{}", problem),
            }
        }

        #[test]
        fn any_text_is_a_valid_setting_or_has_a_problem(text in "-?[0-3]{1,2}|[-+0-9.eEainfNX_ ]{0,6}|\\PC{0,6}") {
            let problems = [
                text.parse::<Seconds>().err(),
                text.parse::<Milliseconds>().err(),
                text.parse::<PositiveInteger<u16>>().err(),
            ];
            for problem in problems.into_iter().flatten() {
                prop_assert!(
                    problem.starts_with("must be ") || problem.ends_with(" is too large"),
                    "{}", problem
                );
            }
            if let Ok(count) = text.parse::<PositiveInteger<u32>>() {
                prop_assert!(u32::from(count) >= 1);
            }
        }
    }
}
