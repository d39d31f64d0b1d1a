//! The list of attacks.

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use super::attacker::{AttackTarget, Outcome};
use super::{bodies, connections, floods, readers, streams};
use crate::fault::Fault;

/// An attack, or a row for comparison. `--help` shows the comments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum AttackKind {
    /// No attack, for comparison
    None,
    /// A process that keeps one core busy, for comparison
    BusyCore,
    /// 200 completions of 128 lists of 15,000 token ids
    ManyLists,
    /// 200 completions of 2,000,000 token ids
    LongLists,
    /// 50 requests to detokenize 2,000,000 token ids
    Detokenize,
    /// 50 requests to tokenize a text of 4 MiB
    Tokenize,
    /// 60 gRPC completions that resume after 1,000,000 tokens
    Resume,
    /// 300 bodies of 4 MiB whose last 3 bytes are held back
    HeldBodies,
    /// 6 unary completions of 128 choices with log probabilities
    Logprobs,
    /// 500 streams at full speed whose clients read 5 KB/s
    SlowReaders,
    /// 500 HTTP/2 streams with windows of 0 bytes
    ZeroWindows,
    /// 500 HTTP/2 streams whose windows grow by 1 byte a second
    ByteWindows,
    /// HTTP/2 requests that are reset after the server has accepted them, two for each PING
    AcceptedResets,
    /// HTTP/2 requests that are reset at once
    Resets,
    /// CONTINUATION frames without an end
    Continuations,
    /// SETTINGS frames
    Settings,
    /// PING frames
    Pings,
    /// DATA frames without data
    EmptyData,
    /// HTTP/2 headers that HPACK makes a thousand times longer
    Hpack,
    /// 500 connections that send a byte a second
    Drips,
    /// 2,000 connections that send nothing
    Idle,
}

/// Duration of an attack that does not end by itself.
const DURATION: Duration = Duration::from_secs(10);
/// Maximum duration of an attack with large bodies. It ends earlier, once all requests are answered.
const LONGEST_ANSWER: Duration = Duration::from_secs(60);
/// Time within which the server must end clients that make next to no progress. It exceeds the sum of the server's
/// timeouts.
const MAX_TIME_TO_END: Duration = Duration::from_secs(65);

impl AttackKind {
    /// Returns the name of the attack on the command line.
    pub(super) fn name(self) -> String {
        let value = self.to_possible_value().expect("no attack is hidden");
        value.get_name().to_owned()
    }

    /// Returns true for a row that is not an attack, but a comparison.
    pub(super) fn is_comparison(self) -> bool {
        matches!(self, Self::None | Self::BusyCore)
    }

    /// Returns the default maximum duration of the attack.
    pub(super) fn duration(self) -> Duration {
        match self {
            Self::ManyLists
            | Self::LongLists
            | Self::Detokenize
            | Self::Tokenize
            | Self::Resume
            | Self::Logprobs => LONGEST_ANSWER,
            Self::ZeroWindows | Self::ByteWindows | Self::Drips => MAX_TIME_TO_END,
            Self::None
            | Self::BusyCore
            | Self::HeldBodies
            | Self::SlowReaders
            | Self::AcceptedResets
            | Self::Resets
            | Self::Continuations
            | Self::Settings
            | Self::Pings
            | Self::EmptyData
            | Self::Hpack
            | Self::Idle => DURATION,
        }
    }

    pub(super) async fn run(self, target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
        match self {
            Self::None => connections::send_nothing(target, 0).await,
            Self::BusyCore => connections::keep_core_busy(target).await,
            Self::ManyLists => bodies::complete_many_lists(target).await,
            Self::LongLists => bodies::complete_long_lists(target).await,
            Self::Detokenize => bodies::detokenize(target).await,
            Self::Tokenize => bodies::tokenize(target).await,
            Self::Resume => bodies::resume(target).await,
            Self::HeldBodies => bodies::hold_back(target).await,
            Self::Logprobs => bodies::request_logprobs(target).await,
            Self::SlowReaders => readers::read_slowly(target).await,
            Self::ZeroWindows => streams::open_with_windows(target, None).await,
            Self::ByteWindows => {
                streams::open_with_windows(target, Some(Duration::from_secs(1))).await
            }
            Self::AcceptedResets => streams::reset_accepted(target).await,
            Self::Resets => floods::send_resets(target).await,
            Self::Continuations => floods::send_continuations(target).await,
            Self::Settings => floods::send_settings(target).await,
            Self::Pings => floods::send_pings(target).await,
            Self::EmptyData => floods::send_empty_data(target).await,
            Self::Hpack => floods::send_large_headers(target).await,
            Self::Drips => connections::drip(target).await,
            Self::Idle => connections::send_nothing(target, connections::IDLE_CONNECTIONS).await,
        }
    }
}
