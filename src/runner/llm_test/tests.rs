//! Tests of the test runner's deadlines, credit and ends of sequences.

use super::*;
use crate::runner::{BosPolicy, Emission, Model};

struct FixedCredit(usize);

impl SlotCredit for FixedCredit {
    fn credit(&self, _slot: Slot) -> usize {
        self.0
    }
}

fn sequence(max_tokens: u32) -> Sequence {
    let mut sequence = Sequence::new([0], max_tokens);
    sequence.options.timestamps = true;
    sequence
}

fn runner(interval: Duration) -> TestRunner {
    TestRunner::new(
        TestRunnerOptions {
            interval,
            ..TestRunnerOptions::default()
        },
        2,
    )
}

fn step(runner: &mut TestRunner, credit: usize) -> Vec<Emission> {
    let mut emissions = Vec::new();
    runner
        .step(&mut Step::new(&FixedCredit(credit), &mut emissions))
        .unwrap();
    emissions
}

#[test]
fn the_prompt_has_as_many_tokens_as_words_and_at_least_one() {
    let model = TestModel::new(&TestRunnerOptions::default());
    let tokens = |text| model.tokenize(text, BosPolicy::Add).unwrap().len();
    assert_eq!(tokens("The capital of France is"), 5);
    assert_eq!(tokens(""), 1);
}

#[test]
fn deadlines_are_absolute_from_admission() {
    let mut runner = runner(Duration::from_secs(1));
    let before = monotonic_ns();
    runner.admit(Slot(0), sequence(3)).unwrap();
    let NextStep::At(first) = runner.next_step(&FixedCredit(1)) else {
        panic!("no deadline")
    };
    assert!(first >= before + 1_000_000_000);
    assert!(step(&mut runner, 1).is_empty(), "nothing is due yet");
    runner.sequences[0].as_mut().unwrap().due_ns = 5;
    runner.deadlines = BinaryHeap::from([Reverse((5, Slot(0), 1))]);
    let emissions = step(&mut runner, 1);
    assert!(
        matches!(&emissions[..], [Emission::Token(Slot(0), token)] if token.due_ns == 5),
        "{emissions:?}"
    );
    assert_eq!(
        runner.next_step(&FixedCredit(1)),
        NextStep::At(1_000_000_005)
    );
}

#[test]
fn a_sequence_without_credit_is_skipped_and_loses_no_token() {
    let mut runner = runner(Duration::ZERO);
    runner.admit(Slot(0), sequence(100)).unwrap();
    assert!(step(&mut runner, 0).is_empty());
    assert_eq!(runner.next_step(&FixedCredit(0)), NextStep::Idle);
    assert!(matches!(runner.next_step(&FixedCredit(2)), NextStep::At(_)));
    let emissions = step(&mut runner, 2);
    let texts: Vec<_> = emissions
        .iter()
        .map(|emission| match emission {
            Emission::Token(_, token) => String::from_utf8(token.bytes.to_vec()).unwrap(),
            Emission::Prompt(..) | Emission::EndOfSequence(..) | Emission::Failed(..) => {
                panic!("{emission:?}")
            }
        })
        .collect();
    assert_eq!(texts, ["token_0", "token_1"]);
}

#[test]
fn a_released_sequence_emits_nothing() {
    let mut runner = runner(Duration::ZERO);
    runner.admit(Slot(0), sequence(100)).unwrap();
    runner.release(Slot(0));
    assert_eq!(runner.next_step(&FixedCredit(1)), NextStep::Idle);
    runner.admit(Slot(0), sequence(100)).unwrap();
    assert_eq!(step(&mut runner, 1).len(), 1);
}

#[test]
fn a_reused_slot_does_not_inherit_the_wait_for_credit() {
    let mut runner = runner(Duration::ZERO);
    runner.admit(Slot(0), sequence(100)).unwrap();
    assert!(step(&mut runner, 0).is_empty(), "it has no credit");
    runner.release(Slot(0));
    runner.admit(Slot(0), sequence(100)).unwrap();
    assert!(matches!(runner.next_step(&FixedCredit(3)), NextStep::At(_)));
    assert_eq!(step(&mut runner, 3).len(), 3, "the credit is 3");
}

#[test]
fn a_burst_stops_at_max_tokens() {
    let mut runner = runner(Duration::ZERO);
    runner.admit(Slot(0), sequence(2)).unwrap();
    assert_eq!(step(&mut runner, 10).len(), 2);
}
