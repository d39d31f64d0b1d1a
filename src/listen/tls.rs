//! Mutual TLS: server and client verify each other's certificate.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;

/// PEM files that one end of a TLS connection uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    /// CA certificates that verify the other end's certificate.
    pub ca: PathBuf,
    /// Certificate of this end, followed by its intermediate certificates.
    pub certificate: PathBuf,
    /// Private key of the certificate.
    pub key: PathBuf,
}

/// Error for a TLS file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub(crate) struct TlsError {
    path: PathBuf,
    problem: String,
}

/// TLS acceptor that requires a client certificate.
#[derive(Clone)]
pub struct MutualTls(TlsAcceptor);

impl MutualTls {
    /// Reads the certificate and key files of the server.
    ///
    /// # Errors
    /// A file cannot be read, or its contents are not valid. The error names the file.
    pub(crate) fn server(files: &TlsFiles) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            let added = roots.add(certificate);
            added.map_err(|error| invalid_file(&files.ca, &error))?;
        }
        let provider = Arc::new(ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let verifier = verifier
            .build()
            .map_err(|error| invalid_file(&files.ca, &error))?;
        let key = PrivateKeyDer::from_pem_file(&files.key);
        let key = key.map_err(|error| invalid_file(&files.key, &error))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid_file(&files.certificate, &error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(certificates(&files.certificate)?, key)
            .map_err(|error| invalid_file(&files.certificate, &error))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// Performs the TLS handshake.
    pub(super) async fn accept<I>(&self, stream: I) -> io::Result<TlsStream<I>>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        self.0.accept(stream).await
    }
}

/// Reads all certificates in a file. The file must contain at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let certificates: Vec<_> = certificates.map_err(|error| invalid_file(path, &error))?;
    if certificates.is_empty() {
        return Err(invalid_file(path, &"the file contains no certificate"));
    }
    Ok(certificates)
}

fn invalid_file(path: &Path, problem: &impl ToString) -> TlsError {
    TlsError {
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}
