//! Whether each token came exactly once and in its place, by the index in its text. It knows nothing
//! of how tokens come.

/// What is wrong with the order of the tokens: the first thing that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OrderFault {
    /// It never came, and another did in its place.
    #[error("token_{index} is lost: token_{instead} came in its place")]
    Lost { index: u32, instead: u32 },
    /// It never came, and none did after it.
    #[error("token_{index} is lost: {received} of {expected} tokens came")]
    LostAtEnd {
        index: u32,
        received: usize,
        expected: u32,
    },
    /// It came once more.
    #[error("token_{index} is repeated: it came again where token_{place} was due")]
    Repeated { index: u32, place: usize },
    /// It came before one that has a lower index.
    #[error("token_{early} and token_{late} are swapped: token_{early} came first")]
    Swapped { early: u32, late: u32 },
    /// It was not asked for.
    #[error(
        "token_{index} is extra: it came at place {place}, and {expected} tokens were asked for"
    )]
    Extra {
        index: u32,
        place: usize,
        expected: u32,
    },
}

/// The index of the test runner's token with this text.
pub(crate) fn index_of(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("token_")?;
    // `+7` and `07` are numbers to `parse`, and no texts of the test runner's.
    let is_written_so = match digits.as_bytes() {
        [b'0'] => true,
        [b'1'..=b'9', rest @ ..] => rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    is_written_so.then(|| digits.parse().ok()).flatten()
}

/// Checks that the tokens are 0, 1, 2 … and as many as expected.
pub(crate) fn check(received: &[u32], expected: u32) -> Result<(), OrderFault> {
    let mut places = 0..expected;
    for (place, &index) in received.iter().enumerate() {
        let due = places.next();
        if due == Some(index) {
            continue;
        }
        return Err(fault_at(received, place, index, due, expected));
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

/// What it means that this token came in this place; up to here all was right. Only what came later
/// tells a lost token from a late one.
fn fault_at(
    received: &[u32],
    place: usize,
    index: u32,
    due: Option<u32>,
    expected: u32,
) -> OrderFault {
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
    fn every_token_once_and_in_order_is_right() {
        assert_eq!(check(&[0, 1, 2], 3), Ok(()));
    }

    #[test]
    fn a_lost_token_is_named_with_what_came_instead() {
        let (index, instead) = (1, 2);
        assert_eq!(
            check(&[0, 2, 3], 4),
            Err(OrderFault::Lost { index, instead })
        );
    }

    #[test]
    fn a_stream_that_is_too_short_lost_its_last_tokens() {
        let fault = OrderFault::LostAtEnd {
            index: 2,
            received: 2,
            expected: 4,
        };
        assert_eq!(check(&[0, 1], 4), Err(fault));
        assert_eq!(fault.to_string(), "token_2 is lost: 2 of 4 tokens came");
    }

    #[test]
    fn a_token_that_came_again_is_repeated_also_at_the_end() {
        let repeated = |index, place| Err(OrderFault::Repeated { index, place });
        assert_eq!(check(&[0, 1, 1, 2], 3), repeated(1, 2));
        assert_eq!(check(&[0, 1, 2, 2], 3), repeated(2, 3));
    }

    #[test]
    fn a_late_token_is_swapped_and_not_lost() {
        let (early, late) = (2, 1);
        assert_eq!(
            check(&[0, 2, 1, 3], 4),
            Err(OrderFault::Swapped { early, late })
        );
    }

    #[test]
    fn a_token_beyond_those_asked_for_is_extra() {
        let extra = |index, place| {
            Err(OrderFault::Extra {
                index,
                place,
                expected: 3,
            })
        };
        assert_eq!(check(&[0, 1, 2, 3], 3), extra(3, 3));
        assert_eq!(check(&[0, 7, 2], 3), extra(7, 1));
    }

    #[test]
    fn only_the_test_runners_texts_have_an_index() {
        assert_eq!(index_of("token_17"), Some(17));
        for text in ["token_", "token_+7", "token_07", " token_7", "Paris", ""] {
            assert_eq!(index_of(text), None, "{text}");
        }
    }
}
