//! Under which host names the HTTP API answers, and which web pages may use it. Most requests are written as browsers
//! write them, and what a browser would let its page read stands in the answers' headers; Chromium has the last word.

mod support;

use serde_json::json;
use support::http::{End, Refusal, Request, Response, completion, get, post, refusal, refused};
use support::http2::Connection;
use support::program::chromium;
use support::{Setup, TestServer, full_speed};
use tokenway::gateway::OriginPolicy;
use tokenway::listen::Address;
use tokenway::runner::llm_test::TestRunnerOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};

const PAGE: &str = "http://localhost:3000";

/// The test runner behind an HTTP API with these entries of `--allowed-hosts` and `--cors-origins`.
fn allowing(hosts: &[&str], origins: &[&str], options: TestRunnerOptions) -> Setup {
    let mut setup = Setup::test_runner(options);
    let door = setup.parts.http.as_mut().expect("it has an HTTP API");
    door.origins = OriginPolicy {
        allowed_hosts: hosts.iter().map(|host| host.parse().expect(host)).collect(),
        cors_origins: origins
            .iter()
            .map(|origin| origin.parse().expect(origin))
            .collect(),
    };
    setup
}

async fn server(hosts: &[&str], origins: &[&str]) -> TestServer {
    allowing(hosts, origins, full_speed()).start().await
}

fn ask() -> Request {
    completion(&json!({"prompt": "a", "max_tokens": 1}))
}

/// A request of each kind besides health checks.
fn every_kind() -> [Request; 7] {
    [
        ask(),
        post("/tokenize", r#"{"prompt": "a"}"#),
        get("/v1/models"),
        get("/metrics"),
        get("/openapi.json"),
        get("/nothing"),
        get("/v1/completions").method("OPTIONS"),
    ]
}

fn forbidden(header: &str) -> Refusal {
    refused(403, "host_not_allowed", Some(header))
}

async fn status(server: &TestServer, request: Request) -> u16 {
    request.fetch(server).await.0.status
}

#[tokio::test]
async fn a_host_name_that_somebody_else_may_have_pointed_here_is_refused() {
    let server = server(&[], &[]).await;
    for host in [
        "rebound.example",
        "rebound.example:8000",
        "localhost.rebound.example",
        "127.0.0.1.rebound.example",
        "notlocalhost",
        "127.1",
        "user@localhost",
        "localhost, rebound.example",
        "[::1",
    ] {
        for request in every_kind() {
            let request = request.header("host", host);
            assert_eq!(refusal(&server, request).await, forbidden("host"), "{host}");
        }
    }
}

#[tokio::test]
async fn names_of_this_machine_and_addresses_are_served() {
    let server = server(&[], &[]).await;
    for host in [
        "localhost",
        "LocalHost.:8000",
        "model.localhost",
        "127.0.0.1:8000",
        "127.9.9.9",
        "[::1]:8000",
        "10.1.2.3:8000",
        "0.0.0.0",
        "",
    ] {
        let served = status(&server, ask().header("host", host)).await;
        assert_eq!(served, 200, "{host}");
    }
}

#[tokio::test]
async fn a_refusal_of_a_host_name_says_which_setting_allows_it() {
    let server = server(&[], &[]).await;
    let request = ask().header("host", "gateway.example:8000");
    let (_, body) = request.fetch(&server).await;
    let said = "start the server with --allowed-hosts gateway.example.";
    assert!(body.text.contains(said), "{}", body.text);
}

#[tokio::test]
async fn health_is_told_under_every_host_name_and_not_to_foreign_pages() {
    let server = server(&[], &[]).await;
    for route in ["/livez", "/readyz", "/health"] {
        let request = get(route).header("host", "probe.example");
        assert_eq!(status(&server, request).await, 200, "{route}");
        let page = get(route).header("origin", "http://rebound.example");
        assert_eq!(refusal(&server, page).await, forbidden("origin"));
    }
}

#[tokio::test]
async fn allowed_hosts_are_served_and_a_star_is_every_host() {
    let listed = server(&["gateway.example", ".internal.example:8000"], &[]).await;
    for (host, expected) in [
        ("gateway.example", 200),
        ("gateway.example:1234", 200),
        ("a.gateway.example", 403),
        ("internal.example:8000", 200),
        ("a.b.internal.example:8000", 200),
        ("a.internal.example:8001", 403),
        ("localhost", 200),
    ] {
        let got = status(&listed, ask().header("host", host)).await;
        assert_eq!(got, expected, "{host}");
    }
    let any = server(&["*"], &[]).await;
    for host in ["rebound.example", "what is this"] {
        assert_eq!(status(&any, ask().header("host", host)).await, 200);
    }
}

#[tokio::test]
async fn every_host_that_a_request_names_must_be_allowed() {
    let server = server(&[], &[]).await;
    // In HTTP/1.1 an absolute URI goes before the header, in HTTP/2 there is `:authority`.
    let absolute = get("http://rebound.example/v1/models");
    assert_eq!(refusal(&server, absolute).await, forbidden("host"));
    let connection = Connection::open(&server.http_address(), 65_535).await;
    for (authority, host, expected) in [
        ("localhost:8000", None, 200),
        ("rebound.example", None, 403),
        ("localhost", Some("rebound.example"), 403),
        ("rebound.example", Some("localhost"), 403),
    ] {
        let mut request = http::Request::get(format!("http://{authority}/v1/models"));
        if let Some(host) = host {
            request = request.header("host", host);
        }
        let request = request.body(()).expect("a request");
        let status = connection.status(request).await;
        assert_eq!(status.as_u16(), expected, "{authority} {host:?}");
    }
}

#[tokio::test]
async fn a_unix_socket_is_reached_under_any_host_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("http.sock");
    let mut setup = allowing(&[], &[], full_speed());
    let door = setup.parts.http.as_mut().expect("it has an HTTP API");
    door.listen = Address::Unix(path.clone());
    let _server = setup.start().await;
    for (headers, expected) in [
        ("host: tokenway", "HTTP/1.1 200"),
        (
            "host: tokenway\r\norigin: http://evil.example",
            "HTTP/1.1 403",
        ),
    ] {
        let mut stream = UnixStream::connect(&path).await.expect("it listens");
        let request = format!("GET /v1/models HTTP/1.1\r\n{headers}\r\nconnection: close\r\n\r\n");
        let sent = stream.write_all(request.as_bytes()).await;
        sent.expect("it is taken");
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer).await;
        read.expect("an answer");
        assert!(answer.starts_with(expected), "{headers}: {answer}");
    }
}

#[tokio::test]
async fn a_web_page_of_a_foreign_origin_is_refused_and_so_is_its_preflight() {
    let server = server(&[], &["http://allowed.example"]).await;
    for origin in [
        "http://evil.example",
        "null",
        PAGE,
        "http://localhost:1",
        "https://allowed.example",
        "http://allowed.example:8000",
        "chrome-extension://abcdef",
        "http://allowed.example http://evil.example",
    ] {
        for request in every_kind() {
            let request = request.header("origin", origin);
            let request = request.header("access-control-request-method", "POST");
            let (response, body) = request.fetch(&server).await;
            let (code, param) = body.error();
            let got = (response.status, code, param);
            assert_eq!(got, forbidden("origin"), "{origin}");
            assert_eq!(response.header("access-control-allow-origin"), None);
            assert!(response.header("x-request-id").is_some());
        }
    }
}

#[tokio::test]
async fn a_web_page_of_the_servers_own_origin_is_served() {
    let server = server(&["gateway.example"], &[]).await;
    let address = server.http_address();
    let own = format!("http://{address}");
    for (host, origin, expected) in [
        (&*address, &*own, 200),
        ("localhost:8000", "http://LOCALHOST:8000", 200),
        // Behind a proxy that ends TLS.
        ("gateway.example", "https://gateway.example", 200),
        ("gateway.example:443", "https://gateway.example", 200),
        ("gateway.example", "http://gateway.example:8000", 403),
        ("localhost:8000", "http://127.0.0.1:8000", 403),
        // The page's own name has been pointed here.
        ("rebound.example", "http://rebound.example", 403),
        ("", "http://localhost", 403),
    ] {
        let request = ask().header("host", host).header("origin", origin);
        let got = status(&server, request).await;
        assert_eq!(got, expected, "{host} {origin}");
    }
}

#[tokio::test]
async fn the_preflight_of_an_allowed_page_is_answered() {
    let server = server(&[], &[PAGE]).await;
    let preflight = get("/v1/completions")
        .method("OPTIONS")
        .header("origin", PAGE)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,x-anything")
        .header("access-control-request-private-network", "true");
    let (response, body) = preflight.fetch(&server).await;
    assert_eq!((response.status, body.end), (200, End::Clean));
    for (header, value) in [
        ("access-control-allow-origin", PAGE),
        ("access-control-allow-methods", "GET,POST"),
        ("access-control-allow-headers", "authorization,x-anything"),
        ("access-control-allow-private-network", "true"),
        ("access-control-max-age", "600"),
    ] {
        assert_eq!(response.header(header), Some(value), "{header}");
    }
    assert_eq!(response.header("access-control-allow-credentials"), None);
    assert!(varies_by(&response, "origin"));
}

fn varies_by(response: &Response, header: &str) -> bool {
    let mut names = response.headers_of("vary").flat_map(|it| it.split(", "));
    names.any(|name| name.eq_ignore_ascii_case(header))
}

#[tokio::test]
async fn an_allowed_page_can_read_answers_and_refusals() {
    let server = server(&[], &[PAGE]).await;
    let stream = completion(&json!({"prompt": "a", "max_tokens": 1, "stream": true}));
    for (request, expected) in [
        (ask(), 200),
        (stream, 200),
        (get("/v1/models"), 200),
        (post("/v1/completions", "no JSON"), 400),
        (ask().header("x-request-id", "é"), 400),
        (get("/nothing"), 404),
        (get("/v1/completions"), 405),
        (ask().header("content-length", "5000000"), 413),
        (ask().header("content-type", "text/plain"), 415),
    ] {
        let response = request.header("origin", PAGE).send(&server).await;
        assert_eq!(response.status, expected);
        let allowed = response.header("access-control-allow-origin");
        assert_eq!(allowed, Some(PAGE), "{expected}");
        let exposed = response.header("access-control-expose-headers");
        assert_eq!(exposed, Some("*"), "{expected}");
        assert!(varies_by(&response, "origin"), "{expected}");
    }
}

#[tokio::test]
async fn an_allowed_page_can_read_a_stream_to_its_error() {
    let options = TestRunnerOptions {
        fail_at: Some(3),
        ..full_speed()
    };
    let server = allowing(&[], &[PAGE], options).start().await;
    let request = completion(&json!({"prompt": "a", "max_tokens": 5, "stream": true}));
    let (response, body) = request.header("origin", PAGE).fetch(&server).await;
    assert_eq!(response.header("access-control-allow-origin"), Some(PAGE));
    assert!(varies_by(&response, "accept") && varies_by(&response, "origin"));
    let lines = body.lines();
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[3]["error"]["code"], "internal_error");
}

#[tokio::test]
async fn with_a_star_every_page_may_use_the_server() {
    let server = server(&[], &["*"]).await;
    for origin in ["http://anything.example", "null"] {
        let response = ask().header("origin", origin).send(&server).await;
        assert_eq!(response.status, 200);
        let allowed = response.header("access-control-allow-origin");
        assert_eq!(allowed, Some(origin));
    }
    // The name under which the server was reached must be its own all the same.
    let rebound = ask().header("host", "rebound.example");
    assert_eq!(refusal(&server, rebound).await, forbidden("host"));
}

/// What Chromium shows of the page at this URL.
async fn shown(url: &str) -> String {
    let profile = tempfile::tempdir().expect("a folder");
    chromium(url, profile.path()).run().await.success()
}

/// What a page of this listener's origin reads of a server.
async fn seen_by_page(page: &str, server: &TestServer) -> Vec<String> {
    let dom = shown(&format!("{page}/?{}", server.http_url())).await;
    let seen = dom
        .split_once("<pre id=\"seen\">")
        .and_then(|(_, rest)| rest.split_once("end\n"));
    let (seen, _) = seen.unwrap_or_else(|| panic!("the page's script has not ended: {dom}"));
    seen.lines().map(str::to_owned).collect()
}

/// Answers every request with the page, until the test ends; its origin is left.
async fn serve_page() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let origin = format!("http://{}", listener.local_addr().expect("it is bound"));
    let page = include_str!("clients/page.html");
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{page}",
        page.len()
    );
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            // A browser may have thought better of a connection.
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    origin
}

#[tokio::test]
async fn chromium_lets_an_allowed_page_read_streams_and_errors() {
    let page = serve_page().await;
    let server = server(&[], &[&page]).await;
    let seen = [
        "stream: 200, named, lines: 5",
        "error: 400, named, lines: 1",
        "simple: 415, named, lines: 1",
        "models: 200, named, lines: 1",
    ];
    assert_eq!(seen_by_page(&page, &server).await, seen);
}

#[tokio::test]
async fn chromium_lets_a_page_of_another_origin_read_nothing() {
    let page = serve_page().await;
    let server = server(&[], &[]).await;
    let seen = ["stream", "error", "simple", "models"].map(|it| format!("{it}: TypeError"));
    assert_eq!(seen_by_page(&page, &server).await, seen);
}

#[tokio::test]
async fn chromium_reaches_nothing_by_a_name_that_was_pointed_here() {
    let server = server(&[], &[]).await;
    let address = server.http_address();
    let (_, port) = address.rsplit_once(':').expect("it has a port");
    let dom = shown(&format!("http://rebound.example:{port}/v1/models")).await;
    assert!(dom.contains("host_not_allowed"), "{dom}");
    let dom = shown(&format!("http://localhost:{port}/v1/models")).await;
    assert!(dom.contains("llm_test"), "{dom}");
}
