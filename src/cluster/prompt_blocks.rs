//! Cuts the prompt of a request into blocks and hashes them. The hashes cover those parts of the request that decide
//! the tokens of the prompt. A chat is hashed as it was sent, because the gateway does not know the engine's template.
//! This module must not know where the request goes.

use std::hash::{Hash, Hasher, RandomState};

use prost::Message;
use prost_types::Value;

use super::policy::BYTES_PER_TOKEN;
use crate::prefix_index::{BlockHasher, PromptBlocks};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;

#[cfg(test)]
mod tests;

/// Maximum number of bytes of text in a block. Smaller blocks would match common prefixes more exactly, but fill the
/// index sooner.
const BLOCK_BYTES: usize = 512;
/// Maximum number of token ids in a block. They stand for about [`BLOCK_BYTES`] of text.
const BLOCK_IDS: usize = BLOCK_BYTES / BYTES_PER_TOKEN;

/// Extra fields that change how an engine renders a chat.
const TEMPLATE_FIELDS: [&str; 3] = ["chat_template", "chat_template_kwargs", "documents"];

/// Hashes the prompt of a request. Prompts with a common prefix have the same first blocks if the options that the
/// engine renders with the prompt are equal: the tools, the reasoning effort and the template's fields.
///
/// `key` makes the hashes unpredictable for clients.
pub(super) fn prompt_blocks(message: &v1::CompletionRequest, key: &RandomState) -> PromptBlocks {
    let mut hasher = BlockHasher::new(key, &Seed(message));
    for tool in &message.tools {
        let tool = tool.encode_to_vec();
        hasher.push(&tool, tokens_of(&tool));
    }
    match &message.input {
        Some(Input::Prompt(text)) => {
            let blocks = text.as_bytes().chunks(BLOCK_BYTES);
            blocks.for_each(|block| hasher.push(&block, tokens_of(block)));
        }
        Some(Input::PromptTokenIds(prompt)) => {
            let blocks = prompt.ids.chunks(BLOCK_IDS);
            blocks.for_each(|block| hasher.push(&block, length(block.len())));
        }
        Some(Input::Chat(chat)) => {
            let messages = chat.messages.iter();
            messages.for_each(|message| push_message(&mut hasher, message));
        }
        None => {}
    }
    hasher.finish()
}

/// Adds the blocks of a chat message. Each message begins a new block, so that a growing chat keeps its first blocks.
fn push_message(hasher: &mut BlockHasher<'_>, message: &v1::ChatMessage) {
    let mut blocks = message.content.as_bytes().chunks(BLOCK_BYTES);
    let first = blocks.next().unwrap_or_default();
    hasher.push(&(Some(Header(message)), first), tokens_of(first));
    for block in blocks {
        hasher.push(&(None::<Header<'_>>, block), tokens_of(block));
    }
}

fn tokens_of(text: &[u8]) -> u64 {
    length(text.len() / BYTES_PER_TOKEN)
}

fn length(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// The parts of a request, besides its input, that change the tokens of the prompt or forbid sharing them. Prompts with
/// different seeds share no blocks.
struct Seed<'a>(&'a v1::CompletionRequest);

impl Hash for Seed<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self(message) = self;
        message.cache_salt.hash(state);
        // Text, token ids and chats with the same bytes are different prompts, so the kind of the input is hashed too.
        // An engine renders a prompt with a suffix differently from a prompt without one.
        message
            .input
            .as_ref()
            .map(std::mem::discriminant)
            .hash(state);
        message.suffix.is_some().hash(state);
        message.reasoning_effort.hash(state);
        for name in TEMPLATE_FIELDS {
            let value = extra_field(message, name);
            value.map(Message::encode_to_vec).hash(state);
        }
    }
}

fn extra_field<'a>(message: &'a v1::CompletionRequest, name: &str) -> Option<&'a Value> {
    message.extra_fields.as_ref()?.fields.get(name)
}

/// A chat message without its content.
struct Header<'a>(&'a v1::ChatMessage);

impl Hash for Header<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let v1::ChatMessage {
            role,
            content: _,
            name,
            tool_calls,
            tool_call_id,
            reasoning_content,
            refusal,
        } = self.0;
        (role, name, tool_call_id, reasoning_content, refusal).hash(state);
        for call in tool_calls {
            let v1::ToolCall {
                id,
                name,
                arguments,
            } = call;
            (id, name, arguments).hash(state);
        }
    }
}
