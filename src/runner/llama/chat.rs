//! Renders a model's chat template like Hugging Face's `apply_chat_template`. This module knows messages and text. It
//! must not know tokens or the device.
//!
//! llama.cpp has its own template engine, but it supports only a fixed list of templates and aborts the process on
//! some inputs.

use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::globals::{cycler, joiner};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::request::ChatMessage;
use crate::runner::ModelError;
use clock::Clock;

mod clock;
mod generation_tags;
mod json;

const TEMPLATE_NAME: &str = "chat";

/// Maximum amount of work per rendering, in minijinja's unit "fuel": one per instruction, and one per 64 bytes that
/// the template creates. An endless template stops within a fraction of a second, after at most 64 MiB.
const MAX_FUEL: u64 = 1_000_000;

/// Maximum amount of work on the caller's thread. It is limited by the thread's stack: minijinja recurses into nested
/// lists and needs about 512 bytes of stack per level, and a template can add a level with less than two units of
/// fuel.
const INLINE_FUEL: u64 = 5_000;

/// Stack size of the rendering thread, enough for lists nested as deeply as [`MAX_FUEL`] allows. The system does not
/// allocate unused stack.
const STACK_BYTES: usize = 320 * 1024 * 1024;

/// A compiled chat template, and the special tokens that it may use.
pub(super) struct ChatTemplate {
    /// Template environment limited to [`INLINE_FUEL`], for the caller's thread.
    inline: Environment<'static>,
    /// Template environment limited to [`MAX_FUEL`], for a separate thread with a large stack.
    threaded: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// The place at which a rendered prompt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PromptEnd {
    /// After the text that starts the assistant's next message.
    GenerationPrompt,
    /// After the last message.
    Messages,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// The template is invalid; the text says why.
    pub(super) fn new(source: &str, bos_token: String, eos_token: String) -> Result<Self, String> {
        Self::with_clock(source, bos_token, eos_token, Zoned::now)
    }

    fn with_clock(
        source: &str,
        bos_token: String,
        eos_token: String,
        clock: Clock,
    ) -> Result<Self, String> {
        let mut environment = environment(clock).map_err(|error| error.to_string())?;
        environment
            .add_template_owned(TEMPLATE_NAME, generation_tags::replace(source))
            .map_err(|error| error.to_string())?;
        let mut inline = environment.clone();
        inline.set_fuel(Some(INLINE_FUEL));
        Ok(Self {
            inline,
            threaded: environment,
            bos_token,
            eos_token,
        })
    }

    /// Renders messages into a prompt. The prompt ends with the start of the assistant's message.
    ///
    /// # Errors
    /// The template rejects the messages, fails, or exceeds the limit of work.
    pub(super) fn render(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        self.render_up_to(messages, PromptEnd::GenerationPrompt)
    }

    /// Returns the text that the template puts before the assistant's message. `None` if the template rejects a chat of
    /// one message, or if the generation prompt changes more than the end of the rendered chat.
    pub(super) fn generation_prompt(&self) -> Option<String> {
        let messages = [ChatMessage {
            role: "user".to_owned(),
            content: "a".to_owned(),
            name: None,
        }];
        let prompt = self.render(&messages).ok()?;
        let without = self.render_up_to(&messages, PromptEnd::Messages).ok()?;
        prompt.strip_prefix(&without).map(str::to_owned)
    }

    fn render_up_to(&self, messages: &[ChatMessage], end: PromptEnd) -> Result<String, ModelError> {
        let messages: Value = messages
            .iter()
            .map(|message| {
                let name = message.name.iter().map(|name| ("name", name));
                let fields = [("role", &message.role), ("content", &message.content)];
                let fields = fields.into_iter().chain(name);
                Value::from_pairs(fields.map(|(key, value)| (key, Value::from(value))))
            })
            .collect();
        let context = Value::from_pairs([
            ("messages", messages),
            // Hugging Face defines `tools` and `documents` even if the request has none.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("bos_token", Value::from(&self.bos_token)),
            ("eos_token", Value::from(&self.eos_token)),
            (
                "add_generation_prompt",
                Value::from(end == PromptEnd::GenerationPrompt),
            ),
        ]);
        match render(&self.inline, &context) {
            Err(error) if error.kind() == ErrorKind::OutOfFuel => self.render_on_thread(&context),
            rendered => rendered.map_err(|error| ModelError::Invalid(error_message(&error))),
        }
    }

    fn render_on_thread(&self, context: &Value) -> Result<String, ModelError> {
        let failed = || ModelError::Failed("The chat template could not be rendered.".to_owned());
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("chat-template".to_owned())
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, || {
                    let rendered = render(&self.threaded, context);
                    rendered.map_err(|error| ModelError::Invalid(error_message(&error)))
                });
            let joined = thread.map_err(|_| failed())?.join();
            joined.unwrap_or_else(|_| Err(failed()))
        })
    }
}

fn render(environment: &Environment<'_>, context: &Value) -> Result<String, Error> {
    environment.get_template(TEMPLATE_NAME)?.render(context)
}

/// Creates a Jinja environment with the settings, functions, filters and tests that Hugging Face uses.
fn environment(clock: Clock) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    // Chat templates expect these two settings, which are not Jinja's defaults.
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(MAX_FUEL));
    environment.set_unknown_method_callback(python_method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| {
        clock::strftime(&clock(), format)
    });
    environment.add_function("cycler", cycler);
    environment.add_function("joiner", joiner);
    environment.add_filter("tojson", json::tojson);
    // These filters are removed because they do more work than fuel measures. No template needs them.
    environment.remove_filter("pprint");
    environment.remove_global("debug");
    environment.add_test("callable", is_jinja_callable);
    environment.add_test("iterable", is_jinja_iterable);
    environment.add_test("sequence", is_jinja_sequence);
    Ok(environment)
}

/// Calls a method of a Python type. The width and precision of `format` are limited, because fuel does not measure
/// them: a template could allocate all memory and crash the process.
fn python_method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if name == "format" && value.as_str().is_some_and(has_long_number) {
        let message = "`format` supports widths and precisions up to 9999";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    unknown_method_callback(state, value, name, args)
}

/// Returns true if a text contains a number of more than four digits. As a width, it would make `format` allocate
/// megabytes.
fn has_long_number(text: &str) -> bool {
    text.split(|character: char| !character.is_ascii_digit())
        .any(|number| number.len() > 4)
}

/// Returns the error message for a failed rendering. If the template called `raise_exception`, the message contains
/// the text of that call.
fn error_message(error: &Error) -> String {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(RaisedException(text)) = cause.downcast_ref() {
            return format!("The model's chat template rejected the messages: {text}");
        }
        source = cause.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return "The model's chat template takes too long to render these messages; send fewer or \
                shorter messages."
            .to_owned();
    }
    let line = error
        .line()
        .map_or_else(String::new, |line| format!(" (line {line})"));
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    format!("The model's chat template cannot render these messages: {detail}{line}")
}

/// Error that carries the text a template passed to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct RaisedException(String);

/// Template function `raise_exception`, with which a template rejects messages.
fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(RaisedException(message)))
}

/// Template test `iterable`, by Jinja's rule: an undefined value is iterable, and `none` is not.
fn is_jinja_iterable(value: &Value) -> bool {
    value.kind() == ValueKind::Iterable || is_jinja_sequence(value)
}

/// Template test `sequence`, by Jinja's rule: a sequence has a length and items, so strings, maps and undefined
/// values count too.
fn is_jinja_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map
    )
}

/// Template test `callable`. minijinja reports only macros and functions as plain values.
fn is_jinja_callable(value: &Value) -> bool {
    value.kind() == ValueKind::Plain
}

#[cfg(test)]
mod tests;
