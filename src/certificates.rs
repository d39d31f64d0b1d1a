//! Certificates and keys in PEM files, and the TLS configuration of clients.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::client::WantsClientCert;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, ConfigBuilder, RootCertStore};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

mod command;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;

pub use command::{TlsCommand, TlsCommandError};

/// Maximum time for the TLS handshake of a client.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Error for a file of certificates, or of a key, that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct CertificateError {
    path: PathBuf,
    problem: String,
}

impl CertificateError {
    /// Returns the path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// A PEM file that was read.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PemFile {
    path: PathBuf,
    contents: Arc<[u8]>,
}

impl PemFile {
    /// Reads a file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn read(path: &Path) -> Result<Self, CertificateError> {
        let contents = fs::read(path).map_err(|error| CertificateError {
            path: path.to_owned(),
            problem: error.to_string(),
        })?;
        Ok(Self {
            path: path.to_owned(),
            contents: contents.into(),
        })
    }

    /// Returns all certificates in the file.
    ///
    /// # Errors
    /// The file is not valid, or contains no certificate.
    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
        let certificates = CertificateDer::pem_slice_iter(&self.contents);
        let certificates: Result<Vec<_>, _> = certificates.collect();
        let certificates = certificates.map_err(|error| self.error(&error))?;
        match certificates.is_empty() {
            true => Err(self.error(&"the file contains no certificate")),
            false => Ok(certificates),
        }
    }

    /// Returns the CA certificates in the file.
    ///
    /// # Errors
    /// The file is not valid, or contains no certificate.
    pub(crate) fn authorities(&self) -> Result<RootCertStore, CertificateError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates()? {
            let added = roots.add(certificate);
            added.map_err(|error| self.error(&error))?;
        }
        Ok(roots)
    }

    /// Returns the private key in the file.
    ///
    /// # Errors
    /// The file is not valid, or contains no private key.
    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>, CertificateError> {
        PrivateKeyDer::from_pem_slice(&self.contents).map_err(|error| self.error(&error))
    }

    /// Returns an error for this file with this problem.
    pub(crate) fn error(&self, problem: &impl ToString) -> CertificateError {
        CertificateError {
            path: self.path.clone(),
            problem: problem.to_string(),
        }
    }
}

/// Paths of the PEM files of a TLS client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClientTlsFiles {
    /// CA certificates that verify the server's certificate. `None` for the certificate authorities of this machine, or
    /// those of the file in the environment variable `SSL_CERT_FILE`.
    pub(crate) ca: Option<PathBuf>,
    /// Certificate and private key of the client, for servers that require a client certificate.
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
}

/// The certificates of a TLS client. Two are equal if the files have the same contents.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ClientTls {
    ca: Option<PemFile>,
    identity: Option<(PemFile, PemFile)>,
}

impl ClientTls {
    /// Reads the files.
    ///
    /// # Errors A file cannot be read, its contents are not valid, or the key does not belong to the certificate. The
    /// error names the file.
    pub(crate) fn read(files: &ClientTlsFiles) -> Result<Self, CertificateError> {
        let identity = files.identity.as_ref();
        let identity = identity.map(|(certificate, key)| {
            Ok::<_, CertificateError>((PemFile::read(certificate)?, PemFile::read(key)?))
        });
        let tls = Self {
            ca: files.ca.as_deref().map(PemFile::read).transpose()?,
            identity: identity.transpose()?,
        };
        tls.try_config()?;
        Ok(tls)
    }

    /// Returns the configuration for rustls.
    pub(crate) fn config(&self) -> ClientConfig {
        self.try_config()
            .expect("the files were checked when they were read")
    }

    /// Returns these certificates. Those that are missing are taken from `default`.
    pub(crate) fn or(self, default: &Self) -> Self {
        Self {
            ca: self.ca.or_else(|| default.ca.clone()),
            identity: self.identity.or_else(|| default.identity.clone()),
        }
    }

    fn try_config(&self) -> Result<ClientConfig, CertificateError> {
        let builder = match &self.ca {
            Some(ca) => builder(ca.authorities()?),
            None => builder(machine_authorities()),
        };
        let Some((certificate, key)) = &self.identity else {
            return Ok(builder.with_no_client_auth());
        };
        builder
            .with_client_auth_cert(certificate.certificates()?, key.key()?)
            .map_err(|error| certificate.error(&error))
    }

    /// Returns the configuration for tonic.
    pub(crate) fn tonic_config(&self) -> ClientTlsConfig {
        // tonic's own limit for a connection ends before the handshake.
        let config = ClientTlsConfig::new().timeout(HANDSHAKE_TIMEOUT);
        let config = match &self.ca {
            Some(ca) => config.ca_certificate(Certificate::from_pem(&ca.contents)),
            None => config.trust_anchors(machine_authorities().roots),
        };
        match &self.identity {
            Some((certificate, key)) => {
                config.identity(Identity::from_pem(&certificate.contents, &key.contents))
            }
            None => config,
        }
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = |file: &PemFile| file.path.clone();
        f.debug_struct("ClientTls")
            .field("ca", &self.ca.as_ref().map(path))
            .field(
                "certificate",
                &self.identity.as_ref().map(|(it, _)| path(it)),
            )
            .finish_non_exhaustive()
    }
}

/// Returns a configuration that trusts no certificate authority, for clients that never connect over TLS. It saves
/// reading the certificates of this machine.
pub(crate) fn client_config_without_authorities() -> ClientConfig {
    builder(RootCertStore::empty()).with_no_client_auth()
}

fn builder(roots: RootCertStore) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider supports the default versions")
        .with_root_certificates(roots)
}

/// Returns the certificate authorities of this machine, or those of the file in the environment variable
/// `SSL_CERT_FILE`.
fn machine_authorities() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    for error in found.errors {
        tracing::warn!(%error, "cannot read a certificate authority");
    }
    if roots.is_empty() {
        tracing::error!("this machine has no certificate authorities; set SSL_CERT_FILE");
    }
    roots
}
