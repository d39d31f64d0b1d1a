//! Template filter `tojson`. It takes the arguments and gives the output of the filter in Hugging Face's
//! `transformers`, which is Python's `json.dumps(value, ensure_ascii=False)`. minijinja's own filter escapes HTML
//! characters; this one does not.

use std::io::{self, Write};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// Maximum length of the JSON of one value, in bytes. No prompt may be longer.
const MAX_JSON_BYTES: usize = 16 * 1024 * 1024;

/// Maximum nesting of lists and maps, so that serializing them does not overflow the stack.
const MAX_DEPTH: usize = 128;

/// Maximum length of the indentation and of a separator, in bytes.
const MAX_WIDTH: usize = 64;

/// `value | tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
///
/// # Errors
/// An argument is unknown or too large, or the value cannot be written as JSON.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja passes arguments by value"
)]
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    args: Kwargs,
) -> Result<Value, Error> {
    let named: Option<bool> = args.get("ensure_ascii")?;
    let indent: Option<Value> = args.get("indent")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    let sorts_keys: Option<bool> = args.get("sort_keys")?;
    args.assert_all_used()?;
    let indent = indent.map_or(Ok(None), |it| indentation(&it))?;
    let item = if indent.is_some() { "," } else { ", " };
    let separators = separators.unwrap_or_else(|| vec![item.to_owned(), ": ".to_owned()]);
    let Ok([item, key]) = <[String; 2]>::try_from(separators) else {
        return Err(invalid_argument(
            "`separators` must be a list of two strings",
        ));
    };
    if item.len().max(key.len()) > MAX_WIDTH {
        return Err(invalid_argument(&format!(
            "`separators` must be at most {MAX_WIDTH} bytes each"
        )));
    }
    let python = PythonFormatter {
        item,
        key,
        indent,
        ensures_ascii: named.or(ensure_ascii).unwrap_or(false),
        depth: 0,
        has_items: false,
    };
    let value = match sorts_keys {
        Some(true) => sort_keys(value, MAX_DEPTH)?,
        _ => value.clone(),
    };
    let mut output = LimitedBuffer(Vec::new());
    let mut serializer = Serializer::with_formatter(&mut output, python);
    value
        .serialize(&mut serializer)
        .map_err(|error| invalid_argument(&error.to_string()))?;
    let text = String::from_utf8(output.0).map_err(|error| invalid_argument(&error.to_string()))?;
    Ok(Value::from(text))
}

fn invalid_argument(reason: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {reason}"))
}

/// Converts the argument `indent`, a number of spaces or a string, to the indentation of one level. `None` means no
/// indentation.
fn indentation(indent: &Value) -> Result<Option<String>, Error> {
    if indent.is_none() {
        return Ok(None);
    }
    let text = match indent.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let width = usize::try_from(indent.clone())?;
            " ".repeat(width.min(MAX_WIDTH + 1))
        }
    };
    if text.len() > MAX_WIDTH {
        return Err(invalid_argument(&format!(
            "`indent` must be at most {MAX_WIDTH} bytes"
        )));
    }
    Ok(Some(text))
}

/// Copies a value with the keys of all its maps sorted.
fn sort_keys(value: &Value, depth: usize) -> Result<Value, Error> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(invalid_argument(&format!(
            "the value is nested deeper than {MAX_DEPTH} levels"
        )));
    };
    if value.kind() == ValueKind::Map {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        keys.sort();
        let pairs = keys.into_iter().map(|key| {
            let inner = value.get_item(&key)?;
            Ok((key, sort_keys(&inner, depth)?))
        });
        return Ok(Value::from_pairs(pairs.collect::<Result<Vec<_>, Error>>()?));
    }
    if value.kind() == ValueKind::Seq {
        let items = value.try_iter()?.map(|item| sort_keys(&item, depth));
        return Ok(Value::from(items.collect::<Result<Vec<_>, Error>>()?));
    }
    Ok(value.clone())
}

/// A buffer whose writes fail when they would exceed [`MAX_JSON_BYTES`].
struct LimitedBuffer(Vec<u8>);

impl Write for LimitedBuffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_JSON_BYTES {
            let reason = format!("the value is longer than {MAX_JSON_BYTES} bytes");
            return Err(io::Error::other(reason));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Formats JSON with the whitespace of Python's `json.dumps`.
struct PythonFormatter {
    item: String,
    key: String,
    /// Indentation of one level. `None` writes everything on one line.
    indent: Option<String>,
    ensures_ascii: bool,
    depth: usize,
    /// True if the current list or map has an item. A list or map without items has no line breaks.
    has_items: bool,
}

impl PythonFormatter {
    fn begin<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_items = false;
        if self.depth > MAX_DEPTH {
            let reason = format!("the value is nested deeper than {MAX_DEPTH} levels");
            return Err(io::Error::other(reason));
        }
        writer.write_all(bracket)
    }

    fn end<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_items {
            self.new_line(writer)?;
        }
        self.has_items = true;
        writer.write_all(bracket)
    }

    fn separate<W: ?Sized + Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else {
            return Ok(());
        };
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(indent.as_bytes()))
    }
}

impl Formatter for PythonFormatter {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"]")
    }

    fn begin_array_value<W>(&mut self, writer: &mut W, first: bool) -> io::Result<()>
    where
        W: ?Sized + Write,
    {
        self.separate(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_items = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"}")
    }

    fn begin_object_key<W>(&mut self, writer: &mut W, first: bool) -> io::Result<()>
    where
        W: ?Sized + Write,
    {
        self.separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_items = true;
        Ok(())
    }

    fn write_string_fragment<W>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()>
    where
        W: ?Sized + Write,
    {
        if !self.ensures_ascii || fragment.is_ascii() {
            return writer.write_all(fragment.as_bytes());
        }
        for it in fragment.chars() {
            if it.is_ascii() {
                write!(writer, "{it}")?;
            } else {
                let mut units = [0; 2];
                for unit in it.encode_utf16(&mut units) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    fn render(expression: &str) -> Result<String, minijinja::Error> {
        let mut environment = Environment::new();
        environment.add_filter("tojson", super::tojson);
        environment.render_str(&format!("{{{{ {expression} }}}}"), context! {})
    }

    #[test]
    fn tojson_matches_json_dumps() {
        // Output of Python's json.dumps.
        for (expression, python) in [
            ("\"<a href='x'>&é\" | tojson", "\"<a href='x'>&é\""),
            (
                "{'b': [1, 2.5, none], 'a': {}, 'c': [true]} | tojson",
                r#"{"b": [1, 2.5, null], "a": {}, "c": [true]}"#,
            ),
            (
                "{'b': [1, [], {}], 'a': 'x'} | tojson(indent=2)",
                "{\n  \"b\": [\n    1,\n    [],\n    {}\n  ],\n  \"a\": \"x\"\n}",
            ),
            ("[] | tojson(indent=2)", "[]"),
            (
                "[{'b': 1, 'a': {'d': 1, 'c': 2}}] | tojson(sort_keys=true)",
                r#"[{"a": {"c": 2, "d": 1}, "b": 1}]"#,
            ),
            (
                "{'a': [1, 2]} | tojson(separators=(',', ':'))",
                r#"{"a":[1,2]}"#,
            ),
            (
                "'é😀' | tojson(ensure_ascii=true)",
                r#""\u00e9\ud83d\ude00""#,
            ),
            ("'é' | tojson(true)", r#""\u00e9""#),
            ("'a\\n\"\\\\' | tojson", r#""a\n\"\\""#),
        ] {
            assert_eq!(render(expression).unwrap(), python, "{expression}");
        }
    }

    #[test]
    fn unknown_and_oversized_arguments_are_rejected() {
        assert!(render("1 | tojson(depth=2)").is_err());
        assert!(render("[1] | tojson(indent=1000000000)").is_err());
    }

    #[test]
    fn depth_and_length_are_bounded() {
        let deep = "{% set it = namespace(list=[]) %}{% for i in range(200) %}\
            {% set it.list = [it.list] %}{% endfor %}{{ it.list | tojson }}";
        let mut environment = Environment::new();
        environment.add_filter("tojson", super::tojson);
        let error = environment.render_str(deep, context! {}).unwrap_err();
        assert!(error.to_string().contains("deeper than 128"), "{error}");
        let long = render("('a' * 1000000 ~ '') | list | tojson(indent=64)").unwrap_err();
        assert!(long.to_string().contains("longer than"), "{long}");
    }
}
