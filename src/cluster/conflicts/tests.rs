//! Tests of conflicts between engines.

use super::*;

fn listed(text: &str) -> EngineSpec {
    EngineSpec::at(text.parse().expect("a valid address"))
}

fn named(name: &str, text: &str) -> EngineSpec {
    EngineSpec {
        name: name.into(),
        ..listed(text)
    }
}

#[test]
fn one_engine_written_in_two_ways_is_listed_twice() {
    for (one, other) in [
        ("http://a:1", "http://a:1/"),
        ("http://a:1", "grpc://a:1"),
        ("http://a:1", "vllm+grpc://a:1"),
        ("http://a:1", "http://A:1"),
        ("http://a", "http://a:80"),
        ("http://[::1]:1", "http://[0:0::1]:1"),
        ("unix:/a/b", "unix:///a//./b"),
        ("http://127.0.0.1:1", "http://localhost:1"),
        ("http://localhost:1", "http://127.0.0.1:1"),
        ("http://[::1]:1", "http://localhost:1"),
        ("http://0.0.0.0:1", "http://127.0.0.1:1"),
    ] {
        let engines = [listed(one), listed("http://b:1"), listed(other)];
        let conflicts = find_conflicts(&engines, &[]);
        let [conflict] = &conflicts[..] else {
            panic!("expected one conflict: {conflicts:?}");
        };
        assert_eq!(conflict.engine, 2);
        let expected = format!("--engine: {other} is the same server as {one}; remove one of them");
        assert_eq!(conflict.message(&engines), expected);
    }
}

#[test]
fn engines_with_names_are_named_in_a_conflict() {
    let engines = [named("a", "http://a:1"), named("b", "http://A:1")];
    let messages = find_conflicts(&engines, &[]);
    let messages: Vec<_> = messages.iter().map(|it| it.message(&engines)).collect();
    let expected = "engine 'b': http://A:1 is the same server as the engine 'a' (http://a:1); \
                    remove one of them";
    assert_eq!(messages, [expected]);
}

#[test]
fn different_engines_may_be_listed_together() {
    let engines = [
        "http://a:1",
        "http://a:2",
        "http://b:1",
        "http://127.0.0.1:1",
        "http://127.0.0.2:1",
        "unix:/a",
        "unix:/b",
    ];
    assert_eq!(find_conflicts(&engines.map(listed), &[]), []);
}

#[test]
fn an_engine_at_the_gateways_own_address_is_rejected() {
    let check = |text, listen: &str| {
        let engines = [listed("http://b:1"), listed(text)];
        let conflicts = find_conflicts(&engines, &[("grpc-listen", listen.to_owned())]);
        let messages = conflicts.iter().map(|it| it.message(&engines));
        messages.collect::<Vec<_>>()
    };
    for (text, listen) in [
        ("http://127.0.0.1:50051", "127.0.0.1:50051"),
        ("http://localhost:50051", "127.0.0.1:50051"),
        ("http://127.0.0.1:50051", "localhost:50051"),
        ("http://[::1]:50051", "localhost:50051"),
        ("http://127.0.0.1:50051", "0.0.0.0:50051"),
        ("http://localhost:50051", "[::]:50051"),
        ("http://a.example:50051", "A.example:50051"),
        ("unix:/run//t.sock", "unix:/run/t.sock"),
    ] {
        let messages = check(text, listen);
        let expected = format!(
            "--engine: {text} is the address of this gateway itself (--grpc-listen {listen})"
        );
        assert_eq!(messages.len(), 1);
        assert!(messages[0].starts_with(&expected), "{messages:?}");
    }
    for (text, listen) in [
        ("http://127.0.0.1:50052", "127.0.0.1:50051"),
        ("http://127.0.0.2:50051", "127.0.0.1:50051"),
        ("http://10.0.0.1:50051", "0.0.0.0:50051"),
        ("http://a.example:50051", "localhost:50051"),
        ("unix:/run/a.sock", "unix:/run/b.sock"),
    ] {
        assert!(check(text, listen).is_empty(), "{text} {listen}");
    }
}
