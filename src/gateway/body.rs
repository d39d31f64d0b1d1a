//! The body of `/v1/completions` as the engine's messages, field by field.

use serde_json::{Value, json};

use super::fields::Fields;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::{
    MAX_CHOICES, MAX_MODEL_NAME_BYTES, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_USER_BYTES,
};

/// A request for completions.
#[derive(Debug)]
pub(super) struct CompletionBody {
    /// One message for each prompt.
    pub(super) messages: Vec<v1::CompletionRequest>,
    /// How many choices each prompt has.
    pub(super) choices_per_prompt: u32,
    /// Whether the answer is a stream, and what it holds besides the text.
    pub(super) stream: Option<StreamOptions>,
}

/// What a stream holds besides the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// A last object with the usage.
    pub include_usage: bool,
    /// Each token's deadline and emission.
    pub include_stamps: bool,
    /// What the request took, in the last object.
    pub include_timings: bool,
    /// Each token's id.
    pub return_token_ids: bool,
}

impl CompletionBody {
    /// Reads a body.
    ///
    /// # Errors
    /// Names the first field that is at fault.
    pub(super) fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut fields = Fields::parse(body)?;
        let prompts = prompts(&mut fields)?;
        let stream = stream(&mut fields)?;
        let n = fields.integer("n")?;
        let message = v1::CompletionRequest {
            model: fields.string("model")?.unwrap_or_default(),
            max_tokens: fields.integer("max_tokens")?,
            n,
            temperature: fields.number("temperature")?,
            top_p: fields.number("top_p")?,
            top_k: fields.integer("top_k")?,
            min_p: fields.number("min_p")?,
            presence_penalty: fields.number("presence_penalty")?,
            frequency_penalty: fields.number("frequency_penalty")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            seed: fields.integer("seed")?,
            stop: stop(&mut fields)?,
            priority: fields.integer("priority")?,
            include_stamps: stream.is_some_and(|stream| stream.include_stamps),
            user: fields.string("user")?.unwrap_or_default(),
            ..v1::CompletionRequest::default()
        };
        refuse_unsupported(&mut fields)?;
        fields.finish()?;
        let choices_per_prompt = n.unwrap_or(1);
        check_choices(prompts.len(), choices_per_prompt)?;
        check_sizes(&message)?;
        let with_prompt = |input| v1::CompletionRequest {
            input: Some(input),
            ..message.clone()
        };
        Ok(Self {
            messages: prompts.into_iter().map(with_prompt).collect(),
            choices_per_prompt,
            stream,
        })
    }
}

/// Fields that this server cannot honour yet, each with what asks for nothing: OpenAI's default.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), Error> {
    fields.refuse("best_of", &[json!(1)])?;
    fields.refuse("echo", &[json!(false)])?;
    fields.refuse("ignore_eos", &[json!(false)])?;
    fields.refuse("include_stop_str_in_output", &[json!(false)])?;
    fields.refuse("logit_bias", &[json!({})])?;
    fields.refuse("logprobs", &[])?;
    fields.refuse("min_tokens", &[json!(0)])?;
    fields.refuse("stop_token_ids", &[json!([])])?;
    fields.refuse("suffix", &[])
}

fn stream(fields: &mut Fields) -> Result<Option<StreamOptions>, Error> {
    let is_stream = fields.bool("stream")?.unwrap_or(false);
    let mut options = fields.object("stream_options", "stream_options.")?;
    if !is_stream && !options.is_empty() {
        let message = "stream_options is only allowed with stream: true.";
        return Err(Error::invalid_value("stream_options", message));
    }
    let known = StreamOptions {
        include_usage: options.bool("include_usage")?.unwrap_or(false),
        include_stamps: options.bool("include_stamps")?.unwrap_or(false),
        include_timings: options.bool("include_timings")?.unwrap_or(false),
        return_token_ids: options.bool("return_token_ids")?.unwrap_or(false),
    };
    options.refuse("include_obfuscation", &[json!(false)])?;
    options.refuse("continuous_usage_stats", &[json!(false)])?;
    options.finish()?;
    Ok(is_stream.then_some(known))
}

/// What `stop` must be.
const WANTED_STOP: &str = "a string or a list of strings";

fn stop(fields: &mut Fields) -> Result<Vec<String>, Error> {
    match fields.take("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop]),
        Some(Value::Array(stops)) => stops
            .into_iter()
            .map(|stop| match stop {
                Value::String(text) => Ok(text),
                Value::Null
                | Value::Bool(_)
                | Value::Number(_)
                | Value::Array(_)
                | Value::Object(_) => Err(fields.wrong_type("stop", WANTED_STOP, &stop)),
            })
            .collect(),
        Some(other) => Err(fields.wrong_type("stop", WANTED_STOP, &other)),
    }
}

/// The prompts, in any of OpenAI's four forms.
fn prompts(fields: &mut Fields) -> Result<Vec<Input>, Error> {
    match fields.take("prompt") {
        None => {
            let message = "prompt is required.";
            Err(Error::new(ErrorKind::MissingParameter, message).with_param("prompt"))
        }
        Some(Value::String(text)) => Ok(vec![Input::Prompt(text)]),
        Some(Value::Array(items)) => match items.first() {
            None => Err(Error::invalid_value(
                "prompt",
                "prompt must not be an empty list.",
            )),
            Some(Value::Number(_)) => Ok(vec![token_ids(items)?]),
            Some(first) => {
                let kind = std::mem::discriminant(first);
                let odd = items
                    .iter()
                    .find(|item| std::mem::discriminant(*item) != kind);
                match odd {
                    None => items.into_iter().map(one_of_many).collect(),
                    Some(odd) => Err(wrong_prompt(odd)),
                }
            }
        },
        Some(other) => Err(wrong_prompt(&other)),
    }
}

fn one_of_many(item: Value) -> Result<Input, Error> {
    match item {
        Value::String(text) => Ok(Input::Prompt(text)),
        Value::Array(ids) => token_ids(ids),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            Err(wrong_prompt(&item))
        }
    }
}

fn token_ids(items: Vec<Value>) -> Result<Input, Error> {
    if items.is_empty() {
        return Err(Error::invalid_value(
            "prompt",
            "prompt must not hold an empty list.",
        ));
    }
    let id = |item: Value| match item.as_u64().map(u32::try_from) {
        Some(Ok(id)) => Ok(id),
        Some(Err(_)) => Err(Error::invalid_value(
            "prompt",
            "A token id is out of range.",
        )),
        None => Err(wrong_prompt(&item)),
    };
    let ids: Result<Vec<_>, _> = items.into_iter().map(id).collect();
    Ok(Input::PromptTokenIds(v1::TokenIds { ids: ids? }))
}

fn wrong_prompt(value: &Value) -> Error {
    let message = format!(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists; \
         it holds {}.",
        super::fields::kind_of(value)
    );
    Error::new(ErrorKind::InvalidType, message).with_param("prompt")
}

/// What each prompt's message has a copy of must be small. Whether it is right, the engine says.
fn check_sizes(message: &v1::CompletionRequest) -> Result<(), Error> {
    let stop: usize = message.stop.iter().map(String::len).sum();
    for (param, size, limit) in [
        ("model", message.model.len(), MAX_MODEL_NAME_BYTES),
        ("stop", stop, MAX_STOP_STRINGS * MAX_STOP_BYTES),
        ("user", message.user.len(), MAX_USER_BYTES),
    ] {
        if size > limit {
            let text = format!("{param} must be at most {limit} bytes.");
            return Err(Error::invalid_value(param, text));
        }
    }
    Ok(())
}

fn check_choices(prompts: usize, choices_per_prompt: u32) -> Result<(), Error> {
    // An n of 0 is for the engine to refuse; it must not let any number of prompts through.
    let choices = u32::try_from(prompts)
        .ok()
        .and_then(|n| n.checked_mul(choices_per_prompt.max(1)));
    if choices.is_some_and(|choices| choices <= MAX_CHOICES) {
        return Ok(());
    }
    let message = format!("The number of prompts times n must be at most {MAX_CHOICES}.");
    Err(Error::invalid_value("n", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &Value) -> Result<CompletionBody, Error> {
        CompletionBody::parse(body.to_string().as_bytes())
    }

    fn refusal(body: &Value) -> (&'static str, Option<String>) {
        let error = parse(body).expect_err(&body.to_string());
        (error.kind.row().code, error.param)
    }

    #[test]
    fn a_prompt_has_four_forms() {
        let inputs = |prompt: Value| -> Vec<Input> {
            let body = parse(&json!({"prompt": prompt})).unwrap();
            body.messages
                .into_iter()
                .filter_map(|message| message.input)
                .collect()
        };
        let text = |text: &str| Input::Prompt(text.to_owned());
        let ids = |ids: &[u32]| Input::PromptTokenIds(v1::TokenIds { ids: ids.to_vec() });
        assert_eq!(inputs(json!("a")), [text("a")]);
        assert_eq!(inputs(json!(["a", "b"])), [text("a"), text("b")]);
        assert_eq!(inputs(json!([1, 2])), [ids(&[1, 2])]);
        assert_eq!(inputs(json!([[1], [2, 3]])), [ids(&[1]), ids(&[2, 3])]);
    }

    #[test]
    fn null_and_openais_defaults_are_never_refused() {
        let body = json!({
            "prompt": "a", "best_of": 1, "echo": false, "logit_bias": null, "logprobs": null,
            "suffix": null, "max_tokens": null, "n": null, "stop": null, "stream": null,
            "stream_options": {"include_usage": null}, "seed": null, "user": null, "model": null, "unknown": null,
            "min_tokens": 0, "ignore_eos": false, "stop_token_ids": [],
        });
        let body = parse(&body).unwrap();
        assert_eq!(body.stream, None);
        assert_eq!(body.messages[0].max_tokens, None);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_with_its_field() {
        for (name, value) in [
            ("best_of", json!(2)),
            ("echo", json!(true)),
            ("logit_bias", json!({"1": 5})),
            ("logprobs", json!(0)),
            ("suffix", json!("")),
            ("min_tokens", json!(1)),
            ("ignore_eos", json!(true)),
            ("stop_token_ids", json!([1])),
            ("include_stop_str_in_output", json!(true)),
        ] {
            let expected = ("unsupported_parameter", Some(name.to_owned()));
            assert_eq!(refusal(&json!({"prompt": "a", name: value})), expected);
        }
        let body =
            json!({"prompt": "a", "stream": true, "stream_options": {"include_obfuscation": true}});
        let expected = Some("stream_options.include_obfuscation".to_owned());
        assert_eq!(refusal(&body), ("unsupported_parameter", expected));
    }

    #[test]
    fn a_wrong_type_is_refused_with_its_field() {
        for (name, value) in [
            ("prompt", json!(1)),
            ("prompt", json!(["a", 1])),
            ("prompt", json!([1, "a"])),
            ("prompt", json!(["a", [1]])),
            ("prompt", json!([1.5])),
            ("prompt", json!([-1])),
            ("max_tokens", json!("16")),
            ("max_tokens", json!(1.5)),
            ("temperature", json!("hot")),
            ("stream", json!(1)),
            ("stop", json!([1])),
            ("stop", json!(1)),
            ("stream_options", json!(true)),
            ("user", json!(7)),
        ] {
            let mut body = json!({"prompt": "a"});
            body[name] = value;
            assert_eq!(
                refusal(&body),
                ("invalid_type", Some(name.to_owned())),
                "{body}"
            );
        }
    }

    #[test]
    fn what_is_out_of_range_missing_or_unknown_is_refused_with_its_field() {
        let invalid = |name: &str| ("invalid_value", Some(name.to_owned()));
        assert_eq!(refusal(&json!({"prompt": []})), invalid("prompt"));
        assert_eq!(refusal(&json!({"prompt": [[]]})), invalid("prompt"));
        assert_eq!(
            refusal(&json!({"prompt": [4_294_967_296_u64]})),
            invalid("prompt")
        );
        assert_eq!(
            refusal(&json!({"prompt": "a", "max_tokens": -1})),
            invalid("max_tokens")
        );
        let body = json!({"prompt": "a", "max_tokens": 1e23});
        assert_eq!(refusal(&body), invalid("max_tokens"));
        let body = json!({"prompt": "a", "temperature": 1e39});
        assert_eq!(refusal(&body), invalid("temperature"));
        assert_eq!(
            refusal(&json!({"prompt": ["a", "b"], "n": 65})),
            invalid("n")
        );
        let many = vec!["a"; 129];
        assert_eq!(refusal(&json!({"prompt": many, "n": 0})), invalid("n"));
        let long = "m".repeat(100_000);
        for name in ["model", "stop", "user"] {
            assert_eq!(refusal(&json!({"prompt": "a", name: long})), invalid(name));
        }
        let body = json!({"prompt": "a", "stream_options": {"include_usage": true}});
        assert_eq!(refusal(&body), invalid("stream_options"));
        let missing = ("missing_parameter", Some("prompt".to_owned()));
        assert_eq!(refusal(&json!({"prompt": null})), missing);
        let unknown = ("unknown_parameter", Some("temprature".to_owned()));
        assert_eq!(refusal(&json!({"prompt": "a", "temprature": 1})), unknown);
    }

    #[test]
    fn a_number_is_not_rounded_onto_the_bound_of_a_range() {
        let taken = |temperature: f64| {
            let body = json!({"prompt": "a", "temperature": temperature}).to_string();
            let body = CompletionBody::parse(body.as_bytes()).unwrap();
            body.messages[0].temperature()
        };
        assert_eq!((taken(2.0), taken(0.0), taken(0.7)), (2.0, 0.0, 0.7));
        assert!(taken(2.000_000_1) > 2.0 && taken(-1e-50) < 0.0);
    }

    #[test]
    fn what_is_no_json_is_refused() {
        let deep = "[".repeat(100_000);
        for body in ["", "{", "{\"prompt\": NaN}", "\u{feff}{}", &deep] {
            let error = CompletionBody::parse(body.as_bytes()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidJson);
        }
        let error = CompletionBody::parse(b"{\"prompt\": \"\xff\"}").unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidJson);
        assert_eq!(refusal(&json!([])), ("invalid_type", None));
    }
}
