//! The kinds of OpenAI-compatible servers that differ in what they support.

use crate::cluster::ladder::Abilities;
use crate::cluster::spec::ServerKind;
use crate::request::Parameter;

/// An OpenAI-compatible server, as its list of models or the settings identify it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Flavor {
    /// vLLM's HTTP server.
    Vllm,
    /// llama.cpp's server.
    LlamaCpp,
    /// llama.cpp's server behind a proxy that passes on only the paths below `/v1`.
    LlamaCppV1,
    /// Any other server. Of the fields that Tokenway knows, only OpenAI's own are sent to it.
    #[default]
    Other,
}

/// Parameters that this gateway does not pass to any OpenAI-compatible engine.
const NEVER: [Parameter; 1] = [Parameter::EchoLogprobs];

/// Parameters that OpenAI's own API does not have.
const NOT_OPENAI: [Parameter; 7] = [
    NEVER[0],
    Parameter::TopK,
    Parameter::MinP,
    Parameter::RepetitionPenalty,
    Parameter::MinTokens,
    Parameter::IgnoreEos,
    Parameter::StopTokenIds,
];

/// llama.cpp's server ignores these fields.
const NOT_LLAMA_CPP: [Parameter; 5] = [
    NEVER[0],
    Parameter::RepetitionPenalty,
    Parameter::MinTokens,
    Parameter::StopTokenIds,
    Parameter::Suffix,
];

impl From<ServerKind> for Flavor {
    fn from(kind: ServerKind) -> Self {
        match kind {
            ServerKind::Vllm => Self::Vllm,
            ServerKind::LlamaCpp => Self::LlamaCpp,
            ServerKind::OpenAi => Self::Other,
        }
    }
}

impl Flavor {
    /// Recognizes a server by the `owned_by` of its models.
    pub(super) fn from_owner(owner: &str) -> Self {
        match owner {
            // The frontend in Rust calls itself `vllm-frontend-rs`.
            _ if owner.starts_with("vllm") => Self::Vllm,
            "llamacpp" => Self::LlamaCpp,
            _ => Self::Other,
        }
    }

    /// Returns the name under which the list of models shows the server.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::LlamaCpp | Self::LlamaCppV1 => "llama.cpp",
            Self::Other => "openai",
        }
    }

    /// Returns true if the server can end the text after the matched stop string.
    pub(super) fn includes_stop_string(self) -> bool {
        self == Self::Vllm
    }

    /// Returns the abilities that decide how the server can continue a completion of another one.
    pub(super) fn abilities(self) -> Abilities {
        match self {
            Self::Vllm => Abilities {
                takes_token_ids: true,
                continues_chats: true,
                ..Abilities::default()
            },
            Self::LlamaCpp | Self::LlamaCppV1 => Abilities {
                takes_token_ids: self == Self::LlamaCpp,
                continues_chats: true,
                penalizes_prompt: true,
                ..Abilities::default()
            },
            Self::Other => Abilities::default(),
        }
    }

    /// Returns true if the server is known to share computed tokens only between prompts with the same salt.
    /// llama.cpp's server shares them among all requests, and an unknown server may ignore the salt.
    pub(super) fn isolates_prompts(self) -> bool {
        self == Self::Vllm
    }

    /// Returns true if the server can start the text of a completion with the prompt.
    pub(super) fn echoes_prompts(self) -> bool {
        self == Self::Vllm
    }

    /// Returns the parameters that are not passed to the server.
    pub(super) fn unsupported(self) -> &'static [Parameter] {
        match self {
            Self::Vllm => &NEVER,
            Self::LlamaCpp | Self::LlamaCppV1 => &NOT_LLAMA_CPP,
            Self::Other => &NOT_OPENAI,
        }
    }
}
