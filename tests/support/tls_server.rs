//! A server process with TLS, and the authority of its certificate.

use std::path::Path;

use tempfile::TempDir;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use super::certificates::{CertificateAuthority, CertificateFiles};
use super::http::{Request, Response};
use super::program::start_server;
use super::running_program::RunningProgram;

/// A server with TLS, and the authority of its certificate.
pub struct TlsServer {
    pub running: RunningProgram,
    pub http: String,
    pub grpc: String,
    pub authority: CertificateAuthority,
    _folder: TempDir,
}

impl TlsServer {
    /// Starts a server whose clients need no certificate.
    pub async fn start(arguments: &[&str]) -> Self {
        let (folder, authority) = new_authority();
        let files = authority.sign("server");
        Self::start_with(folder, authority, &files, arguments).await
    }

    pub async fn start_with(
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
    pub async fn send(&self, request: Request) -> Response {
        let stream = self.authority.client().connect(&self.http).await;
        request.send_on(stream.expect("a TLS connection")).await
    }

    pub async fn channel(&self, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("https://{}", self.grpc))?;
        endpoint.tls_config(tls)?.connect().await
    }

    /// Returns the certificate that the server presents now on the HTTP API.
    pub async fn certificate(&self) -> Vec<u8> {
        let stream = self.authority.client().connect(&self.http).await;
        let stream = stream.expect("a TLS connection");
        let certificates = stream.get_ref().1.peer_certificates();
        certificates.expect("a certificate")[0].to_vec()
    }
}

pub fn new_authority() -> (TempDir, CertificateAuthority) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let authority = CertificateAuthority::new(folder.path(), "ca");
    (folder, authority)
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

pub fn flags(files: &CertificateFiles) -> [&str; 4] {
    [
        "--tls-cert",
        text(&files.certificate),
        "--tls-key",
        text(&files.key),
    ]
}
