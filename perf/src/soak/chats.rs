//! Clients that chat with a real model. The conversations grow, some begin with the same instructions, and there are
//! many more of them than slots.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use tokio::time::timeout;

use super::client::SharedState;
use super::tally::End;
use crate::fault::Fault;
use crate::model::client::Client;
use crate::model::prose::Prose;

/// Number of different instructions of chats.
const INSTRUCTIONS: u64 = 4;
/// Number of words in the instructions.
const INSTRUCTION_WORDS: usize = 60;
/// Maximum number of turns of a chat.
const MAX_TURNS: u32 = 6;
/// Maximum number of words in a message.
const MAX_MESSAGE_WORDS: usize = 90;
/// Maximum number of tokens in a reply.
const MAX_REPLY_TOKENS: u32 = 32;
/// Maximum time that a client reads a reply before it leaves.
const MAX_STAY: Duration = Duration::from_secs(3);

/// The messages of a chat so far.
struct Chat {
    client: Client,
    prose: Prose,
    messages: Vec<String>,
}

impl Chat {
    fn begin(shared: &SharedState, random: &mut StdRng) -> Self {
        let mut instructions = Prose::from_seed(random.random_range(0..INSTRUCTIONS));
        Self {
            client: Client {
                url: shared.server.http.clone(),
            },
            messages: vec![instructions.text(INSTRUCTION_WORDS)],
            prose: Prose::from_seed(random.random()),
        }
    }

    /// Adds a message of the user.
    fn add_message(&mut self, random: &mut StdRng) {
        let words = random.random_range(1..=MAX_MESSAGE_WORDS);
        self.messages.push(self.prose.text(words));
    }

    /// Reads the reply to the last message.
    async fn reply(&self, shared: &SharedState, tokens: u32) -> Result<String, Fault> {
        let reply = self.client.chat(&self.messages, tokens).await?;
        shared.tally.borrow_mut().streams += 1;
        Ok(reply.text)
    }
}

/// Holds a chat of a few turns.
pub(super) async fn hold_chat(shared: &SharedState, random: &mut StdRng) -> Result<End, Fault> {
    let mut chat = Chat::begin(shared, random);
    for _ in 0..random.random_range(1..=MAX_TURNS) {
        chat.add_message(random);
        let reply = chat.reply(shared, reply_tokens(random)).await?;
        chat.messages.push(reply);
    }
    Ok("whole")
}

/// Leaves a chat before the reply is complete, and then continues it.
pub(super) async fn leave_chat(shared: &SharedState, random: &mut StdRng) -> Result<End, Fault> {
    let mut chat = Chat::begin(shared, random);
    chat.add_message(random);
    let stay = random.random_range(Duration::ZERO..MAX_STAY);
    let end = match timeout(stay, chat.reply(shared, MAX_REPLY_TOKENS)).await {
        Ok(reply) => {
            reply?;
            "whole"
        }
        Err(_) => "left, then whole",
    };
    chat.reply(shared, reply_tokens(random)).await?;
    Ok(end)
}

/// Requests the same reply twice. The text must be the same, although the second one is computed from the kept state of
/// the first one.
pub(super) async fn repeat_chat(shared: &SharedState, random: &mut StdRng) -> Result<End, Fault> {
    let mut chat = Chat::begin(shared, random);
    chat.add_message(random);
    let tokens = reply_tokens(random);
    let first = chat.reply(shared, tokens).await?;
    let second = chat.reply(shared, tokens).await?;
    if first == second {
        return Ok("the same text");
    }
    Err(Fault::unexpected(
        format!("{first:?}"),
        format!("{second:?}"),
    ))
}

fn reply_tokens(random: &mut StdRng) -> u32 {
    random.random_range(1..=MAX_REPLY_TOKENS)
}
