//! The engine's request types. They are independent of the protocols: the HTTP and gRPC APIs convert their messages
//! into these types and check every value.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

/// The id of a token in a model's vocabulary.
pub type TokenId = u32;

/// The maximum number of choices of one request.
pub(crate) const MAX_CHOICES: u32 = 128;

/// The maximum number of stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;

/// Maximum length of a stop string in bytes. Up to this much text is held back while a match is possible.
pub const MAX_STOP_BYTES: usize = 1_024;

/// The maximum number of stop tokens of one request.
pub(crate) const MAX_STOP_TOKENS: usize = 128;

/// The maximum number of logit biases of one request.
pub(crate) const MAX_LOGIT_BIASES: usize = 1_024;

/// The maximum number of most likely tokens that a request may ask for at each position.
pub(crate) const MAX_LOGPROBS: u32 = 20;

/// Maximum length of a model name in bytes. It is limited because error messages repeat the name and are sent in
/// headers.
pub(crate) const MAX_MODEL_NAME_BYTES: usize = 256;

/// The maximum length of `user` in bytes.
pub(crate) const MAX_USER_BYTES: usize = 512;

/// The maximum length of `cache_salt` in bytes.
pub(crate) const MAX_CACHE_SALT_BYTES: usize = 512;

/// Maximum timeout: ten years, which also stands for "no deadline". A longer timeout would overflow `Instant`.
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

/// The maximum length of a request id in bytes.
pub(crate) const MAX_REQUEST_ID_BYTES: usize = 128;

/// The default of `max_tokens`, except for chats.
pub(crate) const DEFAULT_MAX_TOKENS: u32 = 16;

/// A request for the completion of one prompt.
#[derive(Clone, Debug)]
pub struct CompletionRequest {
    /// Identifies the request in logs and responses.
    pub id: RequestId,
    /// The name of the model. `None` selects the only model.
    pub model: Option<String>,
    /// The prompt.
    pub input: Input,
    /// The maximum number of tokens of each choice. 0 is allowed only with `echo`.
    ///
    /// `None` means 16, or the rest of the context for a chat.
    pub max_tokens: Option<u32>,
    /// The number of choices, 1 to 128.
    pub choices: u32,
    /// The stop strings. A match ends a choice before `max_tokens`.
    pub stopping: StopStringOptions,
    /// The options that the request passes to the runner, for each of its sequences.
    pub options: SequenceOptions,
    /// True if the prompt is returned before the completion, with log probabilities if `logprobs` is set.
    pub echo: bool,
    /// The tokens that the client already has, for each choice from choice 0 on. Sampling continues after them.
    pub resume: Vec<Vec<TokenId>>,
    /// The parameters of [`Parameter::PASSED_ON`] that the client's request uses. Their values are not kept, because
    /// no runner supports them.
    pub passed_on: Vec<Parameter>,
    /// The priority. Lower numbers run first.
    pub priority: i32,
    /// The time when the request arrived.
    pub arrived: Instant,
    /// The time at which the request fails with `deadline_exceeded`.
    pub deadline: Instant,
}

/// Identifies a request in logs and responses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(pub Arc<str>);

impl RequestId {
    /// Creates a random unique id.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string().into())
    }

    /// Accepts a client's request id if it consists of 1 to [`MAX_REQUEST_ID_BYTES`] visible ASCII characters. Other
    /// characters could forge log lines.
    #[must_use]
    pub(crate) fn parse(id: &str) -> Option<Self> {
        let is_valid = (1..=MAX_REQUEST_ID_BYTES).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_graphic());
        is_valid.then(|| Self(id.into()))
    }
}

/// The prompt of a request, in one of its forms.
#[derive(Clone, Debug)]
pub enum Input {
    /// Text to tokenize.
    Text(String),
    /// Token ids, at least one.
    TokenIds(Vec<TokenId>),
    /// Messages to render with the model's chat template, at least one.
    Chat(Vec<ChatMessage>),
    /// Text to insert between a prefix and a suffix (fill-in-the-middle).
    Infill {
        /// The text before the completion.
        prefix: String,
        /// The text after the completion.
        suffix: String,
    },
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// The role of the author, such as `user`.
    pub role: String,
    /// The text.
    pub content: String,
    /// The author's name, to distinguish authors with the same role.
    pub name: Option<String>,
}

/// The options of a request that are passed to the runner unchanged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceOptions {
    /// Seed of the sampling. Each random draw is determined by the seed, the choice and the token's index.
    pub seed: u64,
    /// The sampling parameters.
    pub sampling: Sampling,
    /// Values to add to the logits of these tokens before sampling, each from -100 to 100. Sorted by token id.
    pub logit_bias: Arc<[(TokenId, f32)]>,
    /// The tokens that end a choice before `max_tokens`.
    pub stop_tokens: StopTokens,
    /// Number of most likely tokens to return at each position, from 0 to 20, in addition to the log
    /// probability of the sampled token. `None` returns no log probabilities.
    pub logprobs: Option<u32>,
    /// True if each token must have the times when it was due and when it was emitted.
    pub timestamps: bool,
    /// The end user on whose behalf the client sends the request (`user`).
    pub user: EndUser,
    /// Salt for prefix caches. Only prompts with the same salt share computed tokens.
    pub cache_salt: CacheSalt,
}

/// The parameters that select the next token from the model's logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Sampling temperature, from 0 (greedy) to 2.
    pub temperature: f32,
    /// Nucleus sampling, from 0 (only the most likely token) to 1 (all tokens).
    pub top_p: f32,
    /// The number of most likely tokens to keep. 0 keeps all.
    pub top_k: u32,
    /// Minimum probability relative to that of the most likely token, from 0 to 1.
    pub min_p: f32,
    /// Presence penalty, from -2 to 2.
    pub presence_penalty: f32,
    /// Frequency penalty, from -2 to 2.
    pub frequency_penalty: f32,
    /// Repetition penalty, above 0 and at most 2.
    pub repetition_penalty: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

/// The strings that end a choice before `max_tokens`.
#[derive(Clone, Debug, Default)]
pub struct StopStringOptions {
    /// Strings that end a choice. None is empty.
    pub strings: Vec<String>,
    /// True if the text ends after the matched stop string or stop token instead of before it.
    pub include_stop: bool,
}

/// The tokens that end a choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StopTokens {
    /// Stop tokens in addition to the model's end-of-sequence tokens.
    pub ids: Arc<[TokenId]>,
    /// True if a choice continues after the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Number of tokens below which only `max_tokens` can end a choice.
    pub min_tokens: u32,
}

/// A request field that not every runner or engine supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// A temperature other than 1.
    Temperature,
    /// Nucleus sampling: `top_p` below 1.
    TopP,
    /// `top_k` above 0.
    TopK,
    /// `min_p` above 0.
    MinP,
    /// A presence penalty other than 0.
    PresencePenalty,
    /// A frequency penalty other than 0.
    FrequencyPenalty,
    /// A repetition penalty other than 1.
    RepetitionPenalty,
    /// At least one logit bias.
    LogitBias,
    /// `min_tokens` above 0.
    MinTokens,
    /// `ignore_eos` set to true.
    IgnoreEos,
    /// At least one stop token id.
    StopTokenIds,
    /// Log probabilities of the completion's tokens.
    Logprobs,
    /// Log probabilities of the prompt's tokens: `echo` together with `logprobs`.
    EchoLogprobs,
    /// Fill-in-the-middle.
    Suffix,
    /// At least one tool.
    Tools,
    /// A choice between tools and text other than "none" and "auto".
    ToolChoice,
    /// A format other than free text.
    ResponseFormat,
    /// A reasoning effort other than "medium".
    ReasoningEffort,
    /// A chat message with tool calls.
    ToolCalls,
    /// A chat message that answers a tool call.
    ToolCallId,
    /// A chat message with reasoning.
    ReasoningContent,
    /// A chat message with a refusal.
    Refusal,
    /// Fields that Tokenway does not know.
    ExtraFields,
}

impl Parameter {
    /// Every parameter that a runner may support.
    pub const ALL: [Self; 14] = [
        Self::Temperature,
        Self::TopP,
        Self::TopK,
        Self::MinP,
        Self::PresencePenalty,
        Self::FrequencyPenalty,
        Self::RepetitionPenalty,
        Self::LogitBias,
        Self::MinTokens,
        Self::IgnoreEos,
        Self::StopTokenIds,
        Self::Logprobs,
        Self::EchoLogprobs,
        Self::Suffix,
    ];

    /// Every parameter that no runner supports: a gateway passes it on to engines of other kinds.
    pub const PASSED_ON: [Self; 9] = [
        Self::Tools,
        Self::ToolChoice,
        Self::ResponseFormat,
        Self::ReasoningEffort,
        Self::ToolCalls,
        Self::ToolCallId,
        Self::ReasoningContent,
        Self::Refusal,
        Self::ExtraFields,
    ];

    /// The name of the request field.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Temperature => "temperature",
            Self::TopP => "top_p",
            Self::TopK => "top_k",
            Self::MinP => "min_p",
            Self::PresencePenalty => "presence_penalty",
            Self::FrequencyPenalty => "frequency_penalty",
            Self::RepetitionPenalty => "repetition_penalty",
            Self::LogitBias => "logit_bias",
            Self::MinTokens => "min_tokens",
            Self::IgnoreEos => "ignore_eos",
            Self::StopTokenIds => "stop_token_ids",
            Self::Logprobs => "logprobs",
            Self::EchoLogprobs => "echo",
            Self::Suffix => "suffix",
            Self::Tools => "tools",
            Self::ToolChoice => "tool_choice",
            Self::ResponseFormat => "response_format",
            Self::ReasoningEffort => "reasoning_effort",
            Self::ToolCalls => "tool_calls",
            Self::ToolCallId => "tool_call_id",
            Self::ReasoningContent => "reasoning_content",
            Self::Refusal => "refusal",
            Self::ExtraFields => "extra_fields",
        }
    }
}

#[cfg(test)]
impl CompletionRequest {
    /// Creates a request for tests: one completion of this text, with default parameters and a deadline in one hour.
    pub(crate) fn for_test(text: &str) -> Self {
        let now = Instant::now();
        Self {
            id: RequestId::random(),
            model: None,
            input: Input::Text(text.to_owned()),
            max_tokens: None,
            choices: 1,
            stopping: StopStringOptions::default(),
            options: SequenceOptions::default(),
            echo: false,
            resume: Vec::new(),
            passed_on: Vec::new(),
            priority: 0,
            arrived: now,
            deadline: now + Duration::from_secs(3_600),
        }
    }
}

impl CompletionRequest {
    /// Returns the number of tokens that the client already has, of all choices together.
    pub(crate) fn resumed_tokens(&self) -> u64 {
        let tokens = self.resume.iter().map(Vec::len).sum::<usize>();
        u64::try_from(tokens).unwrap_or(u64::MAX)
    }

    /// Replaces the salt of the prefix cache with the result of `scoped`, which is called with `user` and the salt.
    pub(crate) fn scope_cache_salt(&mut self, scoped: impl FnOnce(&str, &str) -> String) {
        let options = &mut self.options;
        let text = |text: &Option<Arc<str>>| text.as_deref().unwrap_or_default().to_owned();
        let salt = scoped(&text(&options.user.0), &text(&options.cache_salt.0));
        options.cache_salt = CacheSalt(Some(salt).filter(|salt| !salt.is_empty()).map(Into::into));
    }

    /// Returns true if the request uses this parameter.
    #[must_use]
    pub(crate) fn uses_parameter(&self, parameter: Parameter) -> bool {
        let SequenceOptions {
            sampling,
            stop_tokens,
            logit_bias,
            logprobs,
            ..
        } = &self.options;
        let default = Sampling::default();
        match parameter {
            Parameter::Temperature => sampling.temperature != default.temperature,
            Parameter::TopP => sampling.top_p != default.top_p,
            Parameter::TopK => sampling.top_k != default.top_k,
            Parameter::MinP => sampling.min_p != default.min_p,
            Parameter::PresencePenalty => sampling.presence_penalty != default.presence_penalty,
            Parameter::FrequencyPenalty => sampling.frequency_penalty != default.frequency_penalty,
            Parameter::RepetitionPenalty => {
                sampling.repetition_penalty != default.repetition_penalty
            }
            Parameter::LogitBias => !logit_bias.is_empty(),
            Parameter::MinTokens => stop_tokens.min_tokens > 0,
            Parameter::IgnoreEos => stop_tokens.ignore_eos,
            Parameter::StopTokenIds => !stop_tokens.ids.is_empty(),
            Parameter::Logprobs => logprobs.is_some(),
            Parameter::EchoLogprobs => self.echo && logprobs.is_some(),
            Parameter::Suffix => matches!(self.input, Input::Infill { .. }),
            Parameter::Tools
            | Parameter::ToolChoice
            | Parameter::ResponseFormat
            | Parameter::ReasoningEffort
            | Parameter::ToolCalls
            | Parameter::ToolCallId
            | Parameter::ReasoningContent
            | Parameter::Refusal
            | Parameter::ExtraFields => self.passed_on.contains(&parameter),
        }
    }
}

/// The end user on whose behalf the client sends a request. It is passed to the runner, and never logged or used as a
/// metric label.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndUser(pub Option<Arc<str>>);

/// Isolates prompts in prefix caches: only sequences with the same salt share computed tokens. The client may choose a
/// secret salt, so `Debug` does not show it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct CacheSalt(pub Option<Arc<str>>);

impl std::fmt::Debug for CacheSalt {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = self.0.as_ref().map(|_| "…");
        formatter.debug_tuple("CacheSalt").field(&shown).finish()
    }
}

/// The reason why a choice ended successfully.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended the text, or a stop string or stop token matched.
    Stop,
    /// The choice reached `max_tokens`.
    Length,
}
