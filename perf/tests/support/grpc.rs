//! A gRPC server that streams given tokens. It runs on its own thread and shares no code with the client under test.

use std::net::{SocketAddr, TcpListener};
use std::thread;

use bytes::Bytes;
use h2::server::SendResponse;
use http::{HeaderMap, Response};
use prost::Message;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;

/// The way in which the server ends its streams.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    Summary,
    /// The stream ends cleanly, but without a summary.
    Missing,
    /// The stream ends with the status `Internal`.
    Error,
}

/// A server that runs until the test ends.
pub(crate) struct PlantedGrpcServer(SocketAddr);

impl PlantedGrpcServer {
    /// Starts a server that answers every request with the tokens of these indices.
    pub(crate) fn streaming(indices: &'static [u32], end: StreamEnd) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        listener.set_nonblocking(true).expect("it is a socket");
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                while let Ok((socket, _)) = listener.accept().await {
                    tokio::spawn(async move {
                        let mut connection = h2::server::handshake(socket).await?;
                        while let Some(request) = connection.accept().await {
                            send_answer(indices, end, request?.1)?;
                        }
                        Ok::<_, h2::Error>(())
                    });
                }
            });
        });
        Self(address)
    }

    pub(crate) fn address(&self) -> String {
        self.0.to_string()
    }
}

fn send_answer(
    indices: &[u32],
    end: StreamEnd,
    mut respond: SendResponse<Bytes>,
) -> Result<(), h2::Error> {
    let head = Response::builder().header("content-type", "application/grpc");
    let mut stream = respond.send_response(head.body(()).expect("a response"), false)?;
    let mut send = |event| {
        let message = v1::CompletionEvent { event: Some(event) }.encode_to_vec();
        let length = u32::try_from(message.len()).expect("a short message");
        let framed = [&[0][..], &length.to_be_bytes(), &message].concat();
        stream.send_data(framed.into(), false)
    };
    send(Event::Started(v1::Started::default()))?;
    for (place, &index) in (1..).zip(indices) {
        let is_last = place == indices.len() && end != StreamEnd::Error;
        let token = v1::Token {
            id: index,
            text: format!("token_{index}"),
            ..v1::Token::default()
        };
        send(Event::Tokens(v1::Tokens {
            first_index: index,
            tokens: [token].into_iter().collect(),
            finish_reason: if is_last {
                v1::FinishReason::Length.into()
            } else {
                0
            },
            ..v1::Tokens::default()
        }))?;
    }
    if end == StreamEnd::Summary {
        send(Event::Summary(v1::Summary::default()))?;
    }
    let mut trailers = HeaderMap::new();
    let status = if end == StreamEnd::Error { "13" } else { "0" };
    trailers.insert("grpc-status", status.parse().expect("a number"));
    trailers.insert("grpc-message", "planted".parse().expect("a text"));
    stream.send_trailers(trailers)
}
