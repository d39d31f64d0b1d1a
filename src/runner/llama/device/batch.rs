//! The batch of one call of llama.cpp: the rows of each sequence.

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_batch::BatchAddError;
use llama_cpp_2::token::LlamaToken;

use super::LlamaRunner;
use crate::runner::Slot;

/// The rows of one sequence in a batch.
pub(super) struct BatchPart {
    pub(super) slot: Slot,
    pub(super) rows: usize,
    /// Index of the first row in the batch.
    first_row: i32,
    /// True if the next token is sampled from the logits of the last row. False while the prompt has more rows.
    pub(super) samples: bool,
}

impl BatchPart {
    pub(super) fn new(slot: Slot, rows: usize) -> Self {
        Self {
            slot,
            rows,
            first_row: 0,
            samples: false,
        }
    }

    /// Returns the logits of one of this sequence's rows. Logits must have been requested for the row.
    pub(super) fn logits<'a>(&self, context: &'a LlamaContext<'_>, offset: usize) -> &'a [f32] {
        let offset =
            i32::try_from(offset).expect("the number of rows in a batch fits into 32 bits");
        context.get_logits_ith(self.first_row + offset)
    }
}

/// Reason why a batch could not be filled. It should never occur, because sequences are checked when they are
/// admitted.
#[derive(Debug, thiserror::Error)]
pub(super) enum BatchError {
    #[error("a row index or a slot does not fit into 32 bits: {0}")]
    Number(#[from] std::num::TryFromIntError),
    #[error("{0}")]
    Full(#[from] BatchAddError),
}

impl LlamaRunner {
    /// Adds the planned rows to the batch. Logits are requested for rows that a token is sampled from, and for all
    /// rows of a scored prompt.
    pub(super) fn fill_batch(&mut self) -> Result<(), BatchError> {
        for part in &mut self.parts {
            let Some(sequence) = self.slots.sequence(part.slot) else {
                continue;
            };
            let seq_id = i32::try_from(part.slot.0)?;
            part.first_row = self.batch.n_tokens();
            part.samples = sequence.samples_after(part.rows);
            let (first, tokens) = sequence.next_rows(part.rows);
            for (offset, id) in tokens.iter().enumerate() {
                let is_sampled = part.samples && offset + 1 == part.rows;
                let has_output = is_sampled || sequence.is_scoring();
                let position = i32::try_from(first + offset)?;
                let token = LlamaToken(i32::try_from(*id)?);
                self.batch.add(token, position, &[seq_id], has_output)?;
            }
        }
        Ok(())
    }
}
