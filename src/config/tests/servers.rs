use std::time::Duration;

use super::show::shown;
use super::*;
use crate::gateway::{StreamFormat, UnknownFieldPolicy};
use crate::listen::Limits;
use crate::models::UnknownModelPolicy;
use crate::runner::llm_test::TestRunnerOptions;
use crate::server::{HttpFrontend, ServerParts, WorkerParts};

#[test]
fn defaults_match_the_documented_contract() {
    let parts = server_parts(&[]);
    let http = parts.http.as_ref().unwrap();
    assert_eq!(http.listen.to_string(), "127.0.0.1:8000");
    assert_eq!(http.stream_format, StreamFormat::Ndjson);
    assert_eq!(parts.grpc.as_ref().unwrap().to_string(), "127.0.0.1:50051");
    assert_eq!(parts.request_timeout, Duration::from_secs(600));
    let embedded = ServerParts::new(parts.source.clone());
    assert_eq!(parts.request_timeout, embedded.request_timeout);
    assert_eq!(parts.access_log, embedded.access_log);
    assert_eq!(parts.drain, embedded.drain);
    let engine = engine(&parts);
    let model = &engine.models[0];
    assert_eq!(model.queue_depth, 1_024);
    assert_eq!(model.slow_reader_timeout, Duration::from_secs(10));
    assert_eq!(engine.models.len(), 1);
    assert_eq!(model.aliases, ["test"]);
    assert_eq!(engine.unknown_model, UnknownModelPolicy::Refuse);
    assert_eq!(http.unknown_fields, UnknownFieldPolicy::Refuse);
    assert_eq!(http.headers_after, Some(Duration::from_secs(30)));
    assert_eq!(
        (model.name.as_str(), model.workers, model.slots),
        ("llm_test", 1, 1_024)
    );
}

#[test]
fn each_command_opens_its_own_apis() {
    let engine = server_parts(&["engine"]);
    assert!(engine.http.is_none() && engine.grpc.is_some());
    let gateway = server_parts(&[
        "gateway",
        "--engine",
        "http://a:1,unix:/b",
        "--engine",
        "http://c:2",
    ]);
    assert!(gateway.http.is_some() && gateway.grpc.is_some());
    let Source::Remote(engines) = gateway.source else {
        panic!("the source is a local engine")
    };
    let engines: Vec<_> = engines
        .engines
        .iter()
        .map(|it| it.address.to_string())
        .collect();
    assert_eq!(engines, ["http://a:1", "unix:/b", "http://c:2"]);
}

#[test]
fn an_error_about_an_engine_does_not_repeat_its_password() {
    let engine = "http://user:secret@a:1";
    let (_folder, path) = settings_file(&format!("engine = [\"{engine}\"]"));
    for arguments in [["--engine", engine], ["--config", &path]] {
        let error = error_of(&[&["gateway"], &arguments[..]].concat());
        assert!(error.contains("must not have a user name"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn one_file_serves_every_command() {
    let (_folder, path) = settings_file("engine = [\"http://a:1\"]\nslots = 3");
    let Source::Remote(engines) = server_parts(&["gateway", "--config", &path]).source else {
        panic!("the source is a local engine")
    };
    assert_eq!(engines.engines.len(), 1);
    assert_eq!(engines.engines[0].address.to_string(), "http://a:1");
    assert_eq!(
        engine(&server_parts(&["--config", &path])).models[0].slots,
        3
    );
}

#[test]
fn a_public_address_needs_insecure() {
    for (setting, address) in [
        ("--http-listen", "0.0.0.0:0"),
        ("--grpc-listen", "[::]:0"),
        ("--admin-listen", "10.0.0.1:0"),
    ] {
        let error = error_of(&["serve", setting, address]);
        assert!(
            error.contains(setting) && error.contains("--insecure"),
            "{error}"
        );
        server_parts(&["serve", setting, address, "--insecure"]);
    }
}

#[test]
fn connection_timeouts_can_be_set_but_not_disabled() {
    let default = server_parts(&[]).limits;
    let seconds = Duration::from_secs;
    assert_eq!(default.keep_alive_timeout, seconds(75));
    assert_eq!(default.header_timeout, seconds(10));
    assert_eq!(
        (default.body_timeout, default.write_timeout),
        (seconds(30), seconds(30))
    );
    let (_folder, path) = settings_file("keep_alive_timeout = 3700\nbody_timeout = 5");
    let common = [
        "--config",
        &path,
        "--header-timeout",
        "2",
        "--write-timeout",
        "40",
    ];
    for command in ["serve", "engine", "gateway"] {
        let mut arguments = vec![command];
        arguments.extend(common);
        if command == "gateway" {
            arguments.extend(["--engine", "http://a:1"]);
        }
        let limits = server_parts(&arguments).limits;
        assert_eq!(limits.keep_alive_timeout, seconds(3_700));
        assert_eq!(limits.header_timeout, seconds(2));
        assert_eq!(
            (limits.body_timeout, limits.write_timeout),
            (seconds(5), seconds(40))
        );
    }
    for setting in ["keep-alive", "header", "body", "write"] {
        let flag = format!("--{setting}-timeout");
        let expected = format!("'{flag} <SECONDS>': must be above 0 seconds (got 0)");
        let error = error_of(&["serve", &flag, "0"]);
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn the_number_of_connections_is_limited() {
    let default = server_parts(&[]).limits;
    let counts = (default.max_connections, default.max_connections_per_address);
    assert_eq!(counts, (10_000, 2_000));
    let (_folder, path) = settings_file("max_connections = 7");
    let flags = [
        "serve",
        "--config",
        &path,
        "--max-connections-per-address",
        "5",
    ];
    let limits = server_parts(&flags).limits;
    assert_eq!(limits.max_connections, 7);
    assert_eq!(limits.max_connections_per_address, 5);
    let error = error_of(&["serve", "--max-connections", "0"]);
    let problem = "'--max-connections <COUNT>': must be at least 1 (got 0)";
    assert!(error.contains(problem), "{error}");
}

#[test]
fn embedding_programs_have_the_same_defaults() {
    let parts = server_parts(&[]);
    let http = parts.http.clone().unwrap();
    let embedded = HttpFrontend::listening_on(http.listen.clone());
    assert_eq!(http.stream_format, embedded.stream_format);
    assert_eq!(http.unknown_fields, embedded.unknown_fields);
    assert_eq!(http.headers_after, embedded.headers_after);
    assert_eq!(http.origins, embedded.origins);
    let (limits, embedded) = (parts.limits.clone(), Limits::default());
    assert_eq!(format!("{limits:?}"), format!("{embedded:?}"));
    let (workers, embedded) = (&engine(&parts).workers, WorkerParts::default());
    assert_eq!(
        format!("{:?}", workers.timeouts),
        format!("{:?}", embedded.timeouts)
    );
    assert_eq!(
        format!("{:?}", workers.resumption),
        format!("{:?}", embedded.resumption)
    );
    let options = TestRunnerOptions::default();
    assert_eq!(
        (options.interval, options.first_token_delay),
        (Duration::from_millis(20), Duration::ZERO)
    );
    assert_eq!(
        shown(&[], "test_runner_frequency_ms"),
        "test_runner_frequency_ms = 20 # default"
    );
}

#[test]
fn an_engine_that_is_listed_twice_or_is_the_gateway_itself_is_rejected() {
    let gateway = |engines: &[&str]| {
        let flags = engines.iter().flat_map(|engine| ["--engine", *engine]);
        error_of(&["gateway"].into_iter().chain(flags).collect::<Vec<_>>())
    };
    let twice = gateway(&["http://a:1", "http://b:1", "http://A:1/"]);
    let expected = "--engine: http://A:1/ is the same server as http://a:1; remove one of them";
    assert!(twice.contains(expected), "{twice}");
    for (engine, setting) in [
        ("http://localhost:50051", "--grpc-listen 127.0.0.1:50051"),
        ("http://127.0.0.1:8000", "--http-listen 127.0.0.1:8000"),
    ] {
        let itself = gateway(&[engine]);
        assert!(itself.contains(engine), "{itself}");
        assert!(itself.contains(setting), "{itself}");
    }
}
