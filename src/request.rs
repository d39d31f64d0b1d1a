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

/// The longest name of a model, in bytes: errors repeat it, and travel in headers.
pub const MAX_MODEL_NAME_BYTES: usize = 256;

/// The longest name of a user, in bytes.
pub const MAX_USER_BYTES: usize = 512;

/// Ten years stand for 'no deadline': longer times overflow the clocks that they are added to.
pub const LONGEST_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

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
    /// The most tokens of each choice, at least 1.
    pub max_tokens: u32,
    /// How many choices, 1 to [`MAX_CHOICES`].
    pub choices: u32,
    /// How to sample.
    pub sampling: Sampling,
    /// Strings that end a choice; none is empty.
    pub stop: Vec<String>,
    /// Seeds the sampling.
    pub seed: u64,
    /// Lower goes first.
    pub priority: i32,
    /// Whether tokens carry the times of deadline and emission.
    pub stamps: bool,
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
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: String,
    /// What was said.
    pub content: String,
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

/// On whose behalf a request runs. It travels with the request; it is in no log and no metric.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller(pub Option<Arc<str>>);

/// Why a choice ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it, or a stop string matched.
    Stop,
    /// It reached `max_tokens`.
    Length,
}
