//! Fuzz targets of the hand-written messages, which must decode like the generated ones.

use bytes::Buf;
use prost::Message;

use super::generated::{GeneratedStep, GeneratedTokens};
use super::{v1, worker};

/// An encoded `Tokens`: a byte with the position at which the encoding is split into two chunks, and the encoding.
pub(crate) fn tokens(data: &[u8]) {
    compare::<v1::Tokens, GeneratedTokens>(data, |_| ());
}

/// An encoded `Step`, split like the one of [`tokens`].
pub(crate) fn step(data: &[u8]) {
    compare::<worker::Step, GeneratedStep>(data, |step| {
        for entry in &mut step.sequences {
            // A list keeps the encoding of its numbers, which may be longer than necessary.
            entry.ids = entry.ids.iter().collect();
            entry.lengths = entry.lengths.iter().collect();
            // The hand-written code drops most of those that are too many.
            entry.logprobs.clear();
        }
    });
    if let Ok(step) = worker::Step::decode(data) {
        let mut entries = step.sequences.iter();
        assert!(entries.all(|entry| entry.logprobs.len() <= entry.ids.len() + 1));
    }
}

/// Decodes as `Written` what decodes as `Generated`, from one chunk and from two. After `normalize`, both are the same,
/// and the generated code reads what the hand-written code writes.
fn compare<Written, Generated>(data: &[u8], normalize: fn(&mut Written))
where
    Written: Message + Default + From<Generated>,
    Generated: Message + Default,
{
    let Some((split, encoded)) = data.split_first() else {
        return;
    };
    let decoded = Written::decode(encoded);
    let Ok(generated) = Generated::decode(encoded) else {
        return;
    };
    let decoded = decoded.expect("what the generated code decodes is valid");
    assert_eq!(decoded.encoded_len(), decoded.encode_to_vec().len());
    let normalized = |mut message: Written| {
        normalize(&mut message);
        message.encode_to_vec()
    };
    let encoding = normalized(decoded);
    assert_eq!(normalized(Written::from(generated)), encoding);
    let read = Generated::decode(&*encoding).expect("the encoding is valid");
    assert_eq!(normalized(Written::from(read)), encoding);
    let (one, other) = encoded.split_at(usize::from(*split).min(encoded.len()));
    let chunks = Written::decode(one.chain(other)).expect("chunks do not matter");
    assert_eq!(normalized(chunks), encoding);
}
