//! Fuzz target of the seams between two streams of one completion.

use super::continuation::{TargetFacts, continuation};
use super::delivered::Delivered;
use super::rung::Rung;
use super::seam::Seam;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::tokens::{Timestamps, TokenBatch};

/// The number of tokens that are delivered before the stream breaks, two bytes that decide how two engines divide the
/// text into tokens, and the text. The client gets the text once, without a gap in the indices, whether the second engine
/// replays the text or continues it.
pub(crate) fn seams(data: &[u8]) {
    let [delivered_tokens, first, second, text @ ..] = data else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    let message = v1::CompletionRequest {
        input: Some(Input::Prompt("p".to_owned())),
        ..v1::CompletionRequest::default()
    };
    let mut delivered = Delivered::at_start(&message);
    let mut seam = Seam::continuing(&delivered);
    let pieces = divide(&text, *first);
    let kept = usize::from(*delivered_tokens).min(pieces.len());
    let seen = send(&mut seam, &mut delivered, &pieces[..kept]);
    for rung in [Rung::Replay, Rung::Text] {
        let mut delivered = delivered.clone();
        let continued = continuation(rung, &message, &delivered, &TargetFacts::default());
        let rest = match rung {
            Rung::Replay => &text[..],
            Rung::Resume | Rung::TokenIds | Rung::Text => &text[seen.len()..],
        };
        let mut seam = continued.seam;
        let added = send(&mut seam, &mut delivered, &divide(rest, *second));
        assert_eq!(format!("{seen}{added}"), text, "{rung:?}");
    }
}

/// Sends tokens through a seam. Returns the text that the client gets.
fn send(seam: &mut Seam, delivered: &mut Delivered, tokens: &[&str]) -> String {
    let mut seen = String::new();
    for (first_index, token) in (0..).zip(tokens) {
        let mut batch = TokenBatch::default();
        batch.push_with(0, Timestamps::default(), |out| out.push_str(token));
        let tokens = v1::Tokens {
            first_index,
            tokens: batch,
            ..v1::Tokens::default()
        };
        let joined = seam.join(tokens, delivered).expect("the text is the same");
        if let Some(joined) = joined {
            let next = delivered.choices[0].next_index;
            assert_eq!(joined.first_index, next, "the indices have a gap");
            seen.push_str(joined.tokens.text());
            delivered.record_tokens(&joined);
        }
    }
    seen
}

/// Divides a text into pieces of lengths that `lengths` decides. Some pieces are empty.
fn divide(text: &str, lengths: u8) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    let mut state = u32::from(lengths);
    while !rest.is_empty() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let length = usize::try_from(state >> 29).unwrap_or(0);
        let end = rest.ceil_char_boundary(length.min(rest.len()));
        let (piece, after) = rest.split_at(end);
        pieces.push(piece);
        rest = after;
    }
    pieces
}
