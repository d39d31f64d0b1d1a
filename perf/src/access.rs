//! Access of a client to a server: the key that it sends, and TLS.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderValue};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_util::either::Either;

use crate::fault::Fault;
use crate::stream::Protocol;

/// Name in the server's certificate.
const SERVER_NAME: &str = "localhost";

/// Socket of a client, with or without TLS.
pub(crate) type ClientSocket = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Key and TLS of a client. The default has neither.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Access {
    /// API key.
    pub(crate) key: Option<Arc<str>>,
    /// PEM file with the CA certificate of the server. Without it, the client does not use TLS.
    pub(crate) authority: Option<Arc<PathBuf>>,
}

impl Access {
    pub(crate) fn scheme(&self) -> &'static str {
        match self.authority {
            Some(_) => "https",
            None => "http",
        }
    }

    /// Adds the key to the headers of a request.
    pub(crate) fn authorize(&self, headers: &mut HeaderMap) {
        if let Some(key) = &self.key {
            let value = HeaderValue::from_str(&format!("Bearer {key}"));
            headers.insert(AUTHORIZATION, value.expect("a key is ASCII"));
        }
    }

    /// Starts TLS on a connected socket, if the server requires it.
    pub(crate) async fn secure(
        &self,
        socket: TcpStream,
        protocol: Protocol,
    ) -> Result<ClientSocket, Fault> {
        let Some(authority) = &self.authority else {
            return Ok(Either::Left(socket));
        };
        let certificate = CertificateDer::from_pem_file(authority.as_path());
        let certificate = certificate.map_err(io::Error::other)?;
        let mut authorities = RootCertStore::empty();
        authorities.add(certificate).map_err(io::Error::other)?;
        let mut config = ClientConfig::builder()
            .with_root_certificates(authorities)
            .with_no_client_auth();
        config.alpn_protocols = vec![match protocol {
            Protocol::Http1 => b"http/1.1".to_vec(),
            Protocol::Http2 => b"h2".to_vec(),
        }];
        let name = ServerName::try_from(SERVER_NAME).expect("the name is valid");
        let connector = TlsConnector::from(Arc::new(config));
        Ok(Either::Right(connector.connect(name, socket).await?.into()))
    }
}
