//! Converts a request's prompt into token ids, and checks the request against its model: supported parameters,
//! vocabulary, context length, and the tokens that the client already has.
//!
//! The result is one [`Sequence`] per choice. The scheduler and the workers see only these sequences of a request.
//! This module must not know queues, workers or protocols.

use std::sync::Arc;

use crate::error::{Error, ErrorKind};
use crate::keys::TokenNeed;
use crate::models::ModelEntry;
use crate::request::{CompletionRequest, DEFAULT_MAX_TOKENS, Input, Parameter, TokenId};
use crate::runner::{BosPolicy, ModelFacts, Resumption, Sequence, TokenBytes};

#[cfg(test)]
mod tests;
mod tokenizer;

pub(crate) use tokenizer::Tokenizer;

/// Name of a request field that contains the prompt.
const PROMPT_FIELD: &str = "prompt";
const PROMPT_TOKEN_IDS_FIELD: &str = "prompt_token_ids";
const CHAT_FIELD: &str = "chat";

/// Name of the request field with the tokens that the client already has.
const RESUME_FIELD: &str = "resume";

/// A tokenized prompt, checked against its model.
pub(crate) struct Prompt {
    /// The token ids: at least one, all in the vocabulary.
    pub ids: Arc<[TokenId]>,
    /// The prompt's text, if the request echoes it.
    pub echo: Option<String>,
    /// True if choice 0 must send the prompt's tokens with their log probabilities before its own tokens.
    pub is_scored: bool,
    /// The maximum number of completion tokens. Prompt and completion fit into the context.
    pub max_tokens: u32,
    /// The tokens that the client already has, for each choice from choice 0 on. The list may be shorter than the
    /// number of choices.
    pub resumed: Vec<Vec<DeliveredToken>>,
}

/// A completion token that the client received before its stream was interrupted.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DeliveredToken {
    /// Index in the vocabulary.
    pub id: TokenId,
    /// The token's bytes.
    pub bytes: TokenBytes,
}

/// The token ids of an input, before they are checked.
struct TokenizedInput {
    ids: Vec<TokenId>,
    /// The input's text, if the request echoes it.
    echo: Option<String>,
    /// The request field that contains the input.
    param: &'static str,
}

impl Prompt {
    /// Tokenizes the request's prompt and checks the request against its model.
    ///
    /// # Errors
    /// Returns an error that names the field the model does not support, or [`ErrorKind::NotReady`] if the
    /// model is not loaded.
    pub(crate) async fn prepare(
        model: &ModelEntry,
        request: &CompletionRequest,
    ) -> Result<Self, Error> {
        let tokenizer = Tokenizer::new(model)?;
        let facts = tokenizer.facts();
        check_supported(model, facts, request)?;
        let TokenizedInput { ids, echo, param } = tokenize(&tokenizer, request).await?;
        if ids.is_empty() {
            return Err(Error::invalid_value(param, "The prompt is empty."));
        }
        let max_tokens = max_tokens(facts, request, ids.len());
        check_context(facts, ids.len(), max_tokens, param)?;
        let min_tokens = request.options.stop_tokens.min_tokens;
        if min_tokens > max_tokens {
            let message = format!(
                "`min_tokens` must be at most the token limit, {max_tokens} (got {min_tokens})."
            );
            return Err(Error::invalid_value("min_tokens", message));
        }
        let options = &request.options;
        tokenizer.check_vocabulary(&options.stop_tokens.ids, "stop_token_ids")?;
        let biased: Vec<_> = options.logit_bias.iter().map(|(id, _)| *id).collect();
        tokenizer.check_vocabulary(&biased, "logit_bias")?;
        check_resume(model, facts, request, max_tokens)?;
        let mut resumed = Vec::with_capacity(request.resume.len());
        for ids in &request.resume {
            resumed.push(delivered_tokens(&tokenizer, ids).await?);
        }
        Ok(Self {
            ids: ids.into(),
            echo,
            is_scored: request.uses_parameter(Parameter::EchoLogprobs),
            max_tokens,
            resumed,
        })
    }

    /// Returns the number of tokens of the prompt.
    #[must_use]
    pub(crate) fn token_count(&self) -> u32 {
        u32::try_from(self.ids.len())
            .expect("a prompt that fits the context has fewer than 2^32 tokens")
    }

    /// Returns the number of tokens that the request needs: its prompt with the resumed tokens, and `max_tokens` for
    /// each choice. A chat without `max_tokens` may use the rest of the context, but at first reserves only the default
    /// of a text prompt.
    #[must_use]
    pub(crate) fn token_need(&self, request: &CompletionRequest) -> TokenNeed {
        let max_tokens = match request.max_tokens {
            Some(max_tokens) => max_tokens,
            None => self.max_tokens.min(DEFAULT_MAX_TOKENS),
        };
        TokenNeed {
            prompt: u64::from(self.token_count()).saturating_add(request.resumed_tokens()),
            completion: u64::from(max_tokens) * u64::from(request.choices),
            is_open_ended: max_tokens < self.max_tokens,
        }
    }

    /// Creates the sequence of each choice of the request.
    #[must_use]
    pub(crate) fn sequences(&self, request: &CompletionRequest) -> Vec<Sequence> {
        let mut resume = request.resume.iter();
        let sequences = (0..request.choices).map(|choice| Sequence {
            request_id: request.id.clone(),
            prompt: Arc::clone(&self.ids),
            delivered: resume.next().cloned().unwrap_or_default(),
            choice,
            max_tokens: self.max_tokens,
            // The prompt's log probabilities are the same for every choice, so choice 0 alone computes them.
            scores_prompt: choice == 0 && self.is_scored,
            options: request.options.clone(),
        });
        sequences.collect()
    }
}

/// Rejects a request that uses a parameter that the model's runner does not support.
fn check_supported(
    model: &ModelEntry,
    facts: &ModelFacts,
    request: &CompletionRequest,
) -> Result<(), Error> {
    let mut unsupported = facts.unsupported.iter().chain(&Parameter::PASSED_ON);
    let Some(parameter) = unsupported.find(|parameter| request.uses_parameter(**parameter)) else {
        return Ok(());
    };
    let param = parameter.name();
    let feature = if *parameter == Parameter::EchoLogprobs {
        "log probabilities of the prompt (`echo` with `logprobs`)"
    } else if *parameter == Parameter::Suffix {
        "`suffix`: it has no fill-in-the-middle tokens"
    } else {
        param
    };
    let message = format!("The model '{}' does not support {feature}.", model.name);
    Err(Error::new(ErrorKind::UnsupportedParameter, message).with_param(param))
}

/// Converts the request's input into token ids.
async fn tokenize(
    tokenizer: &Tokenizer,
    request: &CompletionRequest,
) -> Result<TokenizedInput, Error> {
    let (ids, echo, param) = match &request.input {
        Input::Text(text) => {
            let ids = tokenizer
                .tokenize(text, BosPolicy::Add, PROMPT_FIELD)
                .await?;
            (ids, request.echo.then(|| text.clone()), PROMPT_FIELD)
        }
        Input::Chat(messages) => {
            let text = tokenizer.render_chat(messages).await?;
            let ids = tokenizer
                .tokenize(&text, BosPolicy::Add, CHAT_FIELD)
                .await?;
            (ids, request.echo.then_some(text), CHAT_FIELD)
        }
        Input::TokenIds(ids) => {
            // This check needs no tokenizer, so it comes before the vocabulary lookups.
            let max_tokens = request.max_tokens.unwrap_or(1);
            check_context(
                tokenizer.facts(),
                ids.len(),
                max_tokens,
                PROMPT_TOKEN_IDS_FIELD,
            )?;
            let text = tokenizer
                .detokenize(ids.clone(), PROMPT_TOKEN_IDS_FIELD)
                .await?;
            (
                ids.clone(),
                request.echo.then_some(text),
                PROMPT_TOKEN_IDS_FIELD,
            )
        }
        Input::Infill { prefix, suffix } => {
            let ids = tokenizer
                .tokenize_infill(prefix.clone(), suffix.clone())
                .await?;
            (ids, request.echo.then(|| prefix.clone()), PROMPT_FIELD)
        }
    };
    Ok(TokenizedInput { ids, echo, param })
}

/// Returns the request's `max_tokens` or its default.
fn max_tokens(facts: &ModelFacts, request: &CompletionRequest, prompt_tokens: usize) -> u32 {
    match (request.max_tokens, &request.input) {
        (Some(max_tokens), _) => max_tokens,
        // A chat may use the rest of the context. If nothing is left, 1 makes the context check below fail.
        (None, Input::Chat(_)) => {
            let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
            facts.context_length.saturating_sub(prompt_tokens).max(1)
        }
        (None, Input::Text(_) | Input::TokenIds(_) | Input::Infill { .. }) => DEFAULT_MAX_TOKENS,
    }
}

/// Checks that the prompt and `max_tokens` fit into the context.
fn check_context(
    facts: &ModelFacts,
    prompt_tokens: usize,
    max_tokens: u32,
    param: &str,
) -> Result<(), Error> {
    let context = u64::from(facts.context_length);
    let prompt_tokens = u64::try_from(prompt_tokens).unwrap_or(u64::MAX);
    if prompt_tokens.saturating_add(u64::from(max_tokens)) <= context {
        return Ok(());
    }
    let message = format!(
        "This model's context is {context} tokens. The prompt has {prompt_tokens} tokens, which leaves no room \
         for {max_tokens} more."
    );
    // The error names `max_tokens` if `max_tokens` alone exceeds the context and the prompt does not.
    let exceeds_alone = u64::from(max_tokens) >= context;
    let param = if exceeds_alone && prompt_tokens < context {
        "max_tokens"
    } else {
        param
    };
    Err(Error::new(ErrorKind::ContextLengthExceeded, message).with_param(param))
}

/// Checks that the model can resume, and that each resumed choice is below its token limit.
fn check_resume(
    model: &ModelEntry,
    facts: &ModelFacts,
    request: &CompletionRequest,
    max_tokens: u32,
) -> Result<(), Error> {
    if request.resume.is_empty() {
        return Ok(());
    }
    if facts.resumption == Resumption::No {
        let message = format!("The model '{}' does not support `resume`.", model.name);
        return Err(Error::new(ErrorKind::UnsupportedParameter, message).with_param(RESUME_FIELD));
    }
    let limit = usize::try_from(max_tokens).unwrap_or(usize::MAX);
    let mut lengths = request.resume.iter().map(Vec::len);
    match lengths.find(|length| *length > 0 && *length >= limit) {
        None => Ok(()),
        Some(length) => {
            let message = format!(
                "`resume` must have fewer tokens than the token limit, {max_tokens} (got {length})."
            );
            Err(Error::invalid_value(RESUME_FIELD, message))
        }
    }
}

/// Returns the bytes of the tokens of one choice that the client already has.
async fn delivered_tokens(
    tokenizer: &Tokenizer,
    ids: &[TokenId],
) -> Result<Vec<DeliveredToken>, Error> {
    let bytes = tokenizer.token_bytes(ids.to_vec(), RESUME_FIELD).await?;
    let tokens = ids.iter().zip(bytes);
    Ok(tokens
        .map(|(&id, bytes)| DeliveredToken { id, bytes })
        .collect())
}
