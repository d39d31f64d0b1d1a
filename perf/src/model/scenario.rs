//! The scenarios: typical loads on a server with a real model, and the figures that each of them measures.

use clap::ValueEnum;
use serde::Serialize;

use super::chats;
use super::client::Client;
use super::completions;
use super::measurement::{Figure, Measurement};
use super::prose::Prose;
use crate::fault::Fault;

/// A load on a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Scenario {
    /// One stream at a time
    DecodeOne,
    /// Eight streams at the same time
    DecodeEight,
    /// One long prompt
    LongPrompt,
    /// One growing chat of six turns, whose first message is long
    GrowingChat,
    /// 32 conversations: the first turn of each, one after the other, then the second turn of each
    Conversations,
    /// A long prompt that arrives while seven streams run
    PromptAmongStreams,
}

impl Scenario {
    pub(super) fn title(self) -> String {
        match self {
            Self::DecodeOne => "decoding, 1 stream".to_owned(),
            Self::DecodeEight => format!("decoding, {} streams", completions::STREAMS),
            Self::LongPrompt => "a long prompt".to_owned(),
            Self::GrowingChat => format!("a growing chat, {} turns", chats::TURNS),
            Self::Conversations => format!(
                "{} conversations, one after the other",
                chats::CONVERSATIONS
            ),
            Self::PromptAmongStreams => {
                format!(
                    "a long prompt among {} running streams",
                    completions::RUNNING_STREAMS
                )
            }
        }
    }

    pub(super) fn figures(self) -> &'static [Figure] {
        match self {
            Self::DecodeOne | Self::DecodeEight => &[Figure::DecodeRate],
            Self::LongPrompt => &[Figure::PromptRate, Figure::PromptTtft],
            Self::GrowingChat => &[Figure::FirstTurnTtft, Figure::LaterTurnsTtft],
            Self::Conversations => &[
                Figure::FirstTurnTtft,
                Figure::SecondTurnTtft,
                Figure::HotTurnTtft,
            ],
            Self::PromptAmongStreams => &[
                Figure::RunningGapP99,
                Figure::RunningRate,
                Figure::PromptTtft,
            ],
        }
    }

    /// Returns true for a short scenario that needs no new process. All servers then run at the same time, and the
    /// scenario runs on each in turn, many times: the shorter the time between two measurements, the less does a
    /// change of the machine's speed affect their ratio.
    pub(super) fn is_alternating(self) -> bool {
        match self {
            Self::DecodeOne | Self::DecodeEight => true,
            Self::LongPrompt
            | Self::GrowingChat
            | Self::Conversations
            | Self::PromptAmongStreams => false,
        }
    }

    /// Returns the factor by which the scenario has more rounds than `--rounds`.
    pub(super) fn rounds_factor(self) -> u32 {
        match self.is_alternating() {
            true => 16,
            false => 1,
        }
    }

    /// Returns the generator of the scenario's prompts in a round. Every server gets the same prompts.
    fn prose(self, round: u32) -> Prose {
        let position = Self::value_variants().iter().position(|one| *one == self);
        let position = u64::try_from(position.unwrap_or(0)).unwrap_or(0);
        Prose::from_seed(u64::from(round) << 32 | position)
    }

    /// Puts the load on a server and measures it.
    pub(super) async fn run(self, client: &Client, round: u32) -> Result<Measurement, Fault> {
        let prose = &mut self.prose(round);
        match self {
            Self::DecodeOne => completions::decode_alone(client, prose).await,
            Self::DecodeEight => completions::decode_together(client, prose).await,
            Self::LongPrompt => completions::long_prompt(client, prose).await,
            Self::GrowingChat => chats::growing_chat(client, prose).await,
            Self::Conversations => chats::conversations(client, prose).await,
            Self::PromptAmongStreams => completions::prompt_among_streams(client, prose).await,
        }
    }
}
