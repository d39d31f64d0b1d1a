//! UTF-8 decoding across tokens. A character whose bytes are spread over several tokens is emitted with the token that
//! completes it.

/// Decodes the bytes of consecutive tokens into text.
#[derive(Debug, Default)]
pub struct Utf8Assembler {
    /// The bytes of an incomplete character, at most three.
    pending: Vec<u8>,
}

impl Utf8Assembler {
    /// Decodes a token's bytes and appends the complete characters to `text`. Invalid bytes become U+FFFD.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        if self.pending.is_empty()
            && let Ok(whole) = std::str::from_utf8(bytes)
        {
            return text.push_str(whole);
        }
        self.pending.extend_from_slice(bytes);
        let mut rest = &self.pending[..];
        let incomplete = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(
                        std::str::from_utf8(valid)
                            .expect("the bytes before `valid_up_to` are valid UTF-8"),
                    );
                    let Some(invalid) = error.error_len() else {
                        break after.len();
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[invalid..];
                }
            }
        };
        self.pending.drain(..self.pending.len() - incomplete);
    }

    /// Ends the text. An incomplete character becomes U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn texts(tokens: &[&[u8]]) -> Vec<String> {
        let mut assembler = Utf8Assembler::default();
        let text = |write: &mut dyn FnMut(&mut String)| {
            let mut text = String::new();
            write(&mut text);
            text
        };
        let tokens = tokens.iter();
        let mut texts: Vec<_> = tokens
            .map(|token| text(&mut |out| assembler.push(token, out)))
            .collect();
        let last = text(&mut |out| assembler.finish(out));
        texts.extend(Some(last).filter(|last| !last.is_empty()));
        texts
    }

    #[test]
    fn a_character_is_emitted_with_the_token_that_completes_it() {
        let smile = "😀".as_bytes();
        assert_eq!(
            texts(&[&smile[..1], &smile[1..3], &smile[3..]]),
            ["", "", "😀"]
        );
        assert_eq!(texts(&[b"a\xc3", b"\xa9b"]), ["a", "éb"]);
    }

    #[test]
    fn invalid_bytes_are_replaced_and_the_following_text_is_kept() {
        assert_eq!(texts(&[b"a\xffb"]), ["a\u{fffd}b"]);
        assert_eq!(texts(&[b"\xe2\x82", b"x"]), ["", "\u{fffd}x"]);
    }

    #[test]
    fn an_incomplete_character_is_replaced_at_the_end() {
        assert_eq!(texts(&[b"a\xf0\x9f"]), ["a", "\u{fffd}"]);
    }

    #[test]
    fn every_split_of_a_text_decodes_to_the_text() {
        let text = "aé€😀z";
        for at in 0..=text.len() {
            let (left, right) = text.as_bytes().split_at(at);
            assert_eq!(texts(&[left, right]).concat(), text);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_decode_to_the_text_of_the_whole(
            parts in vec(text_or_bytes(), 0..10),
            lengths in vec(1..5_usize, 1..6),
        ) {
            let bytes = parts.concat();
            let mut rest = &bytes[..];
            let mut tokens = Vec::new();
            for length in lengths.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (token, after) = rest.split_at(rest.len().min(*length));
                tokens.push(token);
                rest = after;
            }
            prop_assert_eq!(texts(&tokens).concat(), String::from_utf8_lossy(&bytes));
        }
    }

    fn text_or_bytes() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            "\\PC{0,3}".prop_map(String::into_bytes),
            vec(any::<u8>(), 0..4),
            vec(0x80_u8.., 0..4),
        ]
    }
}
