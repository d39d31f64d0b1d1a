//! The parts of a GGUF model that all threads share: facts, tokenizer and chat template. This module must not know
//! the device's llama.cpp context.

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::vocab::LlamaVocab;

use super::chat::ChatTemplate;
use super::prefill::ChatMarkers;
use crate::request::{ChatMessage, Parameter, TokenId};
use crate::runner::{
    BosPolicy, DeviceFacts, LoadError, Model, ModelError, ModelFacts, Resumption, TokenBytes,
};

/// Maximum length of a prompt in bytes, whatever the context length. It equals the size limit of requests in the HTTP
/// and gRPC APIs.
const MAX_PROMPT_BYTES: usize = 4 * 1024 * 1024;

/// Texts longer than this many bytes are tokenized on a separate thread with a large stack; see [`stack_for`].
const MAX_BYTES_TOKENIZED_BY_CALLER: usize = 1024;

/// A model file in memory, with its vocabulary.
pub(super) struct GgufModel {
    llama: LlamaModel,
    facts: ModelFacts,
    vocabulary: Vec<VocabularyEntry>,
    /// Tokens that end a completion (llama.cpp calls them "end of generation").
    end_tokens: Vec<TokenId>,
    chat_markers: ChatMarkers,
    /// The token that begins every prompt, if the model adds one.
    bos: Option<TokenId>,
    infill: Option<InfillTokens>,
    /// The chat template, or the reason why the model cannot chat.
    chat: Result<ChatTemplate, String>,
}

/// Guarantees of a device for the sequences of this model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guarantees {
    pub(super) resumption: Resumption,
    /// See [`ModelFacts::reuses_prefixes`].
    pub(super) reuses_prefixes: bool,
}

/// One token of the vocabulary.
struct VocabularyEntry {
    /// Text of the token in a completion. Empty for a special token.
    visible: TokenBytes,
    /// Full text of the token, if it differs from `visible`.
    full: Option<Box<[u8]>>,
}

/// The fill-in-the-middle tokens of a model.
#[derive(Clone, Copy)]
struct InfillTokens {
    prefix: TokenId,
    suffix: TokenId,
    middle: TokenId,
}

impl InfillTokens {
    fn from_vocabulary(vocab: &LlamaVocab<'_>) -> Option<Self> {
        Some(Self {
            prefix: token_id(vocab.fim_pre())?,
            suffix: token_id(vocab.fim_suf())?,
            middle: token_id(vocab.fim_mid())?,
        })
    }
}

impl GgufModel {
    /// Reads the model's facts and its vocabulary once, so that later calls do not need llama.cpp.
    ///
    /// # Errors
    /// The model cannot complete text.
    pub(super) fn new(
        llama: LlamaModel,
        name: String,
        context_length: u32,
        guarantees: Guarantees,
    ) -> Result<Self, LoadError> {
        check_can_complete(&llama)?;
        let vocab = llama.vocab();
        let mut longest = 1;
        let vocabulary: Vec<VocabularyEntry> = vocab
            .tokens()
            .map(|token| {
                let full = vocab.token_to_piece(token, true, None);
                longest = longest.max(full.len());
                let visible = TokenBytes::from_slice(&vocab.token_to_piece(token, false, None));
                let is_visible = *visible == *full;
                VocabularyEntry {
                    visible,
                    full: (!is_visible).then(|| full.into()),
                }
            })
            .collect();
        let end_tokens = vocab.tokens().filter(|token| vocab.is_eog(*token));
        let end_tokens: Vec<TokenId> = end_tokens.filter_map(token_id).collect();
        let infill = InfillTokens::from_vocabulary(&vocab);
        let bos = token_id(vocab.bos()).filter(|_| vocab.should_add_bos());
        let text_of = |token: LlamaToken| {
            // llama.cpp returns no text for a special token that the model lacks.
            let bytes = token_id(token).map(|_| vocab.token_to_piece(token, true, None));
            String::from_utf8(bytes.unwrap_or_default()).unwrap_or_default()
        };
        let (bos_token, eos_token) = (text_of(vocab.bos()), text_of(vocab.eos()));
        let facts = ModelFacts {
            name: llama.meta_val_str("general.name").unwrap_or(name),
            context_length,
            max_prompt_bytes: max_prompt_bytes(context_length, longest),
            vocabulary_size: u32::try_from(vocabulary.len()).unwrap_or(u32::MAX),
            resumption: guarantees.resumption,
            reuses_prefixes: guarantees.reuses_prefixes,
            device: None,
            unsupported: match infill {
                Some(_) => Vec::new(),
                None => vec![Parameter::Suffix],
            },
            bos_token: Some(bos_token.clone()).filter(|_| bos.is_some()),
            eos_token: Some(eos_token.clone()).filter(|it| !it.is_empty()),
        };
        let chat = chat_template(&llama, bos_token, eos_token);
        Ok(Self {
            chat_markers: chat_markers(&llama, chat.as_ref().ok(), &end_tokens),
            llama,
            facts,
            vocabulary,
            end_tokens,
            bos,
            infill,
            chat,
        })
    }

    /// Adds the facts about the device that runs the model.
    pub(super) fn with_device(mut self, device: DeviceFacts) -> Self {
        self.facts.device = Some(device);
        self
    }

    pub(super) fn llama(&self) -> &LlamaModel {
        &self.llama
    }

    /// Returns true if the vocabulary contains this token.
    pub(super) fn has_token(&self, id: TokenId) -> bool {
        self.entry(id).is_some()
    }

    /// The tokens that mark the assistant's text in a rendered chat.
    pub(super) fn chat_markers(&self) -> &ChatMarkers {
        &self.chat_markers
    }

    /// The tokens that end a completion.
    pub(super) fn end_tokens(&self) -> &[TokenId] {
        &self.end_tokens
    }

    /// Returns the full bytes of a token, which include the text of special tokens. Returns no bytes for an id
    /// outside the vocabulary.
    pub(super) fn full_bytes(&self, id: TokenId) -> Vec<u8> {
        let full = |entry: &VocabularyEntry| match &entry.full {
            Some(full) => full.to_vec(),
            None => entry.visible.to_vec(),
        };
        self.entry(id).map_or_else(Vec::new, full)
    }

    /// Returns the bytes of a token in a completion, which are empty for a special token. Returns `None` for an id
    /// outside the vocabulary.
    pub(super) fn visible_bytes(&self, id: TokenId) -> Option<TokenBytes> {
        self.entry(id).map(|entry| entry.visible.clone())
    }

    fn entry(&self, id: TokenId) -> Option<&VocabularyEntry> {
        self.vocabulary.get(usize::try_from(id).ok()?)
    }

    fn token_ids(&self, text: &str) -> Result<Vec<TokenId>, ModelError> {
        let tokens = self.llama.vocab().tokenize(text.as_bytes(), false, true);
        let ids = tokens.iter().map(|token| TokenId::try_from(token.0));
        ids.collect::<Result<_, _>>().map_err(|_| cannot_tokenize())
    }

    /// Tokenizes a text without the BOS token. Long texts are tokenized on a thread with a large stack.
    fn tokenize_without_bos(&self, text: &str) -> Result<Vec<TokenId>, ModelError> {
        if text.len() <= MAX_BYTES_TOKENIZED_BY_CALLER {
            return self.token_ids(text);
        }
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("tokenize".to_owned())
                .stack_size(stack_for(text))
                .spawn_scoped(scope, || self.token_ids(text));
            let joined = thread.map_err(|_| cannot_tokenize())?.join();
            joined.unwrap_or_else(|_| Err(cannot_tokenize()))
        })
    }
}

impl Model for GgufModel {
    fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    fn tokenize(&self, text: &str, bos: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        let ids = self.tokenize_without_bos(text)?;
        Ok(match bos {
            BosPolicy::Add => with_bos(ids, self.bos),
            BosPolicy::Omit => ids,
        })
    }

    /// Puts the parts in the order prefix, suffix, middle, like llama.cpp's server.
    fn tokenize_infill(&self, prefix: &str, suffix: &str) -> Result<Vec<TokenId>, ModelError> {
        let Some(tokens) = self.infill else {
            let message = "This model has no fill-in-the-middle tokens.";
            return Err(ModelError::Invalid(message.to_owned()));
        };
        let mut ids = vec![tokens.prefix];
        ids.extend(self.tokenize_without_bos(prefix)?);
        ids.push(tokens.suffix);
        ids.extend(self.tokenize_without_bos(suffix)?);
        ids.push(tokens.middle);
        Ok(with_bos(ids, self.bos))
    }

    fn token_bytes(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        let bytes = |id: &TokenId| {
            let unknown =
                || ModelError::Failed(format!("Token id {id} is not in this model's vocabulary."));
            self.visible_bytes(*id).ok_or_else(unknown)
        };
        ids.iter().map(bytes).collect()
    }

    fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        match &self.chat {
            Ok(chat) => chat.render(messages),
            Err(reason) => Err(ModelError::Invalid(reason.clone())),
        }
    }
}

/// Converts a token id of llama.cpp. Returns `None` for -1, which marks a missing token.
fn token_id(token: LlamaToken) -> Option<TokenId> {
    TokenId::try_from(token.0).ok()
}

/// Adds the BOS token at the start, unless it is already there: a chat template may have added it.
fn with_bos(mut ids: Vec<TokenId>, bos: Option<TokenId>) -> Vec<TokenId> {
    if let Some(bos) = bos
        && ids.first() != Some(&bos)
    {
        ids.insert(0, bos);
    }
    ids
}

/// Returns the stack size in bytes for tokenizing a text. Some tokenizers split words with `std::regex`, which
/// recurses once per character of a word. 20,000 letters in a row overflowed a stack of 2 MiB, which is 325 bytes per
/// letter. This function returns three times that (1 KiB per byte). The system does not allocate unused stack.
fn stack_for(text: &str) -> usize {
    MAX_PROMPT_BYTES / 4 + text.len() * 1024
}

/// Returns an upper bound for the size of a prompt that fits the context: all its tokens are as long as the longest
/// token.
fn max_prompt_bytes(context_length: u32, longest_token: usize) -> usize {
    let context_length = usize::try_from(context_length).unwrap_or(usize::MAX);
    context_length
        .saturating_mul(longest_token)
        .min(MAX_PROMPT_BYTES)
}

fn cannot_tokenize() -> ModelError {
    ModelError::Failed("The text could not be tokenized.".to_owned())
}

/// Rejects models without a tokenizer, embedding models and encoders. llama.cpp loads such models, but aborts the
/// process when it samples from them.
fn check_can_complete(llama: &LlamaModel) -> Result<(), LoadError> {
    let meta = |key: &str| llama.meta_val_str(key).ok();
    let architecture = meta("general.architecture").unwrap_or_default();
    let reason = if meta("tokenizer.ggml.model").is_none_or(|it| it == "no_vocab" || it == "none") {
        "has no tokenizer"
    } else if meta(&format!("{architecture}.attention.causal")).as_deref() == Some("false") {
        "does not complete text: its attention is not causal"
    } else if llama.decode_start_token().0 >= 0 {
        "does not complete text: it has an encoder"
    } else {
        return Ok(());
    };
    Err(LoadError(format!("the model {reason}")))
}

/// Returns the token ids that mark the assistant's text in a chat.
fn chat_markers(
    llama: &LlamaModel,
    chat: Option<&ChatTemplate>,
    end_tokens: &[TokenId],
) -> ChatMarkers {
    let text = chat.and_then(ChatTemplate::generation_prompt);
    let tokens = llama
        .vocab()
        .tokenize(text.unwrap_or_default().as_bytes(), false, true);
    ChatMarkers {
        generation_prompt: tokens.into_iter().filter_map(token_id).collect(),
        end_tokens: end_tokens.to_vec(),
    }
}

fn chat_template(llama: &LlamaModel, bos: String, eos: String) -> Result<ChatTemplate, String> {
    let Ok(source) = llama.chat_template(None) else {
        return Err("This model has no chat template.".to_owned());
    };
    let compiled = source
        .to_string()
        .map_err(|error| error.to_string())
        .and_then(|source| ChatTemplate::new(&source, bos, eos));
    compiled.map_err(|error| {
        tracing::warn!(%error, "the model's chat template is invalid; chat requests are rejected");
        "This model's chat template is invalid, so it cannot chat; send a prompt instead."
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bos_is_added_once() {
        assert_eq!(with_bos(vec![5, 6], None), [5, 6]);
        assert_eq!(with_bos(vec![5, 6], Some(1)), [1, 5, 6]);
        assert_eq!(with_bos(vec![1, 5, 6], Some(1)), [1, 5, 6]);
        assert_eq!(with_bos(vec![], Some(1)), [1]);
    }

    #[test]
    fn every_prompt_that_fits_the_context_is_within_the_byte_limit() {
        assert_eq!(max_prompt_bytes(2048, 162), 331_776);
        assert_eq!(max_prompt_bytes(131_072, 512), MAX_PROMPT_BYTES);
    }
}
