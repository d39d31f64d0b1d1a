//! Clients with an API key, over TLS: OpenAI's libraries for Python and Node, and grpcio.

use std::path::Path;

use super::support::program::{Program, node, python, start_server, tokenway};
use super::support::running_program::RunningProgram;

/// A server with TLS that needs a key. Its certificates come from `tokenway tls self-signed`, and its key from
/// `tokenway keys new`.
struct SecuredServer {
    http: String,
    /// Host and port of the gRPC API.
    grpc: String,
    ca: String,
    key: String,
    _running: RunningProgram,
    _folder: tempfile::TempDir,
}

impl SecuredServer {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| path_text(&folder.path().join(name));
        let (tls, keys) = (path("tls"), path("keys.toml"));
        let certificates = tokenway().args(["tls", "self-signed", "--out", &tls]);
        certificates.run().await.expect_success();
        let key = tokenway().args(["keys", "new", "a", "--keys-file", &keys]);
        let key = key.run().await.expect_success();
        let [certificate, private] = ["server.pem", "server.key"].map(|it| format!("{tls}/{it}"));
        let (running, [http, grpc]) = start_server(&[
            "--keys-file",
            &keys,
            "--tls-cert",
            &certificate,
            "--tls-key",
            &private,
        ])
        .await;
        Self {
            http,
            grpc: grpc.replace("https://", ""),
            ca: format!("{tls}/ca.pem"),
            key: key.trim_end().to_owned(),
            _running: running,
            _folder: folder,
        }
    }
}

fn path_text(path: &Path) -> String {
    path.to_str().expect("a UTF-8 path").to_owned()
}

/// Asserts that the program prints the test runner's first 32 tokens with the key, and fails without it.
async fn assert_needs_key(program: impl Fn() -> Program, server: &SecuredServer) {
    let expected: String = (0..32).map(|index| format!("token_{index}")).collect();
    let with_key = program().env("TOKENWAY_API_KEY", &server.key);
    let printed = with_key.run().await.expect_success();
    assert!(printed.starts_with(&expected), "{printed}");
    let with_other_key = program().env("TOKENWAY_API_KEY", "tw_other");
    let error = with_other_key.run().await.expect_failure();
    assert!(error.contains("invalid_api_key"), "{error}");
}

#[tokio::test]
async fn openai_for_python_works_with_a_key_over_tls() {
    let server = SecuredServer::start().await;
    let program = || {
        let example = python("examples/python_openai_client.py");
        let example = example.args(["--url", &server.http, "The capital of France is"]);
        example.env("SSL_CERT_FILE", &server.ca)
    };
    assert_needs_key(program, &server).await;
}

#[tokio::test]
async fn openai_for_node_works_with_a_key_over_tls() {
    let server = SecuredServer::start().await;
    let program = || {
        let script = node("tests/clients/openai_secured.mjs").arg(&server.http);
        script.env("NODE_EXTRA_CA_CERTS", &server.ca)
    };
    assert_needs_key(program, &server).await;
}

#[tokio::test]
async fn grpcio_works_with_a_key_over_tls() {
    let server = SecuredServer::start().await;
    let program = || {
        let example = python("examples/python_grpc_client.py");
        let example = example.args(["--address", &server.grpc, "--tls-ca", &server.ca]);
        example.arg("The capital of France is")
    };
    assert_needs_key(program, &server).await;
}
