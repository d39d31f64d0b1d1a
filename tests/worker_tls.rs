//! Workers that dial in over TCP: both sides show a certificate, or nothing is said.

mod support;

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;
use support::http::{completion, texts};
use support::program::{serving, tokenway};
use tokenway::proto::worker::device_worker_client::DeviceWorkerClient;
use tokenway::proto::worker::{AttachRequest, Hello, attach_request};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

/// An authority, and where its certificate lies.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
    path: PathBuf,
}

/// A certificate and its key, in files.
struct Shown {
    certificate: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(parameters, key).expect("a certificate");
        let path = folder.join(format!("{name}.pem"));
        std::fs::write(&path, issuer.pem()).expect("it can be written");
        Self {
            issuer,
            folder: folder.to_owned(),
            path,
        }
    }

    /// Signs a certificate for this machine.
    fn sign(&self, name: &str) -> Shown {
        let key = KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let parameters = CertificateParams::new(names).expect("names");
        let certificate = parameters
            .signed_by(&key, &self.issuer)
            .expect("it is signed");
        let shown = Shown {
            certificate: self.folder.join(format!("{name}.pem")),
            key: self.folder.join(format!("{name}.key")),
        };
        std::fs::write(&shown.certificate, certificate.pem()).expect("it can be written");
        std::fs::write(&shown.key, key.serialize_pem()).expect("it can be written");
        shown
    }
}

impl Shown {
    fn flags<'a>(&'a self, ca: &'a Authority) -> [&'a str; 6] {
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
        let read = |path| std::fs::read(path).expect("it can be read");
        Identity::from_pem(read(&self.certificate), read(&self.key))
    }
}

/// A port that was free just now.
fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    socket.local_addr().expect("it is bound").port()
}

#[tokio::test]
async fn a_worker_with_a_certificate_of_the_authority_serves_and_no_other_is_heard() {
    let folder = tempfile::tempdir().expect("a folder");
    let (ours, theirs) = (
        Authority::new(folder.path(), "ours"),
        Authority::new(folder.path(), "theirs"),
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
    let dial = [
        "worker",
        "--engine",
        &address,
        "--test-runner-frequency-ms",
        "0",
    ];
    let _worker = tokenway().args(dial).args(worker.flags(&ours)).start();
    let (_server, [http, _]) = serving(&[&attached[..], &engine.flags(&ours)].concat()).await;
    let body = json!({"prompt": "a", "max_tokens": 3, "stream": true});
    let mut response = completion(&body)
        .send_to(&http.replace("http://", ""))
        .await;
    let lines = response.rest().await.lines();
    assert_eq!(texts(&lines, 0), ["token_0", "token_1", "token_2"]);

    let ca = Certificate::from_pem(ours.issuer.pem());
    let with_none = ClientTlsConfig::new().ca_certificate(ca);
    for tls in [with_none.clone(), with_none.identity(stranger.identity())] {
        let endpoint = Endpoint::from_shared(format!("https://{address}"));
        let endpoint = endpoint.expect("an address").tls_config(tls).expect("TLS");
        // The engine's refusal may come only after the handshake is over for this side.
        let attached = async {
            let channel = endpoint
                .connect()
                .await
                .map_err(|error| error.to_string())?;
            let hello = attach_request::Message::Hello(Hello {
                protocol_version: 1,
                ..Hello::default()
            });
            let hello = AttachRequest {
                message: Some(hello),
            };
            let mut client = DeviceWorkerClient::new(channel);
            let attached = client.attach(tokio_stream::iter([hello])).await;
            attached.map_err(|status| status.to_string())
        };
        attached.await.expect_err("it has nothing to show");
    }
}
