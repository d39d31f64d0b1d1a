//! An HTTP/2 client with one connection. The test chooses the flow-control window.

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::request::Builder;
use http::{Request, Response, StatusCode, Uri};
use prost::Message;
use serde_json::Value;
use tokenway::proto::v1;
use tokio::net::TcpStream;
use tokio::time::Interval;
use tonic::Status;

/// An HTTP/2 connection. It ends with the test's runtime.
pub struct Connection {
    requests: SendRequest<Bytes>,
    address: String,
}

/// A body that was read to its end.
pub struct Body {
    pub bytes: Vec<u8>,
    /// The reason of a stream that was reset. `None` if the stream ended cleanly.
    pub reset: Option<Reason>,
}

/// Outcome of a request that the server may refuse by closing the connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A response with this status.
    Status(u16),
    /// The stream was reset, or the connection closed.
    Closed,
}

impl Connection {
    /// Connects. `window` is the initial flow-control window of each stream, in bytes.
    pub async fn open(address: &str, window: u32) -> Self {
        let socket = TcpStream::connect(address)
            .await
            .expect("the server accepts connections");
        let mut settings = h2::client::Builder::new();
        settings.initial_window_size(window);
        let (requests, connection) = settings
            .handshake(socket)
            .await
            .expect("the server speaks HTTP/2");
        tokio::spawn(connection);
        let address = address.to_owned();
        Self { requests, address }
    }

    /// Starts a completion over the HTTP API. Reads the response head.
    pub async fn completion(&self, body: &Value) -> RecvStream {
        let body = body.to_string().into();
        self.post("/v1/completions", "application/json", body).await
    }

    /// Starts a completion over the gRPC API. Reads the response head.
    pub async fn grpc_completion(&self, request: &v1::CompletionRequest) -> RecvStream {
        let message = request.encode_to_vec();
        let length = u32::try_from(message.len()).expect("a short message");
        let framed = [&[0][..], &length.to_be_bytes(), &message].concat();
        let path = "/tokenway.v1.Inference/Complete";
        self.post(path, "application/grpc", framed.into()).await
    }

    /// Sends a request without a body. Returns the status of the response.
    pub async fn status(&self, request: Request<()>) -> StatusCode {
        let requests = self.requests.clone().ready().await;
        let sent = requests
            .expect("the connection is open")
            .send_request(request, true);
        let (answer, _) = sent.expect("the request is sent");
        answer.await.expect("the server responds").status()
    }

    /// Sends a request without a body, which the server may refuse. The path of the request needs no address.
    pub async fn outcome(&self, mut request: Request<()>) -> Outcome {
        *request.uri_mut() = self.uri(request.uri());
        let requests = self.requests.clone().ready().await;
        let sent = requests
            .expect("the connection is open")
            .send_request(request, true);
        let (answer, _) = sent.expect("the request is sent");
        match answer.await {
            Ok(response) => Outcome::Status(response.status().as_u16()),
            Err(_) => Outcome::Closed,
        }
    }

    /// Sends the bytes of a gRPC request. Returns the status in the trailers, or in the head of a response without
    /// messages. The path of the request needs no address.
    pub async fn grpc_status(&self, request: Builder, body: Bytes) -> Option<Status> {
        let mut request = request.body(()).expect("the request is valid");
        *request.uri_mut() = self.uri(request.uri());
        let requests = self.requests.clone().ready().await;
        let sent = requests
            .expect("the connection is open")
            .send_request(request, false);
        let (answer, mut upload) = sent.expect("the request is sent");
        upload.send_data(body, true).expect("the body is sent");
        let (head, mut body) = answer.await.expect("the server responds").into_parts();
        while body.data().await.is_some_and(|data| data.is_ok()) {}
        let trailers = body.trailers().await.ok().flatten();
        Status::from_header_map(&trailers.unwrap_or(head.headers))
    }

    fn uri(&self, path: &Uri) -> Uri {
        let uri = format!("http://{}{path}", self.address);
        uri.parse().expect("the path is valid")
    }

    /// Creates a builder of a `GET` request for this path.
    pub fn get(&self, path: &str) -> Builder {
        Request::get(format!("http://{}{path}", self.address))
    }

    /// Uploads `size` bytes to a path that does not exist. Returns the status of the response, and true if the server
    /// accepted the whole body.
    pub async fn upload_to_unknown_path(&self, mut size: usize) -> (StatusCode, bool) {
        let request = Request::post(format!("http://{}/nowhere", self.address));
        let request = request.body(()).expect("the request is valid");
        let requests = self.requests.clone().ready().await;
        let sent = requests
            .expect("the connection is open")
            .send_request(request, false);
        let (answer, mut upload) = sent.expect("the request is sent");
        let answer = answer.await.expect("the server responds").status();
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

    /// Sends a request whose body starts with `piece`, followed by one byte at each tick. The body never ends. Returns
    /// the response with its whole body.
    pub async fn drip(
        &self,
        path: &str,
        content_type: &str,
        piece: &'static [u8],
        mut ticks: Interval,
    ) -> Response<Vec<u8>> {
        let (answer, mut upload) = self.start_upload(path, content_type).await;
        let sent = upload.send_data(Bytes::from_static(piece), false);
        sent.expect("the stream is open");
        let drip = async {
            loop {
                ticks.tick().await;
                // The server may have ended the stream.
                let _ = upload.send_data(Bytes::from_static(b" "), false);
            }
        };
        let read = async {
            let (parts, body) = answer.await.expect("the server responds").into_parts();
            Response::from_parts(parts, read_body(body).await.bytes)
        };
        tokio::select! {
            response = read => response,
            () = drip => unreachable!("the drip never ends"),
        }
    }

    /// Starts to upload the body of a completion with this request id, and resets the stream. Returns once the server
    /// has received the reset.
    pub async fn reset_upload(&self, id: &str) {
        let request = Request::post(format!("http://{}/v1/completions", self.address))
            .header("content-type", "application/json")
            .header("x-request-id", id);
        let requests = self.requests.clone().ready().await;
        let sent = requests
            .expect("the connection is open")
            .send_request(request.body(()).expect("the request is valid"), false);
        let (answer, mut upload) = sent.expect("the request is sent");
        let piece = Bytes::from_static(b"{");
        upload.send_data(piece, false).expect("the body is sent");
        upload.send_reset(Reason::CANCEL);
        answer.await.expect_err("the stream was reset");
        // The server receives the frames of a connection in order.
        let probe = self.get("/livez").body(()).expect("the request is valid");
        assert_eq!(self.status(probe).await, StatusCode::OK);
    }

    /// Sends the head of a request whose body follows.
    async fn start_upload(
        &self,
        path: &str,
        content_type: &str,
    ) -> (ResponseFuture, SendStream<Bytes>) {
        let request = Request::post(format!("http://{}{path}", self.address))
            .header("content-type", content_type)
            .header("te", "trailers")
            .body(())
            .expect("the request is valid");
        let requests = self.requests.clone().ready().await;
        let sent = requests
            .expect("the connection is open")
            .send_request(request, false);
        sent.expect("the request is sent")
    }

    async fn post(&self, path: &str, content_type: &str, body: Bytes) -> RecvStream {
        let (answer, mut upload) = self.start_upload(path, content_type).await;
        upload.send_data(body, true).expect("the body is sent");
        answer.await.expect("the server responds").into_body()
    }
}

/// Reads a body to its end. Releases window capacity as soon as data is read.
pub async fn read_body(mut stream: RecvStream) -> Body {
    let mut bytes = Vec::new();
    loop {
        match stream.data().await {
            Some(Ok(piece)) => {
                bytes.extend_from_slice(&piece);
                let window = stream.flow_control();
                window
                    .release_capacity(piece.len())
                    .expect("the capacity was used");
            }
            Some(Err(error)) => {
                let reset = Some(error.reason().expect("the stream was reset"));
                return Body { bytes, reset };
            }
            None => return Body { bytes, reset: None },
        }
    }
}

/// Takes one byte of a stream at each tick, until the stream is reset.
pub async fn drip_until_reset(mut stream: RecvStream, mut ticks: Interval) -> Reason {
    loop {
        match stream.data().await {
            Some(Ok(piece)) => {
                for _ in 0..piece.len() {
                    ticks.tick().await;
                    // Releasing fails once the stream is reset.
                    let _ = stream.flow_control().release_capacity(1);
                }
            }
            Some(Err(error)) => return error.reason().expect("the stream was reset"),
            None => panic!("the stream ended cleanly instead of being reset"),
        }
    }
}

/// Waits until a stream is reset. Never releases window capacity.
pub async fn wait_for_reset(mut stream: RecvStream) -> Reason {
    loop {
        match stream.data().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return error.reason().expect("the stream was reset"),
            None => panic!("the stream ended cleanly instead of being reset"),
        }
    }
}
