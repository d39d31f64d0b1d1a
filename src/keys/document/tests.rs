//! Property tests: changes of arbitrary keys files.

use crate::keys::Weight;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::keys::budget::{BudgetAmount, BudgetUnit};
use crate::keys::fuzzing;

const PATH: &str = "keys.toml";

/// The text of a keys file: the part before its keys, one block for each key, and the part after them.
#[derive(Clone, Debug)]
struct Parts {
    before: String,
    keys: Vec<String>,
    after: String,
}

impl Parts {
    fn text(&self) -> String {
        [&self.before, &self.keys.concat(), &self.after]
            .map(String::as_str)
            .concat()
    }
}

fn comment() -> impl Strategy<Value = String> {
    "(# ?[a-z\u{e9}\"=\\[\\]]{0,8}\n|\n|[ \t]{0,2}\n){0,3}"
}

/// A key in one of the forms that TOML allows. `number` makes its name and its secrets unique.
fn key_block(number: usize) -> impl Strategy<Value = String> {
    let hash =
        move |secret: usize| SecretHash::of(format!("{number}-{secret}").as_bytes()).to_string();
    let form = select(vec![0, 1, 2, 3]);
    (comment(), option::of(comment()), form, option::of(1..9_u32)).prop_map(
        move |(above, within, form, limit)| {
            let within = within.unwrap_or_default();
            let (one, two) = (hash(1), hash(2));
            let limits = limit.map_or_else(String::new, |limit| {
                format!("limits = {{ requests_per_minute = {limit} }}\n")
            });
            let name = format!("[[key]]\n{within}name = \"key-{number}\" # The name.\n{limits}");
            let secrets = match form {
                0 => format!("secrets=[{{sha256=\"{one}\"}},{{ sha256 = '{two}' }}]\n"),
                1 => format!("secrets = [\n  {{ sha256 = \"{one}\", expires = 2027-01-31T00:00:00+01:00 }}, # Old.\n{within}]\n"),
                2 => format!("[[key.secrets]]\nsha256 = \"{one}\"\n{within}[[key.secrets]]\nsha256 = \"{two}\"\n"),
                _ => "secrets = []\nscopes = [\n  'admin', # All.\n]\nmodels = [\"m\\u00e9\"]\n".to_owned(),
            };
            format!("{above}{name}{secrets}")
        },
    )
}

fn parts() -> impl Strategy<Value = Parts> {
    let limits = select(vec!["", "[limits]\nconcurrent_requests = 4\n"]);
    let keys = (0..4_usize).prop_flat_map(|count| (0..count).map(key_block).collect::<Vec<_>>());
    (comment(), limits, keys, comment()).prop_map(|(before, limits, keys, after)| Parts {
        before: format!("{before}{limits}"),
        keys,
        after,
    })
}

fn changed(text: &str, change: impl FnOnce(&mut KeysDocument)) -> String {
    let document = KeysDocument::parse(Path::new(PATH), text);
    let mut document = document.unwrap_or_else(|error| panic!("{error} in\n{text}"));
    change(&mut document);
    let text = document.into_text(Path::new(PATH));
    text.expect("the file is still valid")
}

fn key_name(number: usize) -> KeyName {
    format!("key-{number}").parse().expect("the name is valid")
}

fn new_key() -> NewKey {
    NewKey {
        name: "new".parse().expect("the name is valid"),
        scopes: [Scope::Inference].into(),
        models: ["m".to_owned()].into(),
        weight: Weight::default(),
        limits: KeyLimits::default(),
        budgets: vec![
            "1000/day"
                .parse::<BudgetAmount>()
                .expect("a budget")
                .of(BudgetUnit::Tokens),
        ],
        expires: None,
    }
}

fn rotation() -> Rotation {
    let at = |second| Timestamp::from_second(second).expect("the time is in range");
    Rotation {
        old_expire: at(1_900_000_000),
        new_expires: Some(at(2_000_000_000)),
        now: at(1_700_000_000),
    }
}

proptest! {
    #[test]
    fn a_new_key_is_added_without_changing_a_byte_and_removed_without_a_trace(parts in parts()) {
        let text = parts.text();
        let added = changed(&text, |document| {
            document.add(&new_key(), &SecretHash::of(b"new")).expect("the name is new");
        });
        let same_start = text.bytes().zip(added.bytes()).take_while(|(one, other)| one == other).count();
        prop_assert!(added.ends_with(&text[same_start..]), "\n{}became\n{}", text, added);
        let removed = changed(&added, |document| {
            document.remove(&new_key().name).expect("the key was added");
        });
        prop_assert_eq!(removed, text);
    }

    #[test]
    fn a_new_secret_or_a_removed_key_changes_no_byte_of_other_keys(parts in parts(), at: Index) {
        prop_assume!(!parts.keys.is_empty());
        let at = at.index(parts.keys.len());
        let before = [&parts.before[..], &parts.keys[..at].concat()].concat();
        let after = [&parts.keys[at + 1..].concat(), &parts.after[..]].concat();
        let text = parts.text();
        let rotated = changed(&text, |document| {
            let rotated = document.rotate(&key_name(at), &rotation(), &SecretHash::of(b"new"));
            rotated.expect("the key exists");
        });
        let removed = changed(&text, |document| document.remove(&key_name(at)).expect("the key exists"));
        // The blank lines before a key are removed with it.
        for (changed, before) in [(rotated, &before[..]), (removed, before.trim_end())] {
            prop_assert!(changed.starts_with(before), "\n{}became\n{}", text, changed);
            prop_assert!(changed.ends_with(&after), "\n{}became\n{}", text, changed);
        }
    }

    #[test]
    fn a_change_keeps_the_limits_and_other_keys_in_any_layout(
        parts in parts(),
        at: Index,
        added in vec(select(vec!["\r\n", " ", "#", "\n", "key", "[limits]\n", "[[key]]\n", "secrets = []\n"]), 0..3),
    ) {
        let mut text = parts.text();
        let at = text.floor_char_boundary(at.index(text.len() + 1));
        text.insert_str(at, &added.concat());
        fuzzing::keys_file(text.as_bytes());
    }
}
