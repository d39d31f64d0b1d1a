//! The scenarios with chats: one growing chat, and many conversations one after the other. Each turn sends the whole
//! conversation again, including the server's own replies, as chat clients do.

use super::client::{Client, Reply};
use super::completions::ttft_ms;
use super::measurement::{Counts, Figure, Measurement, median};
use super::prose::Prose;
use crate::fault::Fault;
use crate::statistics::count_to_f64;

/// Number of turns of the growing chat.
pub(super) const TURNS: usize = 6;
/// Number of conversations, four for each slot.
pub(super) const CONVERSATIONS: usize = 32;
/// Number of further turns of the last conversation. Each directly follows the turn before, so its tokens are still in
/// the slot.
const HOT_TURNS: usize = 5;
/// Number of words in the user's first message: of the growing chat, and of each of the many conversations.
const LONG_MESSAGE_WORDS: usize = 1_000;
const MESSAGE_WORDS: usize = 200;
/// Number of words in each later message of the user.
const LATER_MESSAGE_WORDS: usize = 24;
const SYSTEM_WORDS: usize = 8;
/// Number of tokens in a reply: in the growing chat, and in each of the many conversations.
const LONG_REPLY_TOKENS: u32 = 32;
const REPLY_TOKENS: u32 = 8;

/// A conversation, and the replies of its turns so far.
struct Conversation {
    /// Contents of the system message, and then alternately of a user message and an assistant message.
    messages: Vec<String>,
    reply_tokens: u32,
    replies: Vec<Reply>,
}

impl Conversation {
    /// Creates a conversation. Each has another system message, which comes first in the prompt, so that conversations
    /// share no prefix but the chat template's.
    fn new(prose: &mut Prose, reply_tokens: u32) -> Self {
        Self {
            messages: vec![prose.text(SYSTEM_WORDS)],
            reply_tokens,
            replies: Vec::new(),
        }
    }

    async fn ask(&mut self, client: &Client, message: String) -> Result<(), Fault> {
        self.messages.push(message);
        let reply = client.chat(&self.messages, self.reply_tokens).await?;
        self.messages.push(reply.text.clone());
        self.replies.push(reply);
        Ok(())
    }
}

/// Measures the TTFT of each turn of a growing chat.
pub(super) async fn growing_chat(client: &Client, prose: &mut Prose) -> Result<Measurement, Fault> {
    let mut chat = Conversation::new(prose, LONG_REPLY_TOKENS);
    for turn in 0..TURNS {
        let words = if turn == 0 {
            LONG_MESSAGE_WORDS
        } else {
            LATER_MESSAGE_WORDS
        };
        chat.ask(client, prose.text(words)).await?;
    }
    let ttfts: Vec<_> = chat.replies.iter().map(ttft_ms).collect();
    let (first, later) = ttfts.split_first().expect("there is a turn");
    let turns = count_to_f64(u64::try_from(later.len()).unwrap_or(u64::MAX));
    let mean = later.iter().sum::<f64>() / turns;
    let figures = [
        (Figure::FirstTurnTtft, *first),
        (Figure::LaterTurnsTtft, mean),
    ];
    Ok(Measurement::new(figures, Counts::of_replies(&chat.replies)))
}

/// Measures the TTFT of conversations that outnumber the slots. Each conversation's second turn comes after the first
/// turns of all others, which have used its slot in the meantime.
pub(super) async fn conversations(
    client: &Client,
    prose: &mut Prose,
) -> Result<Measurement, Fault> {
    let new = |_| Conversation::new(prose, REPLY_TOKENS);
    let mut all: Vec<_> = (0..CONVERSATIONS).map(new).collect();
    for words in [MESSAGE_WORDS, LATER_MESSAGE_WORDS] {
        for conversation in &mut all {
            conversation.ask(client, prose.text(words)).await?;
        }
    }
    let last = all.last_mut().expect("there is a conversation");
    for _ in 0..HOT_TURNS {
        last.ask(client, prose.text(LATER_MESSAGE_WORDS)).await?;
    }
    let hot = last.replies[2..].iter().map(ttft_ms).collect();
    let of_turn = |turn: usize| all.iter().map(|one| ttft_ms(&one.replies[turn])).collect();
    let figures = [
        (Figure::FirstTurnTtft, median(of_turn(0))),
        (Figure::SecondTurnTtft, median(of_turn(1))),
        (Figure::HotTurnTtft, median(hot)),
    ];
    Ok(Measurement::new(
        figures,
        Counts::of_replies(all.iter().flat_map(|one| &one.replies)),
    ))
}
