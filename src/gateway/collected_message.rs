//! The parts of a chat message besides its text, collected from the deltas of a stream.

use std::collections::BTreeMap;

use crate::proto::v1;

/// The parts of one message.
#[derive(Debug, Default, PartialEq)]
pub(super) struct CollectedMessage {
    pub(super) reasoning: String,
    pub(super) refusal: String,
    /// Tool calls by their index.
    tool_calls: BTreeMap<u32, v1::ToolCallDelta>,
}

impl CollectedMessage {
    /// Adds the parts of a delta.
    pub(super) fn add(&mut self, delta: v1::ChatDelta) {
        self.reasoning.push_str(&delta.reasoning_content);
        self.refusal.push_str(&delta.refusal);
        for part in delta.tool_calls {
            let call = self.tool_calls.entry(part.index).or_default();
            // Engines send these three whole. Some repeat them with each delta.
            set_unless_empty(&mut call.id, part.id);
            set_unless_empty(&mut call.r#type, part.r#type);
            set_unless_empty(&mut call.name, part.name);
            call.arguments.push_str(&part.arguments);
        }
    }

    /// Returns the tool calls, ordered by index.
    pub(super) fn into_tool_calls(self) -> impl Iterator<Item = v1::ToolCallDelta> {
        self.tool_calls.into_values()
    }

    /// Returns true if the model called a tool.
    pub(super) fn has_tool_calls(&self) -> bool {
        !self.tool_calls.is_empty()
    }
}

fn set_unless_empty(text: &mut String, new: String) {
    if !new.is_empty() {
        *text = new;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(index: u32, id: &str, name: &str, arguments: &str) -> v1::ChatDelta {
        v1::ChatDelta {
            tool_calls: vec![v1::ToolCallDelta {
                index,
                id: id.to_owned(),
                name: name.to_owned(),
                arguments: arguments.to_owned(),
                ..v1::ToolCallDelta::default()
            }],
            ..v1::ChatDelta::default()
        }
    }

    #[test]
    fn the_parts_of_parallel_tool_calls_are_joined_by_index() {
        let mut message = CollectedMessage::default();
        for delta in [
            part(1, "b", "g", ""),
            part(0, "a", "f", "{"),
            part(1, "", "", "{\"x\":1}"),
            part(0, "a", "f", "}"),
        ] {
            message.add(delta);
        }
        let calls: Vec<_> = message
            .into_tool_calls()
            .map(|call| (call.id, call.name, call.arguments))
            .collect();
        let call = |id: &str, name: &str, arguments: &str| {
            (id.to_owned(), name.to_owned(), arguments.to_owned())
        };
        assert_eq!(calls, [call("a", "f", "{}"), call("b", "g", "{\"x\":1}")]);
    }
}
