//! Certificates for tests of TLS, and TLS clients.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, version};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// A certificate authority and the path of its certificate.
pub struct CertificateAuthority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
    pub path: PathBuf,
}

/// A certificate file and the file of its private key.
#[derive(Clone)]
pub struct CertificateFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl CertificateAuthority {
    /// Creates an authority whose files are in this folder.
    pub fn new(folder: &Path, name: &str) -> Self {
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
    pub fn sign(&self, name: &str) -> CertificateFiles {
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

    /// Returns the configuration of a gRPC client that trusts this authority.
    pub fn grpc_config(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.issuer.pem()))
    }

    /// Returns a TLS client that trusts this authority.
    pub fn client(&self) -> TlsClient<'_> {
        TlsClient {
            authority: self,
            versions: vec![&version::TLS13, &version::TLS12],
            protocols: Vec::new(),
            identity: None,
        }
    }
}

impl CertificateFiles {
    pub fn identity(&self) -> Identity {
        let read = |path| std::fs::read(path).expect("the file can be read");
        Identity::from_pem(read(&self.certificate), read(&self.key))
    }
}

/// A TLS client that trusts one authority.
pub struct TlsClient<'a> {
    authority: &'a CertificateAuthority,
    versions: Vec<&'static SupportedProtocolVersion>,
    protocols: Vec<Vec<u8>>,
    identity: Option<&'a CertificateFiles>,
}

impl<'a> TlsClient<'a> {
    /// Sets the version of TLS.
    pub fn version(mut self, version: &'static SupportedProtocolVersion) -> Self {
        self.versions = vec![version];
        self
    }

    /// Offers these protocols (ALPN).
    pub fn protocols(mut self, protocols: &[&str]) -> Self {
        self.protocols = protocols
            .iter()
            .map(|name| name.as_bytes().into())
            .collect();
        self
    }

    /// Presents a certificate.
    pub fn identity(mut self, identity: &'a CertificateFiles) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Connects, and performs the handshake.
    pub async fn connect(self, address: &str) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        let authority = self.authority.issuer.der().clone();
        roots.add(authority).expect("the authority is valid");
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&self.versions)
            .expect("the versions are supported")
            .with_root_certificates(roots);
        let mut config = match self.identity {
            None => builder.with_no_client_auth(),
            Some(files) => {
                let certificate = CertificateDer::from_pem_file(&files.certificate);
                let key = PrivateKeyDer::from_pem_file(&files.key);
                builder
                    .with_client_auth_cert(
                        vec![certificate.expect("a certificate")],
                        key.expect("a key"),
                    )
                    .expect("the key belongs to the certificate")
            }
        };
        config.alpn_protocols = self.protocols;
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("localhost").expect("a name");
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
    }
}
