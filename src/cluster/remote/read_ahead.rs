//! Reads the stream of a remote engine ahead into a bounded buffer.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::Instrument;

use crate::cluster::upstream::BoxedEventStream;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// Maximum number of events in the read-ahead buffer of a stream.
const READ_AHEAD_EVENTS: usize = 64;
/// Maximum number of tokens in the read-ahead buffer of a stream.
const READ_AHEAD_TOKENS: u32 = 256;

/// Maximum wait for the trailers of a stream after its last event.
const TRAILERS_TIMEOUT: Duration = Duration::from_secs(1);

/// An event in the read-ahead buffer. It holds the permits for its tokens until its reader takes it.
struct BufferedEvent {
    event: Result<v1::CompletionEvent, Status>,
    _permit: OwnedSemaphorePermit,
}

/// Starts a task that reads a stream into a bounded buffer, and pauses while the buffer is full. Dropping the
/// returned stream ends the task and cancels the RPC. The task keeps `held` until it ends.
pub(in crate::cluster) fn start(
    mut stream: impl Stream<Item = Result<v1::CompletionEvent, Status>> + Unpin + Send + 'static,
    held: impl Send + 'static,
    tasks: &TaskTracker,
) -> BoxedEventStream {
    let (sender, receiver) = mpsc::channel(READ_AHEAD_EVENTS);
    let permits = Arc::new(Semaphore::new(
        usize::try_from(READ_AHEAD_TOKENS).unwrap_or(Semaphore::MAX_PERMITS),
    ));
    let reading = async move {
        let _held = held;
        loop {
            let event = tokio::select! {
                event = stream.next() => event,
                () = sender.closed() => return,
            };
            let Some(event) = event else { return };
            let is_last = is_last(&event);
            // Waiting for a permit ends even without a reader: dropping the receiver drops the buffered events, which
            // frees their permits.
            let permit = Arc::clone(&permits).acquire_many_owned(permits_for(&event));
            let permit = permit
                .await
                .expect("the semaphore of the read-ahead buffer is never closed");
            let buffered = BufferedEvent {
                event,
                _permit: permit,
            };
            let has_reader = sender.send(buffered).await.is_ok();
            if is_last {
                // Only the trailers are missing. Dropping the stream before they arrive would reset it.
                let _ = timeout(TRAILERS_TIMEOUT, stream.next()).await;
            }
            if is_last || !has_reader {
                return;
            }
        }
    };
    tasks.spawn(reading.in_current_span());
    Box::pin(ReceiverStream::new(receiver).map(|buffered| buffered.event))
}

/// Returns true for the last event of a stream: a summary or an error.
fn is_last(event: &Result<v1::CompletionEvent, Status>) -> bool {
    let event = event.as_ref().map(|event| &event.event);
    matches!(event, Ok(Some(Event::Summary(_))) | Err(_))
}

/// Returns the number of read-ahead permits that an event takes: its token count, clamped to 1..=READ_AHEAD_TOKENS so
/// that acquiring them can always succeed.
fn permits_for(event: &Result<v1::CompletionEvent, Status>) -> u32 {
    match event.as_ref().map(|event| &event.event) {
        Ok(Some(
            Event::Tokens(tokens)
            | Event::Prompt(v1::EchoedPrompt {
                tokens: Some(tokens),
                ..
            }),
        )) => {
            let count = u32::try_from(tokens.tokens.len()).unwrap_or(READ_AHEAD_TOKENS);
            count.clamp(1, READ_AHEAD_TOKENS)
        }
        Ok(_) | Err(_) => 1,
    }
}
