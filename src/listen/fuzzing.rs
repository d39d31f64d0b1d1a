//! Fuzz target of the first bytes of a connection to a port with TLS.

use std::cell::LazyCell;
use std::sync::Arc;

use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;
use tokio_rustls::rustls::{ServerConfig, ServerConnection};

use super::plaintext::{FirstBytes, HTTP2_PREFACE};
use super::tls;

/// Maximum number of bytes that a server answers to a client that has not finished the handshake.
const MAX_ANSWER_BYTES: usize = 16 * 1024;

thread_local! {
    static CONFIG: LazyCell<Arc<ServerConfig>> = const { LazyCell::new(config) };
}

fn config() -> Arc<ServerConfig> {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]);
    let certified = certified.expect("the name is valid");
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let config = tls::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into());
    Arc::new(config.expect("the key belongs to the certificate"))
}

/// Input: the length of frames, and the bytes that a client sends in such frames. A client that starts TLS gets no
/// response in plain text. No input finishes a handshake, because the client cannot compute its part without the
/// server's.
pub(crate) fn first_bytes(data: &[u8]) {
    let Some((frame_size, bytes)) = data.split_first() else {
        return;
    };
    let start = &bytes[..bytes.len().min(HTTP2_PREFACE.len())];
    let protocol = FirstBytes::of(start);
    let refusal = protocol.refusal();
    match protocol {
        FirstBytes::None | FirstBytes::Tls | FirstBytes::Unknown => assert!(refusal.is_empty()),
        FirstBytes::Http1 => assert!(refusal.starts_with(b"HTTP/1.1 400 ")),
        FirstBytes::Http2 => assert_eq!(start, HTTP2_PREFACE),
    }
    if protocol == FirstBytes::Tls {
        CONFIG.with(|config| shake_hands(config, bytes, usize::from(*frame_size).max(1)));
    }
}

fn shake_hands(config: &Arc<ServerConfig>, bytes: &[u8], frame_size: usize) {
    let connection = ServerConnection::new(Arc::clone(config));
    let mut connection = connection.expect("the configuration is valid");
    for mut frame in bytes.chunks(frame_size) {
        while !frame.is_empty() {
            match connection.read_tls(&mut frame) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let is_broken = connection.process_new_packets().is_err();
            let mut answer = Vec::new();
            while connection.wants_write() {
                let written = connection.write_tls(&mut answer);
                written.expect("writing to memory cannot fail");
            }
            assert!(answer.len() < MAX_ANSWER_BYTES);
            assert!(connection.is_handshaking(), "the handshake needs an answer");
            if is_broken {
                return;
            }
        }
    }
}
