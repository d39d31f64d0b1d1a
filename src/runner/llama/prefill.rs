//! Decides how many rows (tokens) of a prompt go into one call of llama.cpp. With an exact plan, a row's result does
//! not depend on the number of rows in its call. This module knows token ids. It must not know the device or other
//! sequences.
//!
//! llama.cpp's attention on a CPU has two kernels, which round differently: the tiled kernel for calls of at least 64
//! rows of a sequence, and the row kernel for fewer. The tiled kernel is much faster. A row's result depends on the
//! kernel, but not on the other rows of the call. A [`PrefillPlan`] therefore assigns each row of a prompt to a
//! kernel, from the tokens alone. The same prompt therefore has the same results however it is split into calls,
//! whatever part of it is reused, and when it is computed again on another worker.
//!
//! The assistant's text in a chat is generated token by token, with the row kernel. When the next request of the chat
//! repeats this text, the plan assigns it to the row kernel again, so that the request can reuse it.

use std::ops::Range;

use crate::request::TokenId;

/// Minimum number of rows of one sequence for which llama.cpp uses the tiled kernel (`GGML_FA_TILE_Q`).
pub(super) const TILED_ROWS: usize = 64;

/// The token ids that mark the assistant's text in a rendered chat.
#[derive(Debug, Default)]
pub(super) struct ChatMarkers {
    /// The tokens that the chat template puts before the assistant's text. Empty if the model has no chat template
    /// or its template puts nothing there.
    pub(super) generation_prompt: Vec<TokenId>,
    /// Each of these tokens ends the assistant's text.
    pub(super) end_tokens: Vec<TokenId>,
}

/// The kernel of each row of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PrefillPlan {
    /// Each row is computed by one of two kernels. These ranges of rows are for the tiled kernel; each has at least
    /// [`TILED_ROWS`] rows. All other rows are for the row kernel.
    Exact(Vec<Range<usize>>),
    /// Either kernel may compute any row, so the results of a row may differ in their last bits.
    Contiguous,
}

/// A call of llama.cpp for one sequence: the number of its next rows, and the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// Rows for the tiled kernel, in a call of their own.
    Tiled(usize),
    /// Up to 63 rows for the row kernel. They may share a call with rows of other sequences.
    Rows(usize),
}

impl PrefillPlan {
    /// Assigns the rows of a prompt to kernels. The rows after the prompt are for the row kernel.
    pub(super) fn exact(prompt: &[TokenId], markers: &ChatMarkers) -> Self {
        let mut tiled = Vec::new();
        let mut start = 0;
        while start < prompt.len() {
            let end = markers
                .assistant_start(prompt, start)
                .unwrap_or(prompt.len());
            if end - start >= TILED_ROWS {
                tiled.push(start..end);
            }
            start = markers.assistant_end(prompt, end);
        }
        Self::Exact(tiled)
    }

    /// Returns the number of rows that a sequence with this plan can reuse from a sequence with the plan `other`.
    /// `common` is the number of tokens with which both sequences start, and `total` the number of this sequence's
    /// tokens. The last row is computed again, because its logits give the next token.
    pub(super) fn reusable(&self, other: &Self, common: usize, total: usize) -> usize {
        let reusable = common.min(total.saturating_sub(1));
        let (Self::Exact(own), Self::Exact(others)) = (self, other) else {
            return reusable;
        };
        let reusable = reusable.min(first_difference(own, others));
        // The rest of a range for the tiled kernel must be large enough for that kernel.
        match own.iter().find(|range| range.contains(&reusable)) {
            Some(range) => reusable.min(range.end - TILED_ROWS),
            None => reusable,
        }
    }

    /// Returns the next call for a sequence of which `computed` of `total` rows are computed. A call of the tiled
    /// kernel has at most `tiled_budget` rows, rounded down to a multiple of [`TILED_ROWS`] but not to 0. It has more
    /// only if the rest would be too small for this kernel.
    ///
    /// llama.cpp computes the attention of a call in tiles of [`TILED_ROWS`] rows. An incomplete tile takes as long as
    /// a complete one.
    pub(super) fn next_chunk(&self, computed: usize, total: usize, tiled_budget: usize) -> Chunk {
        let budget = (tiled_budget / TILED_ROWS).max(1) * TILED_ROWS;
        let (end, is_tiled) = match self {
            Self::Contiguous => (total, total - computed >= TILED_ROWS),
            Self::Exact(tiled) => match tiled.iter().find(|range| computed < range.end) {
                Some(range) if range.contains(&computed) => (range.end, true),
                Some(range) => (range.start, false),
                None => (total, false),
            },
        };
        let left = end.min(total) - computed;
        if !is_tiled {
            return Chunk::Rows(left.min(TILED_ROWS - 1));
        }
        if left <= budget || left < 2 * TILED_ROWS {
            return Chunk::Tiled(left);
        }
        Chunk::Tiled(budget.min(left - TILED_ROWS))
    }
}

impl ChatMarkers {
    /// Returns the position of the assistant's next text: the end of the next generation prompt at or after `start`.
    fn assistant_start(&self, prompt: &[TokenId], start: usize) -> Option<usize> {
        let length = self.generation_prompt.len();
        if length == 0 {
            return None;
        }
        let mut windows = prompt[start..].windows(length);
        let position = windows.position(|window| window == self.generation_prompt)?;
        Some(start + position + length)
    }

    /// Returns the end of the assistant's text that starts at `start`: the position of the token that ends it, or the
    /// end of the prompt.
    fn assistant_end(&self, prompt: &[TokenId], start: usize) -> usize {
        let mut rest = prompt[start..].iter();
        let length = rest.position(|id| self.end_tokens.contains(id));
        length.map_or(prompt.len(), |length| start + length)
    }
}

/// Returns the first row that is in a range of only one of the two lists, or `usize::MAX` if there is none.
fn first_difference(own: &[Range<usize>], others: &[Range<usize>]) -> usize {
    let mut pairs = own.iter().zip(others);
    if let Some((own, other)) = pairs.find(|(own, other)| own != other) {
        return if own.start == other.start {
            own.end.min(other.end)
        } else {
            own.start.min(other.start)
        };
    }
    let shared = own.len().min(others.len());
    let rest = own.get(shared).or(others.get(shared));
    rest.map_or(usize::MAX, |range| range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The generation prompt of a chat, and the token that ends a message.
    const GENERATE: [TokenId; 2] = [1, 2];
    const END: TokenId = 3;

    fn markers() -> ChatMarkers {
        ChatMarkers {
            generation_prompt: GENERATE.to_vec(),
            end_tokens: vec![END],
        }
    }

    /// Creates a prompt of a chat. Each turn has the number of tokens of the user's and of the assistant's text.
    fn chat(turns: &[(usize, usize)], last: usize) -> Vec<TokenId> {
        let mut ids = Vec::new();
        for (user, assistant) in turns {
            ids.extend(vec![10; *user]);
            ids.push(END);
            ids.extend(GENERATE);
            ids.extend(vec![20; *assistant]);
            ids.push(END);
        }
        ids.extend(vec![10; last]);
        ids.push(END);
        ids.extend(GENERATE);
        ids
    }

    fn exact(prompt: &[TokenId]) -> PrefillPlan {
        PrefillPlan::exact(prompt, &markers())
    }

    fn one_range(range: Range<usize>) -> PrefillPlan {
        PrefillPlan::Exact(Vec::from([range]))
    }

    fn common(a: &[TokenId], b: &[TokenId]) -> usize {
        a.iter().zip(b).take_while(|(a, b)| a == b).count()
    }

    /// Returns the number of rows that the second prompt reuses from the first one and its completion of `generated`
    /// tokens.
    fn reused(first: &[TokenId], generated: usize, second: &[TokenId]) -> usize {
        let mut computed = first.to_vec();
        computed.extend(vec![20; generated]);
        let common = common(&computed, second);
        exact(second).reusable(&exact(first), common, second.len())
    }

    #[test]
    fn the_assistants_text_is_for_the_row_kernel() {
        // 100 tokens of the user and 3 markers, 80 tokens of the assistant, 70 of the user, 4 markers.
        let prompt = chat(&[(100, 80)], 70);
        assert_eq!(exact(&prompt), PrefillPlan::Exact(vec![0..103, 183..257]));
        assert_eq!(prompt.len(), 257);
    }

    #[test]
    fn a_short_message_is_for_the_row_kernel() {
        let prompt = chat(&[(100, 80)], 59);
        assert_eq!(exact(&prompt), one_range(0..103));
        let prompt = chat(&[(100, 80)], 60);
        assert_eq!(exact(&prompt), PrefillPlan::Exact(vec![0..103, 183..247]));
    }

    #[test]
    fn a_prompt_without_markers_is_one_range() {
        let plan = PrefillPlan::exact(&[1; 500], &ChatMarkers::default());
        let PrefillPlan::Exact(tiled) = plan else {
            panic!("the plan is exact");
        };
        assert_eq!(tiled, std::slice::from_ref(&(0..500)));
    }

    #[test]
    fn a_growing_chat_reuses_all_computed_tokens() {
        let first = chat(&[], 100);
        let second = chat(&[(100, 40)], 20);
        assert_eq!(reused(&first, 40, &second), 143);
        let third = chat(&[(100, 40), (20, 30)], 90);
        let mut computed = second.clone();
        computed.extend(vec![20; 30]);
        assert_eq!(reused(&second, 30, &third), computed.len());
    }

    #[test]
    fn text_that_was_generated_is_computed_again_if_the_next_prompt_does_not_mark_it() {
        let first = vec![10; 100];
        let mut second = first.clone();
        second.extend(vec![20; 200]);
        assert_eq!(reused(&first, 120, &second), 100);
    }

    #[test]
    fn the_rest_of_a_range_is_never_too_small_for_the_tiled_kernel() {
        let prompt = vec![10; 200];
        // The whole prompt is reused: its last 64 rows are computed again.
        assert_eq!(reused(&prompt, 0, &prompt), 136);
        // A message for the row kernel: only the last row is computed again.
        let prompt = vec![10; 63];
        assert_eq!(reused(&prompt, 0, &prompt), 62);
        for reused in 0..200 {
            let plan = exact(&[10; 200]);
            let start = plan.reusable(&plan, reused, 200);
            assert!(200 - start >= TILED_ROWS && start <= reused);
        }
    }

    #[test]
    fn every_way_through_a_prompt_uses_the_planned_kernels() {
        let prompt = chat(&[(100, 80), (10, 200)], 333);
        let plan = exact(&prompt);
        let PrefillPlan::Exact(tiled) = &plan else {
            panic!("the plan is exact");
        };
        let total = prompt.len() + 5;
        for budget in [1, 64, 65, 100, 128, 200, 1000] {
            let mut computed = 0;
            while computed < total {
                let (rows, is_tiled) = match plan.next_chunk(computed, total, budget) {
                    Chunk::Tiled(rows) => (rows, true),
                    Chunk::Rows(rows) => (rows, false),
                };
                assert_eq!(rows >= TILED_ROWS, is_tiled, "{rows} rows at {computed}");
                assert!(rows < budget.max(TILED_ROWS) + TILED_ROWS);
                for row in computed..computed + rows {
                    let planned = tiled.iter().any(|range| range.contains(&row));
                    assert_eq!(planned, is_tiled, "row {row} with a budget of {budget}");
                }
                computed += rows;
            }
            assert_eq!(computed, total);
        }
    }

    #[test]
    fn a_contiguous_plan_reuses_everything_but_the_last_row() {
        let plan = PrefillPlan::Contiguous;
        assert_eq!(plan.reusable(&plan, 200, 200), 199);
        assert_eq!(plan.reusable(&plan, 150, 200), 150);
        assert_eq!(plan.next_chunk(150, 200, 128), Chunk::Rows(50));
        assert_eq!(plan.next_chunk(0, 200, 128), Chunk::Tiled(128));
        assert_eq!(plan.next_chunk(0, 200, 127), Chunk::Tiled(64));
        assert_eq!(plan.next_chunk(128, 200, 128), Chunk::Tiled(72));
    }

    #[test]
    fn plans_differ_first_where_only_one_uses_the_tiled_kernel() {
        let ranges = |list: &[(usize, usize)]| -> Vec<_> {
            list.iter().map(|(start, end)| *start..*end).collect()
        };
        for (own, others, first) in [
            (ranges(&[(0, 100)]), ranges(&[(0, 100)]), usize::MAX),
            (ranges(&[(0, 100)]), ranges(&[(0, 90)]), 90),
            (ranges(&[(0, 100)]), ranges(&[]), 0),
            (ranges(&[(0, 100)]), ranges(&[(0, 100), (200, 300)]), 200),
            (ranges(&[(50, 150)]), ranges(&[(0, 150)]), 0),
        ] {
            assert_eq!(first_difference(&own, &others), first);
            assert_eq!(first_difference(&others, &own), first);
        }
    }
}
