use super::*;

fn parse(text: &str) -> Result<Vec<KeyEntry>, String> {
    let parsed = parse_keys(Path::new("keys.toml"), text);
    parsed.map(|it| it.keys).map_err(|error| error.to_string())
}

fn hash(secret: &str) -> SecretHash {
    SecretHash::of(secret.as_bytes())
}

#[test]
fn a_key_has_scopes_models_and_secrets() {
    let (one, two) = (hash("one"), hash("two"));
    let text = format!(
        "[[key]]\nname = \"a\"\nscopes = [\"admin\", \"inference\"]\nmodels = [\"m\"]\nsecrets = [\n\
         {{ sha256 = \"{one}\" }},\n{{ sha256 = \"{two}\", expires = 2027-01-31T00:00:00+01:00 }},\n]\n\
         [[key]]\nname = \"b\"\nsecrets = []\n"
    );
    let keys = parse(&text).unwrap();
    let (a, b) = (&keys[0], &keys[1]);
    assert_eq!(a.key.name.as_str(), "a");
    assert_eq!(a.key.scopes, [Scope::Inference, Scope::Admin].into());
    assert_eq!(a.key.models, Some(["m".to_owned()].into()));
    assert!(a.secrets[0].hash.matches(&one) && a.secrets[0].expires.is_none());
    let expires: Timestamp = "2027-01-30T23:00:00Z".parse().unwrap();
    assert_eq!(a.secrets[1].expires, Some(expires.into()));
    assert_eq!(b.key.scopes, [Scope::Inference].into());
    assert_eq!((&b.key.models, b.secrets.len()), (&None, 0));
    assert_eq!(parse("").unwrap().len(), 0);
}

#[test]
fn a_key_has_weight_1_unless_the_file_says_otherwise() {
    let key = |rest: &str| parse(&format!("[[key]]\nname = \"a\"\nsecrets = []\n{rest}"));
    let weight = |rest: &str| key(rest).unwrap()[0].key.weight.get();
    assert_eq!([weight(""), weight("weight = 100")], [1, 100]);
    for invalid in ["0", "101", "-1", "99999999999"] {
        let error = key(&format!("weight = {invalid}")).err().unwrap();
        let expected = "keys.toml:4: must be a whole number from 1 to 100";
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn limits_belong_to_one_key_or_to_all_keys() {
    let text = "[limits]\nconcurrent_requests = 4\n[[key]]\nname = \"a\"\nsecrets = []\n\
                limits = { requests_per_minute = 60, tokens_per_minute = 1000 }\n";
    let parsed = parse_keys(Path::new("keys.toml"), text).ok().unwrap();
    let expected = KeyLimits {
        concurrent_requests: NonZeroU32::new(4),
        ..KeyLimits::default()
    };
    assert_eq!(parsed.limits, expected);
    let expected = KeyLimits {
        requests_per_minute: NonZeroU32::new(60),
        concurrent_requests: None,
        tokens_per_minute: NonZeroU32::new(1_000),
    };
    assert_eq!(parsed.keys[0].key.quotas.of_key.limits, expected);
    let zero = parse("[limits]\nrequests_per_minute = 0\n").err().unwrap();
    assert!(
        zero.contains("keys.toml:2: must be a whole number from 1"),
        "{zero}"
    );
}

#[test]
fn a_budget_counts_tokens_per_day_per_month_or_in_total() {
    let text =
        |budget: &str| format!("[[key]]\nname = \"a\"\nsecrets = []\nbudgets = [{{ {budget} }}]\n");
    for (budget, expected) in [
        ("tokens = 5, per = \"day\"", "5 tokens per day"),
        ("tokens = 6, per = \"month\"", "6 tokens per month"),
        ("completion_tokens = 7", "7 completion tokens in total"),
    ] {
        let keys = parse(&text(budget)).unwrap();
        let budgets = &keys[0].key.budgets.budgets;
        assert_eq!(budgets.len(), 1);
        assert_eq!(budgets[0].to_string(), expected);
    }
    for (budget, expected) in [
        ("per = \"day\"", "needs either `tokens` or"),
        (
            "tokens = 1, completion_tokens = 1",
            "needs either `tokens` or",
        ),
        ("tokens = 0", "must be a whole number from 1"),
        ("tokens = 1, per = \"year\"", "expected `day` or `month`"),
        ("tokens = 1, for = \"day\"", "unknown field `for`"),
    ] {
        let error = parse(&text(budget)).err().expect("the file is invalid");
        assert!(error.starts_with("keys file keys.toml:4: "), "{error}");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn an_error_names_the_line_and_repeats_no_value() {
    let key = |rest: &str| format!("[[key]]\nname = \"a\"\nsecrets = []\n{rest}\n");
    for (text, expected) in [
        (key("scope = []"), "keys.toml:4: unknown field `scope`"),
        (
            key("scopes = [\"tw_secret\"]"),
            "keys.toml:4: must be inference, metrics, admin or priority",
        ),
        (key("[[keys]]"), "keys.toml:4: unknown field `keys`"),
        (
            "[[key]]\nname = \"tw secret\"\nsecrets = []".to_owned(),
            "keys.toml:2: must be 1 to 64 of the characters",
        ),
        (
            "[[key]]\nname = \"a\"\nsecrets = [{ sha256 = \"tw_secret\" }]".to_owned(),
            "keys.toml:3: must be the SHA-256 of the key in 64 hexadecimal digits",
        ),
        (
            format!(
                "[[key]]\nname = \"a\"\nsecrets = [{{ sha256 = \"{}\", expires = 2027-01-31 }}]",
                hash("a")
            ),
            "keys.toml:3: must be a date and time with an offset",
        ),
        (
            "[[key]]\nname = \"a\"".to_owned(),
            "missing field `secrets`",
        ),
        (
            format!("{0}{0}", key("")),
            "keys.toml: two keys have the name a",
        ),
        (
            format!(
                "[[key]]\nname = \"a\"\nsecrets = [{{ sha256 = \"{0}\" }}, {{ sha256 = \"{0}\" }}]",
                hash("a")
            ),
            "keys.toml: two secrets have the same sha256",
        ),
        ("key = tw_secret".to_owned(), "keys.toml:1: "),
        (
            "[[key]]\nname = \"a\"\nsecrets = \"tw_secret\"".to_owned(),
            "keys.toml:3: invalid value, expected a sequence",
        ),
        (
            "[[key]]\nname = \"a\"\nsecrets = [\"tw_secret\"]".to_owned(),
            "keys.toml:3: invalid value, expected",
        ),
    ] {
        let error = parse(&text).err().expect("the file is invalid");
        assert!(error.contains(expected), "{error}");
        assert!(
            !error.contains("secret\"") && !error.contains("tw_"),
            "{error}"
        );
    }
}
