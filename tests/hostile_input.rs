//! Input that no well-behaved client sends: arbitrary JSON in every field, odd methods and paths, broken gRPC messages,
//! oversized heads, and bytes that are not HTTP. The server responds as documented, and other requests are not
//! affected.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request as HttpRequest};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestRunner;
use prost::Message;
use serde_json::{Map, Value, json};
use support::frames::Api;
use support::http::{Request, completion, expected_error, get, http_error, post};
use support::http2::{Connection, Outcome};
use support::{Setup, TestServer, full_speed, grpc, with_interval};
use tokenway::error::ErrorKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tonic::Code;

/// Time within which the server must act: far above what it needs, and far below its timeouts.
const WAIT_LIMIT: Duration = Duration::from_secs(5);

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

fn address(server: &TestServer, api: Api) -> String {
    match api {
        Api::Http => server.http_address(),
        Api::Grpc => server.grpc_address(),
    }
}

/// A JSON value of any type. Numbers are small or invalid, so that no request generates many tokens.
fn any_value() -> impl Strategy<Value = Value> {
    let numbers = vec![-1_i64, 0, 1, 2, 129, 1_000_000_000, i64::MIN, i64::MAX];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        select(numbers).prop_map(Value::from),
        select(vec![-0.5, 0.5, 1.0, 1e300, 5e-324]).prop_map(Value::from),
        "(\\PC|\\p{Cc}){0,3}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        let name = prop_oneof![
            Just("type".to_owned()),
            Just("text".to_owned()),
            "[a-z0-9]{0,2}"
        ];
        let entries = vec((name, inner.clone()), 0..3);
        let object = entries.prop_map(|entries| entries.into_iter().collect::<Map<_, _>>());
        prop_oneof![
            vec(inner, 0..3).prop_map(Value::Array),
            object.prop_map(Value::Object)
        ]
    })
}

/// Returns each route with a valid body and the names of all its documented fields.
fn routes(description: &Value) -> Vec<(&'static str, Value, Vec<String>)> {
    let message = json!({"role": "user", "content": "a"});
    let bodies = [
        ("/v1/completions", json!({"prompt": "a", "max_tokens": 2})),
        (
            "/v1/chat/completions",
            json!({"messages": [message], "max_tokens": 2}),
        ),
        ("/tokenize", json!({"prompt": "a"})),
        ("/detokenize", json!({"tokens": [1]})),
    ];
    let routes = bodies.map(|(path, body)| {
        let schema =
            &description["paths"][path]["post"]["requestBody"]["content"]["application/json"];
        let fields = field_names(description, &schema["schema"]);
        assert!(fields.len() >= 2, "{path} has {} fields", fields.len());
        (path, body, fields.into_iter().collect())
    });
    routes.to_vec()
}

/// Returns the names of the fields of a schema, and of the schemas that it refers to or combines.
fn field_names(description: &Value, schema: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    if let Some(fields) = schema["properties"].as_object() {
        names.extend(fields.keys().cloned());
    }
    if let Some(reference) = schema["$ref"].as_str() {
        let named = description.pointer(&reference[1..]);
        names.extend(field_names(description, named.expect("the schema exists")));
    }
    for kind in ["oneOf", "anyOf", "allOf"] {
        for part in schema[kind].as_array().into_iter().flatten() {
            names.extend(field_names(description, part));
        }
    }
    names
}

#[test]
fn any_json_in_any_field_is_accepted_or_rejected_with_its_field() {
    let runtime = Runtime::new().expect("a runtime");
    let server = runtime.block_on(server());
    let description = runtime
        .block_on(get("/openapi.json").fetch(&server))
        .1
        .json();
    for (path, body, fields) in routes(&description) {
        let cases = (select(fields), any_value());
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 128,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let checked = runner.run(&cases, |(field, value)| {
            let mut body = body.clone();
            body[&field] = value;
            let (response, answer) = runtime.block_on(post(path, body.to_string()).fetch(&server));
            if response.status == 200 {
                return Ok(());
            }
            let (code, param) = answer.error();
            let expected = if code == "model_not_found" { 404 } else { 400 };
            prop_assert_eq!(response.status, expected, "{}", answer.text);
            prop_assert!(param.is_some(), "{}", answer.text);
            Ok(())
        });
        checked.unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    let metrics = runtime.block_on(server.drain());
    metrics.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn absurd_numbers_are_rejected_by_both_apis_with_their_field() {
    let server = server().await;
    for max_tokens in [json!(1_000_000_000), json!(-1), json!(1e18), json!(-1e18)] {
        let body = json!({"prompt": "a", "max_tokens": max_tokens});
        let (status, _, param) = http_error(&server, completion(&body)).await;
        assert_eq!(
            (status, param.as_deref()),
            (400, Some("max_tokens")),
            "{body}"
        );
    }
    for max_tokens in [1_000_000_000, u32::MAX] {
        let (code, error) = grpc::grpc_error(&server, grpc::request("a", max_tokens)).await;
        assert_eq!(code, Code::InvalidArgument);
        assert_eq!(error.param.as_deref(), Some("max_tokens"));
    }
    for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.5] {
        let mut request = grpc::request("a", 5);
        request.temperature = Some(number);
        let (code, error) = grpc::grpc_error(&server, request).await;
        assert_eq!(
            (code, error.kind),
            (Code::InvalidArgument, ErrorKind::InvalidValue)
        );
        assert_eq!(error.param.as_deref(), Some("temperature"), "{number}");
    }
}

#[tokio::test]
async fn every_other_method_and_path_is_rejected_with_an_error_object() {
    let server = server().await;
    for method in ["GET", "PUT", "DELETE", "PATCH", "TRACE", "post", "BREW"] {
        let request = get("/v1/completions").method(method);
        let expected = expected_error(405, "method_not_allowed", None);
        assert_eq!(http_error(&server, request).await, expected, "{method}");
    }
    for path in [
        "/../../etc/passwd",
        "/v1/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//v1/completions",
        "/v1/completions/",
        "/v1/Completions",
        "/v1/completions%00",
        "/v1/%63ompletions",
    ] {
        let expected = expected_error(404, "not_found", None);
        assert_eq!(
            http_error(&server, post(path, "{}")).await,
            expected,
            "{path}"
        );
    }
    for path in [
        "/v1/models/../../etc/passwd",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/models/%00",
        "/v1/models/%ff",
    ] {
        let expected = expected_error(404, "model_not_found", Some("model"));
        assert_eq!(http_error(&server, get(path)).await, expected, "{path}");
    }
}

/// Sends a completion whose body has `chunks` chunks of 64 KiB and no declared length.
fn chunked_body(chunks: usize) -> Vec<u8> {
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                transfer-encoding: chunked\r\n\r\n";
    let chunk = [&b"10000\r\n"[..], &[b' '; 0x1_0000], b"\r\n"].concat();
    [head.as_bytes(), &chunk.repeat(chunks), b"0\r\n\r\n"].concat()
}

#[tokio::test]
async fn a_body_without_a_declared_length_is_rejected_when_it_becomes_too_large() {
    let server = server().await;
    let stream = TcpStream::connect(server.http_address()).await;
    let (reader, mut writer) = stream.expect("the server accepts connections").into_split();
    // The server answers before it has read 64 MiB, and may then close the connection.
    let upload = tokio::spawn(async move { writer.write_all(&chunked_body(1_024)).await });
    let reader = tokio::io::join(reader, tokio::io::sink());
    let mut response = support::http::Response::read_head(reader).await;
    assert_eq!(response.status, 413);
    let (code, _) = response.read_rest().await.error();
    assert_eq!(code, "request_too_large");
    drop(response);
    let _ = upload.await.expect("the upload does not panic");
    server.drain().await.assert_all_gauges_are_zero();
}

/// A gRPC request without a body.
fn grpc_head(path: &str) -> http::request::Builder {
    HttpRequest::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
}

/// A gRPC message with its prefix: the flag for compression, and the length.
fn framed(flag: u8, length: usize, message: &[u8]) -> Bytes {
    let length = u32::try_from(length).expect("a length of four bytes");
    [&[flag][..], &length.to_be_bytes(), message]
        .concat()
        .into()
}

#[tokio::test]
async fn broken_grpc_messages_have_the_documented_status() {
    const COMPLETE: &str = "/tokenway.v1.Inference/Complete";
    let server = server().await;
    let connection = Connection::open(&server.grpc_address(), 65_535).await;
    let message = grpc::request("a", 2).encode_to_vec();
    let whole = framed(0, message.len(), &message);
    let compressed = framed(1, message.len(), &message);
    let (half, zeros) = (whole.slice(..whole.len() / 2), framed(0, 100, &[0; 100]));
    for (name, path, encoding, body, expected) in [
        ("whole", COMPLETE, None, whole.clone(), &[Code::Ok][..]),
        (
            "declared as 4 GiB",
            COMPLETE,
            None,
            framed(0, 0xffff_ffff, &[]),
            &[Code::OutOfRange],
        ),
        (
            "declared as 64 MiB",
            COMPLETE,
            None,
            framed(0, 64 << 20, &message),
            &[Code::OutOfRange],
        ),
        (
            "truncated",
            COMPLETE,
            None,
            half,
            &[Code::Internal, Code::InvalidArgument],
        ),
        (
            "truncated prefix",
            COMPLETE,
            None,
            whole.slice(..3),
            &[Code::Internal, Code::InvalidArgument],
        ),
        (
            "without a message",
            COMPLETE,
            None,
            Bytes::new(),
            &[Code::Internal, Code::InvalidArgument],
        ),
        (
            "undecodable",
            COMPLETE,
            None,
            zeros,
            &[Code::Internal, Code::InvalidArgument],
        ),
        (
            "unknown flag",
            COMPLETE,
            None,
            framed(7, 1, b"a"),
            &[Code::Internal, Code::InvalidArgument],
        ),
        (
            "gzip",
            COMPLETE,
            Some("gzip"),
            compressed.clone(),
            &[Code::Unimplemented],
        ),
        (
            "unknown encoding",
            COMPLETE,
            Some("x"),
            compressed.clone(),
            &[Code::Unimplemented],
        ),
        (
            "compressed, not declared",
            COMPLETE,
            None,
            compressed,
            &[Code::Unimplemented, Code::Internal, Code::InvalidArgument],
        ),
        (
            "unknown method",
            "/tokenway.v1.Inference/Nothing",
            None,
            whole.clone(),
            &[Code::Unimplemented],
        ),
        (
            "unknown service",
            "/nothing.v1.Nothing/Complete",
            None,
            whole.clone(),
            &[Code::Unimplemented],
        ),
        (
            "no method",
            "/",
            None,
            whole.clone(),
            &[Code::Unimplemented],
        ),
        (
            "traversal",
            "/../../etc/passwd",
            None,
            whole,
            &[Code::Unimplemented],
        ),
    ] {
        let mut head = grpc_head(path);
        if let Some(encoding) = encoding {
            head = head.header("grpc-encoding", encoding);
        }
        let status = connection.grpc_status(head, body).await;
        let code = status.map(|status| status.code());
        assert!(
            code.is_some_and(|code| expected.contains(&code)),
            "{name}: {code:?}"
        );
    }
    server.drain().await.assert_all_gauges_are_zero();
}

/// Runs a stream on another connection while `attack` runs. The stream must be complete.
async fn while_streaming(server: &TestServer, attack: impl Future<Output = ()>) {
    let body = json!({"prompt": "a", "max_tokens": 300, "stream": true});
    let mut response = completion(&body).send(server).await;
    attack.await;
    assert_eq!(response.read_rest().await.lines().len(), 300);
}

#[tokio::test]
async fn oversized_heads_are_rejected_by_both_apis() {
    let server = Setup::test_runner(with_interval(Duration::from_millis(1)))
        .start()
        .await;
    while_streaming(&server, async {
        for api in [Api::Http, Api::Grpc] {
            let many = (0..200).fold(head_for(api), |head, number| {
                head.header(format!("x-{number}"), "a")
            });
            let large = head_for(api).header("x-large", "x".repeat(1 << 20));
            for (head, has_limit) in [(many, matches!(api, Api::Http)), (large, true)] {
                let connection = Connection::open(&address(&server, api), 65_535).await;
                let outcome = connection.outcome(head.body(()).expect("a request")).await;
                let is_rejected = matches!(outcome, Outcome::Status(431) | Outcome::Closed);
                // The gRPC API limits the size of all headers, not their number.
                assert_eq!(is_rejected, has_limit, "{api:?}: {outcome:?}");
            }
        }
        let many = (0..200).fold(get("/livez"), |request: Request, number| {
            request.header(&format!("x-{number}"), "a")
        });
        let large = get("/livez").header("x-large", &"x".repeat(1 << 20));
        for request in [many, large] {
            assert_eq!(request.send(&server).await.status, 431);
        }
    })
    .await;
    server.drain().await.assert_all_gauges_are_zero();
}

fn head_for(api: Api) -> http::request::Builder {
    match api {
        Api::Http => HttpRequest::builder().method(Method::GET).uri("/livez"),
        Api::Grpc => grpc_head("/tokenway.v1.Inference/ListModels"),
    }
}

/// Byte sequences that are not valid HTTP from their start, or from some point on.
fn garbage() -> Vec<Vec<u8>> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut state = 1_u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    let random: Vec<u8> = (0..100_000).map(|_| noise()).collect();
    vec![
        vec![0; 100_000],
        vec![0xff; 100_000],
        random.clone(),
        vec![b'A'; 1_000_000],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"GET\r\n\r\n".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"GET / HTTP/1.1\r\nhost: localhost\r\nno colon\r\n\r\n".to_vec(),
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: \x00\x01\r\n\r\n".to_vec(),
        [PREFACE, &random].concat(),
        [PREFACE, &[0xff; 10_000]].concat(),
        // A SETTINGS frame of an invalid length, a HEADERS frame on stream 0, a DATA frame on an idle stream, and a
        // frame above the maximum size.
        [PREFACE, b"\x00\x00\x05\x04\x00\x00\x00\x00\x00aaaaa"].concat(),
        [
            PREFACE,
            b"\x00\x00\x00\x04\0\0\0\0\0\x00\x00\x01\x01\x05\0\0\0\0\x82",
        ]
        .concat(),
        [
            PREFACE,
            b"\x00\x00\x00\x04\0\0\0\0\0\x00\x00\x01\x00\x01\0\0\0\x05a",
        ]
        .concat(),
        [
            PREFACE,
            b"\x00\x00\x00\x04\0\0\0\0\0\xff\xff\xff\x00\x01\0\0\0\x01",
        ]
        .concat(),
        // HEADERS with an invalid HPACK index.
        [
            PREFACE,
            b"\x00\x00\x00\x04\0\0\0\0\0\x00\x00\x02\x01\x05\0\0\0\x01\xff\xff",
        ]
        .concat(),
    ]
}

#[tokio::test]
async fn bytes_that_are_no_http_close_their_connection_only() {
    let server = Setup::test_runner(with_interval(Duration::from_millis(1)))
        .start()
        .await;
    while_streaming(&server, async {
        for api in [Api::Http, Api::Grpc] {
            for (number, bytes) in garbage().into_iter().enumerate() {
                let stream = TcpStream::connect(address(&server, api)).await;
                let mut stream = stream.expect("the server accepts connections");
                // The server may close the connection before it has read everything.
                let _ = stream.write_all(&bytes).await;
                let closed = timeout(WAIT_LIMIT, stream.read_to_end(&mut Vec::new())).await;
                assert!(
                    closed.is_ok(),
                    "{api:?}, number {number}: the connection stays open"
                );
            }
        }
    })
    .await;
    assert_eq!(get("/livez").send(&server).await.status, 200);
    server.drain().await.assert_all_gauges_are_zero();
}
