//! The parts of a request body that describe a conversation: its messages, and the tools and formats of the answer.
//!
//! JSON inside the client's message, such as a schema, is passed on as it is, so that its keys keep their order.

use serde::Serialize;
use serde_json::value::RawValue;

use crate::cluster::openai::flavor::Flavor;
use crate::error::Error;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::proto::v1::response_format::Format;
use crate::proto::v1::tool_choice::{Choice, Mode};

/// Type of a tool and of a tool call.
const FUNCTION: &str = "function";

/// A message of the conversation.
#[derive(Serialize)]
pub(in crate::cluster::openai) struct Message<'a> {
    role: &'a str,
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall<'a>>,
    #[serde(skip_serializing_if = "str::is_empty")]
    tool_call_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning_content: &'a str,
    /// Newer name of `reasoning_content` (vLLM).
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    refusal: &'a str,
}

#[derive(Serialize)]
struct ToolCall<'a> {
    id: &'a str,
    r#type: &'static str,
    function: CalledFunction<'a>,
}

#[derive(Serialize)]
struct CalledFunction<'a> {
    name: &'a str,
    arguments: &'a str,
}

/// Options of the answer to a conversation. They are left out unless the client sets them.
#[derive(Default, Serialize)]
pub(super) struct ChatOptions<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tools: Vec<Tool<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_choice: Option<ToolChoice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parallel_tool_calls: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_format: Option<ResponseFormat<'a>>,
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning_effort: &'a str,
}

#[derive(Serialize)]
struct Tool<'a> {
    r#type: &'static str,
    function: Function<'a>,
}

/// A function of a tool.
#[derive(Serialize)]
struct Function<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    description: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    strict: Option<bool>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum ToolChoice<'a> {
    Mode(&'static str),
    Function {
        r#type: &'static str,
        function: FunctionName<'a>,
    },
}

#[derive(Serialize)]
struct FunctionName<'a> {
    name: &'a str,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat<'a> {
    Text,
    JsonObject,
    JsonSchema { json_schema: JsonSchema<'a> },
}

#[derive(Serialize)]
struct JsonSchema<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    description: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    schema: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    strict: Option<bool>,
}

/// Converts the messages of a chat.
pub(in crate::cluster::openai) fn messages(chat: &v1::Chat, flavor: Flavor) -> Vec<Message<'_>> {
    let messages = chat.messages.iter();
    messages.map(|it| Message::of(it, flavor)).collect()
}

impl<'a> Message<'a> {
    fn of(message: &'a v1::ChatMessage, flavor: Flavor) -> Self {
        let tool_call = |call: &'a v1::ToolCall| ToolCall {
            id: &call.id,
            r#type: FUNCTION,
            function: CalledFunction {
                name: &call.name,
                arguments: &call.arguments,
            },
        };
        let has_other_parts = !message.tool_calls.is_empty()
            || !message.reasoning_content.is_empty()
            || !message.refusal.is_empty();
        let is_null = message.content.is_empty() && has_other_parts;
        let reasoning = &message.reasoning_content;
        Self {
            role: &message.role,
            content: (!is_null).then_some(&message.content),
            name: &message.name,
            tool_calls: message.tool_calls.iter().map(tool_call).collect(),
            tool_call_id: &message.tool_call_id,
            reasoning_content: reasoning,
            reasoning: if flavor == Flavor::Vllm {
                reasoning
            } else {
                ""
            },
            refusal: &message.refusal,
        }
    }
}

impl<'a> ChatOptions<'a> {
    /// Converts the options of a request.
    ///
    /// # Errors
    /// An option is invalid, or needs a chat and the request is none.
    pub(super) fn of(message: &'a v1::CompletionRequest) -> Result<Self, Error> {
        let is_chat = matches!(message.input, Some(Input::Chat(_)));
        for (param, is_used) in [
            ("tools", !message.tools.is_empty()),
            ("tool_choice", message.tool_choice.is_some()),
            ("reasoning_effort", !message.reasoning_effort.is_empty()),
        ] {
            if is_used && !is_chat {
                let text = format!("{param} requires chat. Send a chat, or leave out {param}.");
                return Err(Error::invalid_value(param, text));
            }
        }
        let tools: Result<Vec<_>, Error> = message.tools.iter().map(tool).collect();
        let has_tools = !message.tools.is_empty();
        Ok(Self {
            tools: tools?,
            tool_choice: message.tool_choice.as_ref().map(tool_choice).transpose()?,
            parallel_tool_calls: message.parallel_tool_calls.filter(|_| has_tools),
            response_format: message
                .response_format
                .as_ref()
                .map(response_format)
                .transpose()?,
            reasoning_effort: &message.reasoning_effort,
        })
    }
}

fn tool(tool: &v1::Tool) -> Result<Tool<'_>, Error> {
    let function = tool.function.as_ref().filter(|it| !it.name.is_empty());
    let Some(function) = function else {
        let text = "tools must have a function with a name in every tool.";
        return Err(Error::invalid_value("tools", text));
    };
    Ok(Tool {
        r#type: FUNCTION,
        function: Function {
            name: &function.name,
            description: &function.description,
            parameters: json_object("tools", "parameters", &function.parameters)?,
            strict: function.strict,
        },
    })
}

fn tool_choice(choice: &v1::ToolChoice) -> Result<ToolChoice<'_>, Error> {
    let mode = |mode: i32| match Mode::try_from(mode) {
        Ok(Mode::None) => Some("none"),
        Ok(Mode::Auto) => Some("auto"),
        Ok(Mode::Required) => Some("required"),
        Ok(Mode::Unspecified) | Err(_) => None,
    };
    match &choice.choice {
        Some(Choice::Mode(number)) => mode(*number).map(ToolChoice::Mode),
        Some(Choice::Function(name)) => Some(ToolChoice::Function {
            r#type: FUNCTION,
            function: FunctionName { name },
        }),
        None => None,
    }
    .ok_or_else(|| {
        let text = "tool_choice must be a mode (none, auto or required) or the name of a function.";
        Error::invalid_value("tool_choice", text)
    })
}

fn response_format(format: &v1::ResponseFormat) -> Result<ResponseFormat<'_>, Error> {
    const NAME: &str = "response_format";
    match &format.format {
        None => {
            let text = "response_format must be text, json_object or json_schema.";
            Err(Error::invalid_value(NAME, text))
        }
        Some(Format::Text(_)) => Ok(ResponseFormat::Text),
        Some(Format::JsonObject(_)) => Ok(ResponseFormat::JsonObject),
        Some(Format::JsonSchema(schema)) => Ok(ResponseFormat::JsonSchema {
            json_schema: JsonSchema {
                name: &schema.name,
                description: &schema.description,
                schema: json_object(NAME, "schema", &schema.schema)?,
                strict: schema.strict,
            },
        }),
    }
}

/// Checks that a text is a JSON object. Returns `None` for an empty text.
fn json_object<'a>(param: &str, field: &str, text: &'a str) -> Result<Option<&'a RawValue>, Error> {
    if text.is_empty() {
        return Ok(None);
    }
    let json = serde_json::from_str(text).ok();
    let object = json.filter(|json: &&RawValue| json.get().starts_with('{'));
    match object {
        Some(object) => Ok(Some(object)),
        None => {
            let text = format!("{param} must have a JSON object in `{field}`, or an empty text.");
            Err(Error::invalid_value(param, text))
        }
    }
}
