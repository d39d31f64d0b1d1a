//! Worker connections over TCP require mutual TLS.

mod support;

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;
use support::http::{completion, texts};
use support::program::{start_server, tokenway};
use tokenway::proto::worker::device_worker_client::DeviceWorkerClient;
use tokenway::proto::worker::{AttachRequest, Hello, attach_request};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

/// A certificate authority and the path of its certificate.
struct CertificateAuthority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
    path: PathBuf,
}

/// A certificate file and the file of its private key.
struct CertificateFiles {
    certificate: PathBuf,
    key: PathBuf,
}

impl CertificateAuthority {
    fn new(folder: &Path, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(parameters, key).expect("a certificate");
        let path = folder.join(format!("{name}.pem"));
        std::fs::write(&path, issuer.pem()).expect("the file can be written");
        Self {
            issuer,
            folder: folder.to_owned(),
            path,
        }
    }

    /// Signs a certificate for this host.
    fn sign(&self, name: &str) -> CertificateFiles {
        let key = KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let parameters = CertificateParams::new(names).expect("names");
        let certificate = parameters
            .signed_by(&key, &self.issuer)
            .expect("the certificate can be signed");
        let files = CertificateFiles {
            certificate: self.folder.join(format!("{name}.pem")),
            key: self.folder.join(format!("{name}.key")),
        };
        std::fs::write(&files.certificate, certificate.pem()).expect("the file can be written");
        std::fs::write(&files.key, key.serialize_pem()).expect("the file can be written");
        files
    }
}

impl CertificateFiles {
    fn flags<'a>(&'a self, ca: &'a CertificateAuthority) -> [&'a str; 6] {
        let text = |path: &'a Path| path.to_str().expect("a path in UTF-8");
        [
            "--worker-tls-ca",
            text(&ca.path),
            "--worker-tls-cert",
            text(&self.certificate),
            "--worker-tls-key",
            text(&self.key),
        ]
    }

    fn identity(&self) -> Identity {
        let read = |path| std::fs::read(path).expect("the file can be read");
        Identity::from_pem(read(&self.certificate), read(&self.key))
    }
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
        .args(worker.flags(&ours))
        .start();
    let (_server, [http, _]) = start_server(&[&attached[..], &engine.flags(&ours)].concat()).await;
    let body = json!({"prompt": "a", "max_tokens": 3, "stream": true});
    let mut response = completion(&body)
        .send_to(&http.replace("http://", ""))
        .await;
    let lines = response.read_rest().await.lines();
    assert_eq!(texts(&lines, 0), ["token_0", "token_1", "token_2"]);

    let ca = Certificate::from_pem(ours.issuer.pem());
    let without_identity = ClientTlsConfig::new().ca_certificate(ca);
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
