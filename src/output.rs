//! Standard output and standard error that never block.
//!
//! A pipe or terminal may be closed, the reader of a pipe may have stopped, and a disk may be full. In all these
//! cases, the code that writes a line must not block, fail or panic. Each stream therefore has a thread that writes
//! from a bounded buffer. A line is dropped and counted if the buffer is full or the write fails. Lines that are
//! logged within a few milliseconds are written together.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// Maximum number of bytes that wait for one stream's writer thread. The thread may hold as many again.
const MAX_BUFFERED_BYTES: usize = 1024 * 1024;

/// Time after a write during which the writer thread collects lines for its next write. A busy server logs thousands
/// of lines per second. Waking the thread for each of them costs more than formatting it.
const COLLECT_TIME: Duration = Duration::from_millis(2);

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
    /// Wakes the writer thread: bytes are queued, or a flush waits for them.
    queued: Condvar,
    /// Wakes a flush: bytes have been written.
    written: Condvar,
}

#[derive(Debug, Default)]
struct BufferState {
    /// Lines that are not written yet, and their number.
    lines: Vec<u8>,
    line_count: u64,
    /// True if the writer thread waits for lines, so that the next line must wake it.
    is_idle: bool,
    is_writing: bool,
    /// Number of flushes that wait.
    flushes: usize,
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
            queued: Condvar::new(),
            written: Condvar::new(),
        });
        let output = Self(Arc::clone(&shared));
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || shared.write_lines(writer))?;
        Ok(output)
    }

    /// Writes one line and a line feed. Never blocks and never fails.
    pub fn write_line(&self, line: fmt::Arguments<'_>) {
        self.push(format!("{line}\n").as_bytes());
    }

    /// Waits until all lines are written, or until the deadline. Returns false if lines remain.
    #[must_use]
    pub fn flush_until(&self, deadline: Instant) -> bool {
        let timeout = deadline.saturating_duration_since(Instant::now());
        let mut state = self.0.state();
        state.flushes += 1;
        self.0.queued.notify_one();
        let is_unwritten = |state: &mut BufferState| state.is_writing || !state.lines.is_empty();
        let waited = self
            .0
            .written
            .wait_timeout_while(state, timeout, is_unwritten);
        let (mut state, result) = waited.unwrap_or_else(PoisonError::into_inner);
        state.flushes -= 1;
        !result.timed_out()
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.0.state();
        if state.lines.len().saturating_add(line.len()) > MAX_BUFFERED_BYTES {
            drop(state);
            DROPPED_LINES.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.lines.extend_from_slice(line);
        state.line_count += 1;
        let must_wake = std::mem::replace(&mut state.is_idle, false);
        drop(state);
        if must_wake {
            self.0.queued.notify_one();
        }
    }
}

/// Each write is queued as one line, or as a part of the progress bar. Writes never fail.
impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
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

    /// Runs the writer thread: writes the queued lines, all in one write, and then collects lines for a while.
    fn write_lines(&self, mut writer: impl Write) {
        let mut lines = Vec::new();
        loop {
            let count = self.take_lines(&mut lines);
            if write_all(&mut writer, &lines).is_err() {
                DROPPED_LINES.fetch_add(count, Ordering::Relaxed);
            }
            lines.clear();
            self.collect();
        }
    }

    /// Waits for lines, swaps them into the empty buffer `lines`, and returns their number.
    fn take_lines(&self, lines: &mut Vec<u8>) -> u64 {
        let mut state = self.state();
        state.is_idle = true;
        let waited = self
            .queued
            .wait_while(state, |state| state.lines.is_empty());
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_idle = false;
        state.is_writing = true;
        std::mem::swap(&mut state.lines, lines);
        std::mem::take(&mut state.line_count)
    }

    /// Ends a write, and leaves new lines in the buffer for [`COLLECT_TIME`] unless a flush waits.
    fn collect(&self) {
        let mut state = self.state();
        state.is_writing = false;
        self.written.notify_all();
        let is_unhurried = |state: &mut BufferState| state.flushes == 0;
        let _ = self
            .queued
            .wait_timeout_while(state, COLLECT_TIME, is_unhurried);
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
        let expected = b"line 0\nline 1\nline 2\n";
        let reader = std::thread::spawn(move || {
            let mut read = Vec::new();
            while read.len() < expected.len() {
                read.extend(written.recv().expect("the writer thread runs"));
            }
            read
        });
        for number in 0..3 {
            output.write_line(format_args!("line {number}"));
        }
        assert!(output.flush_until(soon()));
        let read = reader.join().expect("the reader thread does not panic");
        assert_eq!(read, expected);
    }

    #[test]
    fn a_stalled_reader_blocks_no_writer_and_memory_is_bounded() {
        let (output, _written) = channel_output();
        let before = dropped_lines();
        let line = "x".repeat(MAX_BUFFERED_BYTES / 8);
        for _ in 0..20 {
            output.write_line(format_args!("{line}"));
        }
        // The writer thread may have taken a full buffer before it blocked, and the buffer holds seven lines.
        assert!(dropped_lines() - before >= 20 - 2 * 7);
        assert!(output.0.state().lines.len() <= MAX_BUFFERED_BYTES);
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
        output.write_line(format_args!("lost"));
        assert!(output.flush_until(soon()));
        output.write_line(format_args!("written"));
        assert_eq!(written.recv().expect("a line is written"), b"written\n");
        assert!(dropped_lines() > before);
    }
}
