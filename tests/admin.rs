//! `POST /admin/drain`, and the admin listener.

mod support;

use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::json;
use support::certificates::CertificateAuthority;
use support::http::{BodyEnd, Request, Response, completion, get, post};
use support::keys::KeysFile;
use support::program::tokenway;
use support::running_program::RunningProgram;
use tokio::net::UnixStream;

const FREE_PORT: &str = "127.0.0.1:0";

/// A loopback address in a form that the server does not recognise, so the server treats it as public.
const PUBLIC: &str = "127.1:0";

/// A server process.
struct Server {
    running: RunningProgram,
    /// Start-up lines, up to the line `ready`.
    lines: Vec<String>,
}

impl Server {
    /// Runs `tokenway` with this command line, with APIs on free ports, until it is ready.
    async fn start(command: &str, arguments: &[&str]) -> Self {
        let mut program = tokenway().args([command, "--grpc-listen", FREE_PORT]);
        if command != "engine" {
            program = program.args(["--http-listen", FREE_PORT]);
        }
        let program = program.env("TEST_RUNNER_FREQUENCY_MS", "5");
        let program = program.args(arguments).log_to_file(Stdio::piped());
        let (mut running, mut lines) = (program.start(), Vec::new());
        while !lines
            .last()
            .is_some_and(|line: &String| line.starts_with("ready "))
        {
            lines.push(running.read_line().await);
        }
        Self { running, lines }
    }

    /// Returns the start-up line that begins with this word.
    fn line(&self, word: &str) -> &str {
        let line = self.lines.iter().find(|line| line.starts_with(word));
        line.unwrap_or_else(|| panic!("no {word}: {:?}", self.lines))
    }

    /// Returns the URL in the start-up line that begins with this word.
    fn url(&self, word: &str) -> &str {
        let url = self.line(word).split_whitespace().nth(1);
        url.expect("a URL")
    }

    /// Sends a request to the listener `HTTP` or `admin`.
    async fn send(&self, listener: &str, request: Request) -> Response {
        let url = self.url(listener);
        let address = url.trim_start_matches("http://");
        request.send_to(address).await
    }

    async fn status(&self, listener: &str, request: Request) -> u16 {
        self.send(listener, request).await.status
    }
}

fn drain() -> Request {
    post("/admin/drain", "")
}

fn bearer(request: Request, key: &str) -> Request {
    request.header("authorization", &format!("Bearer {key}"))
}

fn streamed(max_tokens: u32) -> Request {
    completion(&json!({"prompt": "a", "max_tokens": max_tokens, "stream": true}))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[tokio::test]
async fn a_key_with_the_scope_admin_drains_the_server_and_running_streams_finish() {
    let keys = KeysFile::new();
    let app = keys.secret("new app --scope inference,metrics").await;
    let operator = "new operator --scope admin --requests-per-minute 1";
    let operator = keys.secret(operator).await;
    let keys = ["--keys-file", text(&keys.path), "--drain-grace", "3"];
    let mut server = Server::start("serve", &keys).await;
    assert_eq!(server.status("HTTP", drain()).await, 401);
    assert_eq!(server.status("HTTP", bearer(drain(), &app)).await, 403);
    let get_drain = bearer(get("/admin/drain"), &operator);
    assert_eq!(server.status("HTTP", get_drain).await, 405);
    let mut stream = server.send("HTTP", bearer(streamed(800), &app)).await;
    assert!(stream.read_line().await.is_some());

    // The limits of the key do not apply, and a repetition changes nothing.
    for _ in 0..3 {
        let mut response = server.send("HTTP", bearer(drain(), &operator)).await;
        assert_eq!(response.status, 202);
        let body = response.read_rest().await.json();
        assert_eq!(body, json!({"status": "draining"}));
    }
    assert_eq!(server.status("HTTP", get("/readyz")).await, 503);
    assert_eq!(server.status("HTTP", get("/livez")).await, 200);
    let late = server.send("HTTP", bearer(streamed(1), &app)).await;
    assert_eq!(late.status, 503);
    let logged = "POST /admin/drain: the server drains key=\"operator\"";
    server.running.wait_for_log(logged).await;
    assert!(server.running.read_line().await.starts_with("draining "));
    // Kubernetes sends SIGTERM after a `preStop` hook, which may be this request.
    server.running.signal(Signal::TERM);
    let rest = stream.read_rest().await;
    assert_eq!((rest.lines().len(), rest.end), (799, BodyEnd::Clean));
    assert_eq!(server.running.wait_for_exit_code().await, Some(0));
}

#[tokio::test]
async fn a_second_signal_ends_a_drain_that_was_requested_over_http() {
    let arguments = ["--admin-listen", FREE_PORT];
    let mut server = Server::start("serve", &arguments).await;
    let mut stream = server.send("HTTP", streamed(100_000)).await;
    assert!(stream.read_line().await.is_some());
    assert_eq!(server.status("admin", drain()).await, 202);
    assert!(server.running.read_line().await.starts_with("draining "));
    server.running.signal(Signal::TERM);
    server.running.signal(Signal::INT);
    assert_eq!(server.running.wait_for_exit_code().await, Some(1));
}

#[tokio::test]
async fn the_http_api_has_the_routes_for_operators_that_are_safe_there() {
    let keys = KeysFile::new();
    let operator = keys.secret("new operator --scope admin,inference").await;
    let with_keys = ["--keys-file", text(&keys.path)];
    for (arguments, expected) in [
        (&[][..], ["/metrics"].as_slice()),
        (&with_keys, &["/metrics", "/admin/drain"]),
        (&["--admin-listen", FREE_PORT], &[]),
        (
            &[&with_keys[..], &["--admin-listen", FREE_PORT]].concat(),
            &[],
        ),
    ] {
        let server = Server::start("serve", arguments).await;
        let send = async |request| server.send("HTTP", bearer(request, &operator)).await;
        let description = send(get("/openapi.json")).await.read_rest().await.json();
        let line: Vec<_> = server.line("HTTP").split_whitespace().collect();
        for path in ["/metrics", "/admin/drain"] {
            let is_expected = expected.contains(&path);
            let described = description["paths"].get(path).is_some();
            assert_eq!(described, is_expected, "{arguments:?} {path}");
            assert_eq!(line.contains(&path), is_expected, "{line:?} {path}");
            let expected = match (is_expected, path) {
                (false, _) => 404,
                (true, "/metrics") => 200,
                // The route exists, but a GET request does not start the drain.
                (true, _) => 405,
            };
            assert_eq!(
                send(get(path)).await.status,
                expected,
                "{arguments:?} {path}"
            );
        }
        if !expected.contains(&"/admin/drain") {
            assert_eq!(send(drain()).await.status, 404);
        }
        assert_eq!(send(get("/readyz")).await.status, 200);
    }
}

#[tokio::test]
async fn every_command_can_have_an_admin_listener() {
    let admin = ["--admin-listen", FREE_PORT, "--drain-grace", "0"];
    let engine = Server::start("engine", &admin).await;
    let arguments = [&admin[..], &["--engine", engine.url("gRPC")]].concat();
    let gateway = Server::start("gateway", &arguments).await;
    let serve = Server::start("serve", &admin).await;
    for server in [gateway, engine, serve] {
        for path in ["/livez", "/readyz", "/health"] {
            assert_eq!(server.status("admin", get(path)).await, 200, "{path}");
        }
        let metrics = server
            .send("admin", get("/metrics"))
            .await
            .read_rest()
            .await;
        let connections = "tokenway_connections_open{listener=\"admin\"} ";
        assert!(metrics.text.contains(connections), "{}", metrics.text);
        for path in ["/v1/models", "/openapi.json", "/admin"] {
            assert_eq!(server.status("admin", get(path)).await, 404, "{path}");
        }
        assert_eq!(server.status("admin", drain()).await, 202);
        assert_eq!(server.running.wait_for_exit_code().await, Some(0));
    }
}

#[tokio::test]
async fn the_admin_listener_stays_open_until_running_streams_have_finished() {
    let arguments = ["--admin-listen", FREE_PORT, "--drain-grace", "0"];
    let server = Server::start("serve", &arguments).await;
    let mut stream = server.send("HTTP", streamed(100_000)).await;
    assert!(stream.read_line().await.is_some());
    assert_eq!(server.status("admin", drain()).await, 202);
    assert_eq!(server.status("admin", get("/readyz")).await, 503);
    let metrics = server
        .send("admin", get("/metrics"))
        .await
        .read_rest()
        .await;
    let running = "tokenway_requests_in_flight{api=\"http\"} 1\n";
    assert!(metrics.text.contains(running), "{}", metrics.text);
    assert!(stream.read_line().await.is_some());
    // The drain ends with the last stream.
    drop(stream);
    assert_eq!(server.running.wait_for_exit_code().await, Some(0));
}

#[tokio::test]
async fn a_web_page_cannot_use_the_admin_listener() {
    let arguments = ["--admin-listen", FREE_PORT, "--cors-origins", "*"];
    let server = Server::start("serve", &arguments).await;
    for (name, value) in [
        ("origin", "http://evil.example"),
        ("origin", "null"),
        ("origin", "http://localhost:3000"),
        ("host", "rebound.example"),
    ] {
        for request in [drain(), get("/metrics")] {
            let mut response = server.send("admin", request.header(name, value)).await;
            assert_eq!(response.status, 403, "{name}: {value}");
            assert_eq!(response.header("access-control-allow-origin"), None);
            let error = response.read_rest().await.error().0;
            assert_eq!(error, "host_not_allowed");
        }
    }
    assert_eq!(server.status("admin", get("/readyz")).await, 200);
    assert_eq!(server.running.interrupt().await, Some(0));
}

#[tokio::test]
async fn a_unix_socket_needs_no_key() {
    let keys = KeysFile::new();
    keys.secret("new app").await;
    let path = keys.folder.path().join("admin.sock");
    let listen = format!("unix:{}", path.display());
    let arguments = ["--keys-file", text(&keys.path), "--admin-listen", &listen];
    let server = Server::start("serve", &arguments).await;
    assert_eq!(server.url("admin"), listen);
    assert!(server.line("admin").ends_with("; needs no key"));
    for (request, expected) in [(get("/metrics"), 200), (drain(), 202)] {
        let stream = UnixStream::connect(&path).await.expect("a connection");
        assert_eq!(request.send_on(stream).await.status, expected);
    }
    assert_eq!(server.running.wait_for_exit_code().await, Some(0));
    assert!(!path.exists(), "the socket is removed");
}

#[tokio::test]
async fn a_public_admin_address_needs_keys() {
    let keys = KeysFile::new();
    let app = keys.secret("new app").await;
    let prometheus = keys.secret("new prometheus --scope metrics").await;
    let operator = keys.secret("new operator --scope admin").await;
    for command in [
        &["serve"][..],
        &["engine"],
        &["gateway", "--engine", "http://a:1"],
    ] {
        let refused = tokenway().args(command).args(["--admin-listen", PUBLIC]);
        let refused = refused.run().await;
        assert_eq!(refused.code, Some(2), "{}", refused.stderr);
        let expected = format!("--admin-listen {PUBLIC} can be reached from other machines");
        assert!(refused.stderr.contains(&expected), "{}", refused.stderr);
    }

    let insecure = Server::start("serve", &["--admin-listen", PUBLIC, "--insecure"]).await;
    assert_eq!(insecure.status("admin", get("/metrics")).await, 200);
    assert!(insecure.line("tls").contains("not encrypted"));

    let listen = ["--admin-listen", PUBLIC, "--drain-grace", "0"];
    let arguments = [&["--keys-file", text(&keys.path)], &listen[..]].concat();
    let server = Server::start("serve", &arguments).await;
    assert!(!server.line("admin").contains("needs no key"));
    assert_eq!(server.status("admin", get("/readyz")).await, 200);
    for request in [get("/metrics"), drain()] {
        assert_eq!(server.status("admin", request.clone()).await, 401);
        assert_eq!(server.status("admin", bearer(request, &app)).await, 403);
    }
    for key in [&prometheus, &operator] {
        let metrics = bearer(get("/metrics"), key);
        assert_eq!(server.status("admin", metrics).await, 200);
    }
    assert_eq!(
        server.status("admin", bearer(drain(), &prometheus)).await,
        403
    );
    assert_eq!(
        server.status("admin", bearer(drain(), &operator)).await,
        202
    );
    assert_eq!(server.running.wait_for_exit_code().await, Some(0));
}

#[tokio::test]
async fn the_admin_listener_uses_tls_as_the_apis_do() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let authority = CertificateAuthority::new(folder.path(), "ca");
    let files = authority.sign("server");
    let tls = [
        "--tls-cert",
        text(&files.certificate),
        "--tls-key",
        text(&files.key),
    ];
    let arguments = [&tls[..], &["--admin-listen", FREE_PORT]].concat();
    let server = Server::start("serve", &arguments).await;
    let address = server.url("admin").strip_prefix("https://").expect("https");
    let stream = authority.client().connect(address).await;
    let response = get("/metrics")
        .send_on(stream.expect("a TLS connection"))
        .await;
    assert_eq!(response.status, 200);
    let mut response = get("/metrics").send_to(address).await;
    assert_eq!(response.read_rest().await.error().0, "tls_required");
}
