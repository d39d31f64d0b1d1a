//! TLS on both APIs, and between a gateway and its engines.

mod support;

use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::process::Signal;
use serde_json::json;
use support::certificates::{CertificateAuthority, CertificateFiles};
use support::grpc;
use support::http::{BodyEnd, Request, completion, get, texts};
use support::program::{start_gateway, start_server, tokenway};
use support::running_program::RunningProgram;
use tempfile::TempDir;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls::version;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

/// A server with TLS, and the authority of its certificate.
struct TlsServer {
    running: RunningProgram,
    http: String,
    grpc: String,
    authority: CertificateAuthority,
    _folder: TempDir,
}

impl TlsServer {
    /// Starts a server whose clients need no certificate.
    async fn start(arguments: &[&str]) -> Self {
        let (folder, authority) = new_authority();
        let files = authority.sign("server");
        Self::start_with(folder, authority, &files, arguments).await
    }

    async fn start_with(
        folder: TempDir,
        authority: CertificateAuthority,
        files: &CertificateFiles,
        arguments: &[&str],
    ) -> Self {
        let (running, urls) = start_server(&[&flags(files)[..], arguments].concat()).await;
        let [http, grpc] = urls.map(|url| {
            let address = url.strip_prefix("https://");
            address.expect("the URL says https").to_owned()
        });
        Self {
            running,
            http,
            grpc,
            authority,
            _folder: folder,
        }
    }

    /// Sends a request over HTTP/1.1 with TLS. Reads the response head.
    async fn send(&self, request: Request) -> support::http::Response {
        let stream = self.authority.client().connect(&self.http).await;
        request.send_on(stream.expect("a TLS connection")).await
    }

    async fn channel(&self, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("https://{}", self.grpc))?;
        endpoint.tls_config(tls)?.connect().await
    }

    /// Returns the certificate that the server presents now on the HTTP API.
    async fn certificate(&self) -> Vec<u8> {
        let stream = self.authority.client().connect(&self.http).await;
        let stream = stream.expect("a TLS connection");
        let certificates = stream.get_ref().1.peer_certificates();
        certificates.expect("a certificate")[0].to_vec()
    }
}

fn new_authority() -> (TempDir, CertificateAuthority) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let authority = CertificateAuthority::new(folder.path(), "ca");
    (folder, authority)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn flags(files: &CertificateFiles) -> [&str; 4] {
    [
        "--tls-cert",
        text(&files.certificate),
        "--tls-key",
        text(&files.key),
    ]
}

fn streamed(max_tokens: u32) -> Request {
    completion(&json!({"prompt": "a", "max_tokens": max_tokens, "stream": true}))
}

#[tokio::test]
async fn both_apis_stream_over_tls_1_2_and_1_3() {
    let server = TlsServer::start(&[]).await;
    for (version, protocols) in [
        (&version::TLS12, &["http/1.1"][..]),
        (&version::TLS13, &["http/1.1"]),
        (&version::TLS13, &[]),
    ] {
        let client = server.authority.client();
        let client = client.version(version).protocols(protocols);
        let stream = client.connect(&server.http).await;
        let mut response = streamed(3).send_on(stream.expect("a connection")).await;
        let body = response.read_rest().await;
        assert_eq!(body.end, BodyEnd::Clean);
        assert_eq!(texts(&body.lines(), 0), ["token_0", "token_1", "token_2"]);
    }
    for address in [&server.http, &server.grpc] {
        let client = server.authority.client().protocols(&["h2", "http/1.1"]);
        let stream = client.connect(address).await.expect("a connection");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    }
    let http_only = server.authority.client().protocols(&["http/1.1"]);
    http_only
        .connect(&server.grpc)
        .await
        .expect_err("the gRPC API requires HTTP/2");

    let channel = server.channel(server.authority.grpc_config()).await;
    let mut client = InferenceClient::new(channel.expect("a connection"));
    let stream = client.complete(grpc::request("a", 3)).await;
    let whole = grpc::collect(stream.expect("a stream").into_inner()).await;
    assert_eq!(whole.texts(0), ["token_0", "token_1", "token_2"]);
    assert!(whole.summary.is_some());
}

#[tokio::test]
async fn a_client_without_tls_is_told_that_the_port_requires_it() {
    let server = TlsServer::start(&[]).await;
    for address in [&server.http, &server.grpc] {
        let mut response = get("/v1/models").send_to(address).await;
        assert_eq!(response.status, 400);
        let error = response.read_rest().await.json();
        assert_eq!(error["error"]["code"], "tls_required");

        let mut stream = TcpStream::connect(address).await.expect("a connection");
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        stream.write_all(preface).await.expect("the preface");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        assert!(answer.ends_with(b"this port requires TLS"), "{answer:?}");
    }
    let channel = Endpoint::from_shared(format!("http://{}", server.grpc)).expect("a URL");
    let mut client = InferenceClient::new(channel.connect_lazy());
    let rejected = client.complete(grpc::request("a", 3)).await;
    let status = rejected.expect_err("the server requires TLS");
    assert!(
        format!("{status:?}").contains("INADEQUATE_SECURITY"),
        "{status:?}"
    );
}

/// Writes a certificate into a new folder, and switches the link `data` to that folder, as Kubernetes does it for a
/// mounted secret. Returns the paths below the link.
fn mount(folder: &Path, authority: &CertificateAuthority, version: &str) -> CertificateFiles {
    let (real, files) = (folder.join(version), authority.sign("new"));
    std::fs::create_dir(&real).expect("a folder");
    std::fs::rename(files.certificate, real.join("tls.crt")).expect("the certificate");
    std::fs::rename(files.key, real.join("tls.key")).expect("the key");
    let (link, current) = (folder.join("link"), folder.join("data"));
    symlink(&real, &link).expect("a link");
    std::fs::rename(&link, &current).expect("the link is switched");
    CertificateFiles {
        certificate: current.join("tls.crt"),
        key: current.join("tls.key"),
    }
}

#[tokio::test]
async fn new_certificates_are_used_without_touching_open_streams() {
    let (folder, authority) = new_authority();
    let path = folder.path().to_owned();
    let files = mount(&path, &authority, "first");
    let paced = ["--test-runner-frequency-ms", "5"];
    let mut server = TlsServer::start_with(folder, authority, &files, &paced).await;
    let first = server.certificate().await;
    let mut over_http = server.send(streamed(100_000)).await;
    let channel = server.channel(server.authority.grpc_config()).await;
    let mut client = InferenceClient::new(channel.expect("a connection"));
    let stream = client.complete(grpc::request("a", 100_000)).await;
    let mut over_grpc = stream.expect("a stream").into_inner();

    mount(&path, &server.authority, "second");
    let reloaded = "the TLS certificates were reloaded";
    server.running.wait_for_log(reloaded).await;
    let second = server.certificate().await;
    assert_ne!(second, first);
    for index in 0..200 {
        let line = over_http.read_json_line().await.expect("a line");
        assert_eq!(line["choices"][0]["text"], format!("token_{index}"));
    }
    let mut received = grpc::Completion::default();
    while received.choices.is_empty() || received.token_count(0) < 200 {
        let event = over_grpc.message().await.expect("the stream goes on");
        received.add_event(event.expect("an event"));
    }

    // SIGHUP does the same as a change of the files. A key that does not belong to the certificate changes nothing.
    let other = server.authority.sign("other");
    std::fs::copy(&other.key, path.join("second").join("tls.key")).expect("a copy");
    server
        .running
        .wait_for_log("cannot reload the TLS certificates")
        .await;
    assert_eq!(server.certificate().await, second);
    std::fs::copy(&other.certificate, path.join("second").join("tls.crt")).expect("a copy");
    server.running.signal(Signal::HUP);
    server.running.wait_for_log(reloaded).await;
    assert_ne!(server.certificate().await, second);
}

#[tokio::test]
async fn a_server_with_a_client_authority_serves_only_clients_with_its_certificates() {
    let (folder, authority) = new_authority();
    let (files, ours) = (authority.sign("server"), authority.sign("client"));
    let foreign = CertificateAuthority::new(folder.path(), "foreign").sign("stranger");
    let ca = authority.path.clone();
    let arguments = ["--tls-client-ca", text(&ca)];
    let server = TlsServer::start_with(folder, authority, &files, &arguments).await;

    let trusted = server.authority.client().identity(&ours);
    let stream = trusted.connect(&server.http).await.expect("a connection");
    let mut response = streamed(3).send_on(stream).await;
    assert_eq!(response.read_rest().await.lines().len(), 3);
    let tls = server.authority.grpc_config().identity(ours.identity());
    let channel = server.channel(tls).await.expect("a connection");
    let mut client = InferenceClient::new(channel);
    let stream = client.complete(grpc::request("a", 3)).await;
    let whole = grpc::collect(stream.expect("a stream").into_inner()).await;
    assert_eq!(whole.token_count(0), 3);

    for identity in [None, Some(&foreign)] {
        for address in [&server.http, &server.grpc] {
            let client = server.authority.client();
            let client = match identity {
                Some(files) => client.identity(files),
                None => client,
            };
            // In TLS 1.3, the client's handshake may succeed before the server rejects the client's certificate.
            let rejected = async {
                let mut stream = client.connect(address).await?;
                stream.write_all(&get("/v1/models").bytes()).await?;
                stream.read_u8().await
            };
            rejected.await.expect_err("the server rejects the client");
        }
    }
}

#[tokio::test]
async fn a_reader_over_tls_that_reads_nothing_ends_alone() {
    let arguments = [
        "--test-runner-frequency-ms",
        "0",
        "--slow-reader-timeout",
        "0.1",
        "--slots",
        "1",
    ];
    let server = TlsServer::start(&arguments).await;
    let mut stalled = server.send(streamed(1_048_000)).await;
    // The only slot becomes free when the stalled stream is given up.
    let mut next = server.send(streamed(5)).await;
    assert_eq!(next.read_rest().await.lines().len(), 5);
    let rest = stalled.read_rest().await;
    assert_eq!(rest.end, BodyEnd::Unclean);
    let last = rest.lines().pop().expect("a line");
    assert_eq!(last["error"]["code"], "slow_reader");
}

#[tokio::test]
async fn a_gateway_reaches_engines_with_private_authorities_and_client_certificates() {
    let (folder, authority) = new_authority();
    let (files, gateway) = (authority.sign("server"), authority.sign("gateway"));
    let ca = authority.path.clone();
    let arguments = ["--tls-client-ca", text(&ca)];
    let engine = TlsServer::start_with(folder, authority, &files, &arguments).await;
    let engine_flags = [
        "--engine-tls-ca",
        text(&ca),
        "--engine-tls-cert",
        text(&gateway.certificate),
        "--engine-tls-key",
        text(&gateway.key),
    ];
    for address in [
        format!("https://{}", engine.grpc),
        format!("openai+https://{}/v1", engine.http),
    ] {
        let arguments = [&["--engine", &address], &engine_flags[..]].concat();
        let (_gateway, [http, _]) = start_gateway(&arguments).await;
        let address = http.trim_start_matches("http://");
        let mut response = streamed(3).send_to(address).await;
        let lines = response.read_rest().await.lines();
        assert_eq!(texts(&lines, 0), ["token_0", "token_1", "token_2"]);
    }
}

#[tokio::test]
async fn created_certificates_work_with_the_commands_that_are_printed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("tls");
    let create = || tokenway().args(["tls", "self-signed", "--out", text(&out)]);
    let printed = create().run().await.expect_success();
    let files = |name: &str| CertificateFiles {
        certificate: out.join(name).with_extension("pem"),
        key: out.join(name).with_extension("key"),
    };
    let (server, client, ca) = (files("server"), files("client"), out.join("ca.pem"));
    assert!(printed.contains(&flags(&server).join(" ")), "{printed}");
    let again = create().run().await.expect_failure();
    assert!(again.contains("already exists"), "{again}");

    let mutual = ["--tls-client-ca", text(&ca)];
    let arguments = [&flags(&server)[..], &mutual].concat();
    let (_running, [http, grpc]) = start_server(&arguments).await;
    let client = [
        "--tls-client-cert",
        text(&client.certificate),
        "--tls-client-key",
        text(&client.key),
    ];
    for (api, url) in [("--http", &http), ("--grpc", &grpc)] {
        let complete = || {
            let flags = ["complete", api, "--server", url, "--max-tokens", "3", "a"];
            tokenway().args(flags).args(["--tls-ca", text(&ca)])
        };
        let text = complete().args(client).run().await.expect_success();
        assert_eq!(text.trim_end(), "token_0token_1token_2");
        complete().run().await.expect_failure();
    }
}

#[tokio::test]
async fn unusable_files_are_reported_at_start() {
    let (folder, authority) = new_authority();
    let (one, other) = (authority.sign("one"), authority.sign("other"));
    let missing = folder.path().join("missing.pem");
    let empty = folder.path().join("empty.pem");
    std::fs::write(&empty, "").expect("a file");
    for (certificate, key, flag, problem) in [
        (
            &missing,
            &one.key,
            "--tls-cert: ",
            "missing.pem: No such file",
        ),
        (
            &empty,
            &one.key,
            "--tls-cert: ",
            "empty.pem: the file contains no certificate",
        ),
        (&one.certificate, &empty, "--tls-key: ", "empty.pem: "),
        (&one.certificate, &other.key, "--tls-cert: ", "one.pem: "),
    ] {
        let arguments = ["--tls-cert", text(certificate), "--tls-key", text(key)];
        let outcome = tokenway().arg("serve").args(arguments).run().await;
        assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(flag), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(problem), "{}", outcome.stderr);
    }
    let engine = ["gateway", "--engine", "https://a:1", "--engine-tls-ca"];
    let outcome = tokenway().args(engine).arg(&empty).run().await;
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    let problem = "--engine-tls-ca: ";
    assert!(outcome.stderr.contains(problem), "{}", outcome.stderr);
    let alone = ["serve", "--tls-cert", text(&one.certificate)];
    let outcome = tokenway().args(alone).run().await;
    assert!(
        outcome
            .stderr
            .contains("set --tls-cert and --tls-key together")
    );
}
