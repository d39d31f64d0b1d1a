//! Chat messages.

use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};

use crate::error::Error;
use crate::gateway::body_schema::null_schema;
use crate::gateway::fields::{Fields, Unsupported};
use crate::proto::v1;

/// One turn of a conversation.
#[derive(Debug, ToSchema)]
pub(in crate::gateway) struct Message {
    /// The role of the author.
    #[schema(schema_with = role_schema, required)]
    role: &'static str,
    /// Text, or a list of text parts, which are joined with line breaks.
    #[schema(schema_with = content_schema, required)]
    content: String,
    /// Distinguishes participants with the same role.
    name: Option<String>,
}

impl Message {
    /// Supported roles, each with the engine's name for it.
    const ROLES: [(&str, &'static str); 4] = [
        ("system", "system"),
        // OpenAI's newer name for `system`.
        ("developer", "system"),
        ("user", "user"),
        ("assistant", "assistant"),
    ];

    /// Roles of tool results.
    const UNSUPPORTED_ROLES: [&str; 2] = ["tool", "function"];

    /// OpenAI message fields that this server does not support.
    pub(in crate::gateway) const UNSUPPORTED: &[Unsupported] = &[
        ("tool_calls", "[[]]"),
        ("tool_call_id", "[]"),
        ("function_call", "[]"),
        ("audio", "[]"),
        ("refusal", "[]"),
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
        // A message with `tool_calls` may have no `content`. The error must then name `tool_calls`.
        fields.reject_unsupported(Self::UNSUPPORTED)?;
        Ok(Self {
            role,
            content: read_content(fields)?,
            name: fields.take_string("name")?,
        })
    }
}

impl From<Message> for v1::ChatMessage {
    fn from(message: Message) -> Self {
        Self {
            role: message.role.to_owned(),
            content: message.content,
            name: message.name.unwrap_or_default(),
        }
    }
}

fn read_role(fields: &mut Fields) -> Result<&'static str, Error> {
    let role = fields.take_required("role")?;
    let role = fields.string_value("role", role)?;
    let known = Message::ROLES.iter().find(|(name, _)| *name == role);
    match known {
        Some((_, engine_name)) => Ok(engine_name),
        None if Message::UNSUPPORTED_ROLES.contains(&&*role) => Err(fields.unsupported("role")),
        None => Err(fields.invalid("role", "must be system, developer, user or assistant")),
    }
}

fn read_content(fields: &mut Fields) -> Result<String, Error> {
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
    let kind = part.take_required("type")?;
    if part.string_value("type", kind)? != "text" {
        return Err(part.unsupported("type"));
    }
    let text = part.take_required("text")?;
    let text = part.string_value("text", text)?;
    message.finish_nested(part)?;
    Ok(text)
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
            "Text, or a list of text parts, which are joined with line breaks.",
        ))
        .item(text())
        .item(ArrayBuilder::new().items(part).min_items(Some(1)))
        .into()
}
