//! Cost of matching stop strings against a token: a completion of 256 tokens, none of which completes a match.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput};
use tokenway::request::{MAX_STOP_BYTES, MAX_STOP_STRINGS};
use tokenway::text::stop::{StopMatcher, StopStatus, StopStrings};

/// Number of tokens in the completion.
const TOKENS: u32 = 256;
/// Stop strings that chat and code clients use. None starts with a letter.
const COMMON_STOP_STRINGS: [&str; 4] = ["<|im_end|>", "</s>", "\n\n", "```"];

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    stop_strings(&mut criterion);
    criterion.final_summary();
}

fn stop_strings(criterion: &mut Criterion) {
    let words: Vec<_> = (0..TOKENS).map(|at| format!("token_{at}")).collect();
    // Two tokens match a prefix of a stop string, and the third ends the match.
    let prefixes = ["<|", "im_", "start"].map(str::to_owned);
    let prefixes: Vec<_> = prefixes.into_iter().cycle().take(words.len()).collect();
    // The whole text is a prefix of the stop strings, and is held until the end.
    let repeated = vec!["aaaa".to_owned(); words.len()];
    let usual = || COMMON_STOP_STRINGS.map(str::to_owned).to_vec();
    let cases = [
        ("none", Vec::new(), &words),
        ("4 stop strings, never match", usual(), &words),
        ("4 stop strings, matches start and fail", usual(), &prefixes),
        (
            "16 stop strings of 64 bytes, never match",
            long_stop_strings(64, "#"),
            &words,
        ),
        (
            "16 longest stop strings, never match",
            long_stop_strings(MAX_STOP_BYTES, "#"),
            &words,
        ),
        (
            "16 longest stop strings, matches start and fail",
            long_stop_strings(MAX_STOP_BYTES, "a"),
            &repeated,
        ),
    ];
    let mut group = criterion.benchmark_group("stop strings");
    group.throughput(Throughput::Elements(u64::from(TOKENS)));
    for (name, stops, texts) in cases {
        let mut matcher = StopMatcher::new(Arc::new(StopStrings::new(&stops)));
        group.bench_function(name, |bencher| {
            bencher.iter(|| match_completion(&mut matcher, black_box(texts)));
        });
    }
    group.finish();
}

/// Passes the whole completion to the matcher, then ends it.
fn match_completion(matcher: &mut StopMatcher<usize>, texts: &[String]) {
    let release = |token: usize, text: &str| {
        black_box((token, text));
    };
    for (at, text) in texts.iter().enumerate() {
        assert_eq!(matcher.push(at, text, release), StopStatus::Open);
    }
    matcher.finish(release);
}

/// Returns the largest allowed number of stop strings. Each repeats `letter`, differs at its end and has this length
/// in bytes.
fn long_stop_strings(bytes: usize, letter: &str) -> Vec<String> {
    let ends = (0..MAX_STOP_STRINGS).map(|end| format!(" end {end:02}"));
    ends.map(|end| letter.repeat(bytes - end.len()) + &end)
        .collect()
}
