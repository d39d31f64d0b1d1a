//! Checks that each token arrived exactly once and in order, by the index in its text.

use crate::fault::Fault;

/// First violation of the order of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OrderFault {
    #[error("token_{index} is lost: token_{instead} arrived in its place")]
    Lost { index: u32, instead: u32 },
    #[error("token_{index} is lost: {received} of {expected} tokens arrived")]
    LostAtEnd {
        index: u32,
        received: usize,
        expected: u32,
    },
    #[error("token_{index} is repeated: it arrived again in the place of token_{place}")]
    Repeated { index: u32, place: usize },
    #[error("token_{early} and token_{late} are swapped: token_{early} arrived first")]
    Swapped { early: u32, late: u32 },
    #[error(
        "token_{index} is unexpected: only {expected} tokens were requested (it arrived in the place of token_{place})"
    )]
    Extra {
        index: u32,
        place: usize,
        expected: u32,
    },
}

/// Returns the index in the text of a test runner's token, or `None` for any other text.
fn token_index(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("token_")?;
    // `parse` accepts `+7` and `07`, which the test runner never writes.
    let is_canonical = match digits.as_bytes() {
        [b'0'] => true,
        [b'1'..=b'9', rest @ ..] => rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    is_canonical.then(|| digits.parse().ok()).flatten()
}

/// Returns the index in the text of a test runner's token. `beside` is the index that the protocol sends in addition
/// to the text. The two must be equal.
pub(crate) fn check_index(text: &str, beside: Option<u32>) -> Result<u32, Fault> {
    match (token_index(text), beside) {
        (None, _) => Err(Fault::unexpected(
            "a token of the test runner",
            format!("{text:?}"),
        )),
        (Some(index), Some(beside)) if index != beside => {
            Err(Fault::Malformed(format!("{text} with the index {beside}")))
        }
        (Some(index), _) => Ok(index),
    }
}

/// Checks that the indices are 0, 1, 2, … and that there are `expected` of them.
pub(crate) fn check_order(received: &[u32], expected: u32) -> Result<(), OrderFault> {
    let mut places = 0..expected;
    for (place, &index) in received.iter().enumerate() {
        let due = places.next();
        if due != Some(index) {
            return Err(classify_fault(place, due, received, expected));
        }
    }
    match places.next() {
        None => Ok(()),
        Some(index) => Err(OrderFault::LostAtEnd {
            index,
            received: received.len(),
            expected,
        }),
    }
}

/// Lists the faults of a stream that ended as `ended`. Tokens missing because the stream broke are not reported as
/// lost, and surplus tokens are reported as unexpected.
pub(crate) fn stream_faults(
    received: &[u32],
    expected: u32,
    ended: Result<(), Fault>,
) -> Vec<Fault> {
    match (check_order(received, expected), ended) {
        (Ok(()), Ok(())) => vec![],
        (Err(order), Ok(()) | Err(Fault::TooMany(_))) => vec![order.into()],
        (Ok(()) | Err(OrderFault::LostAtEnd { .. }), Err(ended)) => vec![ended],
        (Err(order), Err(ended)) => vec![order.into(), ended],
    }
}

/// Classifies the first token that is out of place. The later tokens show whether the token that was due is lost or
/// only late.
fn classify_fault(place: usize, due: Option<u32>, received: &[u32], expected: u32) -> OrderFault {
    let index = received[place];
    if received[..place].contains(&index) {
        return OrderFault::Repeated { index, place };
    }
    match due {
        Some(due) if index < expected && received[place..].contains(&due) => OrderFault::Swapped {
            early: index,
            late: due,
        },
        Some(due) if index < expected => OrderFault::Lost {
            index: due,
            instead: index,
        },
        Some(_) | None => OrderFault::Extra {
            index,
            place,
            expected,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_out_of_place_is_compared_with_those_before_and_after_it() {
        let swapped = "token_2 and token_1 are swapped: token_2 arrived first";
        let repeated = "token_2 is repeated: it arrived again in the place of token_3";
        let extra = "token_7 is unexpected: only 3 tokens were requested (it arrived in the place of token_1)";
        let table: [(&[u32], u32, &str); 5] = [
            (&[0, 1, 2], 3, ""),
            (&[], 0, ""),
            (&[0, 2, 1, 3], 4, swapped),
            (&[0, 1, 2, 2], 3, repeated),
            (&[0, 7, 2], 3, extra),
        ];
        for (received, expected, reason) in table {
            let found = check_order(received, expected).map_err(|fault| fault.to_string());
            assert_eq!(found.err().unwrap_or_default(), reason);
        }
    }

    #[test]
    fn only_texts_of_the_test_runner_have_an_index() {
        assert_eq!(token_index("token_17"), Some(17));
        for text in ["token_", "token_+7", "token_07", " token_7", "Paris", ""] {
            assert_eq!(token_index(text), None, "{text}");
        }
    }

    #[test]
    fn an_index_beside_the_text_must_agree_with_it() {
        assert_eq!(check_index("token_6", Some(6)).unwrap(), 6);
        let fault = check_index("token_6", Some(5)).unwrap_err();
        let reason = "unexpected data: token_6 with the index 5";
        assert_eq!(fault.to_string(), reason);
    }
}
