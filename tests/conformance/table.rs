//! The rows of the conformance table. Together they use every request field and end in every possible way.

use std::time::Duration;

use serde_json::{Value, json};
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;

/// A request as an HTTP body, with its expected end and its deadline.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    route: Route,
    pub(crate) body: Value,
    pub(crate) ends: ExpectedEnd,
    pub(crate) timeout: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Completions,
    Chat,
}

/// Expected end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpectedEnd {
    /// Every choice has this finish reason.
    With(&'static str),
    /// The request fails with this error code.
    Failing(&'static str),
}

pub(crate) const LENGTH: ExpectedEnd = ExpectedEnd::With("length");
pub(crate) const STOP: ExpectedEnd = ExpectedEnd::With("stop");

/// Returns a completion of `prompt` with additional fields.
pub(crate) fn completion(
    name: &'static str,
    prompt: &Value,
    fields: &Value,
    ends: ExpectedEnd,
) -> Row {
    row(
        name,
        Route::Completions,
        json!({"prompt": prompt}),
        fields,
        ends,
    )
}

/// Returns a chat completion with the message `content` and additional fields.
pub(crate) fn chat(name: &'static str, content: &Value, fields: &Value, ends: ExpectedEnd) -> Row {
    let messages = json!([{"role": "user", "content": content}]);
    row(
        name,
        Route::Chat,
        json!({"messages": messages}),
        fields,
        ends,
    )
}

fn row(
    name: &'static str,
    route: Route,
    mut body: Value,
    fields: &Value,
    ends: ExpectedEnd,
) -> Row {
    let all = body.as_object_mut().expect("a body is an object");
    for (name, value) in fields.as_object().expect("fields are an object") {
        all.insert(name.clone(), value.clone());
    }
    Row {
        name,
        route,
        body,
        ends,
        timeout: None,
    }
}

impl Row {
    pub(crate) fn with_deadline(self, timeout: Duration) -> Self {
        Self {
            timeout: Some(timeout),
            ..self
        }
    }

    pub(crate) fn is_chat(&self) -> bool {
        self.route == Route::Chat
    }

    pub(crate) fn path(&self) -> &'static str {
        match self.route {
            Route::Completions => "/v1/completions",
            Route::Chat => "/v1/chat/completions",
        }
    }

    pub(crate) fn echoes(&self) -> bool {
        self.body["echo"] == json!(true)
    }

    /// Returns true if the request is possible only without streaming.
    pub(crate) fn needs_unary(&self) -> bool {
        self.body.get("best_of").is_some()
    }

    pub(crate) fn prompt(&self) -> &str {
        self.body["prompt"].as_str().expect("the prompt is text")
    }

    /// Returns the same request as a gRPC message.
    pub(crate) fn message(&self) -> v1::CompletionRequest {
        let body = &self.body;
        let int = |name: &str| body[name].as_i64();
        let small =
            |name: &str| int(name).map(|it| i32::try_from(it).expect("the value fits in i32"));
        let count = |name: &str| int(name).map(|it| u32::try_from(it).expect("a count"));
        let number = |name: &str| body[name].as_f64().map(as_f32);
        let flag = |name: &str| body[name].as_bool().unwrap_or(false);
        let text = |name: &str| body[name].as_str().map(str::to_owned);
        let logprobs = if self.is_chat() {
            flag("logprobs").then(|| count("top_logprobs").unwrap_or(0))
        } else {
            count("logprobs")
        };
        v1::CompletionRequest {
            model: text("model").unwrap_or_default(),
            input: self.input(),
            max_tokens: count("max_completion_tokens").or(count("max_tokens")),
            n: count("n"),
            temperature: number("temperature"),
            top_p: number("top_p"),
            top_k: small("top_k"),
            min_p: number("min_p"),
            presence_penalty: number("presence_penalty"),
            frequency_penalty: number("frequency_penalty"),
            repetition_penalty: number("repetition_penalty"),
            seed: int("seed"),
            stop: self.stop(),
            priority: small("priority"),
            logprobs,
            include_stamps: false,
            resume: Vec::new(),
            user: text("user").unwrap_or_default(),
            echo: flag("echo"),
            suffix: text("suffix"),
            logit_bias: self.logit_bias(),
            min_tokens: count("min_tokens").unwrap_or(0),
            ignore_eos: flag("ignore_eos"),
            stop_token_ids: token_ids(&body["stop_token_ids"]),
            include_stop_str_in_output: flag("include_stop_str_in_output"),
            ..v1::CompletionRequest::default()
        }
    }

    fn input(&self) -> Option<Input> {
        if let Some(messages) = self.body["messages"].as_array() {
            let message = |message: &Value| v1::ChatMessage {
                role: message["role"].as_str().expect("a role").to_owned(),
                content: content_text(&message["content"]),
                name: message["name"].as_str().unwrap_or_default().to_owned(),
                ..v1::ChatMessage::default()
            };
            return Some(Input::Chat(v1::Chat {
                messages: messages.iter().map(message).collect(),
            }));
        }
        let prompt = &self.body["prompt"];
        Some(match prompt.as_str() {
            Some(text) => Input::Prompt(text.to_owned()),
            None => Input::PromptTokenIds(v1::TokenIds {
                ids: token_ids(prompt),
            }),
        })
    }

    fn stop(&self) -> Vec<String> {
        let stop = &self.body["stop"];
        if let Some(stop) = stop.as_str() {
            return vec![stop.to_owned()];
        }
        let stops = stop.as_array().into_iter().flatten();
        let text = |stop: &Value| stop.as_str().expect("a string").to_owned();
        stops.map(text).collect()
    }

    fn logit_bias(&self) -> std::collections::HashMap<u32, f32> {
        let bias = self.body["logit_bias"].as_object().into_iter().flatten();
        bias.map(|(id, bias)| {
            let bias = bias.as_f64().expect("a number");
            (id.parse().expect("an id"), as_f32(bias))
        })
        .collect()
    }
}

fn content_text(content: &Value) -> String {
    if let Some(text) = content.as_str() {
        return text.to_owned();
    }
    let parts = content.as_array().expect("parts").iter();
    let texts: Vec<_> = parts
        .map(|part| part["text"].as_str().expect("a text"))
        .collect();
    texts.join("\n")
}

fn token_ids(list: &Value) -> Vec<u32> {
    let ids = list.as_array().into_iter().flatten();
    ids.map(|id| u32::try_from(id.as_u64().expect("an id")).expect("an id"))
        .collect()
}

#[expect(
    clippy::as_conversions,
    reason = "std has no other conversion that rounds a float"
)]
fn as_f32(number: f64) -> f32 {
    number as f32
}
