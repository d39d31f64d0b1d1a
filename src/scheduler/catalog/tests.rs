//! Tests of finding the model of a request.

use super::*;

fn catalog(models: &[(&str, &[&str])]) -> Catalog {
    let entry = |(name, aliases): &(&str, &[&str])| {
        let aliases: Vec<_> = aliases.iter().map(|alias| (*alias).to_owned()).collect();
        CatalogEntry::new(name, &aliases, "llm_test", 0)
    };
    Catalog::new(models.iter().map(entry).collect())
}

fn found(catalog: &Catalog, name: Option<&str>) -> Result<(usize, String), Error> {
    let found = catalog.find(name);
    found.map(|(at, entry)| (at, entry.name.to_string()))
}

#[test]
fn a_model_is_found_by_its_name_and_by_each_alias() {
    let catalog = catalog(&[("a", &[]), ("b", &["bee", "b:latest"])]);
    for name in ["b", "bee", "b:latest"] {
        assert_eq!(found(&catalog, Some(name)), Ok((1, "b".to_owned())));
    }
    let unknown = found(&catalog, Some("c")).expect_err("no model has this name");
    assert_eq!(unknown.kind, ErrorKind::ModelNotFound);
    assert_eq!(
        unknown.message,
        "There is no model 'c'. This server has: a, b (also bee, b:latest)."
    );
}

#[test]
fn a_request_without_a_name_gets_the_only_model() {
    let only = catalog(&[("a", &["first"])]);
    assert_eq!(found(&only, None), Ok((0, "a".to_owned())));
    let unnamed =
        found(&catalog(&[("a", &[]), ("b", &[])]), None).expect_err("there are several models");
    assert_eq!(unnamed.kind, ErrorKind::MissingParameter);
    assert_eq!(
        unnamed.message,
        "`model` is required. This server has: a, b."
    );
}

#[test]
fn the_list_of_models_in_an_error_is_bounded() {
    let names: Vec<_> = (0..100).map(|at| format!("{at:0>256}")).collect();
    let models: Vec<(&str, &[&str])> = names.iter().map(|name| (&**name, &[][..])).collect();
    let unnamed = found(&catalog(&models), None).expect_err("there are several models");
    assert!(
        unnamed.message.len() < MAX_MODEL_LIST_BYTES + 100,
        "{unnamed:?}"
    );
    assert!(unnamed.message.contains("… and 93 more"), "{unnamed:?}");
}

#[test]
fn with_unknown_model_first_an_unknown_name_gets_the_first_model() {
    let catalog = catalog(&[("a", &[]), ("b", &["bee"])]).with_unknown_model(UnknownModel::First);
    for (name, expected) in [
        (Some("gpt-4o"), (0, "a")),
        (None, (0, "a")),
        (Some("a"), (0, "a")),
        (Some("bee"), (1, "b")),
    ] {
        let expected = (expected.0, expected.1.to_owned());
        assert_eq!(found(&catalog, name), Ok(expected));
    }
    let too_long = found(&catalog, Some(&"a".repeat(257))).expect_err("too long");
    assert_eq!(too_long.kind, ErrorKind::InvalidValue);
}
