//! Fuzz targets of model files and of the chat templates in them.

use super::chat::ChatTemplate;
use super::gguf::{Header, check_model};
use crate::request::ChatMessage;
use crate::runner::ModelError;

/// Largest text that a template may render, in bytes: twice what its fuel pays for.
const MAX_RENDERED_BYTES: usize = 128 * 1024 * 1024;

/// A chat template, and the roles and contents of messages, with a zero byte between all of them. A template that
/// compiles renders the messages or rejects them, with bounded work.
///
/// Templates that may store a namespace in itself are left out: minijinja has no limit for the depth of a value, and
/// overflows the stack when it writes such a namespace.
pub(crate) fn chat_template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut parts = text.split('\0').map(str::to_owned);
    let source = parts.next().unwrap_or_default();
    if may_be_cyclic(&source) {
        return;
    }
    let Ok(template) = ChatTemplate::new(&source, "<s>".to_owned(), "</s>".to_owned()) else {
        return;
    };
    let parts: Vec<_> = parts.collect();
    let messages = parts.chunks(2).map(|part| ChatMessage {
        role: part[0].clone(),
        content: part.get(1).cloned().unwrap_or_default(),
        name: None,
    });
    match template.render(&messages.collect::<Vec<_>>()) {
        Ok(rendered) => assert!(rendered.len() <= MAX_RENDERED_BYTES),
        Err(ModelError::Invalid(message)) => assert!(!message.is_empty()),
        Err(error) => panic!("{error}"),
    }
}

/// Returns true if a namespace that the template assigns to is also used as a whole: `ns` in `ns.a = ns`. Such a
/// namespace may contain itself.
fn may_be_cyclic(source: &str) -> bool {
    let is_name = |character: char| character.is_alphanumeric() || character == '_';
    let words = || {
        let starts = source.match_indices(is_name).map(|(at, _)| at);
        let starts = starts.filter(|at| !source[..*at].ends_with(is_name));
        starts.map(|at| source[at..].split_at(source[at..].find(|it| !is_name(it)).unwrap_or(0)))
    };
    let is_assigned = |name: &str| {
        words().any(|(word, rest)| {
            let target = rest.trim_start().strip_prefix(name);
            word == "set" && target.is_some_and(|rest| rest.trim_start().starts_with('.'))
        })
    };
    words().any(|(name, rest)| {
        let rest = rest.trim_start();
        let is_created = rest
            .strip_prefix('=')
            .is_some_and(|value| value.trim_start().starts_with("namespace("));
        !rest.starts_with('.') && !is_created && is_assigned(name)
    })
}

/// The length of a GGUF file as a little-endian number of four bytes, and the start of the file. Its header is checked
/// before llama.cpp reads it.
pub(crate) fn model_file(data: &[u8]) {
    let Some((length, start)) = data.split_first_chunk() else {
        return;
    };
    let length = u32::from_le_bytes(*length).into();
    let checked = Header::parse(start, length).and_then(|header| check_model(&header));
    if let Err(problem) = checked {
        assert!(!problem.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_templates_that_may_store_a_namespace_in_itself_are_left_out() {
        let create = "{% set ns = namespace(a=1) %}";
        for (assignment, is_cyclic) in [
            ("{% set ns.a = ns.a + 1 %}{{ ns.a }}", false),
            ("{% set ns.a = ns %}", true),
            ("{% set x = [ns] %}{% set ns.a = x %}", true),
            ("{{ ns }}", false),
        ] {
            let source = format!("{create}{assignment}");
            assert_eq!(may_be_cyclic(&source), is_cyclic, "{source}");
        }
    }
}
