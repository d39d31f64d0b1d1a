//! TLS of a listener: its certificate, the check of client certificates, and their replacement while it listens.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::{ConfigBuilder, ServerConfig, WantsVerifier};
use tokio_rustls::server::TlsStream;

use super::settings::Protocol;
use crate::certificates::{CertificateError, PemFile};
use crate::watched_files::WatchedFiles;

/// PEM files of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTlsFiles {
    /// Certificate of the server, followed by its intermediate certificates.
    pub certificate: PathBuf,
    /// Private key of the certificate.
    pub key: PathBuf,
    /// CA certificates. If this is set, a client must present a certificate that one of them has signed.
    pub client_ca: Option<PathBuf>,
}

/// TLS of a listener. Clones share the certificates, which can be replaced while connections are open.
#[derive(Clone)]
pub struct ServerTls(Arc<Shared>);

struct Shared {
    files: ServerTlsFiles,
    /// The files as they were before they were first read.
    files_at_start: WatchedFiles,
    acceptors: RwLock<Acceptors>,
    /// Held while the files are read again, so that older certificates never replace newer ones.
    reloading: Mutex<()>,
}

/// The acceptors of one version of the files.
struct Acceptors {
    /// Offers HTTP/2 and HTTP/1.1.
    http: TlsAcceptor,
    /// Offers HTTP/2 only.
    grpc: TlsAcceptor,
}

impl ServerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// A file cannot be read, its contents are not valid, or the key does not belong to the certificate. The error names
    /// the file.
    pub fn read(files: ServerTlsFiles) -> Result<Self, CertificateError> {
        let files_at_start = WatchedFiles::new(files.paths().map(Path::to_owned));
        let acceptors = RwLock::new(Acceptors::read(&files)?);
        Ok(Self(Arc::new(Shared {
            files,
            files_at_start,
            acceptors,
            reloading: Mutex::new(()),
        })))
    }

    /// Reads the files again, for new connections. Open connections are not affected.
    ///
    /// # Errors
    /// The same as for [`ServerTls::read`]. The certificates in force stay.
    pub(crate) fn reload(&self) -> Result<(), CertificateError> {
        let reloading = &self.0.reloading;
        let _reloading = reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let acceptors = Acceptors::read(&self.0.files)?;
        let in_force = self.0.acceptors.write();
        *in_force.unwrap_or_else(PoisonError::into_inner) = acceptors;
        Ok(())
    }

    /// Returns the files as they were before they were first read.
    pub(crate) fn files_at_start(&self) -> WatchedFiles {
        self.0.files_at_start.clone()
    }

    /// Returns the path of the server's certificate.
    pub(crate) fn certificate_path(&self) -> &Path {
        &self.0.files.certificate
    }

    /// Returns true if clients must present a certificate.
    pub(crate) fn requires_client_certificate(&self) -> bool {
        self.0.files.client_ca.is_some()
    }

    /// Performs the TLS handshake.
    pub(super) async fn accept<I>(&self, stream: I, protocol: Protocol) -> io::Result<TlsStream<I>>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let acceptor = self.acceptor(protocol);
        acceptor.accept(stream).await
    }

    fn acceptor(&self, protocol: Protocol) -> TlsAcceptor {
        let acceptors = &self.0.acceptors;
        let acceptors = acceptors.read().unwrap_or_else(PoisonError::into_inner);
        match protocol {
            Protocol::Http => acceptors.http.clone(),
            Protocol::Grpc | Protocol::Worker => acceptors.grpc.clone(),
        }
    }
}

impl ServerTlsFiles {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let files = [&self.certificate, &self.key].into_iter();
        files.chain(&self.client_ca).map(PathBuf::as_path)
    }
}

impl Acceptors {
    fn read(files: &ServerTlsFiles) -> Result<Self, CertificateError> {
        let mut config = server_config(files)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let grpc = TlsAcceptor::from(Arc::new(config.clone()));
        config.alpn_protocols.push(b"http/1.1".to_vec());
        let http = TlsAcceptor::from(Arc::new(config));
        Ok(Self { http, grpc })
    }
}

fn server_config(files: &ServerTlsFiles) -> Result<ServerConfig, CertificateError> {
    let builder = builder();
    let builder = match &files.client_ca {
        Some(ca) => builder.with_client_cert_verifier(client_verifier(ca)?),
        None => builder.with_no_client_auth(),
    };
    let (certificate, key) = (
        PemFile::read(&files.certificate)?,
        PemFile::read(&files.key)?,
    );
    builder
        .with_single_cert(certificate.certificates()?, key.key()?)
        .map_err(|error| certificate.error(&error))
}

pub(super) fn builder() -> ConfigBuilder<ServerConfig, WantsVerifier> {
    ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider supports the default versions")
}

fn client_verifier(ca: &Path) -> Result<Arc<dyn ClientCertVerifier>, CertificateError> {
    let ca = PemFile::read(ca)?;
    let roots = Arc::new(ca.authorities()?);
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
    verifier.map_err(|error| ca.error(&error))
}
