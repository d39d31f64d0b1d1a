//! Tests that a sequence that starts from computed tokens has the same logits, bit for bit, as one that computes all
//! its tokens.

use super::*;

/// Runs a sequence alone in the slot that the runner chooses. Returns the number of reused tokens, and the outputs.
fn complete(runner: &mut LlamaRunner, sequence: Sequence) -> (u32, Vec<Output>) {
    let count = usize::try_from(sequence.max_tokens).unwrap() - sequence.delivered.len();
    let free: Vec<Slot> = (0..runner.slots.len()).map(Slot).collect();
    let slot = runner.choose_slot(&sequence, &free);
    let start = runner.admit(slot, sequence).unwrap();
    let outputs = run(runner, slot, count);
    runner.release(slot);
    (start.cached_tokens, outputs)
}

/// Asserts that a sequence has the same outputs on this runner as on a new runner. Returns the number of reused tokens.
fn assert_same_as_fresh(runner: &mut LlamaRunner, sequence: &Sequence) -> u32 {
    let (_, expected) = complete(&mut self::runner(1), sequence.clone());
    let (cached, outputs) = complete(runner, sequence.clone());
    assert_same_bits(&outputs, &expected);
    cached
}

/// Runs the sequences in these slots until each has the expected outputs. Returns the number of computed rows.
fn run_to_end(runner: &mut LlamaRunner, slots: &[Slot], expected: &[Output]) -> usize {
    let mut rows = 0;
    let mut outputs = Vec::new();
    for _ in 0..MAX_STEPS {
        if outputs.len() >= slots.len() * expected.len() {
            break;
        }
        outputs.extend(step(runner, None));
        rows += usize::try_from(runner.batch.n_tokens()).unwrap();
    }
    for slot in slots {
        let of_slot: Vec<_> = outputs
            .extract_if(.., |output| output.slot == *slot)
            .collect();
        assert_same_bits(&of_slot, expected);
    }
    rows
}

/// Returns the ids of a chat's next prompt: the previous prompt, the completion, and a message of `tokens` tokens.
fn next_turn(
    runner: &LlamaRunner,
    prompt: &[TokenId],
    completion: &[Output],
    tokens: usize,
) -> Vec<TokenId> {
    let markers = runner.model.chat_markers();
    let mut ids = prompt.to_vec();
    ids.extend(self::ids(completion));
    ids.push(markers.end_tokens[0]);
    ids.extend(text(tokens));
    ids.push(markers.end_tokens[0]);
    ids.extend(&markers.generation_prompt);
    ids
}

#[test]
fn a_rows_result_does_not_depend_on_the_size_of_its_call() {
    let sequence = greedy(&text(400), 3);
    let (_, expected) = complete(&mut runner(1), sequence.clone());
    for rows in [64, 100, 128, 192, 1000] {
        let mut runner = runner(1);
        runner.tiled_budget = StepBudget::new(Duration::from_secs(1), rows, rows..=rows);
        let (_, outputs) = complete(&mut runner, sequence.clone());
        assert_same_bits(&outputs, &expected);
    }
}

#[test]
fn a_growing_chat_reuses_its_prompts_and_completions_with_the_same_bits() {
    let mut runner = runner(2);
    assert!(!runner.model.chat_markers().generation_prompt.is_empty());
    let mut prompt = next_turn(&runner, &[], &[], 150);
    let mut expected = 0;
    for message in [20, 90, 10] {
        let sequence = greedy(&prompt, 30);
        let cached = assert_same_as_fresh(&mut runner, &sequence);
        assert_eq!(usize::try_from(cached).unwrap(), expected);
        let (_, completion) = complete(&mut self::runner(1), sequence);
        // The last token is not computed, because no token follows it.
        expected = prompt.len() + completion.len() - 1;
        prompt = next_turn(&runner, &prompt, &completion, message);
    }
}

#[test]
fn a_prompt_that_is_wholly_computed_still_yields_its_first_token() {
    let mut runner = runner(2);
    for tokens in [200, 64, 40, 1] {
        let sequence = greedy(&unrelated(tokens + 7)[7..], 4);
        complete(&mut runner, sequence.clone());
        let cached = assert_same_as_fresh(&mut runner, &sequence);
        assert_eq!(usize::try_from(cached).unwrap(), tokens);
    }
}

#[test]
fn choices_that_run_one_after_the_other_sample_from_the_same_logits() {
    let mut runner = runner(1);
    let choice = |choice| {
        let mut sequence = greedy(&text(100), 8);
        sequence.choice = choice;
        sequence.options.seed = 5;
        sequence.options.sampling.temperature = 1.0;
        sequence
    };
    let first = complete(&mut runner, choice(0));
    let second = complete(&mut runner, choice(1));
    assert_eq!((first.0, second.0), (0, 100));
    assert_ne!(ids(&first.1), ids(&second.1));
    assert_same_bits(&second.1, &complete(&mut self::runner(1), choice(1)).1);
}

#[test]
fn a_prompt_reuses_the_logits_of_a_sequence_in_the_store() {
    let mut runner = runner(1);
    let sequence = greedy(&text(100), 4);
    complete(&mut runner, sequence.clone());
    complete(&mut runner, greedy(&unrelated(100), 4));
    assert_eq!(assert_same_as_fresh(&mut runner, &sequence), 100);
}

#[test]
fn logits_are_not_reused_for_a_prompt_of_another_length() {
    let mut runner = runner(1);
    let completion = complete(&mut runner, greedy(&text(40), 4)).1;
    let longer = [text(40), ids(&completion[..2])].concat();
    assert_eq!(assert_same_as_fresh(&mut runner, &greedy(&longer, 4)), 41);
    assert_eq!(assert_same_as_fresh(&mut runner, &greedy(&text(39), 4)), 38);
}

#[test]
fn a_reused_first_token_waits_for_credit() {
    let mut runner = runner(1);
    let sequence = greedy(&text(50), 3);
    let expected = complete(&mut runner, sequence.clone()).1;
    runner.admit(Slot(0), sequence).unwrap();
    let full = CreditExcept(Some(Slot(0)));
    assert_eq!(runner.next_step(&full), NextStep::Idle);
    assert!(step(&mut runner, Some(Slot(0))).is_empty());
    assert_eq!(runner.next_step(&CreditExcept(None)), NextStep::Now);
    let first = step(&mut runner, None);
    assert_eq!(runner.batch.n_tokens(), 0, "no row is computed");
    let rest = run(&mut runner, Slot(0), 2);
    assert_same_bits(&[first, rest].concat(), &expected);
}

#[test]
fn prompts_that_share_a_part_or_nothing_have_the_same_bits() {
    let mut runner = runner(2);
    let (all, mut all_but_last) = (text(180), text(180));
    all_but_last[179] += 1;
    let nothing = unrelated(180);
    let mut half = text(180);
    half[90] += 1;
    complete(&mut runner, greedy(&all, 3));
    assert_eq!(
        assert_same_as_fresh(&mut runner, &greedy(&all_but_last, 5)),
        116
    );
    assert_eq!(assert_same_as_fresh(&mut runner, &greedy(&nothing, 5)), 0);
    assert_eq!(assert_same_as_fresh(&mut runner, &greedy(&half, 5)), 90);
}

#[test]
fn an_evicted_sequence_returns_from_the_store_with_the_same_bits() {
    let mut runner = runner(1);
    let prompt = next_turn(&runner, &[], &[], 100);
    let mut first = greedy(&prompt, 20);
    first.options.seed = 7;
    first.options.sampling.temperature = 0.9;
    let (_, completion) = complete(&mut runner, first);
    assert_eq!(runner.prefix_cache().bytes, 0);
    complete(&mut runner, greedy(&unrelated(100), 3));
    assert!(runner.prefix_cache().bytes > 1_000_000);
    let next = next_turn(&runner, &prompt, &completion, 10);
    let mut sequence = greedy(&next, 20);
    sequence.options.seed = 8;
    sequence.options.sampling.temperature = 0.9;
    let computed = u32::try_from(prompt.len() + 19).unwrap();
    assert_eq!(assert_same_as_fresh(&mut runner, &sequence), computed);
    assert_eq!(runner.prefix_cache().evictions, 0);
}

#[test]
fn sequences_with_one_prompt_compute_it_once() {
    let mut runner = runner(3);
    let sequence = greedy(&text(300), 6);
    let (_, expected) = complete(&mut self::runner(1), sequence.clone());
    for slot in 0..3 {
        let start = runner.admit(Slot(slot), sequence.clone()).unwrap();
        assert_eq!(start.cached_tokens, if slot == 0 { 0 } else { 300 });
    }
    let rows = run_to_end(&mut runner, &[Slot(0), Slot(1), Slot(2)], &expected);
    assert_eq!(rows, 300 + 3 * 5);
}

#[test]
fn a_sequence_whose_leader_is_cancelled_computes_the_prompt_itself() {
    let mut runner = runner(2);
    let sequence = greedy(&text(300), 3);
    runner.admit(Slot(0), sequence.clone()).unwrap();
    runner.admit(Slot(1), sequence.clone()).unwrap();
    step(&mut runner, None);
    runner.release(Slot(0));
    let outputs = run(&mut runner, Slot(1), 3);
    let (_, expected) = complete(&mut self::runner(1), sequence);
    assert_same_bits(&outputs, &expected);
}

#[test]
fn if_a_leader_is_cancelled_the_other_sequences_compute_the_prompt_once() {
    let sequence = greedy(&text(300), 3);
    let (_, expected) = complete(&mut runner(1), sequence.clone());
    // The third sequence waits for the second one, which waits for the first one.
    for cancelled in [0, 1] {
        let mut runner = runner(3);
        for slot in 0..3 {
            runner.admit(Slot(slot), sequence.clone()).unwrap();
        }
        runner.release(Slot(cancelled));
        let rows = run_to_end(&mut runner, &[Slot(1 - cancelled), Slot(2)], &expected);
        assert_eq!(rows, 300 + 2 * 2, "without {cancelled}");
    }
}

#[test]
fn a_long_sequence_is_not_copied_for_a_few_common_tokens() {
    let mut runner = runner(2);
    complete(&mut runner, greedy(&text(500), 1));
    let other = |common: usize| {
        let mut ids = text(common);
        ids.extend(unrelated(150 - common));
        greedy(&ids, 1)
    };
    assert_eq!(assert_same_as_fresh(&mut runner, &other(15)), 0);
    assert_eq!(assert_same_as_fresh(&mut runner, &other(16)), 16);
}

#[test]
fn a_prompt_does_not_wait_for_a_running_sequence_that_is_not_worth_copying() {
    let mut runner = runner(2);
    runner.admit(Slot(0), greedy(&text(500), 50)).unwrap();
    run(&mut runner, Slot(0), 2);
    let mut ids = text(10);
    ids.extend(unrelated(90));
    let start = runner.admit(Slot(1), greedy(&ids, 1)).unwrap();
    assert_eq!(start.cached_tokens, 0);
    assert_eq!(step(&mut runner, Some(Slot(0))).len(), 1);
}

#[test]
fn a_prompt_starts_in_a_free_slot_with_its_tokens_even_if_a_running_sequence_has_them_too() {
    let mut runner = runner(3);
    let sequence = greedy(&text(200), 2);
    for slot in [0, 1] {
        runner.admit(Slot(slot), sequence.clone()).unwrap();
        run(&mut runner, Slot(slot), 1);
    }
    runner.release(Slot(0));
    let slot = runner.choose_slot(&sequence, &[Slot(0), Slot(2)]);
    assert_eq!(slot, Slot(0));
}

#[test]
fn a_short_prompt_does_not_wait_for_the_rest_of_a_resumed_sequence() {
    let mut runner = runner(2);
    let resumed = Sequence {
        delivered: unrelated(300),
        ..greedy(&text(10), 400)
    };
    runner.admit(Slot(0), resumed).unwrap();
    runner.admit(Slot(1), greedy(&unrelated(12), 1)).unwrap();
    assert_eq!(step(&mut runner, None).len(), 1);
    let resumed = runner.slots.sequence(Slot(0)).expect("it runs");
    assert_eq!(resumed.computed(), MAX_ROWS - 12);
}

#[test]
fn a_resumed_sequence_goes_on_although_short_prompts_could_use_all_rows() {
    let mut runner = runner(3);
    let resumed = Sequence {
        delivered: unrelated(300),
        ..greedy(&text(10), 400)
    };
    runner.admit(Slot(0), resumed).unwrap();
    for slot in [1, 2] {
        let ids = unrelated(60 + slot);
        runner.admit(Slot(slot), greedy(&ids[slot..], 1)).unwrap();
    }
    step(&mut runner, None);
    let resumed = runner.slots.sequence(Slot(0)).expect("it runs");
    assert_eq!(resumed.computed(), MAX_ROWS / 4);
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one_with_the_same_prefix() {
    for threads in [1, 2] {
        let loaded = loader(threads).load_parts(3, &|_| ());
        let mut runner = loaded.expect("the model loads").1;
        // The second prompt waits for the first one. The third prompt begins like the second one.
        runner.admit(Slot(0), greedy(&unrelated(1_200), 1)).unwrap();
        runner.admit(Slot(1), greedy(&text(400), 1)).unwrap();
        let start = runner.admit(Slot(2), greedy(&text(50), 1)).unwrap();
        assert_eq!(start.cached_tokens, 0, "{threads} threads");
        run(&mut runner, Slot(2), 1);
        let long = runner.slots.sequence(Slot(1)).expect("it runs");
        assert_eq!(long.computed(), 0, "{threads} threads");
    }
}

#[test]
fn short_prompts_with_the_same_prefix_compute_it_once() {
    let mut runner = runner(2);
    runner.admit(Slot(0), greedy(&text(50), 1)).unwrap();
    let start = runner.admit(Slot(1), greedy(&text(50), 1)).unwrap();
    assert_eq!(start.cached_tokens, 50);
}

#[test]
fn prompts_with_different_salts_share_nothing() {
    let mut runner = runner(2);
    let salted = |salt: &str| {
        let mut sequence = greedy(&text(100), 2);
        sequence.options.cache_salt = CacheSalt(Some(salt.into()));
        sequence
    };
    assert_eq!(complete(&mut runner, salted("a")).0, 0);
    assert_eq!(complete(&mut runner, salted("b")).0, 0);
    assert_eq!(complete(&mut runner, salted("a")).0, 100);
}

#[test]
fn a_resumed_sequence_counts_only_tokens_of_its_prompt_as_cached() {
    let mut runner = runner(1);
    let sequence = greedy(&text(30), 20);
    let (_, completion) = complete(&mut runner, sequence.clone());
    let resumed = Sequence {
        delivered: ids(&completion[..15]),
        ..sequence
    };
    let (cached, rest) = complete(&mut runner, resumed);
    assert_eq!(cached, 30);
    assert_same_bits(&rest, &completion[15..]);
}

#[test]
fn a_runner_without_prefix_caching_reuses_nothing() {
    let mut runner = runner(2);
    runner.reuses_prefixes = false;
    let sequence = greedy(&text(100), 2);
    for _ in 0..3 {
        assert_eq!(complete(&mut runner, sequence.clone()).0, 0);
    }
    assert_eq!(runner.prefix_cache(), PrefixCacheStats::default());
}
