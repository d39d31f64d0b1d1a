//! The TLS configuration of HTTPS clients.

use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Returns a configuration that trusts the certificate authorities of this machine, or those of the file in the
/// environment variable `SSL_CERT_FILE`.
pub(crate) fn client_config() -> ClientConfig {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    for error in found.errors {
        tracing::warn!(%error, "cannot read a certificate authority");
    }
    if roots.is_empty() {
        tracing::error!("this machine has no certificate authorities; set SSL_CERT_FILE");
    }
    client_config_with(roots)
}

/// Returns a configuration that trusts no certificate authority, for clients that never connect over TLS. It saves
/// reading the certificates of this machine.
pub(crate) fn client_config_without_authorities() -> ClientConfig {
    client_config_with(RootCertStore::empty())
}

fn client_config_with(roots: RootCertStore) -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider supports the default versions")
        .with_root_certificates(roots)
        .with_no_client_auth()
}
