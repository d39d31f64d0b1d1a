//! The parts of a chat's answer besides its text: reasoning, refusal and tool calls.

use crate::proto::v1;

use super::seam::SeamError;

/// The parts of an answer that the client has.
#[derive(Clone, Debug, Default)]
pub(super) struct MessageParts {
    reasoning: String,
    refusal: String,
    calls: Vec<CallParts>,
}

/// A tool call, as far as the client has it.
#[derive(Clone, Debug, Default)]
struct CallParts {
    index: u32,
    has_id: bool,
    has_type: bool,
    name: String,
    arguments: String,
}

/// Position of an engine's stream in the parts that the client has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PartsPosition {
    reasoning: usize,
    refusal: usize,
    /// Positions in the name and in the arguments of each call.
    calls: Vec<(usize, usize)>,
}

impl MessageParts {
    pub(super) fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.refusal.is_empty() && self.calls.is_empty()
    }

    /// Returns true if a stream at this position has repeated all parts.
    pub(super) fn is_reached_by(&self, position: &PartsPosition) -> bool {
        let calls = self.calls.iter().enumerate();
        position.reasoning >= self.reasoning.len()
            && position.refusal >= self.refusal.len()
            && calls.into_iter().all(|(at, call)| {
                let (name, arguments) = position.calls.get(at).copied().unwrap_or_default();
                name >= call.name.len() && arguments >= call.arguments.len()
            })
    }

    /// Removes from a delta what the client has. Ids of tool calls are random, so the client keeps those of the first
    /// stream.
    ///
    /// # Errors
    /// The delta differs from what the client has.
    pub(super) fn remove_repeated(
        &self,
        position: &mut PartsPosition,
        delta: &mut v1::ChatDelta,
    ) -> Result<(), SeamError> {
        skip(
            &self.reasoning,
            &mut position.reasoning,
            &mut delta.reasoning_content,
        )?;
        skip(&self.refusal, &mut position.refusal, &mut delta.refusal)?;
        for call in &mut delta.tool_calls {
            let Some(at) = self.calls.iter().position(|it| it.index == call.index) else {
                continue;
            };
            let known = &self.calls[at];
            if position.calls.len() <= at {
                position.calls.resize(at + 1, (0, 0));
            }
            let (name, arguments) = &mut position.calls[at];
            skip(&known.name, name, &mut call.name)?;
            skip(&known.arguments, arguments, &mut call.arguments)?;
            if known.has_id {
                call.id.clear();
            }
            if known.has_type {
                call.r#type.clear();
            }
        }
        let is_empty = |call: &v1::ToolCallDelta| {
            call.id.is_empty()
                && call.r#type.is_empty()
                && call.name.is_empty()
                && call.arguments.is_empty()
        };
        delta.tool_calls.retain(|call| !is_empty(call));
        Ok(())
    }

    /// Records a delta that the client receives now.
    pub(super) fn record(&mut self, delta: &v1::ChatDelta) {
        self.reasoning.push_str(&delta.reasoning_content);
        self.refusal.push_str(&delta.refusal);
        for new in &delta.tool_calls {
            let at = self.calls.iter().position(|it| it.index == new.index);
            let at = at.unwrap_or_else(|| {
                self.calls.push(CallParts {
                    index: new.index,
                    ..CallParts::default()
                });
                self.calls.len() - 1
            });
            let call = &mut self.calls[at];
            call.has_id |= !new.id.is_empty();
            call.has_type |= !new.r#type.is_empty();
            call.name.push_str(&new.name);
            call.arguments.push_str(&new.arguments);
        }
    }
}

/// Removes from the start of `new` the text that follows `position` in `known`, and moves the position.
///
/// # Errors
/// The texts differ.
fn skip(known: &str, position: &mut usize, new: &mut String) -> Result<(), SeamError> {
    let left = known.get(*position..).unwrap_or_default();
    let repeated = left.len().min(new.len());
    if left.as_bytes()[..repeated] != new.as_bytes()[..repeated] {
        return Err(SeamError::DifferentText);
    }
    *position += new.len();
    new.drain(..repeated);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(index: u32, id: &str, name: &str, arguments: &str) -> v1::ToolCallDelta {
        let r#type = if id.is_empty() { "" } else { "function" };
        v1::ToolCallDelta {
            index,
            id: id.to_owned(),
            r#type: r#type.to_owned(),
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        }
    }

    fn delta(reasoning: &str, tool_calls: Vec<v1::ToolCallDelta>) -> v1::ChatDelta {
        v1::ChatDelta {
            reasoning_content: reasoning.to_owned(),
            tool_calls,
            ..v1::ChatDelta::default()
        }
    }

    fn rest(
        parts: &MessageParts,
        deltas: Vec<v1::ChatDelta>,
    ) -> Result<Vec<v1::ChatDelta>, SeamError> {
        let mut position = PartsPosition::default();
        let mut rest = deltas;
        for delta in &mut rest {
            parts.remove_repeated(&mut position, delta)?;
        }
        assert!(parts.is_reached_by(&position));
        Ok(rest)
    }

    #[test]
    fn a_replayed_tool_call_keeps_the_first_id_and_goes_on_with_its_arguments() {
        let mut parts = MessageParts::default();
        parts.record(&delta("hm", vec![call(0, "call_1", "get", "{\"a\"")]));
        let replayed = vec![
            delta("hmm", vec![call(0, "call_2", "get", "")]),
            delta("", vec![call(0, "", "", "{\"a\":1}")]),
            delta("", vec![call(1, "call_3", "put", "{}")]),
        ];
        let expected = vec![
            delta("m", vec![]),
            delta("", vec![call(0, "", "", ":1}")]),
            delta("", vec![call(1, "call_3", "put", "{}")]),
        ];
        assert_eq!(rest(&parts, replayed), Ok(expected));
    }

    #[test]
    fn a_replay_with_other_arguments_or_another_function_is_an_error() {
        let mut parts = MessageParts::default();
        parts.record(&delta("", vec![call(0, "call_1", "get", "{\"a\"")]));
        for other in [call(0, "x", "put", ""), call(0, "x", "get", "{\"b\"")] {
            assert!(rest(&parts, vec![delta("", vec![other])]).is_err());
        }
    }

    #[test]
    fn a_stream_that_ends_before_all_parts_are_repeated_has_not_reached_them() {
        let mut parts = MessageParts::default();
        parts.record(&delta("abc", vec![]));
        let mut position = PartsPosition::default();
        let mut part = delta("ab", vec![]);
        parts
            .remove_repeated(&mut position, &mut part)
            .expect("it repeats");
        assert_eq!(part, delta("", vec![]));
        assert!(!parts.is_reached_by(&position));
    }
}
