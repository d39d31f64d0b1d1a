//! The chat template that a model file carries, rendered as Hugging Face's `apply_chat_template`
//! does. It knows messages and text; it must not know tokens or the device.
//!
//! llama.cpp's own template engine is never used: it knows a fixed list of templates, and aborts the
//! process on some inputs.

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

const NAME: &str = "chat";

/// The most work of one rendering, in minijinja's fuel: a unit is an instruction, or 64 bytes that the template
/// makes. So a template that loops without an end stops within a fraction of a second, with at most 64 MiB made.
const MAX_FUEL: u64 = 1_000_000;

/// Work for which the caller's thread has stack enough: minijinja recurses into nested lists, about 512 bytes for
/// each level, and a template can nest one level for less than two units of fuel.
const INLINE_FUEL: u64 = 5_000;

/// Stack for the lists that [`MAX_FUEL`] can nest. What is not used is never mapped.
const STACK_BYTES: usize = 320 * 1024 * 1024;

/// A compiled template with the special tokens that it may name.
pub(super) struct ChatTemplate {
    /// Renders on the caller's thread, as far as [`INLINE_FUEL`] goes.
    inline: Environment<'static>,
    /// Renders on a thread of its own what takes more.
    apart: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// What is wrong with it, in words.
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
            .add_template_owned(NAME, generation_tags::without_generation_tags(source))
            .map_err(|error| error.to_string())?;
        let mut inline = environment.clone();
        inline.set_fuel(Some(INLINE_FUEL));
        Ok(Self {
            inline,
            apart: environment,
            bos_token,
            eos_token,
        })
    }

    /// The prompt that asks the model for the next turn.
    ///
    /// # Errors
    /// When the template refuses the messages, or takes too much work.
    pub(super) fn render(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        let messages: Value = messages
            .iter()
            .map(|message| {
                let name = message.name.iter();
                let said = [("role", &message.role), ("content", &message.content)];
                let fields = said.into_iter().chain(name.map(|name| ("name", name)));
                Value::from_pairs(fields.map(|(key, value)| (key, Value::from(value))))
            })
            .collect();
        let context = Value::from_pairs([
            ("messages", messages),
            // Hugging Face defines these two also where a request has none.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("bos_token", Value::from(&self.bos_token)),
            ("eos_token", Value::from(&self.eos_token)),
            ("add_generation_prompt", Value::from(true)),
        ]);
        match render(&self.inline, &context) {
            Err(error) if error.kind() == ErrorKind::OutOfFuel => self.render_apart(&context),
            rendered => rendered.map_err(|error| ModelError::Invalid(reason(&error))),
        }
    }

    fn render_apart(&self, context: &Value) -> Result<String, ModelError> {
        let failed = || ModelError::Failed("a chat template could not be rendered".to_owned());
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("chat-template".to_owned())
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, || {
                    let rendered = render(&self.apart, context);
                    rendered.map_err(|error| ModelError::Invalid(reason(&error)))
                });
            let joined = thread.map_err(|_| failed())?.join();
            joined.unwrap_or_else(|_| Err(failed()))
        })
    }
}

fn render(environment: &Environment<'_>, context: &Value) -> Result<String, Error> {
    environment.get_template(NAME)?.render(context)
}

/// Jinja as Hugging Face sets it up.
fn environment(clock: Clock) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    // Templates are written for these two settings of Jinja, which are not its defaults.
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(MAX_FUEL));
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| {
        clock::strftime(&clock(), format)
    });
    environment.add_function("cycler", cycler);
    environment.add_function("joiner", joiner);
    environment.add_filter("tojson", json::tojson);
    // These two take more work than their fuel pays for, and no template needs them.
    environment.remove_filter("pprint");
    environment.remove_global("debug");
    environment.add_test("callable", is_callable);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    Ok(environment)
}

/// Python's methods. The width and the precision of a `format` are bounded, because its fuel does not pay for them: a
/// template could ask for more memory than there is, and end the process.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == "format" && value.as_str().is_some_and(has_long_number) {
        let message = "`format` takes widths and precisions up to 9999";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    unknown_method_callback(state, value, name, args)
}

/// Whether a text has a number of more than four digits in it.
fn has_long_number(text: &str) -> bool {
    text.split(|character: char| !character.is_ascii_digit())
        .any(|number| number.len() > 4)
}

/// Why a template did not render: its own words where it refuses the messages.
fn reason(error: &Error) -> String {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(Refusal(words)) = cause.downcast_ref() {
            return format!("The model's chat template refused the messages: {words}");
        }
        source = cause.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return "The model's chat template takes too long for these messages; send fewer or shorter ones."
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

/// A template's own words with which it refuses messages.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

/// What templates call to refuse messages.
fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Refusal(message)))
}

/// As Jinja has it: also what is undefined can be iterated, and `none` cannot.
fn is_iterable(value: &Value) -> bool {
    value.kind() == ValueKind::Iterable || is_sequence(value)
}

/// As Jinja has it: whatever has a length and items, so also a text, a map, and what is undefined.
fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map
    )
}

/// Macros and functions are the only values that minijinja can only call.
fn is_callable(value: &Value) -> bool {
    value.kind() == ValueKind::Plain
}

#[cfg(test)]
mod tests;
