//! The test runner's model: one token per word. This module must not know the device.

use super::{CONTEXT_LENGTH, LLM_TEST, TestRunnerOptions, token_text};
use crate::request::{ChatMessage, Parameter, TokenId};
use crate::runner::{BosPolicy, Model, ModelError, ModelFacts, Resumption, TokenBytes};

/// Maximum length of a prompt, in bytes. It equals the size limit of requests in the HTTP and gRPC APIs.
const MAX_PROMPT_BYTES: usize = 4 * 1024 * 1024;

/// The test runner's model. Its token with id `i` has the text `token_i`.
pub(super) struct TestModel {
    facts: ModelFacts,
    prompt_ids: PromptIds,
}

/// Rule for the token id of each word of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PromptIds {
    /// The id is the index of the word in the prompt.
    Index,
    /// The id depends on the word alone, so that only prompts that start with the same words have a common prefix.
    Word,
}

impl TestModel {
    pub(super) fn new(options: &TestRunnerOptions) -> Self {
        let reuses_prefixes = !options.prompt_token_delay.is_zero();
        Self {
            prompt_ids: if reuses_prefixes {
                PromptIds::Word
            } else {
                PromptIds::Index
            },
            facts: ModelFacts {
                name: LLM_TEST.to_owned(),
                context_length: CONTEXT_LENGTH,
                max_prompt_bytes: MAX_PROMPT_BYTES,
                vocabulary_size: TokenId::MAX,
                resumption: Resumption::Exact,
                reuses_prefixes,
                device: None,
                unsupported: vec![Parameter::Suffix],
                bos_token: None,
                eos_token: None,
            },
        }
    }
}

impl Model for TestModel {
    fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// Returns one token per word, and at least one.
    fn tokenize(&self, text: &str, _: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        let words = text.split_whitespace();
        let ids: Vec<_> = match self.prompt_ids {
            PromptIds::Index => words.zip(0..).map(|(_, index)| index).collect(),
            PromptIds::Word => words.map(word_id).collect(),
        };
        Ok(if ids.is_empty() { vec![0] } else { ids })
    }

    fn token_bytes(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        Ok(ids.iter().map(|id| token_text(*id)).collect())
    }

    fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        let lines: Vec<_> = messages
            .iter()
            .map(|message| format!("{}: {}", message.role, message.content))
            .collect();
        Ok(lines.join("\n"))
    }
}

/// Returns the id of a word. A word of a completion, such as `token_7`, has the id of its token, so that a prompt that
/// repeats a completion has the completion's ids. The id of any other word is its FNV-1a hash.
fn word_id(word: &str) -> TokenId {
    let number = word.strip_prefix("token_").and_then(|id| id.parse().ok());
    let hash = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(16_777_619);
    let id = number.unwrap_or_else(|| word.bytes().fold(2_166_136_261, hash));
    // Every id is below the size of the vocabulary.
    id.min(TokenId::MAX - 1)
}
