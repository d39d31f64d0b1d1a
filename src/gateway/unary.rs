//! A completion that is not streamed: one JSON body.

use serde_json::{Value, json};

use super::lines::{Head, finish_reason, usage_object};
use super::opened::{MergedEvent, Opened};
use crate::error::Error;

/// Collects the whole completion.
///
/// # Errors
/// What ended it before it was whole: then nothing of it is sent.
pub(super) async fn collect(mut opened: Opened, head: Head) -> Result<Value, Error> {
    let mut choices = vec![Choice::default(); opened.choices()];
    let usage = loop {
        match opened.next().await? {
            MergedEvent::Started(_) | MergedEvent::Prompt(..) => {}
            MergedEvent::Tokens(tokens) => {
                let at = usize::try_from(tokens.choice).expect("at most 128");
                let choice = &mut choices[at];
                choice.finish = finish_reason(tokens.finish_reason()).or(choice.finish);
                choice.text.push_str(tokens.tokens.text());
            }
            MergedEvent::Ended(usage, _) => break usage,
        }
    };
    let choices: Vec<Value> = choices.iter().enumerate().map(choice_object).collect();
    Ok(json!({
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage_object(&usage),
    }))
}

#[derive(Clone, Default)]
struct Choice {
    text: String,
    finish: Option<&'static str>,
}

fn choice_object((index, choice): (usize, &Choice)) -> Value {
    json!({
        "index": index,
        "text": choice.text,
        "logprobs": null,
        "finish_reason": choice.finish,
    })
}
