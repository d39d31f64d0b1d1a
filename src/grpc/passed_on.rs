//! The parameters that no runner of this process supports, because a gateway passes them on to engines of other kinds.
//! This module decides which of them a request uses. A value that is the same as leaving the field out does not count.

use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::proto::v1::response_format::Format;
use crate::proto::v1::tool_choice::{Choice, Mode};
use crate::request::Parameter;

/// The reasoning effort that is OpenAI's default.
const DEFAULT_REASONING_EFFORT: &str = "medium";

/// A test of whether a message uses a parameter.
type Uses<Message> = fn(&Message) -> bool;

/// The parameters that are fields of a request.
const REQUEST_PARAMETERS: [(Parameter, Uses<v1::CompletionRequest>); 5] = [
    (Parameter::Tools, |it| !it.tools.is_empty()),
    (Parameter::ToolChoice, |it| {
        it.tool_choice.as_ref().is_some_and(is_forced)
    }),
    (Parameter::ResponseFormat, |it| {
        it.response_format.as_ref().is_some_and(is_restricted)
    }),
    (Parameter::ReasoningEffort, |it| {
        !it.reasoning_effort.is_empty() && it.reasoning_effort != DEFAULT_REASONING_EFFORT
    }),
    (Parameter::ExtraFields, |it| {
        let extra = it.extra_fields.as_ref();
        extra.is_some_and(|extra| !extra.fields.is_empty())
    }),
];

/// The parameters that are fields of a chat message.
const MESSAGE_PARAMETERS: [(Parameter, Uses<v1::ChatMessage>); 4] = [
    (Parameter::ToolCalls, |it| !it.tool_calls.is_empty()),
    (Parameter::ToolCallId, |it| !it.tool_call_id.is_empty()),
    (Parameter::ReasoningContent, |it| {
        !it.reasoning_content.is_empty()
    }),
    (Parameter::Refusal, |it| !it.refusal.is_empty()),
];

/// Returns the parameters of [`Parameter::PASSED_ON`] that a request uses.
pub(super) fn passed_on_parameters(message: &v1::CompletionRequest) -> Vec<Parameter> {
    let in_request = REQUEST_PARAMETERS.iter();
    let in_request = in_request.filter(|(_, uses)| uses(message));
    let in_request = in_request.map(|(parameter, _)| *parameter);
    match &message.input {
        Some(Input::Chat(chat)) => in_request.chain(chat_parameters(chat)).collect(),
        Some(Input::Prompt(_) | Input::PromptTokenIds(_)) | None => in_request.collect(),
    }
}

/// Rejects a chat with parts that no runner supports.
///
/// # Errors
/// Returns an error that names the first such field.
pub(super) fn check_plain_chat(chat: &v1::Chat) -> Result<(), Error> {
    match chat_parameters(chat).next() {
        None => Ok(()),
        Some(parameter) => {
            let param = parameter.name();
            let message = format!("The model does not support {param} in messages. Leave it out.");
            Err(Error::new(ErrorKind::UnsupportedParameter, message).with_param(param))
        }
    }
}

fn chat_parameters(chat: &v1::Chat) -> impl Iterator<Item = Parameter> {
    let used = |uses: Uses<v1::ChatMessage>| chat.messages.iter().any(uses);
    MESSAGE_PARAMETERS
        .into_iter()
        .filter(move |(_, uses)| used(*uses))
        .map(|(parameter, _)| parameter)
}

/// Returns true unless the model may answer with text alone, as without tools.
fn is_forced(choice: &v1::ToolChoice) -> bool {
    match choice.choice {
        Some(Choice::Mode(mode)) => Mode::try_from(mode) == Ok(Mode::Required),
        Some(Choice::Function(_)) => true,
        None => false,
    }
}

fn is_restricted(format: &v1::ResponseFormat) -> bool {
    match format.format {
        Some(Format::JsonObject(_) | Format::JsonSchema(_)) => true,
        Some(Format::Text(_)) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_that_is_passed_on_has_a_test() {
        let of_requests = REQUEST_PARAMETERS.iter().map(|(parameter, _)| *parameter);
        let of_messages = MESSAGE_PARAMETERS.iter().map(|(parameter, _)| *parameter);
        let tested: Vec<_> = of_requests.chain(of_messages).collect();
        assert_eq!(tested.len(), Parameter::PASSED_ON.len());
        assert!(Parameter::PASSED_ON.iter().all(|it| tested.contains(it)));
    }

    #[test]
    fn a_value_that_equals_the_default_is_not_used() {
        let mode = |mode: Mode| v1::ToolChoice {
            choice: Some(Choice::Mode(mode.into())),
        };
        for (choice, is_used) in [
            (v1::ToolChoice::default(), false),
            (mode(Mode::None), false),
            (mode(Mode::Auto), false),
            (mode(Mode::Required), true),
        ] {
            let message = v1::CompletionRequest {
                tool_choice: Some(choice.clone()),
                response_format: Some(v1::ResponseFormat {
                    format: Some(Format::Text(v1::TextFormat {})),
                }),
                reasoning_effort: DEFAULT_REASONING_EFFORT.to_owned(),
                parallel_tool_calls: Some(false),
                extra_fields: Some(prost_types::Struct::default()),
                ..v1::CompletionRequest::default()
            };
            let used = passed_on_parameters(&message);
            let expected: &[Parameter] = if is_used {
                &[Parameter::ToolChoice]
            } else {
                &[]
            };
            assert_eq!(used, expected, "{choice:?}");
        }
    }

    #[test]
    fn a_chat_with_parts_that_no_runner_supports_is_rejected_and_the_part_named() {
        let cases = [
            (
                "tool_calls",
                v1::ChatMessage {
                    tool_calls: vec![v1::ToolCall::default()],
                    ..v1::ChatMessage::default()
                },
            ),
            (
                "tool_call_id",
                v1::ChatMessage {
                    tool_call_id: "a".to_owned(),
                    ..v1::ChatMessage::default()
                },
            ),
            (
                "reasoning_content",
                v1::ChatMessage {
                    reasoning_content: "a".to_owned(),
                    ..v1::ChatMessage::default()
                },
            ),
            (
                "refusal",
                v1::ChatMessage {
                    refusal: "a".to_owned(),
                    ..v1::ChatMessage::default()
                },
            ),
        ];
        for (param, message) in cases {
            let messages = vec![v1::ChatMessage::default(), message];
            let error = check_plain_chat(&v1::Chat { messages }).expect_err(param);
            assert_eq!(error.param.as_deref(), Some(param));
        }
    }
}
