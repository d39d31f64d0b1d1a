//! The ways to continue an interrupted completion, from the most exact to the last resort.

use smallvec::SmallVec;

use super::delivered::Delivered;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;

/// A way to continue an interrupted completion on an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rung {
    /// The engine resumes after the delivered token ids (`resume`). The result is that of an undisturbed run if the
    /// engine's runner declares `exact`.
    Resume,
    /// The engine gets the ids of the prompt and the delivered ids as its prompt.
    TokenIds,
    /// The engine gets the delivered text after the prompt, or as the start of the assistant's message.
    Text,
    /// The engine gets the request again. Its text must repeat the delivered text byte for byte, and only the text
    /// after it is passed on.
    Replay,
}

/// Abilities of an upstream that decide how it can continue a completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// The upstream knows the request field `resume`.
    pub(crate) resumes: bool,
    /// The upstream takes token ids as a prompt, reports ids, and can tokenize a prompt.
    pub(crate) takes_token_ids: bool,
    /// The upstream continues the last message of a chat if the assistant wrote it.
    pub(crate) continues_chats: bool,
    /// Presence and frequency penalties of the upstream also count the tokens of the prompt.
    pub(crate) penalizes_prompt: bool,
}

/// Fields of engines that restrict the text, besides `response_format`: those of llama.cpp, vLLM and SGLang.
const CONSTRAINTS: [&str; 9] = [
    "ebnf",
    "grammar",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "json_schema",
    "regex",
    "structured_outputs",
];

impl Rung {
    /// Every rung, in the order in which they are tried.
    pub(crate) const ALL: [Self; 4] = [Self::Resume, Self::TokenIds, Self::Text, Self::Replay];

    /// Returns the value of the label `method`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Resume => "resume",
            Self::TokenIds => "token_ids",
            Self::Text => "text",
            Self::Replay => "replay",
        }
    }

    /// Returns true if a completion can be continued in this way.
    fn applies(self, case: &Case<'_>) -> bool {
        let Case {
            message,
            delivered,
            abilities,
            is_same_model,
        } = case;
        let has_penalty = |penalty: Option<f32>| penalty.is_some_and(|penalty| penalty != 0.0);
        // The engine counts the delivered tokens as prompt, and echoes the continued prompt. It would begin a structured
        // text or a tool call again.
        let moves_into_prompt = !message.echo
            && !is_structured(message)
            && !delivered.has_message_parts()
            && (abilities.penalizes_prompt
                || !has_penalty(message.presence_penalty)
                    && !has_penalty(message.frequency_penalty));
        match self {
            Self::Resume => abilities.resumes && delivered.has_ids && *is_same_model,
            // An engine holds text back while it may be part of a stop string, so the delivered ids may be ahead of
            // the delivered text.
            Self::TokenIds => {
                abilities.takes_token_ids
                    && delivered.has_ids
                    && *is_same_model
                    && moves_into_prompt
                    && message.stop.is_empty()
                    && !resumes_after_unknown_ids(message)
                    && (is_prompt_of_ids(message) || !has_extra_fields(message))
            }
            Self::Text => {
                let is_text = match &message.input {
                    Some(Input::Prompt(_)) => true,
                    Some(Input::Chat(chat)) => {
                        let last = chat.messages.last();
                        abilities.continues_chats && last.is_some_and(|it| it.role != "assistant")
                    }
                    Some(Input::PromptTokenIds(_)) | None => false,
                };
                is_text
                    && delivered.has_text
                    && moves_into_prompt
                    && (message.stop.is_empty() || !message.include_stop_str_in_output)
                    && !delivered.ends_within_stop_string(&message.stop)
            }
            Self::Replay => delivered.has_text,
        }
    }
}

impl From<Option<Rung>> for v1::ResumptionMethod {
    fn from(rung: Option<Rung>) -> Self {
        match rung {
            None => Self::Unspecified,
            Some(Rung::Resume) => Self::Resume,
            Some(Rung::TokenIds) => Self::TokenIds,
            Some(Rung::Text) => Self::Text,
            Some(Rung::Replay) => Self::Replay,
        }
    }
}

/// Returns true if the ids after which a client wants to resume contain 0, which may stand for an unknown id.
fn resumes_after_unknown_ids(message: &v1::CompletionRequest) -> bool {
    let mut resumed = message.resume.iter();
    resumed.any(|choice| choice.token_ids.contains(&0))
}

fn is_prompt_of_ids(message: &v1::CompletionRequest) -> bool {
    matches!(message.input, Some(Input::PromptTokenIds(_)))
}

/// Returns true if the request has fields that Tokenway does not know. They may change the prompt, and an engine's
/// tokenizer does not get them.
fn has_extra_fields(message: &v1::CompletionRequest) -> bool {
    let extra = message.extra_fields.as_ref();
    extra.is_some_and(|extra| !extra.fields.is_empty())
}

/// Returns true if the engine restricts or interprets the text: with tools, or with a response format.
fn is_structured(message: &v1::CompletionRequest) -> bool {
    use v1::response_format::Format;
    let format = message.response_format.as_ref();
    let is_text = format.is_none_or(|format| matches!(format.format, None | Some(Format::Text(_))));
    let extra = message.extra_fields.as_ref();
    let is_constrained = extra.is_some_and(|extra| {
        CONSTRAINTS
            .iter()
            .any(|name| extra.fields.contains_key(*name))
    });
    !message.tools.is_empty() || !is_text || is_constrained
}

/// A completion to continue, and the target that may do so.
pub(in crate::cluster) struct Case<'a> {
    pub(in crate::cluster) message: &'a v1::CompletionRequest,
    pub(in crate::cluster) delivered: &'a Delivered,
    pub(in crate::cluster) abilities: Abilities,
    /// True if the target has the model that generated the delivered tokens.
    pub(in crate::cluster) is_same_model: bool,
}

/// Returns the rungs that apply, in the order in which to try them.
pub(in crate::cluster) fn rungs(case: &Case<'_>) -> SmallVec<[Rung; 4]> {
    let rungs = Rung::ALL.into_iter();
    rungs.filter(|rung| rung.applies(case)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::{Timestamps, TokenBatch};

    const ALL: Abilities = Abilities {
        resumes: true,
        takes_token_ids: true,
        continues_chats: true,
        penalizes_prompt: false,
    };

    fn prompt() -> v1::CompletionRequest {
        v1::CompletionRequest {
            input: Some(Input::Prompt("p".to_owned())),
            ..v1::CompletionRequest::default()
        }
    }

    fn chat(role: &str) -> v1::CompletionRequest {
        let message = v1::ChatMessage {
            role: role.to_owned(),
            ..v1::ChatMessage::default()
        };
        v1::CompletionRequest {
            input: Some(Input::Chat(v1::Chat {
                messages: vec![message],
            })),
            ..v1::CompletionRequest::default()
        }
    }

    fn rungs_of(message: &v1::CompletionRequest, abilities: Abilities) -> Vec<Rung> {
        let case = Case {
            message,
            delivered: &Delivered::at_start(message),
            abilities,
            is_same_model: true,
        };
        rungs(&case).to_vec()
    }

    #[test]
    fn an_engine_that_can_do_everything_offers_every_rung() {
        assert_eq!(rungs_of(&prompt(), ALL), Rung::ALL);
        assert_eq!(rungs_of(&chat("user"), ALL), Rung::ALL);
    }

    #[test]
    fn an_unknown_server_continues_the_text_of_completions_and_replays_chats() {
        let none = Abilities::default();
        assert_eq!(rungs_of(&prompt(), none), [Rung::Text, Rung::Replay]);
        assert_eq!(rungs_of(&chat("user"), none), [Rung::Replay]);
    }

    #[test]
    fn a_chat_that_ends_with_the_assistant_is_not_continued_by_text() {
        assert!(!rungs_of(&chat("assistant"), ALL).contains(&Rung::Text));
    }

    #[test]
    fn ids_are_used_only_for_the_model_that_generated_them() {
        let message = prompt();
        let case = Case {
            message: &message,
            delivered: &Delivered::at_start(&message),
            abilities: ALL,
            is_same_model: false,
        };
        assert_eq!(rungs(&case)[..], [Rung::Text, Rung::Replay]);
    }

    #[test]
    fn options_that_a_longer_prompt_would_change_leave_only_resumption_and_replay() {
        let exact = [Rung::Resume, Rung::Replay];
        let penalized = v1::CompletionRequest {
            presence_penalty: Some(0.5),
            ..prompt()
        };
        assert_eq!(rungs_of(&penalized, ALL), exact);
        let echoed = v1::CompletionRequest {
            echo: true,
            ..prompt()
        };
        assert_eq!(rungs_of(&echoed, ALL), exact);
        let counts_prompt = Abilities {
            penalizes_prompt: true,
            ..ALL
        };
        assert_eq!(rungs_of(&penalized, counts_prompt), Rung::ALL);
    }

    #[test]
    fn ids_are_not_used_if_some_are_unknown_or_if_unknown_fields_may_change_the_prompt() {
        let takes_ids = Abilities {
            takes_token_ids: true,
            ..Abilities::default()
        };
        let resumed = |ids: &[u32]| v1::CompletionRequest {
            resume: vec![v1::ResumedChoice {
                choice: 0,
                token_ids: ids.to_vec(),
            }],
            ..prompt()
        };
        assert_eq!(rungs_of(&resumed(&[5, 6]), takes_ids), [Rung::TokenIds]);
        assert_eq!(rungs_of(&resumed(&[5, 0]), takes_ids), []);
        let value = prost_types::Value { kind: None };
        let extra = prost_types::Struct {
            fields: [("documents".to_owned(), value)].into(),
        };
        let with_extra = |message| v1::CompletionRequest {
            extra_fields: Some(extra.clone()),
            ..message
        };
        let rungs = rungs_of(&with_extra(prompt()), takes_ids);
        assert_eq!(rungs, [Rung::Text, Rung::Replay]);
        let ids = v1::CompletionRequest {
            input: Some(Input::PromptTokenIds(v1::TokenIds::default())),
            ..prompt()
        };
        let rungs = rungs_of(&with_extra(ids), takes_ids);
        assert_eq!(rungs, [Rung::TokenIds, Rung::Replay]);
        let grammar = prost_types::Struct {
            fields: [("grammar".to_owned(), prost_types::Value { kind: None })].into(),
        };
        let constrained = v1::CompletionRequest {
            extra_fields: Some(grammar),
            ..prompt()
        };
        assert_eq!(rungs_of(&constrained, takes_ids), [Rung::Replay]);
    }

    #[test]
    fn text_that_ends_within_a_stop_string_is_only_replayed() {
        let message = v1::CompletionRequest {
            stop: vec!["time a".to_owned()],
            ..prompt()
        };
        for (text, is_continued) in [("once", true), ("once upon a time", false), ("no t", false)] {
            let mut delivered = Delivered::at_start(&message);
            let mut tokens = TokenBatch::default();
            tokens.push_with(0, Timestamps::default(), |out| out.push_str(text));
            delivered.record_tokens(&v1::Tokens {
                tokens,
                ..v1::Tokens::default()
            });
            let case = Case {
                message: &message,
                delivered: &delivered,
                abilities: Abilities::default(),
                is_same_model: true,
            };
            assert_eq!(rungs(&case).contains(&Rung::Text), is_continued, "{text}");
        }
    }

    #[test]
    fn structured_text_and_tool_calls_are_only_replayed() {
        let json = v1::ResponseFormat {
            format: Some(v1::response_format::Format::JsonObject(
                v1::JsonObjectFormat {},
            )),
        };
        let formatted = v1::CompletionRequest {
            response_format: Some(json),
            ..chat("user")
        };
        let with_tools = v1::CompletionRequest {
            tools: vec![v1::Tool::default()],
            ..chat("user")
        };
        for message in [formatted, with_tools] {
            let rungs = rungs_of(&message, ALL);
            assert_eq!(rungs, [Rung::Resume, Rung::Replay]);
        }
    }

    #[test]
    fn a_stop_string_rules_out_ids_and_an_included_one_rules_out_text() {
        let mut message = v1::CompletionRequest {
            stop: vec!["x".to_owned()],
            ..prompt()
        };
        let expected = [Rung::Resume, Rung::Text, Rung::Replay];
        assert_eq!(rungs_of(&message, ALL), expected);
        message.include_stop_str_in_output = true;
        assert_eq!(rungs_of(&message, ALL), [Rung::Resume, Rung::Replay]);
    }
}
