//! Host name and origin checks of the HTTP API. Most tests send the headers that a browser would send and check the
//! CORS headers of the response. Three tests run Chromium.

mod support;

use serde_json::json;
use support::http::{
    BodyEnd, HttpError, Request, Response, completion, expected_error, get, http_error, post,
};
use support::http2::Connection;
use support::program::chromium;
use support::{Setup, TestServer, full_speed};
use tokenway::gateway::OriginPolicy;
use tokenway::listen::Address;
use tokenway::runner::llm_test::TestRunnerOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};

const PAGE_ORIGIN: &str = "http://localhost:3000";

/// Serves the test runner over an HTTP API with these values of `--allowed-hosts` and `--cors-origins`.
fn setup_allowing(hosts: &[&str], origins: &[&str], options: TestRunnerOptions) -> Setup {
    let mut setup = Setup::test_runner(options);
    let http = setup.parts.http.as_mut().expect("the HTTP API is enabled");
    http.origins = OriginPolicy {
        allowed_hosts: hosts.iter().map(|host| host.parse().expect(host)).collect(),
        cors_origins: origins
            .iter()
            .map(|origin| origin.parse().expect(origin))
            .collect(),
    };
    setup
}

async fn server(hosts: &[&str], origins: &[&str]) -> TestServer {
    setup_allowing(hosts, origins, full_speed()).start().await
}

fn completion_request() -> Request {
    completion(&json!({"prompt": "a", "max_tokens": 1}))
}

/// Returns one request for each route except the health routes.
fn one_request_per_route() -> [Request; 7] {
    [
        completion_request(),
        post("/tokenize", r#"{"prompt": "a"}"#),
        get("/v1/models"),
        get("/metrics"),
        get("/openapi.json"),
        get("/nothing"),
        get("/v1/completions").method("OPTIONS"),
    ]
}

fn forbidden_error(header: &str) -> HttpError {
    expected_error(403, "host_not_allowed", Some(header))
}

async fn request_status(server: &TestServer, request: Request) -> u16 {
    request.fetch(server).await.0.status
}

#[tokio::test]
async fn foreign_host_names_are_rejected() {
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
        for request in one_request_per_route() {
            let request = request.header("host", host);
            assert_eq!(
                http_error(&server, request).await,
                forbidden_error("host"),
                "{host}"
            );
        }
    }
}

#[tokio::test]
async fn localhost_names_and_ip_addresses_are_served() {
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
        let served = request_status(&server, completion_request().header("host", host)).await;
        assert_eq!(served, 200, "{host}");
    }
}

#[tokio::test]
async fn the_host_error_names_the_setting_that_allows_it() {
    let server = server(&[], &[]).await;
    let request = completion_request().header("host", "gateway.example:8000");
    let (_, body) = request.fetch(&server).await;
    let hint = "start the server with --allowed-hosts gateway.example.";
    assert!(body.text.contains(hint), "{}", body.text);
}

#[tokio::test]
async fn health_routes_accept_any_host_but_no_foreign_origin() {
    let server = server(&[], &[]).await;
    for route in ["/livez", "/readyz", "/health"] {
        let request = get(route).header("host", "probe.example");
        assert_eq!(request_status(&server, request).await, 200, "{route}");
        let page = get(route).header("origin", "http://rebound.example");
        assert_eq!(http_error(&server, page).await, forbidden_error("origin"));
    }
}

#[tokio::test]
async fn allowed_hosts_are_served_and_a_star_allows_every_host() {
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
        let got = request_status(&listed, completion_request().header("host", host)).await;
        assert_eq!(got, expected, "{host}");
    }
    let any = server(&["*"], &[]).await;
    for host in ["rebound.example", "what is this"] {
        assert_eq!(
            request_status(&any, completion_request().header("host", host)).await,
            200
        );
    }
}

#[tokio::test]
async fn every_host_named_by_a_request_must_be_allowed() {
    let server = server(&[], &[]).await;
    // An absolute URI in HTTP/1.1 and `:authority` in HTTP/2 both take precedence over the `host` header.
    let absolute = get("http://rebound.example/v1/models");
    assert_eq!(http_error(&server, absolute).await, forbidden_error("host"));
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
async fn a_unix_socket_accepts_any_host_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("http.sock");
    let mut setup = setup_allowing(&[], &[], full_speed());
    let http = setup.parts.http.as_mut().expect("the HTTP API is enabled");
    http.listen = Address::Unix(path.clone());
    let _server = setup.start().await;
    for (headers, expected) in [
        ("host: tokenway", "HTTP/1.1 200"),
        (
            "host: tokenway\r\norigin: http://evil.example",
            "HTTP/1.1 403",
        ),
    ] {
        let mut stream = UnixStream::connect(&path)
            .await
            .expect("the server accepts connections");
        let request = format!("GET /v1/models HTTP/1.1\r\n{headers}\r\nconnection: close\r\n\r\n");
        let sent = stream.write_all(request.as_bytes()).await;
        sent.expect("the request is written");
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer).await;
        read.expect("the server responds");
        assert!(answer.starts_with(expected), "{headers}: {answer}");
    }
}

#[tokio::test]
async fn foreign_origins_and_their_preflights_are_rejected() {
    let server = server(&[], &["http://allowed.example"]).await;
    for origin in [
        "http://evil.example",
        "null",
        PAGE_ORIGIN,
        "http://localhost:1",
        "https://allowed.example",
        "http://allowed.example:8000",
        "chrome-extension://abcdef",
        "http://allowed.example http://evil.example",
    ] {
        for request in one_request_per_route() {
            let request = request.header("origin", origin);
            let request = request.header("access-control-request-method", "POST");
            let (response, body) = request.fetch(&server).await;
            let (code, param) = body.error();
            let got = (response.status, code, param);
            assert_eq!(got, forbidden_error("origin"), "{origin}");
            assert_eq!(response.header("access-control-allow-origin"), None);
            assert!(response.header("x-request-id").is_some());
        }
    }
}

#[tokio::test]
async fn the_servers_own_origin_is_served() {
    let server = server(&["gateway.example"], &[]).await;
    let address = server.http_address();
    let own = format!("http://{address}");
    for (host, origin, expected) in [
        (&*address, &*own, 200),
        ("localhost:8000", "http://LOCALHOST:8000", 200),
        // The origin of a page behind a proxy that terminates TLS.
        ("gateway.example", "https://gateway.example", 200),
        ("gateway.example:443", "https://gateway.example", 200),
        ("gateway.example", "http://gateway.example:8000", 403),
        ("localhost:8000", "http://127.0.0.1:8000", 403),
        // DNS rebinding: the page's own host name resolves to this server.
        ("rebound.example", "http://rebound.example", 403),
        ("", "http://localhost", 403),
    ] {
        let request = completion_request()
            .header("host", host)
            .header("origin", origin);
        let got = request_status(&server, request).await;
        assert_eq!(got, expected, "{host} {origin}");
    }
}

#[tokio::test]
async fn the_preflight_of_an_allowed_origin_is_answered() {
    let server = server(&[], &[PAGE_ORIGIN]).await;
    let preflight = get("/v1/completions")
        .method("OPTIONS")
        .header("origin", PAGE_ORIGIN)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,x-anything")
        .header("access-control-request-private-network", "true");
    let (response, body) = preflight.fetch(&server).await;
    assert_eq!((response.status, body.end), (200, BodyEnd::Clean));
    for (header, value) in [
        ("access-control-allow-origin", PAGE_ORIGIN),
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
async fn an_allowed_origin_can_read_responses_and_errors() {
    let server = server(&[], &[PAGE_ORIGIN]).await;
    let stream = completion(&json!({"prompt": "a", "max_tokens": 1, "stream": true}));
    for (request, expected) in [
        (completion_request(), 200),
        (stream, 200),
        (get("/v1/models"), 200),
        (post("/v1/completions", "no JSON"), 400),
        (completion_request().header("x-request-id", "é"), 400),
        (get("/nothing"), 404),
        (get("/v1/completions"), 405),
        (
            completion_request().header("content-length", "5000000"),
            413,
        ),
        (
            completion_request().header("content-type", "text/plain"),
            415,
        ),
    ] {
        let response = request.header("origin", PAGE_ORIGIN).send(&server).await;
        assert_eq!(response.status, expected);
        let allowed = response.header("access-control-allow-origin");
        assert_eq!(allowed, Some(PAGE_ORIGIN), "{expected}");
        let exposed = response.header("access-control-expose-headers");
        assert_eq!(exposed, Some("*"), "{expected}");
        assert!(varies_by(&response, "origin"), "{expected}");
    }
}

#[tokio::test]
async fn an_allowed_origin_can_read_a_stream_up_to_its_error() {
    let options = TestRunnerOptions {
        fail_at: Some(3),
        ..full_speed()
    };
    let server = setup_allowing(&[], &[PAGE_ORIGIN], options).start().await;
    let request = completion(&json!({"prompt": "a", "max_tokens": 5, "stream": true}));
    let (response, body) = request.header("origin", PAGE_ORIGIN).fetch(&server).await;
    assert_eq!(
        response.header("access-control-allow-origin"),
        Some(PAGE_ORIGIN)
    );
    assert!(varies_by(&response, "accept") && varies_by(&response, "origin"));
    let lines = body.lines();
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[3]["error"]["code"], "internal_error");
}

#[tokio::test]
async fn a_star_allows_every_origin() {
    let server = server(&[], &["*"]).await;
    for origin in ["http://anything.example", "null"] {
        let response = completion_request()
            .header("origin", origin)
            .send(&server)
            .await;
        assert_eq!(response.status, 200);
        let allowed = response.header("access-control-allow-origin");
        assert_eq!(allowed, Some(origin));
    }
    // An allowed origin does not disable the check of the host name.
    let rebound = completion_request().header("host", "rebound.example");
    assert_eq!(http_error(&server, rebound).await, forbidden_error("host"));
}

/// Loads this URL in Chromium and returns the DOM of the page.
async fn dom_in_chromium(url: &str) -> String {
    let profile = tempfile::tempdir().expect("a temporary folder");
    chromium(url, profile.path()).run().await.expect_success()
}

/// Opens a page of the origin `page` in Chromium. Returns the results that its script reads from the server.
async fn results_in_page(page: &str, server: &TestServer) -> Vec<String> {
    let dom = dom_in_chromium(&format!("{page}/?{}", server.http_url())).await;
    let seen = dom
        .split_once("<pre id=\"seen\">")
        .and_then(|(_, rest)| rest.split_once("end\n"));
    let (seen, _) = seen.unwrap_or_else(|| panic!("the page's script did not finish: {dom}"));
    seen.lines().map(str::to_owned).collect()
}

/// Serves the test page on every path until the test ends. Returns the origin of the page.
async fn serve_page() -> String {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port exists");
    let origin = format!(
        "http://{}",
        listener.local_addr().expect("the listener is bound")
    );
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
            // Writing fails if the browser has closed the connection.
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    origin
}

#[tokio::test]
async fn chromium_lets_an_allowed_origin_read_streams_and_errors() {
    let page = serve_page().await;
    let server = server(&[], &[&page]).await;
    let seen = [
        "stream: 200, named, lines: 5",
        "error: 400, named, lines: 1",
        "simple: 415, named, lines: 1",
        "models: 200, named, lines: 1",
    ];
    assert_eq!(results_in_page(&page, &server).await, seen);
}

#[tokio::test]
async fn chromium_lets_a_foreign_origin_read_nothing() {
    let page = serve_page().await;
    let server = server(&[], &[]).await;
    let seen = ["stream", "error", "simple", "models"].map(|it| format!("{it}: TypeError"));
    assert_eq!(results_in_page(&page, &server).await, seen);
}

#[tokio::test]
async fn chromium_is_rejected_after_dns_rebinding() {
    let server = server(&[], &[]).await;
    let address = server.http_address();
    let (_, port) = address.rsplit_once(':').expect("the address has a port");
    let dom = dom_in_chromium(&format!("http://rebound.example:{port}/v1/models")).await;
    assert!(dom.contains("host_not_allowed"), "{dom}");
    let dom = dom_in_chromium(&format!("http://localhost:{port}/v1/models")).await;
    assert!(dom.contains("llm_test"), "{dom}");
}
