//! An HTTP/2 client with windows as small as a test wants them, over one connection.

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::request::Builder;
use http::{Request, StatusCode};
use prost::Message;
use serde_json::Value;
use tokenway::proto::v1;
use tokio::net::TcpStream;

/// A connection; it ends with the test's runtime.
pub struct Connection {
    requests: SendRequest<Bytes>,
    address: String,
}

/// A body that was read to its end.
pub struct Body {
    pub bytes: Vec<u8>,
    /// Why the stream was reset; `None` where it ended well.
    pub reset: Option<Reason>,
}

impl Connection {
    /// Connects; the server may send no more of a stream than `window` bytes ahead of its reader.
    pub async fn open(address: &str, window: u32) -> Self {
        let socket = TcpStream::connect(address).await.expect("the door answers");
        let mut settings = h2::client::Builder::new();
        settings.initial_window_size(window);
        let (requests, connection) = settings.handshake(socket).await.expect("it speaks HTTP/2");
        tokio::spawn(connection);
        let address = address.to_owned();
        Self { requests, address }
    }

    /// Asks the HTTP door for a completion, and reads the answer's head.
    pub async fn completion(&self, body: &Value) -> RecvStream {
        let body = body.to_string().into();
        self.post("/v1/completions", "application/json", body).await
    }

    /// Asks the gRPC door for a completion, and reads the answer's head.
    pub async fn grpc_completion(&self, request: &v1::CompletionRequest) -> RecvStream {
        let message = request.encode_to_vec();
        let length = u32::try_from(message.len()).expect("a short message");
        let framed = [&[0][..], &length.to_be_bytes(), &message].concat();
        let path = "/tokenway.v1.Inference/Complete";
        self.post(path, "application/grpc", framed.into()).await
    }

    /// The status of the answer to a request without a body.
    pub async fn status(&self, request: Request<()>) -> StatusCode {
        let requests = self.requests.clone().ready().await;
        let sent = requests.expect("it is open").send_request(request, true);
        let (answer, _) = sent.expect("the request is sent");
        answer.await.expect("an answer").status()
    }

    /// A request for this path, to be filled.
    pub fn get(&self, path: &str) -> Builder {
        Request::get(format!("http://{}{path}", self.address))
    }

    /// Sends a body of this size to where there is nothing. The status of the answer, and whether all of
    /// the body was taken.
    pub async fn upload_to_nowhere(&self, mut size: usize) -> (StatusCode, bool) {
        let request = Request::post(format!("http://{}/nowhere", self.address));
        let request = request.body(()).expect("a whole request");
        let requests = self.requests.clone().ready().await;
        let sent = requests.expect("it is open").send_request(request, false);
        let (answer, mut upload) = sent.expect("the request is sent");
        let answer = answer.await.expect("an answer").status();
        while size > 0 {
            upload.reserve_capacity(size);
            let room = std::future::poll_fn(|cx| upload.poll_capacity(cx)).await;
            let Some(Ok(room)) = room else {
                return (answer, false);
            };
            let piece = Bytes::from(vec![b' '; room]);
            size -= room;
            if upload.send_data(piece, size == 0).is_err() {
                return (answer, false);
            }
        }
        (answer, true)
    }

    async fn post(&self, path: &str, content_type: &str, body: Bytes) -> RecvStream {
        let request = Request::post(format!("http://{}{path}", self.address))
            .header("content-type", content_type)
            .header("te", "trailers")
            .body(())
            .expect("a whole request");
        let requests = self.requests.clone().ready().await;
        let sent = requests.expect("it is open").send_request(request, false);
        let (answer, mut upload) = sent.expect("the request is sent");
        upload.send_data(body, true).expect("the body is sent");
        answer.await.expect("an answer").into_body()
    }
}

/// Reads a body to its end, and gives back each piece of its window as soon as that is read.
pub async fn read(mut stream: RecvStream) -> Body {
    let mut bytes = Vec::new();
    loop {
        match stream.data().await {
            Some(Ok(piece)) => {
                bytes.extend_from_slice(&piece);
                let window = stream.flow_control();
                window.release_capacity(piece.len()).expect("it was taken");
            }
            Some(Err(error)) => {
                let reset = Some(error.reason().expect("a reset"));
                return Body { bytes, reset };
            }
            None => return Body { bytes, reset: None },
        }
    }
}

/// Waits until a stream is reset, and takes nothing of it but what its window holds.
pub async fn reset(mut stream: RecvStream) -> Reason {
    loop {
        match stream.data().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return error.reason().expect("a reset"),
            None => panic!("the stream ended as if it were whole"),
        }
    }
}
