//! The tag `{% generation %}`, which is Hugging Face's own addition to Jinja: it marks the assistant's
//! words for training, and renders its body as it is.
//!
//! minijinja takes no tags of others. `{% with %}` renders its body in the same way, in a scope of its own as
//! well, so the tag's name is replaced before the template is compiled. Only the name changes: no line is added
//! or removed, and errors name the lines of the model's own template.

/// The template with `{% generation %}` written as `{% with %}`. Text, strings, comments and raw blocks that
/// contain the word stay as they are.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut written = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((text, opening, after)) = split_at_opening(rest) {
        written.push_str(text);
        written.push_str(opening);
        rest = match opening {
            "{#" => copy_through(&mut written, after, "#}"),
            "{{" => copy_until(&mut written, after, closing(after, "}}")),
            _ => copy_tag(&mut written, after),
        };
    }
    written.push_str(rest);
    written
}

/// The text before the first opening delimiter, the delimiter, and what follows it.
fn split_at_opening(source: &str) -> Option<(&str, &str, &str)> {
    let at = source.match_indices('{').find_map(|(at, _)| {
        let is_opening = matches!(source.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
        is_opening.then_some(at)
    })?;
    let (text, rest) = source.split_at(at);
    let (opening, after) = rest.split_at(2);
    Some((text, opening, after))
}

/// Copies one block tag whose opening delimiter has been copied, and the raw text behind `{% raw %}`.
fn copy_tag<'a>(written: &mut String, tag: &'a str) -> &'a str {
    let end = closing(tag, "%}");
    let Some(inside) = tag.get(..end).and_then(|tag| tag.strip_suffix("%}")) else {
        return copy_until(written, tag, end);
    };
    match inside.trim_matches(|it: char| it.is_whitespace() || it == '-' || it == '+') {
        "generation" => written.push_str(&tag[..end].replace("generation", "with")),
        "endgeneration" => written.push_str(&tag[..end].replace("endgeneration", "endwith")),
        "raw" => {
            let raw = copy_until(written, tag, end);
            return copy_until(written, raw, end_of_raw(raw));
        }
        _ => return copy_until(written, tag, end),
    }
    &tag[end..]
}

/// Where the tag ends that ends a raw block.
fn end_of_raw(raw: &str) -> usize {
    let ends = raw.match_indices("{%").find_map(|(at, _)| {
        let tag = &raw[at + 2..];
        let inside = tag.trim_start_matches(['-', '+']).trim_start();
        let after = inside.strip_prefix("endraw")?.trim_start();
        let after = after.trim_start_matches(['-', '+']).strip_prefix("%}")?;
        Some(raw.len() - after.len())
    });
    ends.unwrap_or(raw.len())
}

/// Where an expression or a tag ends, its closing delimiter included: the first one outside strings and
/// brackets, as in Jinja. The end of the template, where it is not closed.
fn closing(code: &str, delimiter: &str) -> usize {
    let mut depth = 0_usize;
    let mut quote = None;
    let mut is_escaped = false;
    for (at, it) in code.char_indices() {
        if let Some(open) = quote {
            if is_escaped {
                is_escaped = false;
            } else if it == '\\' {
                is_escaped = true;
            } else if it == open {
                quote = None;
            }
            continue;
        }
        if depth == 0 && code[at..].starts_with(delimiter) {
            return at + delimiter.len();
        }
        match it {
            '"' | '\'' => quote = Some(it),
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    code.len()
}

fn copy_through<'a>(written: &mut String, source: &'a str, delimiter: &str) -> &'a str {
    let end = source.find(delimiter).map(|at| at + delimiter.len());
    copy_until(written, source, end.unwrap_or(source.len()))
}

fn copy_until<'a>(written: &mut String, source: &'a str, end: usize) -> &'a str {
    let (copied, rest) = source.split_at(end);
    written.push_str(copied);
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn stays(source: &str) {
        assert_eq!(without_generation_tags(source), source);
    }

    #[test]
    fn the_tags_are_replaced_with_their_whitespace_control() {
        let source =
            "a{% generation %}b{%- endgeneration -%}c{%+generation-%}\n{% endgeneration %}";
        let written = "a{% with %}b{%- endwith -%}c{%+with-%}\n{% endwith %}";
        assert_eq!(without_generation_tags(source), written);
    }

    #[test]
    fn a_tag_keeps_its_lines() {
        let written = without_generation_tags("{%-\n generation\n-%}\nx");
        assert_eq!(written, "{%-\n with\n-%}\nx");
    }

    #[test]
    fn generation_outside_a_tag_is_left_unchanged() {
        stays("generation {{ '{% generation %}' }} {{ {'a': {'b': generation}} }}");
        stays("{# {% generation %} #}{% set generation = \"%} {% generation %}\" %}");
        stays("{%- raw -%}{{ {% generation %} '{%- endraw -%}");
        stays("{% if generation %}{% endif %}");
    }

    #[test]
    fn tags_after_other_code_are_replaced() {
        let source = "{{ '}}' ~ '\\'' }}{# ' #}{% raw %}{{ \" {% endraw %}{% generation %}";
        let written = "{{ '}}' ~ '\\'' }}{# ' #}{% raw %}{{ \" {% endraw %}{% with %}";
        assert_eq!(without_generation_tags(source), written);
    }

    #[test]
    fn unclosed_templates_are_left_unchanged() {
        stays("{% generation");
        stays("{{ 'a");
        stays("{# a");
        stays("{% raw %} {% generation %}");
        stays("{");
    }
}
