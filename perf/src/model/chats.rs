//! The scenarios with chats: one that grows, and many in turn. Each turn sends the whole conversation again, with the
//! server's own replies, as clients of chats do.

use super::client::{Client, Reply};
use super::completions::ttft_ms;
use super::prose::Prose;
use super::turn::{Counts, Figure, Turn, median};
use crate::fault::Fault;
use crate::statistics::count_to_f64;

/// Number of turns of the chat that grows.
pub(super) const TURNS: usize = 6;
/// Number of conversations in turn: four for each slot.
pub(super) const CONVERSATIONS: usize = 32;
/// Number of further turns of the last conversation, each directly after the other.
const HOT_TURNS: usize = 5;
/// Numbers of words in the first message of the chat that grows, and of each of many conversations.
const LONG_MESSAGE_WORDS: usize = 1_000;
const MESSAGE_WORDS: usize = 200;
/// Number of words in each later message of a user.
const LATER_MESSAGE_WORDS: usize = 24;
const SYSTEM_WORDS: usize = 8;
/// Numbers of tokens of a reply, in the chat that grows and in many conversations.
const LONG_REPLY_TOKENS: u32 = 32;
const REPLY_TOKENS: u32 = 8;

/// A conversation, and the replies of its turns so far.
struct Conversation {
    /// Contents of the system's message, and then of the user's and the model's messages in turn.
    messages: Vec<String>,
    reply_tokens: u32,
    replies: Vec<Reply>,
}

impl Conversation {
    /// Creates a conversation. The system's message comes first in the prompt, so it is different in each.
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

/// Measures the time until the first token of each turn of a chat that grows.
pub(super) async fn growing_chat(client: &Client, prose: &mut Prose) -> Result<Turn, Fault> {
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
    Ok(Turn::new(figures, Counts::of_replies(&chat.replies)))
}

/// Measures the time until the first token of conversations that outnumber the slots. Each second turn follows the
/// first turns of all other conversations.
pub(super) async fn conversations(client: &Client, prose: &mut Prose) -> Result<Turn, Fault> {
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
    Ok(Turn::new(
        figures,
        Counts::of_replies(all.iter().flat_map(|one| &one.replies)),
    ))
}
