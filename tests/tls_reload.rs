//! New certificates and client authorities of a running server.

mod support;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::process::Signal;
use serde_json::json;
use support::certificates::{CertificateAuthority, CertificateFiles};
use support::grpc;
use support::http::{Request, completion, get};
use support::tls_server::{TlsServer, new_authority, text};
use tokenway::proto::v1::inference_client::InferenceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn streamed(max_tokens: u32) -> Request {
    completion(&json!({"prompt": "a", "max_tokens": max_tokens, "stream": true}))
}

/// Writes a certificate into a new folder, and switches the link `data` to that folder, as Kubernetes does for a
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

    // A key that does not belong to the certificate changes nothing.
    let other = server.authority.sign("other");
    std::fs::copy(&other.key, path.join("second").join("tls.key")).expect("a copy");
    server
        .running
        .wait_for_log("cannot reload the TLS certificates")
        .await;
    assert_eq!(server.certificate().await, second);
}

/// Replaces the contents of a file but keeps its metadata, so that the server's file checks do not notice the change.
fn replace_unnoticed(path: &Path, new: &Path) {
    let metadata = std::fs::metadata(path).expect("a file");
    let mut contents = std::fs::read(new).expect("a file");
    let size = usize::try_from(metadata.len()).expect("a size");
    assert!(contents.len() <= size, "the old file has enough padding");
    contents.resize(size, b'\n');
    let mut file = File::options().write(true).open(path).expect("a file");
    file.write_all(&contents).expect("the contents");
    let modified = metadata.modified().expect("a time");
    file.set_modified(modified).expect("the time is set");
}

/// Appends empty lines, which PEM files may have.
fn pad(path: &Path) {
    let file = File::options().append(true).open(path);
    let padded = file.expect("a file").write_all(&[b'\n'; 64]);
    padded.expect("the padding");
}

#[tokio::test]
async fn hangup_reloads_certificates_whose_change_is_not_noticed() {
    let (folder, authority) = new_authority();
    let (files, new) = (authority.sign("server"), authority.sign("new"));
    pad(&files.certificate);
    pad(&files.key);
    let mut server = TlsServer::start_with(folder, authority, &files, &[]).await;
    let before = server.certificate().await;
    replace_unnoticed(&files.certificate, &new.certificate);
    replace_unnoticed(&files.key, &new.key);
    server.running.signal(Signal::HUP);
    server.running.wait_for_log("trigger=\"SIGHUP\"").await;
    assert_ne!(server.certificate().await, before);
}

/// Returns true if the server answers a client that presents this certificate.
async fn is_served(server: &TlsServer, identity: &CertificateFiles) -> bool {
    let client = server.authority.client().identity(identity);
    // In TLS 1.3, the client's handshake may succeed before the server rejects the client's certificate.
    let answered = async {
        let mut stream = client.connect(&server.http).await?;
        stream.write_all(&get("/livez").bytes()).await?;
        stream.read_u8().await
    };
    answered.await.is_ok()
}

#[tokio::test]
async fn a_changed_client_authority_applies_to_new_connections() {
    let (folder, authority) = new_authority();
    let path = folder.path().to_owned();
    let files = authority.sign("server");
    let [old, new] = ["old", "new"].map(|name| CertificateAuthority::new(&path, name));
    let [of_old, of_new] = [old.sign("of-old"), new.sign("of-new")];
    let arguments = ["--tls-client-ca", text(&old.path)];
    let mut server = TlsServer::start_with(folder, authority, &files, &arguments).await;
    assert!(is_served(&server, &of_old).await && !is_served(&server, &of_new).await);
    std::fs::rename(&new.path, &old.path).expect("the file is replaced");
    let reloaded = "the TLS certificates were reloaded";
    server.running.wait_for_log(reloaded).await;
    assert!(is_served(&server, &of_new).await && !is_served(&server, &of_old).await);
}
