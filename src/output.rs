//! Standard output and standard error that never block.
//!
//! A pipe or terminal may be closed, the reader of a pipe may have stopped, and a disk may be full. In all these
//! cases, the code that writes a line must not block, fail or panic. Each stream therefore has a thread that writes
//! from a bounded buffer. A line is dropped and counted if the buffer is full or the write fails.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// Maximum number of bytes buffered for one stream.
const MAX_BUFFERED_BYTES: usize = 1024 * 1024;

/// Pause before a write to a non-blocking stream is retried.
const RETRY_DELAY: Duration = Duration::from_millis(10);

/// Number of lines that this process has dropped. It is global, because the streams belong to the process and not to
/// a server.
static DROPPED_LINES: AtomicU64 = AtomicU64::new(0);

/// Returns the number of lines that this process has dropped so far.
#[must_use]
pub(crate) fn dropped_lines() -> u64 {
    DROPPED_LINES.load(Ordering::Relaxed)
}

/// One output stream. Clones share its buffer.
#[derive(Clone, Debug)]
pub struct Output(Arc<SharedBuffer>);

#[derive(Debug)]
struct SharedBuffer {
    state: Mutex<BufferState>,
    /// Notified when a line is queued (wakes the writer thread) and when a line is written (wakes a flush).
    changed: Condvar,
}

#[derive(Debug, Default)]
struct BufferState {
    queue: VecDeque<Vec<u8>>,
    queued_bytes: usize,
    is_writing: bool,
}

impl Output {
    /// Returns a non-blocking standard output.
    ///
    /// # Errors
    /// The process is out of threads or file descriptors.
    pub fn stdout() -> io::Result<Self> {
        Self::duplicate("stdout", io::stdout().as_fd())
    }

    /// Returns a non-blocking standard error.
    ///
    /// # Errors
    /// The process is out of threads or file descriptors.
    pub fn stderr() -> io::Result<Self> {
        Self::duplicate("stderr", io::stderr().as_fd())
    }

    /// Opens a stream on a duplicate of the file descriptor. With [`io::Stdout`], its lock would block other threads
    /// while a write blocks.
    fn duplicate(name: &str, stream: impl AsFd) -> io::Result<Self> {
        let file = File::from(stream.as_fd().try_clone_to_owned()?);
        Self::to_writer(name, file)
    }

    /// Starts a thread with this name that writes to `writer`. The thread never ends.
    ///
    /// # Errors
    /// The process is out of threads.
    pub fn to_writer(name: &str, writer: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(SharedBuffer {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let output = Self(Arc::clone(&shared));
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || shared.write_lines(writer))?;
        Ok(output)
    }

    /// Writes one line and a line feed. Never blocks and never fails.
    pub fn line(&self, line: fmt::Arguments<'_>) {
        self.push(format!("{line}\n").into_bytes());
    }

    /// Waits until all lines are written, or until the deadline. Returns false if lines remain.
    #[must_use]
    pub fn flush_until(&self, deadline: Instant) -> bool {
        let timeout = deadline.saturating_duration_since(Instant::now());
        let is_busy = |state: &mut BufferState| state.is_writing || !state.queue.is_empty();
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.0.state(), timeout, is_busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn push(&self, bytes: Vec<u8>) {
        let mut state = self.0.state();
        if state.queued_bytes.saturating_add(bytes.len()) > MAX_BUFFERED_BYTES {
            drop(state);
            DROPPED_LINES.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.queued_bytes += bytes.len();
        state.queue.push_back(bytes);
        drop(state);
        self.0.changed.notify_all();
    }
}

/// Each write is queued as one line, or as a part of the progress bar. Writes never fail.
impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes.to_vec());
        Ok(bytes.len())
    }

    /// Does nothing, because code that logs must not block. [`Output::flush_until`] flushes the stream.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl SharedBuffer {
    fn state(&self) -> MutexGuard<'_, BufferState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the writer thread: writes queued lines one after the other.
    fn write_lines(&self, mut writer: impl Write) {
        loop {
            let line = self.next_line();
            if write_all(&mut writer, &line).is_err() {
                DROPPED_LINES.fetch_add(1, Ordering::Relaxed);
            }
            self.state().is_writing = false;
            self.changed.notify_all();
        }
    }

    fn next_line(&self) -> Vec<u8> {
        let mut state = self.state();
        loop {
            if let Some(line) = state.queue.pop_front() {
                state.queued_bytes -= line.len();
                state.is_writing = true;
                return line;
            }
            let guard = self.changed.wait(state);
            state = guard.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Writes all bytes. Retries while the writer would block, because another process may have made the pipe or terminal
/// non-blocking.
fn write_all(writer: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match writer.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::park_timeout(RETRY_DELAY);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::*;

    /// A writer for tests. It sends each write to a channel, and blocks until the write is received.
    struct ChannelWriter(SyncSender<Vec<u8>>);

    impl Write for ChannelWriter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let sent = self.0.send(bytes.to_vec());
            sent.map_err(|_| ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn channel_output() -> (Output, Receiver<Vec<u8>>) {
        let (sender, written) = sync_channel(0);
        let output =
            Output::to_writer("test", ChannelWriter(sender)).expect("the writer thread starts");
        (output, written)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn lines_are_written_in_order_and_a_flush_waits_for_them() {
        let (output, written) = channel_output();
        let reader = std::thread::spawn(move || written.iter().take(3).collect::<Vec<_>>());
        for number in 0..3 {
            output.line(format_args!("line {number}"));
        }
        assert!(output.flush_until(soon()));
        let read = reader.join().expect("the reader thread does not panic");
        assert_eq!(read.concat(), b"line 0\nline 1\nline 2\n");
    }

    #[test]
    fn a_stalled_reader_blocks_no_writer_and_memory_is_bounded() {
        let (output, _written) = channel_output();
        let before = dropped_lines();
        let line = "x".repeat(MAX_BUFFERED_BYTES / 8);
        for _ in 0..20 {
            output.line(format_args!("{line}"));
        }
        // The writer thread may have taken one line out of the buffer before it blocked.
        assert!(dropped_lines() - before >= 20 - 8);
        assert!(output.0.state().queued_bytes <= MAX_BUFFERED_BYTES);
        assert!(!output.flush_until(Instant::now()), "lines remain");
    }

    #[test]
    fn a_failed_write_is_counted_and_the_next_line_is_written() {
        /// A writer whose first write fails as if the disk were full.
        struct FullAtFirst(Option<()>, SyncSender<Vec<u8>>);
        impl Write for FullAtFirst {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                match self.0.take() {
                    Some(()) => Err(ErrorKind::StorageFull.into()),
                    None => ChannelWriter(self.1.clone()).write(bytes),
                }
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (sender, written) = sync_channel(1);
        let before = dropped_lines();
        let output = Output::to_writer("test", FullAtFirst(Some(()), sender))
            .expect("the writer thread starts");
        output.line(format_args!("lost"));
        output.line(format_args!("written"));
        assert_eq!(written.recv().expect("a line is written"), b"written\n");
        assert!(dropped_lines() > before);
    }
}
