//! Standard output and standard error of a program that must not depend on their readers.
//!
//! A reader may go away (a closed pipe or terminal), never read (a full pipe), or have no room (a full disk). None of
//! these may fail, block or panic the code that writes a line. So each stream has a thread of its own, which writes from
//! a bounded buffer. A line that finds the buffer full, or cannot be written, is dropped and counted.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// The most bytes that wait for one stream's reader.
const MAX_BUFFERED_BYTES: usize = 1024 * 1024;

/// The pause before a write is repeated on a stream that another process has made non-blocking.
const RETRY_DELAY: Duration = Duration::from_millis(10);

/// Lines of this process that were dropped. It is one number because the streams belong to the process, not to a server.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// The number of lines that this process has dropped so far.
#[must_use]
pub fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// One stream. Clones write to the same buffer.
#[derive(Clone, Debug)]
pub struct Output(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signals the writer that there is a line, and those who flush that none is left.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    is_writing: bool,
}

impl Output {
    /// Standard output.
    ///
    /// # Errors
    /// The system has no thread or file descriptor left.
    pub fn stdout() -> io::Result<Self> {
        Self::of("stdout", io::stdout().as_fd())
    }

    /// Standard error.
    ///
    /// # Errors
    /// The system has no thread or file descriptor left.
    pub fn stderr() -> io::Result<Self> {
        Self::of("stderr", io::stderr().as_fd())
    }

    /// A file of its own has no lock and no buffer that others wait for while a write blocks.
    fn of(name: &str, stream: impl AsFd) -> io::Result<Self> {
        let file = File::from(stream.as_fd().try_clone_to_owned()?);
        Self::to(name, file)
    }

    /// Writes to any writer, on a thread of this name. The thread lasts as long as the process.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn to(name: &str, writer: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let output = Self(Arc::clone(&shared));
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || shared.write_lines(writer))?;
        Ok(output)
    }

    /// Writes one line; its end is added. It never blocks and never fails.
    pub fn line(&self, line: fmt::Arguments<'_>) {
        self.push(format!("{line}\n").into_bytes());
    }

    /// Waits until everything is written, at most until the deadline. False where something is left.
    #[must_use]
    pub fn flush_until(&self, deadline: Instant) -> bool {
        let at_most = deadline.saturating_duration_since(Instant::now());
        let is_busy = |state: &mut State| state.is_writing || !state.waiting.is_empty();
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.0.state(), at_most, is_busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn push(&self, bytes: Vec<u8>) {
        let mut state = self.0.state();
        if state.waiting_bytes.saturating_add(bytes.len()) > MAX_BUFFERED_BYTES {
            drop(state);
            DROPPED.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.waiting_bytes += bytes.len();
        state.waiting.push_back(bytes);
        drop(state);
        self.0.changed.notify_all();
    }
}

/// Each write is one line, or a piece of the progress bar. Writes never fail.
impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes.to_vec());
        Ok(bytes.len())
    }

    /// Does nothing: whoever logs must not wait. [`Output::flush_until`] waits.
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

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writer's thread.
    fn write_lines(&self, mut writer: impl Write) {
        loop {
            let line = self.next_line();
            if write_whole(&mut writer, &line).is_err() {
                DROPPED.fetch_add(1, Ordering::Relaxed);
            }
            self.state().is_writing = false;
            self.changed.notify_all();
        }
    }

    fn next_line(&self) -> Vec<u8> {
        let mut state = self.state();
        loop {
            if let Some(line) = state.waiting.pop_front() {
                state.waiting_bytes -= line.len();
                state.is_writing = true;
                return line;
            }
            let woken = self.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A pipe or terminal that another process has made non-blocking refuses a write while it is full. This thread has
/// nothing else to do, so it waits.
fn write_whole(writer: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
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

    /// A writer that passes on what it is given, and blocks while nobody takes it.
    struct Passing(SyncSender<Vec<u8>>);

    impl Write for Passing {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let sent = self.0.send(bytes.to_vec());
            sent.map_err(|_| ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn passing() -> (Output, Receiver<Vec<u8>>) {
        let (sender, written) = sync_channel(0);
        let output = Output::to("test", Passing(sender)).expect("a thread");
        (output, written)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn lines_are_written_in_order_and_a_flush_waits_for_them() {
        let (output, written) = passing();
        let reader = std::thread::spawn(move || written.iter().take(3).collect::<Vec<_>>());
        for number in 0..3 {
            output.line(format_args!("line {number}"));
        }
        assert!(output.flush_until(soon()));
        let read = reader.join().expect("it does not panic");
        assert_eq!(read.concat(), b"line 0\nline 1\nline 2\n");
    }

    #[test]
    fn a_stalled_reader_blocks_no_writer_and_memory_is_bounded() {
        let (output, _written) = passing();
        let before = dropped_lines();
        let line = "x".repeat(MAX_BUFFERED_BYTES / 8);
        for _ in 0..20 {
            output.line(format_args!("{line}"));
        }
        // One may have left the buffer for the writer, which blocks.
        assert!(dropped_lines() - before >= 20 - 8);
        assert!(output.0.state().waiting_bytes <= MAX_BUFFERED_BYTES);
        assert!(!output.flush_until(Instant::now()), "much is left");
    }

    #[test]
    fn a_failed_write_is_counted_and_the_next_line_is_written() {
        /// Full at first, as a disk may be.
        struct Full(Option<()>, SyncSender<Vec<u8>>);
        impl Write for Full {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                match self.0.take() {
                    Some(()) => Err(ErrorKind::StorageFull.into()),
                    None => Passing(self.1.clone()).write(bytes),
                }
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (sender, written) = sync_channel(1);
        let before = dropped_lines();
        let output = Output::to("test", Full(Some(()), sender)).expect("a thread");
        output.line(format_args!("lost"));
        output.line(format_args!("written"));
        assert_eq!(written.recv().expect("a line"), b"written\n");
        assert!(dropped_lines() > before);
    }
}
