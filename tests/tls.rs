//! TLS on both APIs, and between a gateway and its engines.

mod support;

use serde_json::json;
use support::certificates::{CertificateAuthority, CertificateFiles};
use support::grpc;
use support::http::{BodyEnd, Request, completion, get, texts};
use support::program::{start_gateway, start_server, tokenway};
use support::tls_server::{TlsServer, flags, new_authority, text};
use tokenway::proto::v1::inference_client::InferenceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls::version;
use tonic::transport::Endpoint;

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
