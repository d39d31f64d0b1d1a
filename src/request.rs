//! What a client asks for, in the engine's own words. It must not know protocols: the doors turn
//! their messages into these types, and a value that exists is valid.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

/// The id of a token in a model's vocabulary.
pub type TokenId = u32;

/// The most choices that one request may ask for.
pub const MAX_CHOICES: u32 = 128;

/// The most stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;

/// The longest stop string, in bytes: as much text as it may be is held back before it is decided.
pub const MAX_STOP_BYTES: usize = 1_024;

/// The most stop tokens of one request.
pub const MAX_STOP_TOKENS: usize = 128;

/// The most tokens whose logits one request may move.
pub const MAX_LOGIT_BIASES: usize = 1_024;

/// How many of the likeliest tokens a request may ask for with each token.
pub const MAX_LOGPROBS: u32 = 20;

/// The longest name of a model, in bytes: errors repeat it, and travel in headers.
pub const MAX_MODEL_NAME_BYTES: usize = 256;

/// The longest name of a user, in bytes.
pub const MAX_USER_BYTES: usize = 512;

/// Ten years stand for 'no deadline': longer times overflow the clocks that they are added to.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

/// What `max_tokens` is when the client does not say.
pub const DEFAULT_MAX_TOKENS: u32 = 16;

/// A request for the completion of one prompt.
#[derive(Clone, Debug)]
pub struct CompletionRequest {
    /// Names the request in logs and answers.
    pub id: RequestId,
    /// The model asked for, or `None` for the only one.
    pub model: Option<String>,
    /// What to complete.
    pub input: Input,
    /// The most tokens of each choice. `None` is [`DEFAULT_MAX_TOKENS`], and for a chat the rest of the
    /// context. 0 only with `echo`.
    pub max_tokens: Option<u32>,
    /// How many choices, 1 to [`MAX_CHOICES`].
    pub choices: u32,
    /// How to sample.
    pub sampling: Sampling,
    /// What is added to the logits of these tokens before sampling, -100 to 100 each.
    pub logit_bias: Arc<[(TokenId, f32)]>,
    /// What ends a choice before `max_tokens`.
    pub stopping: Stopping,
    /// How many of the likeliest tokens to tell with each token's own log probability, or `None` for none
    /// of either.
    pub logprobs: Option<u32>,
    /// Whether the prompt is told before the completion, with its log probabilities where they are asked
    /// for.
    pub echo: bool,
    /// What the client already has of each choice, from the first choice on; generation goes on behind it.
    pub resume: Vec<Vec<TokenId>>,
    /// Seeds the sampling.
    pub seed: u64,
    /// Lower goes first.
    pub priority: i32,
    /// Whether tokens carry the times of deadline and emission.
    pub timestamps: bool,
    /// Who asks.
    pub caller: Caller,
    /// When the request arrived.
    pub arrived: Instant,
    /// When the client no longer waits.
    pub deadline: Instant,
}

/// Names a request in logs and answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(pub Arc<str>);

impl RequestId {
    /// A new id that nobody else has.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string().into())
    }
}

/// What is to be completed.
#[derive(Clone, Debug)]
pub enum Input {
    /// Text to tokenize.
    Text(String),
    /// Token ids, at least one.
    TokenIds(Vec<TokenId>),
    /// Messages to render by the model's chat template, at least one.
    Chat(Vec<ChatMessage>),
    /// A gap to fill.
    Infill {
        /// What comes before it.
        prefix: String,
        /// What comes after it.
        suffix: String,
    },
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: String,
    /// What was said.
    pub content: String,
    /// Tells participants of the same role apart.
    pub name: Option<String>,
}

/// How the next token is chosen from a model's logits. Every value is within its range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 (greedy) to 2.
    pub temperature: f32,
    /// 0 (only the likeliest) to 1.
    pub top_p: f32,
    /// How many of the likeliest to keep; 0 keeps all.
    pub top_k: u32,
    /// 0 to 1, relative to the likeliest.
    pub min_p: f32,
    /// -2 to 2.
    pub presence_penalty: f32,
    /// -2 to 2.
    pub frequency_penalty: f32,
    /// Above 0, up to 2.
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

/// What ends a choice before it has its `max_tokens`.
#[derive(Clone, Debug, Default)]
pub struct Stopping {
    /// Strings that end it; none is empty.
    pub strings: Vec<String>,
    /// Whether the text ends after the stop string or stop token that matched, rather than before it.
    pub include_stop: bool,
    /// What the device looks at.
    pub tokens: StopTokens,
}

/// Which tokens end a choice.
#[derive(Clone, Debug, Default)]
pub struct StopTokens {
    /// These, besides the model's own.
    pub ids: Arc<[TokenId]>,
    /// Whether the model's own end-of-sequence tokens end nothing.
    pub ignore_eos: bool,
    /// Nothing but `max_tokens` ends a choice before it has so many tokens.
    pub min_tokens: u32,
}

/// A field of a request that a runner may be unable to honour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// Another temperature than 1.
    Temperature,
    /// Nucleus sampling.
    TopP,
    /// A limit on the candidates.
    TopK,
    /// A least probability.
    MinP,
    /// A penalty.
    PresencePenalty,
    /// A penalty.
    FrequencyPenalty,
    /// A penalty.
    RepetitionPenalty,
    /// Moved logits.
    LogitBias,
    /// A least number of tokens.
    MinTokens,
    /// No end by the model's will.
    IgnoreEos,
    /// Tokens that end a choice.
    StopTokenIds,
    /// Log probabilities of the completion's tokens.
    Logprobs,
    /// Log probabilities of the prompt's tokens: `echo` together with `logprobs`.
    EchoLogprobs,
    /// A gap to fill.
    Suffix,
}

impl Parameter {
    /// Every one.
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

    /// The name of its field.
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
        }
    }
}

impl CompletionRequest {
    /// Whether the request needs this of its runner.
    #[must_use]
    pub fn needs(&self, parameter: Parameter) -> bool {
        let (sampling, default) = (&self.sampling, Sampling::default());
        let tokens = &self.stopping.tokens;
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
            Parameter::LogitBias => !self.logit_bias.is_empty(),
            Parameter::MinTokens => tokens.min_tokens > 0,
            Parameter::IgnoreEos => tokens.ignore_eos,
            Parameter::StopTokenIds => !tokens.ids.is_empty(),
            Parameter::Logprobs => self.logprobs.is_some(),
            Parameter::EchoLogprobs => self.echo && self.logprobs.is_some(),
            Parameter::Suffix => matches!(self.input, Input::Infill { .. }),
        }
    }
}

/// On whose behalf a request runs. It travels with the request; it is in no log and no metric.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller(pub Option<Arc<str>>);

/// Why a choice ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it, or a stop string or stop token matched.
    Stop,
    /// It reached `max_tokens`.
    Length,
}
