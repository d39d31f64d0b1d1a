//! A completion that is not streamed: one JSON body.

use axum::response::Response;

use super::answer::{
    self, ChatAnswer, ChatChoice, ChatCompletion, Completion, CompletionChoice, finish_reason,
};
use super::body::{ParsedBody, ResponseOptions, Route};
use super::completion_stream::{CompletionStream, MergedEvent};
use super::echo::{Echo, Prompt};
use super::lines::ResponseMetadata;
use super::logprobs::{ChatLogprobs, CompletionLogprobs, characters};
use super::size;
use crate::error::Error;
use crate::proto::v1;
use crate::tokens::TextToken;

/// Collects the whole completion.
///
/// # Errors
/// What ended it before it was whole, also that it has grown too large: then nothing of it is sent.
pub(super) async fn collect(
    mut completion_stream: CompletionStream,
    body: &ParsedBody,
    mut echo: Option<Echo>,
    head: ResponseMetadata,
) -> Result<Response, Error> {
    let choice = || Choice::new(head.route, body.response.logprobs.is_some());
    let mut choices: Vec<Choice> = std::iter::repeat_with(choice)
        .take(completion_stream.choices())
        .collect();
    let mut held = 0;
    let usage = loop {
        match completion_stream.next().await? {
            MergedEvent::Started(_) => {}
            MergedEvent::Prompt(prompt, part) => {
                if let Some(echo) = &mut echo {
                    echo.take(prompt, part)?;
                }
            }
            MergedEvent::Tokens(tokens) => {
                let at = usize::try_from(tokens.choice).expect("at most 128");
                if let Some(prompt) = echo.as_mut().and_then(|echo| echo.begin(tokens.choice)) {
                    held += prompt.size;
                    choices[at].begin(&prompt);
                }
                choices[at].take(&tokens);
                held += size::of_tokens(&tokens.tokens);
                size::check_piece(held)?;
            }
            MergedEvent::Ended(usage, _) => break usage,
        }
    };
    let choices = best(choices, body);
    if held < size::LARGE {
        return Ok(answer(choices, head, usage));
    }
    let written = tokio::task::spawn_blocking(move || answer(choices, head, usage));
    written.await.map_err(|_| Error::internal())
}

/// A choice as far as it has come.
struct Choice {
    text: String,
    finish: Option<&'static str>,
    logprobs: Option<ChoiceLogprobs>,
    /// The sum of its tokens' log probabilities.
    total_logprob: f64,
    /// How many tokens have one.
    scored: u32,
}

enum ChoiceLogprobs {
    Completion(CompletionLogprobs),
    Chat(ChatLogprobs),
}

impl Choice {
    fn new(route: Route, has_logprobs: bool) -> Self {
        Self {
            text: String::new(),
            finish: None,
            logprobs: has_logprobs.then(|| match route {
                Route::Completions => ChoiceLogprobs::Completion(CompletionLogprobs::default()),
                Route::Chat => ChoiceLogprobs::Chat(ChatLogprobs::default()),
            }),
            total_logprob: 0.0,
            scored: 0,
        }
    }

    fn begin(&mut self, prompt: &Prompt) {
        self.text.push_str(&prompt.text);
        if let Some(ChoiceLogprobs::Completion(logprobs)) = &mut self.logprobs {
            *logprobs = prompt.logprobs();
        }
    }

    fn take(&mut self, tokens: &v1::Tokens) {
        self.finish = finish_reason(tokens.finish_reason()).or(self.finish);
        let mut offset = match &self.logprobs {
            Some(ChoiceLogprobs::Completion(_)) => characters(&self.text),
            Some(ChoiceLogprobs::Chat(_)) | None => 0,
        };
        self.text.push_str(tokens.tokens.text());
        for token in tokens
            .tokens
            .iter()
            .filter(|token| token.logprobs.is_some())
        {
            self.score(&token);
            match &mut self.logprobs {
                Some(ChoiceLogprobs::Completion(logprobs)) => {
                    logprobs.push(&token, offset);
                    offset += characters(token.text);
                }
                Some(ChoiceLogprobs::Chat(logprobs)) => logprobs.push(&token),
                None => {}
            }
        }
    }

    fn score(&mut self, token: &TextToken<'_>) {
        if let Some(logprob) = token.logprobs.and_then(|logprobs| logprobs.logprob) {
            self.total_logprob += f64::from(logprob);
            self.scored += 1;
        }
    }

    /// The log probability per token.
    fn mean_logprob(&self) -> f64 {
        self.total_logprob / f64::from(self.scored.max(1))
    }
}

/// The choices that are shown: all, or the likeliest of each prompt's candidates.
fn best(mut choices: Vec<Choice>, body: &ParsedBody) -> Vec<Choice> {
    let ResponseOptions { choices: shown, .. } = body.response;
    if shown == body.candidates {
        return choices;
    }
    let size = |choices| usize::try_from(choices).expect("at most 128");
    let mut best = Vec::new();
    while !choices.is_empty() {
        let others = choices.split_off(size(body.candidates).min(choices.len()));
        choices.sort_by(|one, other| other.mean_logprob().total_cmp(&one.mean_logprob()));
        choices.truncate(size(shown));
        best.append(&mut choices);
        choices = others;
    }
    best
}

fn answer(choices: Vec<Choice>, head: ResponseMetadata, usage: v1::Usage) -> Response {
    let choices = (0..).zip(choices);
    let ResponseMetadata {
        route,
        id,
        created,
        model,
    } = head;
    match route {
        Route::Completions => answer::json(&Completion {
            id,
            object: "text_completion",
            created,
            model,
            choices: choices.map(completion_choice).collect(),
            usage: usage.into(),
        }),
        Route::Chat => answer::json(&ChatCompletion {
            id,
            object: "chat.completion",
            created,
            model,
            choices: choices.map(chat_choice).collect(),
            usage: usage.into(),
        }),
    }
}

fn completion_choice((index, choice): (u32, Choice)) -> CompletionChoice {
    CompletionChoice {
        index,
        text: choice.text,
        logprobs: match choice.logprobs {
            Some(ChoiceLogprobs::Completion(logprobs)) => Some(logprobs),
            Some(ChoiceLogprobs::Chat(_)) | None => None,
        },
        finish_reason: choice.finish,
    }
}

fn chat_choice((index, choice): (u32, Choice)) -> ChatChoice {
    ChatChoice {
        index,
        message: ChatAnswer {
            role: "assistant",
            content: choice.text,
            refusal: None,
        },
        logprobs: match choice.logprobs {
            Some(ChoiceLogprobs::Chat(logprobs)) => Some(logprobs),
            Some(ChoiceLogprobs::Completion(_)) | None => None,
        },
        finish_reason: choice.finish,
    }
}
