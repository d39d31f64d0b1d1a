//! What every thread may ask of a GGUF model: its facts, its tokenizer, its chat template. It must
//! not know the device's context.

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::vocab::LlamaVocab;

use super::chat::ChatTemplate;
use crate::request::{ChatMessage, Parameter, TokenId};
use crate::runner::{BosPolicy, LoadError, Model, ModelError, ModelFacts, Resumption, TokenBytes};

/// The longest prompt that is tokenized, whatever the context: the doors let no more through.
const MAX_PROMPT_BYTES: usize = 4 * 1024 * 1024;

/// Texts longer than this are tokenized on a thread of their own, see [`stack_for`].
const SMALL_TEXT: usize = 1024;

/// A model file in memory.
pub(super) struct GgufModel {
    llama: LlamaModel,
    facts: ModelFacts,
    vocabulary: Vec<Piece>,
    /// The tokens by which the model ends its output.
    ends: Vec<TokenId>,
    /// The token that begins every prompt, where the model has one.
    bos: Option<TokenId>,
    infill: Option<InfillTokens>,
    /// Or why the model cannot chat.
    chat: Result<ChatTemplate, String>,
}

/// One token of the vocabulary.
struct Piece {
    /// What is shown of it: nothing of a special token.
    bytes: TokenBytes,
    /// Its name, where that is not what is shown.
    name: Option<Box<[u8]>>,
}

/// The tokens between which a model fills a gap.
#[derive(Clone, Copy)]
struct InfillTokens {
    prefix: TokenId,
    suffix: TokenId,
    middle: TokenId,
}

impl InfillTokens {
    fn of(vocab: &LlamaVocab<'_>) -> Option<Self> {
        Some(Self {
            prefix: special(vocab.fim_pre())?,
            suffix: special(vocab.fim_suf())?,
            middle: special(vocab.fim_mid())?,
        })
    }
}

impl GgufModel {
    /// Reads out what is asked for again and again.
    ///
    /// # Errors
    /// When the model is none that completes text.
    pub(super) fn new(
        llama: LlamaModel,
        name: String,
        context_length: u32,
        resumption: Resumption,
    ) -> Result<Self, LoadError> {
        check_can_complete(&llama)?;
        let vocab = llama.vocab();
        let mut longest = 1;
        let vocabulary: Vec<Piece> = vocab
            .tokens()
            .map(|token| {
                let name = vocab.token_to_piece(token, true, None);
                longest = longest.max(name.len());
                let bytes = TokenBytes::from_slice(&vocab.token_to_piece(token, false, None));
                let is_shown = *bytes == *name;
                Piece {
                    bytes,
                    name: (!is_shown).then(|| name.into()),
                }
            })
            .collect();
        let ends = vocab.tokens().filter(|token| vocab.is_eog(*token));
        let ends = ends.filter_map(special).collect();
        let infill = InfillTokens::of(&vocab);
        let bos = special(vocab.bos()).filter(|_| vocab.should_add_bos());
        let token_text = |token: LlamaToken| {
            // llama.cpp has no text of a token that the model does not have.
            let bytes = special(token).map(|_| vocab.token_to_piece(token, true, None));
            String::from_utf8(bytes.unwrap_or_default()).unwrap_or_default()
        };
        let (bos_token, eos_token) = (token_text(vocab.bos()), token_text(vocab.eos()));
        let facts = ModelFacts {
            name: llama.meta_val_str("general.name").unwrap_or(name),
            context_length,
            max_prompt_bytes: max_prompt_bytes(context_length, longest),
            vocabulary_size: u32::try_from(vocabulary.len()).unwrap_or(u32::MAX),
            resumption,
            unsupported: match infill {
                Some(_) => Vec::new(),
                None => vec![Parameter::Suffix],
            },
            bos_token: Some(bos_token.clone()).filter(|_| bos.is_some()),
            eos_token: Some(eos_token.clone()).filter(|it| !it.is_empty()),
        };
        let chat = chat_template(&llama, bos_token, eos_token);
        Ok(Self {
            llama,
            facts,
            vocabulary,
            ends,
            bos,
            infill,
            chat,
        })
    }

    pub(super) fn llama(&self) -> &LlamaModel {
        &self.llama
    }

    /// Whether the vocabulary has this token.
    pub(super) fn has(&self, id: TokenId) -> bool {
        self.piece(id).is_some()
    }

    /// The tokens by which the model ends its output.
    pub(super) fn ends(&self) -> &[TokenId] {
        &self.ends
    }

    /// What names a token, also one that is never shown.
    pub(super) fn vocabulary_bytes(&self, id: TokenId) -> Vec<u8> {
        let name = |piece: &Piece| match &piece.name {
            Some(name) => name.to_vec(),
            None => piece.bytes.to_vec(),
        };
        self.piece(id).map_or_else(Vec::new, name)
    }

    /// The bytes of a token, or `None` for an id outside the vocabulary.
    pub(super) fn token_bytes(&self, id: TokenId) -> Option<TokenBytes> {
        self.piece(id).map(|piece| piece.bytes.clone())
    }

    fn piece(&self, id: TokenId) -> Option<&Piece> {
        self.vocabulary.get(usize::try_from(id).ok()?)
    }

    fn token_ids(&self, text: &str) -> Result<Vec<TokenId>, ModelError> {
        let tokens = self.llama.vocab().tokenize(text.as_bytes(), false, true);
        let ids = tokens.iter().map(|token| TokenId::try_from(token.0));
        ids.collect::<Result<_, _>>().map_err(|_| cannot_tokenize())
    }

    /// The ids of a text, with as much stack as it takes.
    fn tokenize_bare(&self, text: &str) -> Result<Vec<TokenId>, ModelError> {
        if text.len() <= SMALL_TEXT {
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
        let ids = self.tokenize_bare(text)?;
        Ok(match bos {
            BosPolicy::Add => begun(ids, self.bos),
            BosPolicy::Omit => ids,
        })
    }

    /// What comes before the gap, what comes after it, and then the gap: the order that llama.cpp's own
    /// server uses.
    fn infill(&self, prefix: &str, suffix: &str) -> Result<Vec<TokenId>, ModelError> {
        let Some(tokens) = self.infill else {
            let message = "This model has no fill-in-the-middle tokens.";
            return Err(ModelError::Invalid(message.to_owned()));
        };
        let mut ids = vec![tokens.prefix];
        ids.extend(self.tokenize_bare(prefix)?);
        ids.push(tokens.suffix);
        ids.extend(self.tokenize_bare(suffix)?);
        ids.push(tokens.middle);
        Ok(begun(ids, self.bos))
    }

    fn pieces(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        let unknown = || ModelError::Failed("a token is not in the vocabulary".to_owned());
        let bytes = |id: &TokenId| self.token_bytes(*id).ok_or_else(unknown);
        ids.iter().map(bytes).collect()
    }

    fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        match &self.chat {
            Ok(chat) => chat.render(messages),
            Err(reason) => Err(ModelError::Invalid(reason.clone())),
        }
    }
}

/// A token's id, where the model has such a token.
fn special(token: LlamaToken) -> Option<TokenId> {
    TokenId::try_from(token.0).ok()
}

/// The ids with the model's bos token first, where it has one. A text that begins with that
/// token already, as a rendered chat may, gets no second one.
fn begun(mut ids: Vec<TokenId>, bos: Option<TokenId>) -> Vec<TokenId> {
    if let Some(bos) = bos
        && ids.first() != Some(&bos)
    {
        ids.insert(0, bos);
    }
    ids
}

/// How much stack it takes to tokenize a text. Some tokenizers split words by `std::regex`, which
/// recurses for each character of a word: 20,000 letters in a row overflowed 2 MiB of stack at 325
/// bytes for each. This has three times as much; what is not used is never mapped.
fn stack_for(text: &str) -> usize {
    MAX_PROMPT_BYTES / 4 + text.len() * 1024
}

/// No prompt that fits the context is longer than this: the longest token, all over the context.
fn max_prompt_bytes(context_length: u32, longest_token: usize) -> usize {
    let context_length = usize::try_from(context_length).unwrap_or(usize::MAX);
    context_length
        .saturating_mul(longest_token)
        .min(MAX_PROMPT_BYTES)
}

fn cannot_tokenize() -> ModelError {
    ModelError::Failed("the text could not be tokenized".to_owned())
}

/// llama.cpp loads models without a tokenizer, embedding models and encoders too, and aborts the
/// process when they are asked for a completion.
fn check_can_complete(llama: &LlamaModel) -> Result<(), LoadError> {
    let meta = |key: &str| llama.meta_val_str(key).ok();
    let architecture = meta("general.architecture").unwrap_or_default();
    let reason = if meta("tokenizer.ggml.model").is_none_or(|it| it == "no_vocab" || it == "none") {
        "has no tokenizer"
    } else if meta(&format!("{architecture}.attention.causal")).as_deref() == Some("false") {
        "does not complete text: its attention is not causal"
    } else if llama.decode_start_token().0 >= 0 {
        "does not complete text: it is an encoder with a decoder"
    } else {
        return Ok(());
    };
    Err(LoadError(format!("it {reason}")))
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
        tracing::warn!(%error, "the model's chat template cannot be used");
        "This model's chat template cannot be used.".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bos_is_added_once() {
        assert_eq!(begun(vec![5, 6], None), [5, 6]);
        assert_eq!(begun(vec![5, 6], Some(1)), [1, 5, 6]);
        assert_eq!(begun(vec![1, 5, 6], Some(1)), [1, 5, 6]);
        assert_eq!(begun(vec![], Some(1)), [1]);
    }

    #[test]
    fn every_prompt_that_fits_the_context_is_within_the_byte_limit() {
        assert_eq!(max_prompt_bytes(2048, 162), 331_776);
        assert_eq!(max_prompt_bytes(131_072, 512), MAX_PROMPT_BYTES);
    }
}
