//! Tests of addresses.

use super::*;

fn engine(text: &str) -> EngineAddress {
    text.parse().expect("a valid address")
}

#[test]
fn an_error_names_the_invalid_part_of_an_address_and_hides_secrets() {
    for (text, shown, problem) in [
        (
            "http://user:secret@a:1",
            "http://…",
            "a user name or a password",
        ),
        ("http://secret@a:1", "http://…", "a user name or a password"),
        (
            "http://a:1?key=secret",
            "http://…",
            "a query string or a fragment",
        ),
        (
            "http://a:1/#secret",
            "http://…",
            "a query string or a fragment",
        ),
        (
            "https://user:secret@a:1",
            "https://…",
            "use http://host:port",
        ),
        ("user:secret@a:1", "'…", "use http://host:port"),
        ("http://a:1/b", "http://a:1/b", "a path"),
        ("http://a:65536", "http://a:65536", "from 0 to 65535"),
        (
            "http://[::1]:65536/",
            "http://[::1]:65536/",
            "from 0 to 65535",
        ),
        ("http://a:b", "http://a:b", "from 0 to 65535"),
        ("unix:a", "unix:a", "absolute"),
    ] {
        let error = text.parse::<EngineAddress>().expect_err(text);
        assert!(error.contains(shown) && error.contains(problem), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
    assert!("http://a:65535/".parse::<EngineAddress>().is_ok());
}

#[test]
fn the_base_url_of_an_openai_compatible_engine_ends_in_v1_unless_it_has_a_path() {
    for (text, expected) in [
        ("openai+http://a:1", "http://a:1/v1"),
        ("openai+http://a:1/", "http://a:1/v1"),
        ("openai+https://a/v1/", "https://a/v1"),
        ("openai+http://[::1]:1/api/v3", "http://[::1]:1/api/v3"),
    ] {
        let EngineProtocol::OpenAi(url) = engine(text).protocol else {
            panic!("{text} is not OpenAI-compatible");
        };
        assert_eq!(url.to_string(), expected);
    }
}

#[test]
fn an_invalid_openai_address_is_rejected_without_its_secrets() {
    for text in [
        "openai+ftp://a",
        "openai+a:1",
        "openai+http://",
        "openai+http://k:secret@a/v1",
        "openai+http://a/v1?key=secret",
        "openai+http://a:x/v1",
    ] {
        let error = text.parse::<EngineAddress>().expect_err(text);
        assert!(
            !error.contains("secret") && error.contains("openai+http://host"),
            "{error}"
        );
    }
}

#[test]
fn grpc_is_another_spelling_of_the_http_address_of_a_tokenway_engine() {
    let grpc = engine("grpc://a:1");
    assert_eq!(grpc, engine("http://a:1"));
    assert!(matches!(grpc.protocol, EngineProtocol::Tokenway));
    assert_eq!(grpc.to_string(), "grpc://a:1");
    assert_eq!(grpc.endpoint().uri().to_string(), "http://a:1/");
    let error = "grpc://user:secret@a:1".parse::<EngineAddress>();
    let error = error.expect_err("a user name");
    assert!(error.contains("'grpc://…'"), "{error}");
}

#[test]
fn the_address_of_vllms_grpc_api_is_a_host_and_a_port() {
    for (text, expected) in [
        ("vllm+grpc://a:9000", "http://a:9000/"),
        ("vllm+grpc://a:9000/", "http://a:9000/"),
        ("vllm+grpc://[::1]:1", "http://[::1]:1/"),
    ] {
        let EngineProtocol::Vllm(url) = engine(text).protocol else {
            panic!("{text} is not the address of vLLM's gRPC API");
        };
        assert_eq!(url.to_string(), expected);
    }
    for (text, problem) in [
        ("vllm+grpc://a", "--grpc-port"),
        ("vllm+grpc://a:x", "from 0 to 65535"),
        ("vllm+grpc://a:1/v1", "a path"),
        ("vllm+grpc://", "vllm+grpc://host:port"),
        ("vllm+http://a:1", "vllm+grpc://host:port"),
        ("vllm+grpc://k:secret@a:1", "'vllm+grpc://…'"),
        ("vllm+grpc://a:1?key=secret", "'vllm+grpc://…'"),
    ] {
        let error = text.parse::<EngineAddress>().expect_err(text);
        assert!(error.contains(problem), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}
