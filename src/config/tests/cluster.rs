//! Tests of `[[engine]]` and `[[route]]` tables.

use std::time::Duration;

use super::check::assert_problems;
use super::*;
use crate::cluster::{ApiKey, ClusterSpec, PlacementPolicy, RoutePolicy, ServerKind};

/// Two engines, in four lines.
const ENGINES: &str = "[[engine]]\nname = \"a\"\naddress = \"http://a:1\"\n\
                       [[engine]]\nname = \"b\"\naddress = \"openai+http://b:1/v1\"\n";

/// The line of [`ENGINES`] at which `more` begins is 7.
fn with_engines(more: &str) -> String {
    format!("{ENGINES}{more}")
}

fn cluster(text: &str) -> ClusterSpec {
    let (_folder, path) = settings_file(text);
    match server_parts(&["gateway", "--config", &path]).source {
        Source::Remote(cluster) => cluster,
        Source::Engine(_) => panic!("the source is a local engine"),
    }
}

fn gateway_error(text: &str) -> String {
    let (_folder, path) = settings_file(text);
    error_of(&["gateway", "--config", &path]).replace(&path, "")
}

#[test]
fn engine_tables_have_names_addresses_keys_and_overrides() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "sk-1\n").unwrap();
    let cluster = cluster(&format!(
        "[[engine]]\nname = \"a\"\naddress = \"openai+http://a:1\"\napi_key_file = \"{}\"\n\
         server = \"llama.cpp\"\ncontext_length = 4096\n\
         [[engine]]\nname = \"b\"\naddress = \"grpc://b:1\"",
        key.display()
    ));
    let [a, b] = &cluster.engines[..] else {
        panic!("expected two engines: {cluster:?}");
    };
    assert_eq!((&*a.name, a.address.as_str()), ("a", "openai+http://a:1"));
    assert_eq!(a.api_key, ApiKey::new("sk-1"));
    assert_eq!(a.server, Some(ServerKind::LlamaCpp));
    assert_eq!(a.context_length, Some(4_096));
    assert_eq!((&*b.name, b.address.as_str()), ("b", "grpc://b:1"));
    assert_eq!(
        (b.api_key.is_none(), b.server, b.context_length),
        (true, None, None)
    );
    assert!(cluster.routes.is_empty());
}

#[test]
fn route_tables_have_targets_fallbacks_and_a_policy() {
    let cluster = cluster(&with_engines(
        "[[route]]\nmodel = \"chat\"\n\
         targets = [{ engine = \"a\", model = \"m\", weight = 2 }, { engine = \"b\" }]\n\
         fallback = [{ engine = \"b\", model = \"small\" }]\n\
         policy = { tries = 5, first_token_timeout = 0.5, stall_timeout = 2, max_concurrency = 64, queue_depth = 0 }\n\
         [[route]]\nmodel = \"other\"\ntargets = [{ engine = \"b\" }]",
    ));
    let [chat, other] = &cluster.routes[..] else {
        panic!("expected two routes: {cluster:?}");
    };
    let targets = chat.targets.iter().chain(&chat.fallback);
    let targets: Vec<_> = targets
        .map(|it| (&*it.engine, it.model.as_deref(), it.weight))
        .collect();
    let expected = [("a", Some("m"), 2), ("b", None, 1), ("b", Some("small"), 1)];
    assert_eq!((&*chat.model, targets), ("chat", expected.to_vec()));
    assert_eq!((chat.targets.len(), chat.fallback.len()), (2, 1));
    let policy = RoutePolicy {
        tries: 5,
        first_token_timeout: Duration::from_millis(500),
        stall_timeout: Duration::from_secs(2),
        max_concurrency: Some(64),
        queue_depth: 0,
    };
    assert_eq!(chat.policy, policy);
    assert_eq!(
        (&*other.model, &other.policy),
        ("other", &RoutePolicy::default())
    );
}

#[test]
fn requests_are_placed_by_prefix_unless_the_index_has_no_blocks() {
    let placement = |more: &str| cluster(&format!("{more}\n{ENGINES}")).placement;
    assert_eq!(placement(""), PlacementPolicy::default());
    assert_eq!(
        placement("prefix_index_blocks = 65536"),
        PlacementPolicy::default()
    );
    let few = placement("prefix_index_blocks = 9");
    assert_eq!(few, PlacementPolicy::remembering(9));
    assert_ne!(few, PlacementPolicy::default());
    let none = placement("prefix_index_blocks = 0");
    assert_eq!(none, PlacementPolicy::LeastLoad);
    let error = gateway_error(&format!("prefix_index_blocks = -1\n{ENGINES}"));
    assert!(error.contains(":1:1: prefix_index_blocks: "), "{error}");
}

#[test]
fn a_policy_may_be_written_as_a_table_of_its_own() {
    let cluster = cluster(&with_engines(
        "[[route]]\nmodel = \"chat\"\n[[route.targets]]\nengine = \"a\"\n[route.policy]\ntries = 7",
    ));
    assert_eq!(cluster.routes[0].policy.tries, 7);
    let text = with_engines(
        "[[route]]\nmodel = \"chat\"\n[[route.targets]]\nengine = \"a\"\n\
                             [route.policy]\ntries = 0\ntry = 1",
    );
    assert_problems(
        &text,
        &[
            ":12:1: route[1].policy.tries: must be at least 1 (got 0)",
            ":13:1: the key 'route[1].policy.try' is unknown",
        ],
    );
}

#[test]
fn other_commands_ignore_the_tables() {
    let text = "slots = 3\n[[engine]]\nname = 1\n[[route]]\nmodel = 2";
    let (_folder, path) = settings_file(text);
    for command in ["serve", "engine"] {
        let parts = server_parts(&[command, "--config", &path]);
        assert_eq!(engine(&parts).models[0].slots, 3);
    }
}

#[test]
fn every_invalid_value_of_the_tables_is_a_problem() {
    let text = "[[engine]]\nname = \"\"\naddress = \"ftp://a\"\napi_key_env = 1\nserver = \"x\"\ncontext_length = 0\n\
                [[engine]]\nname = \"a\\n\"\n\
                [[route]]\nmodel = \"\"\ntargets = [\n{ engine = 1, weight = 0 },\n\"a\",\n[\"a\"],\n]\nfallback = 1\n\
                [route.policy]\ntries = 0\nfirst_token_timeout = 0\nstall_timeout = -1\nmax_concurrency = 0\nqueue_depth = -1\n\
                [[route]]\npolicy = [3]\ntargets = [2026-11-29]";
    assert_problems(
        text,
        &[
            ":2:1: engine[1].name: must not be empty",
            ":3:1: engine[1].address: 'ftp://a' is not a valid engine address; use http://host:port, grpc://",
            ":4:1: engine[1].api_key_env: invalid type: integer `1`, expected a string",
            ":5:1: engine[1].server: must be vllm, llama.cpp or openai",
            ":6:1: engine[1].context_length: must be at least 1 (got 0)",
            ":8:1: engine[2].name: must not contain line breaks",
            ":10:1: route[1].model: must not be empty",
            ":12:3: route[1].targets[1].engine: invalid type: integer `1`, expected a string",
            ":12:15: route[1].targets[1].weight: must be at least 1 (got 0)",
            ":13:1: route[1].targets[2]: invalid type: string \"a\", expected a table",
            ":14:1: route[1].targets[3]: invalid type: list, expected a table",
            ":16:1: route[1].fallback: invalid type: integer `1`, expected a list",
            ":18:1: route[1].policy.tries: must be at least 1 (got 0)",
            ":19:1: route[1].policy.first_token_timeout: must be above 0 seconds (got 0)",
            ":20:1: route[1].policy.stall_timeout: must be from 0 seconds to ten years (got -1)",
            ":21:1: route[1].policy.max_concurrency: must be at least 1 (got 0)",
            ":22:1: route[1].policy.queue_depth: invalid value: integer `-1`, expected an integer from 0",
            ":24:1: route[2].policy: invalid type: list, expected a table",
            ":25:12: route[2].targets[1]: invalid type: date or time, expected a table",
        ],
    );
}

#[test]
fn every_unknown_key_of_the_tables_is_a_problem_with_the_known_keys() {
    let text = with_engines(
        "port = 1\n[[route]]\nmodels = \"m\"\ntargets = [{ engine = \"a\", wait = 1 }]\npolicy.retries = 1",
    );
    assert_problems(
        &text,
        &[
            ":7:1: the key 'engine[2].port' is unknown; known keys are name, address, api_key_env, api_key_file, \
             tls_ca, tls_cert, tls_key, server, context_length",
            ":9:1: the key 'route[1].models' is unknown; known keys are model, targets, fallback, policy",
            ":10:28: the key 'route[1].targets[1].wait' is unknown; known keys are engine, model, weight",
            ":11:8: the key 'route[1].policy.retries' is unknown; known keys are tries, first_token_timeout, \
             stall_timeout, max_concurrency, queue_depth",
        ],
    );
    let error = gateway_error("[[routes]]\nmodel = \"m\"");
    assert!(
        error.contains("known tables are [[model]], [[engine]] and [[route]]"),
        "{error}"
    );
}

#[test]
fn every_missing_key_of_the_tables_is_a_problem() {
    assert_problems(
        "[[engine]]\n[[engine]]\nname = \"b\"\naddress = \"http://b:1\"\n[[route]]\nfallback = [{}]\n\
         [[route]]\nmodel = \"m\"\ntargets = []",
        &[
            ":1:1: engine[1].name is required",
            ":1:1: engine[1].address is required",
            ":5:1: route[1].model is required",
            ":5:1: route[1].targets is required",
            ":6:13: route[1].fallback[1].engine is required",
            ":9:1: route[2].targets must not be empty; write at least one target, such as { engine = \"a\" }",
        ],
    );
}

#[test]
fn names_that_are_repeated_or_unknown_are_problems() {
    assert_problems(
        &with_engines(
            "[[engine]]\nname = \"a\"\naddress = \"http://c:1\"\n\
             [[route]]\nmodel = \"m\"\n\
             targets = [{ engine = \"a\" }, { engine = \"c\" }, { engine = \"a\", model = \"m\" }]\n\
             fallback = [{ engine = \"b\", weight = 2 }]\n\
             [[route]]\nmodel = \"m\"\ntargets = [{ engine = \"b\" }]",
        ),
        &[
            ":8:1: engine[1].name and engine[3].name are both 'a'; each must be different",
            ":12:32: route[1].targets[2].engine: there is no engine 'c'; the engines are a, b, a",
            ":12:48: route[1].targets[1] and route[1].targets[3] are the same model of the same engine",
            ":13:29: route[1].fallback[1].weight has no effect",
            ":15:1: route[1].model and route[2].model are both 'm'; each must be different",
        ],
    );
}

#[test]
fn engines_that_are_listed_twice_or_are_the_gateway_itself_are_problems() {
    assert_problems(
        &with_engines(
            "[[engine]]\nname = \"c\"\naddress = \"grpc://A:1\"\n\
             [[engine]]\nname = \"d\"\naddress = \"http://localhost:50051\"",
        ),
        &[
            ":9:1: engine[3].address: grpc://A:1 is the same server as the engine 'a' (http://a:1); remove one",
            ":12:1: engine[4].address: http://localhost:50051 is the address of this gateway itself \
             (--grpc-listen 127.0.0.1:50051)",
        ],
    );
}

#[test]
fn engines_are_either_tables_or_a_list_of_addresses() {
    let expected =
        "engine: write each engine as a table under [[engine]], or all engines as a list";
    for text in [
        "engine = [\"http://user:secret@a:1\", { name = \"b\" }]",
        "engine = { name = \"a\" }",
        "[engine]\nname = \"a\"",
    ] {
        let error = gateway_error(text);
        assert!(error.contains(expected), "{text}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
    for text in ["route = []", "route = 1", "[route]\nmodel = \"a\""] {
        let error = gateway_error(&format!("engine = [\"http://a:1\"]\n{text}"));
        let expected = ":2:1: route: write each route as a table under [[route]]";
        assert!(error.contains(expected) || text.starts_with('['), "{error}");
        assert!(error.contains("under [[route]]"), "{error}");
    }
    let error = gateway_error("[[route]]\nmodel = \"a\"");
    assert!(
        error.contains("--engine is required for a gateway"),
        "{error}"
    );
    assert!(error.contains("[[engine]]"), "{error}");
    let (_folder, path) = settings_file(ENGINES);
    let error = error_of(&["gateway", "--config", &path, "--engine", "http://c:1"]);
    let expected = format!("{path}:1:1: --engine and the [[engine]] tables both list the engines");
    assert!(error.contains(&expected), "{error}");
}

#[test]
fn routes_name_engines_of_a_list_by_their_addresses() {
    let cluster = cluster(
        "engine = [\"http://a:1\"]\n[[route]]\nmodel = \"m\"\ntargets = [{ engine = \"http://a:1\" }]",
    );
    assert_eq!(&*cluster.routes[0].targets[0].engine, "http://a:1");
}

#[test]
fn every_mistake_about_a_key_is_a_problem() {
    let engine = |address: &str, key: &str| {
        format!("[[engine]]\nname = \"a\"\naddress = \"{address}\"\n{key}")
    };
    for (key, problem) in [
        (
            "api_key_env = \"TOKENWAY_TEST_UNSET\"",
            "api_key_env: this environment variable is not set",
        ),
        (
            "api_key_env = \"sk-secret\"",
            "api_key_env: must be the name of an environment variable",
        ),
        (
            "api_key_file = \"/nowhere/secret\"",
            "api_key_file: cannot read this file",
        ),
    ] {
        let text = engine("openai+http://a:1", key);
        assert_problems(&text, &[&format!(":4:1: engine[1].{problem}")]);
        let error = gateway_error(&text);
        assert!(
            error.contains(problem) && !error.contains("secret"),
            "{error}"
        );
    }
    assert_problems(
        &engine(
            "openai+http://a:1",
            "api_key_env = \"A\"\napi_key_file = \"b\"",
        ),
        &[
            ":5:1: engine[1].api_key_env and engine[1].api_key_file are both set; remove one of them",
        ],
    );
    assert_problems(
        &engine("http://a:1", "server = \"vllm\""),
        &[":4:1: engine[1].server applies to OpenAI-compatible engines only; remove it"],
    );
}

#[test]
fn a_key_in_the_settings_file_is_rejected_and_never_printed() {
    for text in [
        "[[engine]]\napi_key = \"sk-secret\"",
        "engine = [{ api_key = \"sk-secret\" }]",
        "[[engine]]\napi_key = sk-secret",
        "engine = [{ name = \"a\", api_key = sk-secret }]",
        "[[engine]]\napi_key = \"sk-secret\"\napi_key = \"sk-secret\"",
        "api_key = \"sk-secret\"",
    ] {
        let error = gateway_error(text);
        assert!(error.contains("api_key"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
    let error = gateway_error("[[engine]]\napi_key = \"sk-secret\"");
    let expected = ":2:1: the key 'engine[1].api_key' is not allowed: write api_key_env or api_key_file; a key must \
                    not stand in the settings file";
    assert!(error.contains(expected), "{error}");
}

#[test]
fn a_key_is_not_in_debug_output() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("file");
    std::fs::write(&key, "sk-secret").unwrap();
    let address = "openai+http://a:1";
    let cluster = cluster(&format!(
        "[[engine]]\nname = \"a\"\naddress = \"{address}\"\napi_key_file = \"{}\"",
        key.display()
    ));
    let debug = format!("{cluster:?}");
    assert!(
        debug.contains(address) && !debug.contains("secret"),
        "{debug}"
    );
}

#[test]
fn certificates_of_an_engine_need_https_and_belong_together() {
    for (address, keys, expected) in [
        (
            "http://a:1",
            "tls_ca = \"ca.pem\"",
            "engine[1].tls_ca applies to addresses with https only; remove it",
        ),
        (
            "https://a:1",
            "tls_cert = \"a.pem\"",
            "engine[1].tls_cert is set alone; set tls_cert and tls_key together",
        ),
        (
            "openai+https://a:1",
            "tls_ca = \"/nowhere/ca.pem\"",
            "engine[1].tls_ca: /nowhere/ca.pem: No such file",
        ),
        (
            "https://a..b:1",
            "",
            "engine[1].address: 'https://a..b:1' is not a valid engine address: its host is not",
        ),
    ] {
        let text = format!("[[engine]]\nname = \"a\"\naddress = \"{address}\"\n{keys}");
        let error = gateway_error(&text);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn an_engine_inherits_the_certificates_that_its_table_does_not_name() {
    let folder = tempfile::tempdir().unwrap();
    let certified = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
    let write = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let ca = write("ca.pem", certified.cert.pem());
    let certificate = write("own.pem", certified.cert.pem());
    let key = write("own.key", certified.signing_key.serialize_pem());
    let text = format!(
        "[[engine]]\nname = \"a\"\naddress = \"https://a:1\"\ntls_cert = \"{certificate}\"\ntls_key = \"{key}\""
    );
    let (_folder, path) = settings_file(&text);
    let parts = server_parts(&["gateway", "--config", &path, "--engine-tls-ca", &ca]);
    let Source::Remote(spec) = parts.source else {
        panic!("a gateway has remote engines");
    };
    let tls = format!("{:?}", spec.engines[0].tls);
    assert!(tls.contains("ca.pem") && tls.contains("own.pem"), "{tls}");
}

#[test]
fn the_documentation_describes_every_key_of_the_tables() {
    let text = with_engines("x = 1\n[[route]]\nx = 1\ntargets = [{ x = 1 }]\npolicy = { x = 1 }");
    let page = include_str!("../../../docs/configuration.md");
    let problems = check::problems(&text);
    assert_eq!(problems.len(), 4, "{problems:?}");
    for problem in problems {
        let (_, keys) = problem.split_once("known keys are ").unwrap();
        for key in keys.split(", ") {
            assert!(
                page.contains(&format!("| `{key}` |")),
                "{key} is not documented"
            );
        }
    }
}

#[test]
fn the_documented_file_is_valid() {
    let page = include_str!("../../../docs/configuration.md");
    let (_, rest) = page.split_once("cat >routes.toml <<'END'\n").unwrap();
    let (file, _) = rest.split_once("END\n").unwrap();
    assert_problems(file, &[]);
}
