//! Tests of finding a model by its name.

use super::*;

fn models(models: &[(&str, &[&str])], unknown: UnknownModelPolicy) -> Models {
    let spec = |(name, aliases): &(&str, &[&str])| ModelSpec {
        name: (*name).to_owned(),
        aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        runner: "llm_test",
        created: 0,
    };
    Models::new(models.iter().map(spec).collect(), unknown)
}

fn find(models: &Models, name: Option<&str>) -> Result<String, Error> {
    models.find(name).map(|entry| entry.name.to_string())
}

#[test]
fn a_model_is_found_by_its_name_and_by_each_alias() {
    let models = models(
        &[("a", &[]), ("b", &["bee", "b:latest"])],
        UnknownModelPolicy::Refuse,
    );
    for name in ["b", "bee", "b:latest"] {
        assert_eq!(find(&models, Some(name)), Ok("b".to_owned()));
    }
    let unknown = find(&models, Some("c")).expect_err("there is none");
    assert_eq!(unknown.kind, ErrorKind::ModelNotFound);
    assert_eq!(
        unknown.message,
        "There is no model 'c'. This server has: a, b (also bee, b:latest)."
    );
}

#[test]
fn a_request_without_a_name_gets_the_only_model() {
    let only = models(&[("a", &["first"])], UnknownModelPolicy::Refuse);
    assert_eq!(find(&only, None), Ok("a".to_owned()));
    let two = models(&[("a", &[]), ("b", &[])], UnknownModelPolicy::Refuse);
    let unnamed = find(&two, None).expect_err("the model is ambiguous");
    assert_eq!(unnamed.kind, ErrorKind::MissingParameter);
    assert_eq!(
        unnamed.message,
        "`model` is required. This server has: a, b."
    );
}

#[test]
fn the_list_of_models_in_an_error_is_bounded() {
    let names: Vec<_> = (0..100).map(|index| format!("{index:0>256}")).collect();
    let names: Vec<(&str, &[&str])> = names.iter().map(|name| (&**name, &[][..])).collect();
    let unnamed = find(&models(&names, UnknownModelPolicy::Refuse), None);
    let unnamed = unnamed.expect_err("the model is ambiguous");
    assert!(
        unnamed.message.len() < MAX_MODEL_LIST_BYTES + 100,
        "{unnamed:?}"
    );
    assert!(unnamed.message.contains("… and 93 more"), "{unnamed:?}");
}

#[test]
fn with_unknown_model_first_an_unknown_name_gets_the_first_model() {
    let models = models(&[("a", &[]), ("b", &["bee"])], UnknownModelPolicy::First);
    for (name, expected) in [
        (Some("gpt-4o"), "a"),
        (None, "a"),
        (Some("a"), "a"),
        (Some("bee"), "b"),
    ] {
        assert_eq!(find(&models, name), Ok(expected.to_owned()));
    }
    let too_long = find(&models, Some(&"a".repeat(257))).expect_err("the name is too long");
    assert_eq!(too_long.kind, ErrorKind::InvalidValue);
}

#[test]
fn a_models_id_finds_its_entry_and_its_value() {
    let models = Models::for_test(&["a", "b"]);
    let depths = models.map_values([1, 2]);
    for (name, depth) in [("a", 1), ("b", 2)] {
        let id = models.find(Some(name)).expect("the model exists").id;
        assert_eq!((&*models.get(id).name, depths[id]), (name, depth));
    }
}
