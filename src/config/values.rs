//! Values of settings that have a form of their own.

use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::cluster;
use crate::gateway::{AllowedHost, AllowedOrigin, StreamFormat, UnknownFields};
use crate::listen::Address;
use crate::request::MAX_TIMEOUT;

/// A number of things, at least one.
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
            return Err("it must be at least 1".to_owned());
        }
        let fits = N::try_from(number).map(Self);
        fits.map_err(|_| format!("{number} is too many"))
    }
}

impl<N: TryFrom<i64>> FromStr for Count<N> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number: i64 = text
            .parse()
            .map_err(|_| "it must be a whole number".to_owned())?;
        Self::try_from(number)
    }
}

/// A span of time, written in seconds with fractions.
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
            .ok_or_else(|| format!("{seconds} is no number of seconds from 0 to ten years"))
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let seconds: f64 = text
            .parse()
            .map_err(|_| "it must be a number of seconds".to_owned())?;
        Self::try_from(seconds)
    }
}

impl From<Seconds> for Duration {
    fn from(seconds: Seconds) -> Self {
        seconds.0
    }
}

/// A span of time, written in milliseconds with fractions.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub(super) struct Milliseconds(Duration);

impl TryFrom<f64> for Milliseconds {
    type Error = String;

    fn try_from(milliseconds: f64) -> Result<Self, String> {
        Duration::try_from_secs_f64(milliseconds / 1_000.0)
            .map(Self)
            .map_err(|_| format!("{milliseconds} is no number of milliseconds from 0 on"))
    }
}

impl FromStr for Milliseconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let milliseconds: f64 = text
            .parse()
            .map_err(|_| "it must be a number of milliseconds".to_owned())?;
        Self::try_from(milliseconds)
    }
}

impl From<Milliseconds> for Duration {
    fn from(milliseconds: Milliseconds) -> Self {
        milliseconds.0
    }
}

/// The address of an engine's gRPC door.
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
            _ => Err("it must be ndjson or sse".to_owned()),
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
            _ => Err("it must be refuse or ignore".to_owned()),
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
