//! The chat template that a model file carries, rendered as Hugging Face's `apply_chat_template`
//! does. It knows messages and text; it must not know tokens or the device.
//!
//! llama.cpp's own template engine is never used: it knows a fixed list of templates, and aborts the
//! process on some inputs.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::request::ChatMessage;
use crate::runner::ModelError;

const NAME: &str = "chat";

/// A compiled template with the special tokens that it may name.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(super) fn new(
        source: String,
        bos_token: String,
        eos_token: String,
    ) -> Result<Self, String> {
        let mut environment = Environment::new();
        // Templates are written for these two settings of Jinja, which are not its defaults.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| error.to_string())?;
        Ok(Self {
            environment,
            bos_token,
            eos_token,
        })
    }

    /// The prompt that asks the model for the next turn.
    ///
    /// # Errors
    /// When the template refuses the messages.
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
            ("bos_token", Value::from(&self.bos_token)),
            ("eos_token", Value::from(&self.eos_token)),
            ("add_generation_prompt", Value::from(true)),
        ]);
        let rendered = self
            .environment
            .get_template(NAME)
            .and_then(|template| template.render(context));
        rendered.map_err(|error| {
            let reason = error
                .detail()
                .map_or_else(|| error.to_string(), str::to_owned);
            ModelError::Invalid(format!(
                "The model's chat template refused the messages: {reason}"
            ))
        })
    }
}

/// What templates call to refuse messages.
fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.to_owned(), "<s>".to_owned(), "</s>".to_owned()).unwrap()
    }

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage {
            role: role.to_owned(),
            content: content.to_owned(),
            name: None,
        }
    }

    #[test]
    fn chatml_ends_with_the_turn_that_is_asked_for() {
        let chatml = template(
            "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + \
             message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
             {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        );
        assert_eq!(
            chatml.render(&[message("user", "<b>Hi</b> \"é\" {{ 1 }}")]),
            Ok(
                "<|im_start|>user\n<b>Hi</b> \"é\" {{ 1 }}<|im_end|>\n<|im_start|>assistant\n"
                    .into()
            )
        );
    }

    #[test]
    fn templates_may_use_what_python_has() {
        let template = template(
            "{{ bos_token }}\n\
             {%- set ns = namespace(system='') %}\n\
             {%- if messages[0].role == 'system' %}\n\
                 {%- set ns.system = messages[0]['content'].strip().upper() %}\n\
                 {%- set messages = messages[1:] %}\n\
             {%- endif %}\n\
             {%- for message in messages %}\n\
                 {%- if message.content.startswith('skip') %}{% continue %}{% endif %}\n\
                 {%- if message.tool_calls is defined or tools %}{{ tools | tojson }}{% endif %}\n\
                 {{- ns.system ~ '|' ~ message.content.split(' ')[-1] | trim ~ eos_token }}\n\
             {%- endfor %}\n",
        );
        let messages = [
            message("system", " be brief "),
            message("user", "skip me"),
            message("user", "one two"),
        ];
        assert_eq!(template.render(&messages), Ok("<s>BE BRIEF|two</s>".into()));
    }

    #[test]
    fn a_template_may_tell_participants_apart_by_their_names() {
        let template = template(
            "{% for message in messages %}{{ message.name if message.name is defined else 'nobody' }}:\
             {{ message.content }};{% endfor %}",
        );
        let named = ChatMessage {
            name: Some("Ann".to_owned()),
            ..message("user", "Hi")
        };
        let rendered = template.render(&[named, message("user", "Ho")]);
        assert_eq!(rendered, Ok("Ann:Hi;nobody:Ho;".into()));
    }

    #[test]
    fn blocks_take_their_line_with_them() {
        let template = template("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n");
        assert_eq!(template.render(&[message("user", "")]), Ok("x\n".into()));
    }

    #[test]
    fn a_template_may_refuse_messages() {
        let template = template("{{ raise_exception('Roles must alternate') }}");
        let refused = template.render(&[message("user", "Hi")]);
        let reason = "The model's chat template refused the messages: Roles must alternate";
        assert_eq!(refused, Err(ModelError::Invalid(reason.to_owned())));
    }

    #[test]
    fn a_template_that_is_none_is_an_error() {
        let broken = ChatTemplate::new("{% for %}".to_owned(), String::new(), String::new());
        assert!(broken.is_err());
    }
}
