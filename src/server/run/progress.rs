//! The terminal on which the progress bar is drawn. Writes neither block nor fail, even if the terminal is stopped
//! (Ctrl-S) or closed.

use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressDrawTarget, TermLike};
use rustix::termios::tcgetwinsize;

use crate::output::Output;

/// Width of a terminal that does not report its size, in characters.
const DEFAULT_WIDTH: u16 = 80;

/// Returns the place to draw the progress bar: standard error if it is a terminal, otherwise nowhere.
pub(super) fn draw_target(stderr: &Output) -> ProgressDrawTarget {
    if io::stderr().is_terminal() {
        ProgressDrawTarget::term_like(Box::new(Terminal(stderr.clone())))
    } else {
        ProgressDrawTarget::hidden()
    }
}

#[derive(Debug)]
struct Terminal(Output);

impl Terminal {
    fn write(&self, text: &str) -> io::Result<()> {
        self.0.clone().write_all(text.as_bytes())
    }

    /// Writes the control sequence that moves the cursor by `steps` cells.
    fn move_cursor(&self, steps: usize, direction: char) -> io::Result<()> {
        match steps {
            0 => Ok(()),
            _ => self.write(&format!("\x1b[{steps}{direction}")),
        }
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        let size = tcgetwinsize(io::stderr()).ok();
        let columns = size.map(|size| size.ws_col);
        columns
            .filter(|columns| *columns > 0)
            .unwrap_or(DEFAULT_WIDTH)
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'D')
    }

    fn write_line(&self, s: &str) -> io::Result<()> {
        self.write(&format!("{s}\n"))
    }

    fn write_str(&self, s: &str) -> io::Result<()> {
        self.write(s)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.write("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
