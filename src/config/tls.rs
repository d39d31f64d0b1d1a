//! The settings of TLS: certificates of a server, and certificates with which a client verifies servers.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::settings::Settings;
use super::values::FilePath;
use crate::certificates::{CertificateError, ClientTls, ClientTlsFiles};
use crate::listen::{ServerTls, ServerTlsFiles};

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "TLS")]
pub(super) struct ServerTlsSettings {
    /// Certificate (PEM file) of the HTTP API and the gRPC API, followed by its intermediate certificates. Both APIs
    /// then require TLS, except on Unix sockets. Changed files are applied within a few seconds, and on SIGHUP.
    /// `tokenway tls self-signed` creates a certificate for trying it [default: no TLS]
    #[arg(long, env = "TOKENWAY_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<FilePath>,
    /// Private key (PEM file) of the certificate in --tls-cert
    #[arg(long, env = "TOKENWAY_TLS_KEY", value_name = "FILE")]
    tls_key: Option<FilePath>,
    /// CA certificates (PEM file) of clients. Each client must then present a certificate that one of them has signed
    /// (mutual TLS) [default: clients need no certificate]
    #[arg(long, env = "TOKENWAY_TLS_CLIENT_CA", value_name = "FILE")]
    tls_client_ca: Option<FilePath>,
}

impl ServerTlsSettings {
    /// Reads the certificates. Returns `None` if the APIs do not use TLS.
    pub(super) fn server_tls(self, settings: &Settings) -> Result<Option<ServerTls>, ConfigError> {
        let files = match (self.tls_cert, self.tls_key) {
            (Some(certificate), Some(key)) => ServerTlsFiles {
                certificate: certificate.value,
                key: key.value,
                client_ca: self.tls_client_ca.map(|ca| ca.value),
            },
            (None, None) if self.tls_client_ca.is_none() => return Ok(None),
            _ => {
                let problem = "set --tls-cert and --tls-key together; --tls-client-ca needs both";
                return Err(ConfigError::Invalid(problem.to_owned()));
            }
        };
        let tls = ServerTls::read(files.clone());
        let paths = [
            ("tls_cert", Some(&files.certificate)),
            ("tls_key", Some(&files.key)),
            ("tls_client_ca", files.client_ca.as_ref()),
        ];
        tls.map(Some)
            .map_err(|error| invalid_file(settings, &error, &paths))
    }
}

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "TLS of engines")]
pub(super) struct EngineTlsSettings {
    /// CA certificates (PEM file) that verify the certificates of engines with `https` addresses [default: the
    /// certificate authorities of this machine]
    #[arg(long, env = "TOKENWAY_ENGINE_TLS_CA", value_name = "FILE")]
    engine_tls_ca: Option<FilePath>,
    /// Certificate (PEM file) that the gateway presents to engines with `https` addresses [default: none]
    #[arg(long, env = "TOKENWAY_ENGINE_TLS_CERT", value_name = "FILE")]
    engine_tls_cert: Option<FilePath>,
    /// Private key (PEM file) of the certificate in --engine-tls-cert
    #[arg(long, env = "TOKENWAY_ENGINE_TLS_KEY", value_name = "FILE")]
    engine_tls_key: Option<FilePath>,
}

impl EngineTlsSettings {
    /// Reads the certificates for engines.
    pub(super) fn client_tls(self, settings: &Settings) -> Result<ClientTls, ConfigError> {
        let identity = match (self.engine_tls_cert, self.engine_tls_key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some((certificate.value, key.value)),
            (Some(_), None) | (None, Some(_)) => {
                let problem = "set --engine-tls-cert and --engine-tls-key together";
                return Err(ConfigError::Invalid(problem.to_owned()));
            }
        };
        let ca = self.engine_tls_ca.map(|ca| ca.value);
        if ca.is_none() && identity.is_none() {
            return Ok(ClientTls::default());
        }
        let files = ClientTlsFiles { ca, identity };
        let (certificate, key) = files.identity.as_ref().map(|(it, key)| (it, key)).unzip();
        let paths = [
            ("engine_tls_ca", files.ca.as_ref()),
            ("engine_tls_cert", certificate),
            ("engine_tls_key", key),
        ];
        let tls = ClientTls::read(&files);
        tls.map_err(|error| invalid_file(settings, &error, &paths))
    }
}

/// Returns the error for a file that cannot be used. `paths` has the key of each setting, and the path in it.
fn invalid_file(
    settings: &Settings,
    error: &CertificateError,
    paths: &[(&str, Option<&PathBuf>)],
) -> ConfigError {
    let found = paths
        .iter()
        .find(|(_, path)| path.is_some_and(|path| path == error.path()));
    let (key, _) = found.expect("the error is about one of the files");
    let name = settings.name(key);
    settings.error(key, format!("{name}: {error}"))
}
