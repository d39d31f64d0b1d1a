//! Values of settings that have a form of their own.

use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::cluster;
use crate::gateway::StreamFormat;
use crate::listen::Address;
use crate::request::LONGEST_TIMEOUT;

/// More workers, slots, threads or tokens of context than any machine has.
const MAX_COUNT: u32 = 16_777_216;

/// How many of something there are, of which there must be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "i64")]
pub(super) struct Count(u32);

impl TryFrom<i64> for Count {
    type Error = String;

    fn try_from(count: i64) -> Result<Self, String> {
        u32::try_from(count)
            .ok()
            .filter(|count| (1..=MAX_COUNT).contains(count))
            .map(Self)
            .ok_or_else(|| format!("it must be a whole number from 1 to {MAX_COUNT}"))
    }
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // What is no number is out of range like 0.
        Self::try_from(text.parse().unwrap_or(0))
    }
}

impl From<Count> for u32 {
    fn from(count: Count) -> Self {
        count.0
    }
}

impl From<Count> for usize {
    fn from(count: Count) -> Self {
        Self::try_from(count.0).expect("16 million fit into it")
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
            .filter(|time| *time <= LONGEST_TIMEOUT)
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

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}
