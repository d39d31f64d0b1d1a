//! Worker connections over TCP require mutual TLS.

mod support;

use std::path::Path;

use serde_json::json;
use support::certificates::{CertificateAuthority, CertificateFiles};
use support::http::{completion, texts};
use support::program::{start_server, tokenway};
use tokenway::proto::worker::device_worker_client::DeviceWorkerClient;
use tokenway::proto::worker::{AttachRequest, Hello, attach_request};
use tonic::transport::Endpoint;

/// Returns the flags of one end of worker connections.
fn flags<'a>(files: &'a CertificateFiles, ca: &'a CertificateAuthority) -> [&'a str; 6] {
    let text = |path: &'a Path| path.to_str().expect("a path in UTF-8");
    [
        "--worker-tls-ca",
        text(&ca.path),
        "--worker-tls-cert",
        text(&files.certificate),
        "--worker-tls-key",
        text(&files.key),
    ]
}

/// Returns a port that was free a moment ago.
fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port exists");
    socket.local_addr().expect("the listener is bound").port()
}

#[tokio::test]
async fn only_workers_with_a_trusted_certificate_are_accepted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (ours, theirs) = (
        CertificateAuthority::new(folder.path(), "ours"),
        CertificateAuthority::new(folder.path(), "theirs"),
    );
    let (engine, worker, stranger) = (
        ours.sign("engine"),
        ours.sign("worker"),
        theirs.sign("stranger"),
    );
    let address = format!("localhost:{}", free_port());
    let attached = [
        "--runner",
        "attached",
        "--model-name",
        "m",
        "--worker-listen",
        &address,
    ];
    let worker_arguments = [
        "worker",
        "--engine",
        &address,
        "--test-runner-frequency-ms",
        "0",
    ];
    let _worker = tokenway()
        .args(worker_arguments)
        .args(flags(&worker, &ours))
        .start();
    let (_server, [http, _]) =
        start_server(&[&attached[..], &flags(&engine, &ours)].concat()).await;
    let body = json!({"prompt": "a", "max_tokens": 3, "stream": true});
    let mut response = completion(&body)
        .send_to(&http.replace("http://", ""))
        .await;
    let lines = response.read_rest().await.lines();
    assert_eq!(texts(&lines, 0), ["token_0", "token_1", "token_2"]);

    let without_identity = ours.grpc_config();
    for tls in [
        without_identity.clone(),
        without_identity.identity(stranger.identity()),
    ] {
        let endpoint = Endpoint::from_shared(format!("https://{address}"));
        let endpoint = endpoint.expect("an address").tls_config(tls).expect("TLS");
        // In TLS 1.3, the client's handshake may succeed before the engine rejects the client's certificate.
        let attached = async {
            let channel = endpoint
                .connect()
                .await
                .map_err(|error| error.to_string())?;
            let hello = attach_request::Message::Hello(Hello {
                protocol_version: 2,
                ..Hello::default()
            });
            let hello = AttachRequest {
                message: Some(hello),
            };
            let mut client = DeviceWorkerClient::new(channel);
            let attached = client.attach(tokio_stream::iter([hello])).await;
            attached.map_err(|status| status.to_string())
        };
        attached
            .await
            .expect_err("the engine rejects the certificate");
    }
}
