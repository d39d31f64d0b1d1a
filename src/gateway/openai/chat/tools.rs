//! The fields of a chat body that describe tools and the format of the answer.
//!
//! JSON Schemas are passed on as text, so that their keys and numbers stay as the client wrote them.

use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::schema::{AnyOfBuilder, ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};

use crate::error::Error;
use crate::gateway::body_schema::null_schema;
use crate::gateway::fields::Fields;
use crate::gateway::openai::message::{function_type_schema, read_function_type};
use crate::proto::v1;
use crate::proto::v1::response_format::Format;
use crate::proto::v1::tool_choice::{Choice, Mode};

/// Modes of `tool_choice`.
const MODES: [(&str, Mode); 3] = [
    ("none", Mode::None),
    ("auto", Mode::Auto),
    ("required", Mode::Required),
];

/// Tools and format of the answer. Only engines of other kinds behind a gateway support these fields.
#[derive(Debug, ToSchema)]
pub(super) struct ToolFields {
    /// Functions that the model may call, up to 128.
    #[schema(value_type = Vec<Tool>, required = false, nullable, max_items = 128)]
    tools: Vec<v1::Tool>,
    /// `none`, `auto`, `required`, or the function that the model must call.
    #[schema(schema_with = tool_choice_schema, required = false)]
    tool_choice: Option<v1::ToolChoice>,
    /// Permission to call several tools at once. No effect without tools.
    parallel_tool_calls: Option<bool>,
    /// Format of the text.
    #[schema(value_type = Option<ResponseFormat>)]
    response_format: Option<v1::ResponseFormat>,
    /// Effort that a reasoning model spends before its answer, such as `low`.
    reasoning_effort: Option<String>,
}

/// A tool.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only describes what `tool` reads")]
struct Tool {
    /// Type of the tool.
    #[schema(schema_with = function_type_schema, required)]
    r#type: &'static str,
    /// The function.
    function: FunctionDefinition,
}

/// A function that the model may call.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only describes what `tool` reads")]
struct FunctionDefinition {
    /// Name of the function.
    name: String,
    /// Purpose of the function.
    description: Option<String>,
    /// JSON Schema of the arguments.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Value>,
    /// Makes the arguments follow the schema exactly.
    strict: Option<bool>,
}

/// A format of the text.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only describes what `response_format` reads")]
struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    #[schema(schema_with = format_type_schema, required)]
    r#type: &'static str,
    /// The schema. Required with `json_schema`.
    json_schema: Option<JsonSchemaFormat>,
}

/// A schema of the text.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only describes what `response_format` reads")]
struct JsonSchemaFormat {
    /// Name of the format.
    name: String,
    /// Purpose of the format.
    description: Option<String>,
    /// JSON Schema of the text.
    #[schema(value_type = Option<Object>)]
    schema: Option<Value>,
    /// Makes the text follow the schema exactly.
    strict: Option<bool>,
}

impl ToolFields {
    /// Reads the fields. Leaves out values that have no effect, so that engines without tools accept them.
    pub(super) fn read(fields: &mut Fields) -> Result<Self, Error> {
        let tools = tools(fields)?;
        let has_tools = !tools.is_empty();
        let tool_choice = tool_choice(fields)?;
        let parallel_tool_calls = fields.take_bool("parallel_tool_calls")?;
        let has_effect = |choice: &v1::ToolChoice| has_tools || requires_tools(choice);
        Ok(Self {
            tools,
            tool_choice: tool_choice.filter(has_effect),
            parallel_tool_calls: parallel_tool_calls.filter(|_| has_tools),
            response_format: response_format(fields)?,
            reasoning_effort: fields.take_string("reasoning_effort")?,
        })
    }

    /// Moves the fields into a message for the engine.
    pub(super) fn write_to(self, message: &mut v1::CompletionRequest) {
        message.tools = self.tools;
        message.tool_choice = self.tool_choice;
        message.parallel_tool_calls = self.parallel_tool_calls;
        message.response_format = self.response_format;
        message.reasoning_effort = self.reasoning_effort.unwrap_or_default();
    }
}

fn tools(fields: &mut Fields) -> Result<Vec<v1::Tool>, Error> {
    const NAME: &str = "tools";
    const MAX_TOOLS: usize = 128;
    let tools = fields
        .take_list(NAME, "a list of tools")?
        .unwrap_or_default();
    if tools.len() > MAX_TOOLS {
        let rule = format!("must have at most {MAX_TOOLS} tools (got {})", tools.len());
        return Err(fields.invalid(NAME, &rule));
    }
    let read = |(index, tool)| {
        let mut tool = fields.nested(&format!("{NAME}[{index}]"), tool)?;
        read_function_type(&mut tool)?;
        let mut function = tool.take_required_object("function")?;
        let read = v1::FunctionDefinition {
            name: non_empty_name(&mut function)?,
            description: function.take_string("description")?.unwrap_or_default(),
            parameters: schema_text(&mut function, "parameters")?,
            strict: function.take_bool("strict")?,
        };
        tool.finish_nested(function)?;
        fields.finish_nested(tool)?;
        Ok(v1::Tool {
            function: Some(read),
        })
    };
    tools.into_iter().enumerate().map(read).collect()
}

fn tool_choice(fields: &mut Fields) -> Result<Option<v1::ToolChoice>, Error> {
    const NAME: &str = "tool_choice";
    let choice = match fields.take(NAME) {
        None => return Ok(None),
        Some(Value::String(name)) => match MODES.iter().find(|(known, _)| *known == name) {
            Some((_, mode)) => Choice::Mode((*mode).into()),
            None => {
                let rule = "must be none, auto, required or an object with a function";
                return Err(fields.invalid(NAME, rule));
            }
        },
        Some(Value::Object(object)) => {
            let mut choice = fields.nested(NAME, Value::Object(object))?;
            read_function_type(&mut choice)?;
            let mut function = choice.take_required_object("function")?;
            let name = non_empty_name(&mut function)?;
            choice.finish_nested(function)?;
            fields.finish_nested(choice)?;
            Choice::Function(name)
        }
        Some(other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_))) => {
            return Err(fields.wrong_type(NAME, "a string or an object", &other));
        }
    };
    Ok(Some(v1::ToolChoice {
        choice: Some(choice),
    }))
}

fn requires_tools(choice: &v1::ToolChoice) -> bool {
    match choice.choice {
        Some(Choice::Mode(mode)) => Mode::try_from(mode) == Ok(Mode::Required),
        Some(Choice::Function(_)) => true,
        None => false,
    }
}

/// Reads `response_format`. Returns `None` for free text.
fn response_format(fields: &mut Fields) -> Result<Option<v1::ResponseFormat>, Error> {
    let Some(mut format) = fields.take_object("response_format")? else {
        return Ok(None);
    };
    let read = match &*format.take_required_string("type")? {
        "text" => None,
        "json_object" => Some(Format::JsonObject(v1::JsonObjectFormat {})),
        "json_schema" => {
            let mut schema = format.take_required_object("json_schema")?;
            let read = v1::JsonSchemaFormat {
                name: non_empty_name(&mut schema)?,
                description: schema.take_string("description")?.unwrap_or_default(),
                schema: schema_text(&mut schema, "schema")?,
                strict: schema.take_bool("strict")?,
            };
            format.finish_nested(schema)?;
            Some(Format::JsonSchema(read))
        }
        _ => return Err(format.unsupported("type")),
    };
    fields.finish_nested(format)?;
    Ok(read.map(|format| v1::ResponseFormat {
        format: Some(format),
    }))
}

fn non_empty_name(fields: &mut Fields) -> Result<String, Error> {
    let name = fields.take_required_string("name")?;
    if name.is_empty() {
        return Err(fields.invalid("name", "must not be empty"));
    }
    Ok(name)
}

/// Reads a JSON Schema, as text. Returns an empty text if the field is missing.
fn schema_text(fields: &mut Fields, name: &str) -> Result<String, Error> {
    match fields.take(name) {
        None => Ok(String::new()),
        Some(schema @ Value::Object(_)) => Ok(schema.to_string()),
        Some(
            other @ (Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_)),
        ) => Err(fields.wrong_type(name, "an object", &other)),
    }
}

fn tool_choice_schema() -> RefOr<Schema> {
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let function = ObjectBuilder::new()
        .property("name", text().min_length(Some(1)))
        .required("name");
    let object = ObjectBuilder::new()
        .property("type", function_type_schema())
        .required("type")
        .property("function", function)
        .required("function");
    AnyOfBuilder::new()
        .description(Some(
            "`none`, `auto`, `required`, or the function that the model must call.",
        ))
        .item(text().enum_values(Some(MODES.map(|(name, _)| name))))
        .item(object)
        .item(null_schema())
        .into()
}

fn format_type_schema() -> RefOr<Schema> {
    ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some(["text", "json_object", "json_schema"]))
        .into()
}
