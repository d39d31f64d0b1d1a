//! Arbitrary JSON for property tests.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Map, Value};

/// Texts with characters that JSON, HTTP or line readers treat specially.
pub(super) fn text() -> impl Strategy<Value = String> {
    let special = select(vec![
        "\0", "\u{1f}", "\n", "\r\n", "\"", "\\", "\u{7f}", "\u{85}", "\u{2028}", "\u{2029}",
        "\u{84}", "\u{2027}", "\u{c285}", "\u{fffd}", "😀", "\\ud800",
    ]);
    let part = prop_oneof![
        special.prop_map(str::to_owned),
        any::<char>().prop_map(String::from)
    ];
    vec(part, 0..6).prop_map(|parts| parts.concat())
}

/// Values of every JSON type, nested up to four levels.
pub(super) fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        select(vec![-1, 0, 1, 2, 128, 129, 1_000_000_000]).prop_map(Value::from),
        // serde_json reads these without rounding.
        any::<i32>().prop_map(|number| Value::from(f64::from(number) / 8.0)),
        text().prop_map(Value::String),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::Array),
            object(inner).prop_map(Value::Object),
        ]
    })
}

/// Objects whose values come from `values`.
pub(super) fn object(
    values: impl Strategy<Value = Value>,
) -> impl Strategy<Value = Map<String, Value>> {
    vec((text(), values), 0..4).prop_map(|entries| entries.into_iter().collect())
}

/// JSON texts; most of them are invalid in one place.
pub(super) fn broken_json() -> impl Strategy<Value = Vec<u8>> {
    let fault = prop_oneof![Just(b"".to_vec()), vec(any::<u8>(), 1), special_json()];
    (object(value()), any::<(Index, Index)>(), fault).prop_map(|(object, (from, to), fault)| {
        let mut text = Value::Object(object).to_string().into_bytes();
        let from = from.index(text.len() + 1);
        let to = from + to.index(text.len() + 1 - from).min(3);
        text.splice(from..to, fault);
        text
    })
}

fn special_json() -> impl Strategy<Value = Vec<u8>> {
    let parts = select(vec![
        "NaN",
        "1e999",
        "-",
        "01",
        "\"\\ud800\"",
        "\"a\":1,",
        "{\"a\":{\"b\":1,\"b\":2}}",
        "\u{feff}",
        "//",
        "'a'",
    ]);
    parts.prop_map(|part| part.as_bytes().to_vec())
}
