//! The outcome of a request, in a form that is the same for all transports.

use serde_json::Value;

use crate::table::Row;

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    /// The echoed prompt, if `echo` was set.
    pub(crate) echo: Option<String>,
    /// Logprobs of the prompt's tokens, if the request asks for them.
    pub(crate) scored: Vec<TokenLogprob>,
    pub(crate) choices: Vec<Choice>,
    /// Number of prompt tokens and completion tokens. `None` if the request failed.
    pub(crate) usage: Option<(u32, u32)>,
    /// Error code and field.
    pub(crate) error: Option<(String, Option<String>)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) text: String,
    /// Token ids. `None` for unary responses, which do not have them.
    pub(crate) ids: Option<Vec<u32>>,
    pub(crate) finish: Option<String>,
    pub(crate) logprobs: Vec<TokenLogprob>,
}

/// Logprob of a token. A token that is not valid UTF-8 is written as in OpenAI's completions: `bytes:\xf0`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenLogprob {
    token: String,
    logprob: Option<f32>,
    /// Sorted by token, because JSON objects have no order.
    top: Vec<(String, f32)>,
}

impl TokenLogprob {
    pub(crate) fn new(token: &[u8], logprob: Option<f32>, top: Vec<(Vec<u8>, f32)>) -> Self {
        let mut top: Vec<_> = top
            .into_iter()
            .map(|(token, logprob)| (printable(&token), logprob))
            .collect();
        top.sort_by(|one, other| one.0.cmp(&other.0));
        Self {
            token: printable(token),
            logprob,
            top,
        }
    }
}

/// Returns a token's bytes as text, or hex-escaped if they are not valid UTF-8.
fn printable(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let bytes: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{bytes}")
        }
    }
}

impl Outcome {
    pub(crate) fn failed(error: (String, Option<String>)) -> Self {
        Self {
            error: Some(error),
            ..Self::default()
        }
    }

    /// Parses a unary response.
    pub(crate) fn from_body(row: &Row, body: &Value) -> Self {
        if let Some(error) = error(body) {
            return Self::failed(error);
        }
        let mut outcome = Self {
            usage: usage_of(body),
            ..Self::default()
        };
        for object in as_objects(&body["choices"]) {
            let text = if row.is_chat() {
                &object["message"]["content"]
            } else {
                &object["text"]
            };
            let logprobs = logprobs_of(row, &object["logprobs"]);
            outcome.add_choice(row, text.as_str().expect("a text"), logprobs, object);
        }
        outcome
    }

    /// Adds a choice of a unary response. Separates the echoed prompt from its text.
    fn add_choice(
        &mut self,
        row: &Row,
        text: &str,
        mut logprobs: Vec<TokenLogprob>,
        object: &Value,
    ) {
        let mut text = text.to_owned();
        if row.echoes() {
            let rest = text.split_off(row.prompt().len());
            self.echo = Some(std::mem::replace(&mut text, rest));
            // The logprobs of the prompt's tokens come before those of the completion.
            let prompt_tokens = self.usage.expect("a whole response has a usage").0;
            let scored = logprobs
                .len()
                .min(usize::try_from(prompt_tokens).expect("a small number"));
            let rest = logprobs.split_off(scored);
            self.scored = std::mem::replace(&mut logprobs, rest);
        }
        self.choices.push(Choice {
            text,
            ids: None,
            finish: object["finish_reason"].as_str().map(str::to_owned),
            logprobs,
        });
    }

    /// Parses the objects of a streamed response.
    pub(crate) fn from_lines(row: &Row, lines: &[Value]) -> Self {
        let mut outcome = Self::default();
        for line in lines {
            assert!(outcome.error.is_none(), "{line} follows an error");
            outcome.error = error(line);
            outcome.usage = outcome.usage.or_else(|| usage_of(line));
            for object in line["choices"].as_array().into_iter().flatten() {
                outcome.add_line(row, object);
            }
        }
        outcome
    }

    fn add_line(&mut self, row: &Row, object: &Value) {
        let at =
            usize::try_from(object["index"].as_u64().expect("an index")).expect("a small number");
        let is_first = self.choices.len() <= at;
        if is_first {
            self.choices.resize(at + 1, Choice::default());
        }
        let text = if row.is_chat() {
            &object["delta"]["content"]
        } else {
            &object["text"]
        };
        let text = text.as_str().unwrap_or_default();
        let logprobs = logprobs_of(row, &object["logprobs"]);
        let choice = &mut self.choices[at];
        if row.echoes() && choice.ids.is_none() {
            choice.ids = Some(Vec::new());
            self.echo = Some(text.to_owned());
            self.scored = logprobs;
            return;
        }
        assert_eq!(choice.finish, None, "{object} follows the end");
        choice.text.push_str(text);
        choice.logprobs.extend(logprobs);
        let ids = choice.ids.get_or_insert_default();
        let line_ids = object["token_ids"].as_array().into_iter().flatten();
        ids.extend(line_ids.map(|id| u32::try_from(id.as_u64().expect("an id")).expect("an id")));
        choice.finish = object["finish_reason"].as_str().map(str::to_owned);
    }

    /// Removes the token ids, because unary responses do not have them.
    pub(crate) fn without_token_ids(mut self) -> Self {
        for choice in &mut self.choices {
            choice.ids = None;
        }
        self
    }
}

fn error(object: &Value) -> Option<(String, Option<String>)> {
    let error = object.get("error")?;
    let text = |field: &str| error[field].as_str().map(str::to_owned);
    Some((text("code").expect("a code"), text("param")))
}

fn usage_of(object: &Value) -> Option<(u32, u32)> {
    let usage = object.get("usage").filter(|usage| !usage.is_null())?;
    let count = |field: &str| {
        let count = usage[field].as_u64().expect("a count");
        u32::try_from(count).expect("a small number")
    };
    let (prompt, completion) = (count("prompt_tokens"), count("completion_tokens"));
    assert_eq!(count("total_tokens"), prompt + completion);
    Some((prompt, completion))
}

fn logprobs_of(row: &Row, logprobs: &Value) -> Vec<TokenLogprob> {
    if logprobs.is_null() {
        return Vec::new();
    }
    if row.is_chat() {
        return as_objects(&logprobs["content"])
            .iter()
            .map(chat_logprob)
            .collect();
    }
    let columns = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
    let [tokens, sampled, top, offsets] = columns.map(|column| as_objects(&logprobs[column]));
    assert!(
        [sampled, top, offsets]
            .iter()
            .all(|column| column.len() == tokens.len())
    );
    let one = |at: usize| TokenLogprob {
        token: tokens[at].as_str().expect("a token").to_owned(),
        logprob: sampled[at].as_f64().map(as_f32),
        top: top[at]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(token, logprob)| (token.clone(), as_f32(logprob.as_f64().expect("a number"))))
            .collect(),
    };
    (0..tokens.len()).map(one).collect()
}

fn chat_logprob(object: &Value) -> TokenLogprob {
    let bytes = |object: &Value| -> Vec<u8> {
        let bytes = as_objects(&object["bytes"]).iter();
        bytes
            .map(|byte| u8::try_from(byte.as_u64().expect("a byte")).expect("a byte"))
            .collect()
    };
    let logprob = |object: &Value| object["logprob"].as_f64().map(as_f32);
    let top = as_objects(&object["top_logprobs"]).iter();
    let top = top
        .map(|top| (bytes(top), logprob(top).expect("a number")))
        .collect();
    TokenLogprob::new(&bytes(object), logprob(object), top)
}

fn as_objects(list: &Value) -> &[Value] {
    list.as_array().expect("a list")
}

/// Converts a JSON number back to the `f32` from which it was printed.
#[expect(
    clippy::as_conversions,
    reason = "std has no other conversion that rounds a float"
)]
fn as_f32(number: f64) -> f32 {
    number as f32
}
