//! Chat messages of a request.

use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};

use crate::error::Error;
use crate::gateway::body_schema::null_schema;
use crate::gateway::fields::{Fields, Unsupported};
use crate::proto::v1;

/// Type of a tool and of a tool call.
const FUNCTION: &str = "function";

/// One turn of a conversation.
#[derive(Debug, ToSchema)]
pub(in crate::gateway) struct Message {
    /// The role of the author.
    #[schema(schema_with = role_schema, required)]
    role: &'static str,
    /// Text, or a list of text parts, which are joined with line breaks. Required unless an assistant's message has
    /// other parts.
    #[schema(schema_with = content_schema, required = false)]
    content: String,
    /// Distinguishes participants with the same role.
    name: Option<String>,
    /// Tools that the assistant called. Only engines of other kinds behind a gateway support this and the fields below.
    #[schema(required = false, nullable)]
    tool_calls: Vec<MessageToolCall>,
    /// Id of the tool call that this message answers. Required with the role `tool`.
    tool_call_id: Option<String>,
    /// Reasoning of the assistant before its answer.
    reasoning_content: Option<String>,
    /// Refusal of the assistant instead of an answer.
    refusal: Option<String>,
}

/// A call of a function by the assistant.
#[derive(Debug, ToSchema)]
struct MessageToolCall {
    /// Id of the call, which the answer of the tool repeats.
    id: String,
    /// Type of the tool.
    #[schema(schema_with = function_type_schema, required)]
    #[expect(dead_code, reason = "only describes the field, which has one value")]
    r#type: &'static str,
    /// The called function.
    function: MessageFunction,
}

/// A called function.
#[derive(Debug, ToSchema)]
struct MessageFunction {
    /// Name of the function.
    name: String,
    /// Arguments as the model wrote them: JSON as text.
    arguments: String,
}

impl Message {
    /// Supported roles, each with the engine's name for it.
    const ROLES: [(&str, &'static str); 5] = [
        ("system", "system"),
        // OpenAI's newer name for `system`.
        ("developer", "system"),
        ("user", "user"),
        ("assistant", "assistant"),
        ("tool", "tool"),
    ];

    /// OpenAI's older name of the role `tool`.
    const UNSUPPORTED_ROLE: &str = "function";

    /// OpenAI message fields that this server does not support.
    pub(in crate::gateway) const UNSUPPORTED: &[Unsupported] = &[
        ("function_call", "[]"),
        ("audio", "[]"),
        // OpenAI's responses contain this field, and clients send these messages back in the next request.
        ("annotations", "[[]]"),
    ];

    /// Reads a required field that holds a list of messages. `name` is the field's name.
    pub(in crate::gateway) fn read_all(fields: &mut Fields, name: &str) -> Result<v1::Chat, Error> {
        let items = fields.take_required_list(name, "a list of messages")?;
        if items.is_empty() {
            return Err(fields.invalid(name, "must contain at least one message"));
        }
        let read = |(index, item)| {
            let mut message = fields.nested(&format!("{name}[{index}]"), item)?;
            let read = Self::read(&mut message)?;
            fields.finish_nested(message)?;
            Ok(read.into())
        };
        let messages: Result<Vec<v1::ChatMessage>, Error> =
            items.into_iter().enumerate().map(read).collect();
        Ok(v1::Chat {
            messages: messages?,
        })
    }

    pub(in crate::gateway) fn read(fields: &mut Fields) -> Result<Self, Error> {
        let role = read_role(fields)?;
        fields.reject_unsupported(Self::UNSUPPORTED)?;
        let tool_calls = read_tool_calls(fields)?;
        let non_empty = |text: Option<String>| text.filter(|text| !text.is_empty());
        let reasoning_content = non_empty(fields.take_string("reasoning_content")?);
        let refusal = non_empty(fields.take_string("refusal")?);
        let has_other_parts =
            !tool_calls.is_empty() || reasoning_content.is_some() || refusal.is_some();
        if has_other_parts && role != "assistant" {
            let rule = "must be assistant for a message with tool calls, reasoning or a refusal";
            return Err(fields.invalid("role", rule));
        }
        Ok(Self {
            role,
            tool_calls,
            reasoning_content,
            refusal,
            content: read_content(fields, has_other_parts)?,
            name: fields.take_string("name")?,
            tool_call_id: read_tool_call_id(fields, role)?,
        })
    }
}

impl From<Message> for v1::ChatMessage {
    fn from(message: Message) -> Self {
        Self {
            role: message.role.to_owned(),
            content: message.content,
            name: message.name.unwrap_or_default(),
            tool_calls: message.tool_calls.into_iter().map(Into::into).collect(),
            tool_call_id: message.tool_call_id.unwrap_or_default(),
            reasoning_content: message.reasoning_content.unwrap_or_default(),
            refusal: message.refusal.unwrap_or_default(),
        }
    }
}

impl From<MessageToolCall> for v1::ToolCall {
    fn from(call: MessageToolCall) -> Self {
        Self {
            id: call.id,
            name: call.function.name,
            arguments: call.function.arguments,
        }
    }
}

fn read_role(fields: &mut Fields) -> Result<&'static str, Error> {
    let role = fields.take_required_string("role")?;
    let known = Message::ROLES.iter().find(|(name, _)| *name == role);
    match known {
        Some((_, engine_name)) => Ok(engine_name),
        None if role == Message::UNSUPPORTED_ROLE => Err(fields.unsupported("role")),
        None => Err(fields.invalid("role", "must be system, developer, user, assistant or tool")),
    }
}

fn read_tool_calls(fields: &mut Fields) -> Result<Vec<MessageToolCall>, Error> {
    const NAME: &str = "tool_calls";
    let calls = fields.take_list(NAME, "a list of tool calls")?;
    let calls = calls.unwrap_or_default().into_iter().enumerate();
    let read = |(index, call)| {
        let mut call = fields.nested(&format!("{NAME}[{index}]"), call)?;
        let read = MessageToolCall::read(&mut call)?;
        fields.finish_nested(call)?;
        Ok(read)
    };
    calls.map(read).collect()
}

impl MessageToolCall {
    fn read(fields: &mut Fields) -> Result<Self, Error> {
        read_function_type(fields)?;
        // Clients that join the parts of a stream send the index of the part back.
        fields.take_integer::<u32>("index")?;
        let mut function = fields.take_required_object("function")?;
        let called = MessageFunction {
            name: function.take_required_string("name")?,
            arguments: function.take_required_string("arguments")?,
        };
        fields.finish_nested(function)?;
        Ok(Self {
            id: fields.take_required_string("id")?,
            r#type: FUNCTION,
            function: called,
        })
    }
}

/// Reads the required field `type`, whose only supported value is `function`.
pub(super) fn read_function_type(fields: &mut Fields) -> Result<(), Error> {
    if fields.take_required_string("type")? == FUNCTION {
        return Ok(());
    }
    Err(fields.unsupported("type"))
}

fn read_tool_call_id(fields: &mut Fields, role: &str) -> Result<Option<String>, Error> {
    const NAME: &str = "tool_call_id";
    if role == "tool" {
        let id = fields.take_required_string(NAME)?;
        if id.is_empty() {
            return Err(fields.invalid(NAME, "must not be empty"));
        }
        return Ok(Some(id));
    }
    match fields.take_string(NAME)? {
        None => Ok(None),
        Some(_) => Err(fields.invalid(NAME, "is only allowed with the role tool")),
    }
}

/// Reads the text of a message. It may be missing from a message with other parts.
fn read_content(fields: &mut Fields, has_other_parts: bool) -> Result<String, Error> {
    if has_other_parts && !fields.contains("content") {
        fields.take("content");
        return Ok(String::new());
    }
    match fields.take_required("content")? {
        Value::String(text) => Ok(text),
        Value::Array(parts) if parts.is_empty() => {
            Err(fields.invalid("content", "must contain at least one part"))
        }
        Value::Array(parts) => {
            let texts: Result<Vec<_>, _> = parts
                .into_iter()
                .enumerate()
                .map(|(index, part)| text_of_part(fields, &format!("content[{index}]"), part))
                .collect();
            Ok(texts?.join("\n"))
        }
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            Err(fields.wrong_type("content", "a string or a list of parts", &other))
        }
    }
}

fn text_of_part(message: &mut Fields, name: &str, part: Value) -> Result<String, Error> {
    let mut part = message.nested(name, part)?;
    if part.take_required_string("type")? != "text" {
        return Err(part.unsupported("type"));
    }
    let text = part.take_required_string("text")?;
    message.finish_nested(part)?;
    Ok(text)
}

/// Schema of the type of a tool or of a tool call.
pub(super) fn function_type_schema() -> RefOr<Schema> {
    ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some([FUNCTION]))
        .into()
}

fn role_schema() -> RefOr<Schema> {
    let roles = Message::ROLES.map(|(name, _)| name);
    ObjectBuilder::new()
        .schema_type(Type::String)
        .description(Some(
            "The role of the author. `developer` is treated as `system`.",
        ))
        .enum_values(Some(roles))
        .into()
}

fn content_schema() -> RefOr<Schema> {
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let part = ObjectBuilder::new()
        .property("type", text().enum_values(Some(["text"])))
        .required("type")
        .property("text", text())
        .required("text")
        .additional_properties(Some(null_schema()));
    AnyOfBuilder::new()
        .description(Some(
            "Text, or a list of text parts, which are joined with line breaks. May be null only if an \
             assistant's message has other parts.",
        ))
        .item(text())
        .item(ArrayBuilder::new().items(part).min_items(Some(1)))
        .item(null_schema())
        .into()
}
