//! Clients that send plain HTTP to a port with TLS. They get an error in their own protocol; otherwise they would see
//! only that the connection ends.

use std::io;

use super::transport::AcceptedSocket;

/// First byte of a TLS connection: the type of a handshake record (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// First bytes of an HTTP/2 connection (RFC 9113, section 3.4). No HTTP/1.1 method starts with them.
pub(super) const HTTP2_PREFACE: &[u8] = b"PRI";

/// Protocol of a client, as far as its first bytes show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FirstBytes {
    /// The client has closed the connection.
    None,
    Tls,
    Http1,
    Http2,
    /// Neither TLS nor HTTP.
    Unknown,
}

impl FirstBytes {
    /// Waits for the first bytes of a connection. They can still be read afterwards.
    pub(super) async fn peek(socket: &AcceptedSocket) -> io::Result<Self> {
        let mut bytes = [0; HTTP2_PREFACE.len()];
        let count = socket.peek(&mut bytes).await?;
        Ok(Self::of(&bytes[..count]))
    }

    pub(super) fn of(bytes: &[u8]) -> Self {
        match bytes {
            [] => Self::None,
            [TLS_HANDSHAKE, ..] => Self::Tls,
            HTTP2_PREFACE => Self::Http2,
            [first, ..] if first.is_ascii_uppercase() => Self::Http1,
            _ => Self::Unknown,
        }
    }

    /// Returns the answer to a client without TLS.
    pub(super) fn refusal(self) -> Vec<u8> {
        match self {
            Self::None | Self::Tls | Self::Unknown => Vec::new(),
            Self::Http1 => http1_refusal(),
            Self::Http2 => http2_refusal(),
        }
    }
}

fn http1_refusal() -> Vec<u8> {
    let body = concat!(
        r#"{"error":{"message":"This port requires TLS. Use https:// instead of http://.","#,
        r#""type":"invalid_request_error","param":null,"code":"tls_required"}}"#,
    );
    let length = body.len();
    let response = format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n{body}"
    );
    response.into_bytes()
}

/// Returns the SETTINGS frame that starts every HTTP/2 connection, and a GOAWAY frame (RFC 9113, section 6.8) with the
/// error `INADEQUATE_SECURITY` and a message.
fn http2_refusal() -> Vec<u8> {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const GO_AWAY_HEADER: [u8; 6] = [7, 0, 0, 0, 0, 0];
    const LAST_STREAM: [u8; 4] = [0; 4];
    const INADEQUATE_SECURITY: [u8; 4] = [0, 0, 0, 12];
    const MESSAGE: &[u8] = b"this port requires TLS";
    let length = u8::try_from(LAST_STREAM.len() + INADEQUATE_SECURITY.len() + MESSAGE.len());
    let length = [0, 0, length.expect("the message is short")];
    [
        &SETTINGS[..],
        &length,
        &GO_AWAY_HEADER,
        &LAST_STREAM,
        &INADEQUATE_SECURITY,
        MESSAGE,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_follows_from_the_first_bytes() {
        for (bytes, expected) in [
            (&b""[..], FirstBytes::None),
            (b"\x16\x03\x01", FirstBytes::Tls),
            (b"PRI", FirstBytes::Http2),
            (b"POS", FirstBytes::Http1),
            (b"P", FirstBytes::Http1),
            (b"GET", FirstBytes::Http1),
            (b"\x80\x2e\x01", FirstBytes::Unknown),
        ] {
            assert_eq!(FirstBytes::of(bytes), expected, "{bytes:?}");
        }
    }
}
