//! Support for Hugging Face's tag `{% generation %}`. The tag marks the assistant's text for training and renders its
//! body unchanged.
//!
//! minijinja has no custom tags. Its tag `{% with %}` also renders its body unchanged, in a scope of its own. The
//! name of the tag is therefore replaced before the template is compiled. Line numbers in errors stay correct,
//! because only the name changes.

/// Replaces the tag `{% generation %}` by `{% with %}`. The word stays unchanged in text, strings, comments and raw
/// blocks.
pub(super) fn replace(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((text, opening, after)) = split_at_opening(rest) {
        output.push_str(text);
        output.push_str(opening);
        rest = match opening {
            "{#" => copy_through(&mut output, after, "#}"),
            "{{" => copy_until(&mut output, after, closing(after, "}}")),
            _ => copy_tag(&mut output, after),
        };
    }
    output.push_str(rest);
    output
}

/// Splits a template at its first opening delimiter. Returns the text before it, the delimiter, and the rest.
fn split_at_opening(source: &str) -> Option<(&str, &str, &str)> {
    let at = source.match_indices('{').find_map(|(at, _)| {
        let is_opening = matches!(source.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
        is_opening.then_some(at)
    })?;
    let (text, rest) = source.split_at(at);
    let (opening, after) = rest.split_at(2);
    Some((text, opening, after))
}

/// Copies a tag to the output; its opening delimiter has already been copied. For `{% raw %}`, also copies the raw
/// text. Returns the rest of the template.
fn copy_tag<'a>(output: &mut String, tag: &'a str) -> &'a str {
    let end = closing(tag, "%}");
    let Some(inside) = tag.get(..end).and_then(|tag| tag.strip_suffix("%}")) else {
        return copy_until(output, tag, end);
    };
    match inside.trim_matches(|it: char| it.is_whitespace() || it == '-' || it == '+') {
        "generation" => output.push_str(&tag[..end].replace("generation", "with")),
        "endgeneration" => output.push_str(&tag[..end].replace("endgeneration", "endwith")),
        "raw" => {
            let raw = copy_until(output, tag, end);
            return copy_until(output, raw, end_of_raw(raw));
        }
        _ => return copy_until(output, tag, end),
    }
    &tag[end..]
}

/// Returns the index after the `{% endraw %}` tag, or the length of `raw` if there is no such tag.
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

/// Returns the index after the closing delimiter of an expression or a tag. As in Jinja, this is the first delimiter
/// outside strings and brackets. Returns the length of `code` if the expression is not closed.
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

fn copy_through<'a>(output: &mut String, source: &'a str, delimiter: &str) -> &'a str {
    let end = source.find(delimiter).map(|at| at + delimiter.len());
    copy_until(output, source, end.unwrap_or(source.len()))
}

fn copy_until<'a>(output: &mut String, source: &'a str, end: usize) -> &'a str {
    let (copied, rest) = source.split_at(end);
    output.push_str(copied);
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_unchanged(source: &str) {
        assert_eq!(replace(source), source);
    }

    #[test]
    fn tags_are_replaced_and_keep_their_whitespace_control() {
        let source =
            "a{% generation %}b{%- endgeneration -%}c{%+generation-%}\n{% endgeneration %}";
        let expected = "a{% with %}b{%- endwith -%}c{%+with-%}\n{% endwith %}";
        assert_eq!(replace(source), expected);
    }

    #[test]
    fn a_tag_keeps_its_line_breaks() {
        let output = replace("{%-\n generation\n-%}\nx");
        assert_eq!(output, "{%-\n with\n-%}\nx");
    }

    #[test]
    fn generation_outside_a_tag_is_left_unchanged() {
        assert_unchanged("generation {{ '{% generation %}' }} {{ {'a': {'b': generation}} }}");
        assert_unchanged("{# {% generation %} #}{% set generation = \"%} {% generation %}\" %}");
        assert_unchanged("{%- raw -%}{{ {% generation %} '{%- endraw -%}");
        assert_unchanged("{% if generation %}{% endif %}");
    }

    #[test]
    fn tags_after_other_code_are_replaced() {
        let source = "{{ '}}' ~ '\\'' }}{# ' #}{% raw %}{{ \" {% endraw %}{% generation %}";
        let expected = "{{ '}}' ~ '\\'' }}{# ' #}{% raw %}{{ \" {% endraw %}{% with %}";
        assert_eq!(replace(source), expected);
    }

    #[test]
    fn unclosed_templates_are_left_unchanged() {
        assert_unchanged("{% generation");
        assert_unchanged("{{ 'a");
        assert_unchanged("{# a");
        assert_unchanged("{% raw %} {% generation %}");
        assert_unchanged("{");
    }
}
