//! The stream of a connection: write timeout, header timeout, checks of the bytes that are read, and notification of
//! flushes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::Limits;
use super::activity::Activity;
use super::frames::FrameParser;
use super::request_head::HeadScanner;
use super::resets::{GO_AWAY_FRAME, ResetLimit};
use super::transport::Transport;
use crate::delivery::FlushTracker;

/// Stream with timeouts for writes and headers, and a limit on HTTP/2 cancellations.
pub(super) struct WatchedStream {
    transport: Transport,
    write_timeout: Duration,
    /// Write timeout; set while the socket accepts no data.
    write_timer: Option<Pin<Box<Sleep>>>,
    /// Number of bytes that the socket below a TLS session had accepted at the last check of the write timeout.
    sent_bytes: u64,
    /// True while written data waits. The next completed flush clears it.
    has_unsent_data: bool,
    header_timeout: Duration,
    /// Header timeout. Set while the headers of an HTTP/2 request, or of a second or later HTTP/1.1 request, are
    /// incomplete.
    header_timer: Option<Pin<Box<Sleep>>>,
    frames: FrameParser,
    resets: ResetLimit,
    /// Timer of a pause in reading. Set while an HTTP/2 client is slowed down that cancels almost all of its requests.
    read_pause: Option<Pin<Box<Sleep>>>,
    head: HeadScanner,
    activity: Arc<Activity>,
    flushes: Arc<FlushTracker>,
}

impl WatchedStream {
    pub(super) fn new(
        transport: Transport,
        limits: &Limits,
        activity: &Arc<Activity>,
    ) -> (Self, Arc<FlushTracker>) {
        let flushes = Arc::new(FlushTracker::default());
        let watched = Self {
            transport,
            write_timeout: limits.write_timeout,
            write_timer: None,
            sent_bytes: 0,
            has_unsent_data: false,
            header_timeout: limits.header_timeout,
            header_timer: None,
            frames: FrameParser::new(),
            resets: ResetLimit::new(),
            read_pause: None,
            head: HeadScanner::default(),
            activity: Arc::clone(activity),
            flushes: Arc::clone(&flushes),
        };
        (watched, flushes)
    }

    /// Returns the result of a write or a flush, or an error once the socket has accepted no data for the write
    /// timeout.
    ///
    /// A write to a TLS session may only fill the session's buffer, and a flush may send a part of it and still be
    /// pending. Progress is therefore judged by the bytes that the socket has accepted.
    fn check_write_timeout<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let sent_bytes = self.transport.sent_bytes();
        let has_sent = sent_bytes != self.sent_bytes;
        self.sent_bytes = sent_bytes;
        if has_sent || (written.is_ready() && !self.transport.has_buffered_data()) {
            self.write_timer = None;
        }
        if written.is_ready() {
            return written;
        }
        if !self.has_unsent_data {
            self.has_unsent_data = true;
            self.activity.set_output_blocked();
        }
        let timeout = self.write_timeout;
        let timer = self
            .write_timer
            .get_or_insert_with(|| Box::pin(sleep(timeout)));
        if timer.deadline() <= Instant::now() || timer.as_mut().poll(cx).is_ready() {
            let message = "the peer accepted no data within the write timeout";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)));
        }
        Poll::Pending
    }

    /// Checks and records the bytes that were read. Fails if the peer cancels too many requests.
    fn record_read(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.check_frames(bytes)?;
        if self.frames.is_http2() {
            self.activity.set_http2();
        } else if (self.head.is_in_head() || self.activity.expects_head())
            && let Some(Err(fault)) = self.head.scan(bytes)
        {
            self.activity.set_malformed_head(fault);
        }
        self.activity.record_read(bytes);
        Ok(())
    }

    fn check_frames(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (mut is_flood, header_blocks) = (false, self.frames.header_blocks());
        let resets = &mut self.resets;
        self.frames
            .parse(bytes, |frame| is_flood |= !resets.count(frame));
        if is_flood {
            tracing::warn!("closing a connection: the HTTP/2 client cancelled too many requests");
            self.transport.try_write(GO_AWAY_FRAME);
            return Err(io::Error::other("the peer cancelled too many requests"));
        }
        // The header timeout starts anew with each request.
        if self.frames.header_blocks() != header_blocks {
            self.header_timer = None;
        }
        let pause = self.resets.pause_until();
        self.read_pause = pause.map(|until| Box::pin(sleep_until(until)));
        Ok(())
    }

    /// Fails once the headers of a request have been incomplete for the header timeout.
    fn check_header_timeout(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.activity.is_reading_headers() && !self.frames.is_in_header_block() {
            self.header_timer = None;
            return Poll::Pending;
        }
        let timeout = self.header_timeout;
        let timer = self
            .header_timer
            .get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(timer.as_mut().poll(cx));
        let message = "the peer did not complete the request headers within the header timeout";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(pause) = &mut this.read_pause {
            ready!(pause.as_mut().poll(cx));
            this.read_pause = None;
        }
        let before = buffer.filled().len();
        match this.transport.poll_read(cx, buffer) {
            Poll::Ready(Ok(())) => Poll::Ready(this.record_read(&buffer.filled()[before..])),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => this.check_header_timeout(cx),
        }
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.transport.poll_write(cx, slices);
        this.check_write_timeout(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Reports that all written data was flushed.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = this.transport.poll_flush(cx);
        ready!(this.check_write_timeout(cx, flushed))?;
        if this.has_unsent_data {
            this.has_unsent_data = false;
            this.activity.clear_output_blocked();
        }
        this.flushes.record_flush();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let shut_down = this.transport.poll_shutdown(cx);
        this.check_write_timeout(cx, shut_down)
    }
}
