//! The object `delta` of a chat line that has no text.

use serde::Serialize;

use crate::proto::v1;

/// The parts of a message besides its text. Parts without news are left out.
#[derive(Serialize)]
pub(super) struct DeltaObject<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning_content: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    refusal: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCallObject<'a>>,
}

#[derive(Serialize)]
struct ToolCallObject<'a> {
    index: u32,
    #[serde(skip_serializing_if = "str::is_empty")]
    id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    r#type: &'a str,
    function: FunctionObject<'a>,
}

/// The function of a tool call. OpenAI's clients append `arguments` of each part, so it is always present.
#[derive(Serialize)]
struct FunctionObject<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
    arguments: &'a str,
}

impl<'a> From<&'a v1::ChatDelta> for DeltaObject<'a> {
    fn from(delta: &'a v1::ChatDelta) -> Self {
        let tool_call = |call: &'a v1::ToolCallDelta| ToolCallObject {
            index: call.index,
            id: &call.id,
            r#type: &call.r#type,
            function: FunctionObject {
                name: &call.name,
                arguments: &call.arguments,
            },
        };
        Self {
            reasoning_content: &delta.reasoning_content,
            refusal: &delta.refusal,
            tool_calls: delta.tool_calls.iter().map(tool_call).collect(),
        }
    }
}
