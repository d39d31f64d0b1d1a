//! Output of the completion.

use std::io::Write;

use super::options::ClientError;

/// Writes text and flushes it, so that the text appears on the terminal at once.
pub(super) fn write_text(out: &mut dyn Write, text: &str) -> Result<(), ClientError> {
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
