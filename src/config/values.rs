//! Types of settings that need parsing: counts, times, addresses and choices.

use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::cluster;
use crate::gateway::{AllowedHost, AllowedOrigin, StreamFormat, UnknownFields};
use crate::listen::Address;
use crate::request::MAX_TIMEOUT;

/// An integer of at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "i64", bound = "N: TryFrom<i64>")]
pub(super) struct Count<N>(N);

impl<N> Count<N> {
    pub(super) fn get(self) -> N {
        self.0
    }
}

impl<N: TryFrom<i64>> TryFrom<i64> for Count<N> {
    type Error = String;

    fn try_from(number: i64) -> Result<Self, String> {
        if number < 1 {
            return Err(format!("must be at least 1 (got {number})"));
        }
        let count = N::try_from(number).map(Self);
        count.map_err(|_| format!("{number} is too large"))
    }
}

impl<N: TryFrom<i64>> FromStr for Count<N> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number: i64 = text.parse().map_err(|_| "must be an integer".to_owned())?;
        Self::try_from(number)
    }
}

/// A duration from 0 seconds to ten years, given as a number of seconds such as `0.5`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub(super) struct Seconds(Duration);

impl TryFrom<f64> for Seconds {
    type Error = String;

    fn try_from(seconds: f64) -> Result<Self, String> {
        Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|time| *time <= MAX_TIMEOUT)
            .map(Self)
            .ok_or_else(|| format!("must be from 0 seconds to ten years (got {seconds})"))
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let seconds: f64 = text
            .parse()
            .map_err(|_| "must be a number of seconds".to_owned())?;
        Self::try_from(seconds)
    }
}

impl From<Seconds> for Duration {
    fn from(seconds: Seconds) -> Self {
        seconds.0
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

/// The address of an engine's gRPC API.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct EngineAddress(String);

impl TryFrom<String> for EngineAddress {
    type Error = String;

    fn try_from(address: String) -> Result<Self, String> {
        cluster::check_address(&address)?;
        Ok(Self(address))
    }
}

impl FromStr for EngineAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::try_from(text.to_owned())
    }
}

impl From<EngineAddress> for String {
    fn from(address: EngineAddress) -> Self {
        address.0
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

impl<'de> Deserialize<'de> for StreamFormat {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl FromStr for UnknownFields {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "ignore" => Ok(Self::Ignore),
            _ => Err("must be refuse or ignore".to_owned()),
        }
    }
}

impl<'de> Deserialize<'de> for UnknownFields {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for AllowedHost {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for AllowedOrigin {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}
