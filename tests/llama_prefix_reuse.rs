//! A real model that reuses computed prompt tokens. Its texts must equal the texts without reuse, whether the tokens
//! were kept in a slot or in the store.

mod support;

use std::sync::Arc;

use futures_util::future::join_all;
use serde_json::{Value, json};
use support::http::post;
use support::{Setup, TestServer, model_path};
use tokenway::runner::llama::{LlamaLoader, LlamaOptions};

const INSTRUCTIONS: &str = "You are a patient guide of a small museum of clocks. You answer every question of a visitor in one \
    or two short sentences. You know the history of each clock in the museum: who built it, in which year, in which town, what \
    it was used for, and how it came here. If you do not know an answer, you say so, and you name a clock that may be of \
    interest instead. You never talk about anything but clocks.";

const QUESTIONS: [&str; 3] = [
    "Which clock is the oldest?",
    "And who built it? Please tell me also where it stood before it came into this museum, how long the journey took, which \
     parts had to be replaced, whether it still keeps the time as well as in its first year, and who winds it up today.",
    "Thank you.",
];

/// The sampling of a request.
#[derive(Clone, Copy)]
enum Sampling {
    Greedy,
    Seed(u64),
}

async fn start(slots: usize, prefix_caching: bool) -> TestServer {
    let options = LlamaOptions {
        model_path: model_path(),
        prefix_caching,
        ..LlamaOptions::default()
    };
    let loader = Arc::new(LlamaLoader::new(options));
    Setup::runner("smollm2", loader, slots).start().await
}

/// The messages of a chat so far, and the number of cached tokens that the server reported for the last turn.
struct Chat {
    messages: Vec<Value>,
    sampling: Sampling,
    cached_tokens: Option<u64>,
}

impl Chat {
    fn new(instructions: &str, sampling: Sampling) -> Self {
        Self {
            messages: vec![json!({"role": "system", "content": instructions})],
            sampling,
            cached_tokens: None,
        }
    }

    /// Asks a question, and adds the answer to the chat.
    async fn ask(&mut self, server: &TestServer, question: &str) {
        self.messages
            .push(json!({"role": "user", "content": question}));
        let (temperature, seed) = match self.sampling {
            Sampling::Greedy => (0.0, 0),
            Sampling::Seed(seed) => (0.8, seed),
        };
        let body = json!({
            "messages": self.messages, "max_tokens": 24, "temperature": temperature, "seed": seed,
        });
        let (response, body) = post("/v1/chat/completions", body.to_string())
            .fetch(server)
            .await;
        assert_eq!(response.status, 200, "{}", body.text);
        let answer = body.json();
        let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
        self.cached_tokens = cached.as_u64();
        let message = &answer["choices"][0]["message"];
        let content = &message["content"];
        self.messages
            .push(json!({"role": "assistant", "content": content}));
    }
}

#[tokio::test]
async fn a_chat_has_the_same_answers_with_and_without_reuse() {
    let (fresh, reusing) = tokio::join!(start(2, false), start(2, true));
    for sampling in [Sampling::Greedy, Sampling::Seed(5)] {
        let mut expected = Chat::new(INSTRUCTIONS, sampling);
        let mut chat = Chat::new(INSTRUCTIONS, sampling);
        for question in QUESTIONS {
            expected.ask(&fresh, question).await;
            assert_eq!(expected.cached_tokens, None);
            chat.ask(&reusing, question).await;
        }
        assert_eq!(chat.messages, expected.messages);
        assert!(chat.cached_tokens > Some(200), "{:?}", chat.cached_tokens);
    }
}

#[tokio::test]
async fn more_chats_than_slots_keep_their_answers_and_reuse_their_turns() {
    let (fresh, reusing) = tokio::join!(start(5, false), start(2, true));
    let instructions = |number: usize| format!("Visitor {number}. {INSTRUCTIONS}");
    let chats = || -> Vec<Chat> {
        let seed = |number| Sampling::Seed(u64::try_from(number).expect("it is small"));
        let chats = (0..5).map(|number| Chat::new(&instructions(number), seed(number)));
        chats.collect()
    };
    let (mut expected, mut actual) = (chats(), chats());
    for question in [QUESTIONS[0], QUESTIONS[2]] {
        // One server runs the chats one after another, the other all at once.
        for chat in &mut expected {
            chat.ask(&fresh, question).await;
        }
        join_all(actual.iter_mut().map(|chat| chat.ask(&reusing, question))).await;
    }
    for (chat, expected) in actual.iter().zip(&expected) {
        assert_eq!(chat.messages, expected.messages);
        assert!(chat.cached_tokens > Some(100), "{:?}", chat.cached_tokens);
    }
}
