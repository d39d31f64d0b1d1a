//! Tests that need the device's internals: the bits of its logits, the rows of its batches, and its recovery from
//! errors.

use std::path::PathBuf;

use super::*;
use crate::request::{CacheSalt, Sampling, TokenId};
use crate::runner::llama::devices::SelectedDevices;
use crate::runner::llama::model::Guarantees;
use crate::runner::llama::{LlamaLoader, LlamaOptions, init_backend, load_file};
use crate::runner::{Emission, Resumption};

mod reuse;

/// Gives one token of credit to every slot except the given one.
struct CreditExcept(Option<Slot>);

impl SlotCredit for CreditExcept {
    fn credit(&self, slot: Slot) -> usize {
        usize::from(self.0 != Some(slot))
    }
}

fn loader(threads: usize) -> LlamaLoader {
    let model_path = std::env::var_os("TOKENWAY_TEST_MODEL").map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            PathBuf::from(home).join(".cache/tokenway/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    let at = model_path.display();
    assert!(
        model_path.exists(),
        "{at} does not exist: `make model` downloads it"
    );
    LlamaLoader::new(LlamaOptions {
        model_path,
        threads,
        prefix_cache_bytes: 64 * 1024 * 1024,
        max_step: Duration::from_secs(10),
        ..LlamaOptions::default()
    })
}

fn device_options(slots: usize, reuses_prefixes: bool) -> DeviceOptions {
    DeviceOptions {
        slots,
        reuses_prefixes,
        prefix_cache_bytes: 64 * 1024 * 1024,
        max_step: Duration::from_secs(10),
    }
}

fn runner(slots: usize) -> LlamaRunner {
    let loaded = loader(1).load_parts(slots, &|_| ());
    loaded.expect("the model loads").1
}

/// Creates a prompt with this number of tokens. A longer prompt starts with all shorter ones.
fn text(tokens: usize) -> Vec<TokenId> {
    // Any ids of ordinary words would do.
    (0..tokens)
        .map(|index| TokenId::try_from(1000 + index * 37 % 8000).unwrap())
        .collect()
}

/// Creates a prompt with this number of tokens. It has no common prefix with the prompts of [`text`].
fn unrelated(tokens: usize) -> Vec<TokenId> {
    let mut ids = text(tokens + 1);
    ids.remove(0);
    ids
}

fn greedy(prompt: &[TokenId], max_tokens: u32) -> Sequence {
    let mut sequence = Sequence::new(prompt, max_tokens);
    sequence.options.sampling.temperature = 0.0;
    sequence
}

/// A token with the bits of the logits from which it was chosen.
#[derive(Clone, PartialEq)]
struct Output {
    slot: Slot,
    id: TokenId,
    bits: Vec<u32>,
}

/// Runs one step in which the slot `stalled` has no credit.
fn step(runner: &mut LlamaRunner, stalled: Option<Slot>) -> Vec<Output> {
    let mut emissions = Vec::new();
    let credit = CreditExcept(stalled);
    runner
        .step(&mut Step::new(&credit, &mut emissions))
        .unwrap();
    let outputs = emissions.into_iter().map(|emission| {
        let (Emission::Token(slot, token) | Emission::EndOfSequence(slot, token)) = emission else {
            panic!("{emission:?}");
        };
        let id = token.id;
        let bits = logit_bits(runner, slot);
        Output { slot, id, bits }
    });
    outputs.collect()
}

/// Returns the bits of the logits from which the last step sampled the token of this slot.
fn logit_bits(runner: &LlamaRunner, slot: Slot) -> Vec<u32> {
    let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect();
    let mut parts = runner.parts.iter();
    match parts.find(|part| part.slot == slot) {
        Some(part) => runner
            .context
            .with_dependent(|_, context| bits(part.logits(context, part.rows - 1))),
        None => {
            let sequence = runner.slots.sequence(slot).expect("it runs");
            let reused = sequence.first_logits().expect("it reuses logits");
            bits(&reused.logits)
        }
    }
}

/// More steps than any test needs.
const MAX_STEPS: usize = 1_000;

/// Runs steps until the sequence in the slot has this number of outputs.
fn run(runner: &mut LlamaRunner, slot: Slot, count: usize) -> Vec<Output> {
    let mut made = Vec::new();
    for _ in 0..MAX_STEPS {
        if made.len() >= count {
            return made;
        }
        let outputs = step(runner, None);
        made.extend(outputs.into_iter().filter(|output| output.slot == slot));
    }
    panic!("{} of {count} outputs after {MAX_STEPS} steps", made.len());
}

fn ids(outputs: &[Output]) -> Vec<TokenId> {
    outputs.iter().map(|output| output.id).collect()
}

fn assert_same_bits(outputs: &[Output], expected: &[Output]) {
    assert_eq!(ids(outputs), ids(expected));
    let same = outputs.iter().zip(expected).all(|(a, b)| a.bits == b.bits);
    assert!(
        same,
        "the tokens are equal but the bits of their logits differ"
    );
}

/// Shows that [`Resumption::Exact`] holds. The prompt needs several chunks. The sequence passes 512 KV cells, the
/// number from which llama.cpp may split a lone sequence's attention.
#[test]
fn logits_are_bit_identical_alone_in_a_batch_and_after_a_resumption() {
    let mut runner = runner(4);
    assert_eq!(runner.model.facts().resumption, Resumption::Exact);
    let sequence = greedy(&text(500), 30);
    runner.admit(Slot(0), sequence.clone()).unwrap();
    let alone = run(&mut runner, Slot(0), 30);
    runner.release(Slot(0));

    let mut resumed = sequence.clone();
    resumed.delivered = ids(&alone[..13]);
    runner.admit(Slot(0), resumed.clone()).unwrap();
    assert_same_bits(&run(&mut runner, Slot(0), 17), &alone[13..]);
    runner.release(Slot(0));

    runner.admit(Slot(1), greedy(&text(20), 400)).unwrap();
    run(&mut runner, Slot(1), 1);
    runner.admit(Slot(2), sequence).unwrap();
    runner.admit(Slot(3), greedy(&text(90), 400)).unwrap();
    let in_batch = run(&mut runner, Slot(2), 30);
    assert_same_bits(&in_batch, &alone);
    runner.release(Slot(2));

    runner.admit(Slot(2), resumed).unwrap();
    assert_same_bits(&run(&mut runner, Slot(2), 17), &alone[13..]);
}

#[test]
fn resumption_is_contiguous_on_several_threads() {
    let (model, _) = loader(2).load_parts(1, &|_| ()).expect("the model loads");
    assert_eq!(model.facts().resumption, Resumption::Contiguous);
}

#[test]
fn a_resumed_sequence_samples_the_same_tokens_with_penalties() {
    let mut runner = runner(1);
    let mut sequence = greedy(&text(8), 24);
    sequence.options.seed = 3;
    sequence.options.sampling = Sampling {
        frequency_penalty: 1.5,
        repetition_penalty: 1.2,
        top_p: 0.9,
        ..Sampling::default()
    };
    runner.admit(Slot(0), sequence.clone()).unwrap();
    let undisturbed = ids(&run(&mut runner, Slot(0), 24));
    runner.release(Slot(0));
    sequence.delivered = undisturbed[..11].to_vec();
    runner.admit(Slot(0), sequence).unwrap();
    assert_eq!(ids(&run(&mut runner, Slot(0), 13)), undisturbed[11..]);
}

#[test]
fn short_prompts_share_the_rows_of_a_call_and_delay_no_running_sequence() {
    let mut runner = runner(4);
    runner.admit(Slot(2), greedy(&text(5), 100)).unwrap();
    run(&mut runner, Slot(2), 1);
    runner.admit(Slot(1), greedy(&unrelated(40), 1)).unwrap();
    runner.admit(Slot(0), greedy(&text(50)[10..], 1)).unwrap();
    // The prompt in slot 1 was admitted first. Its 40 rows fit into the first call, with 23 rows of the other prompt.
    for (rows, finished) in [(64, vec![Slot(1)]), (18, vec![Slot(0)]), (1, vec![])] {
        let outputs = step(&mut runner, None);
        assert_eq!(runner.batch.n_tokens(), rows);
        let mut slots: Vec<_> = outputs.iter().map(|output| output.slot).collect();
        slots.retain(|slot| *slot != Slot(2));
        assert_eq!(
            outputs.len(),
            slots.len() + 1,
            "slot 2 has a token in every step"
        );
        assert_eq!(slots, finished);
    }
}

#[test]
fn a_long_prompt_is_computed_in_parts_of_128_rows_on_a_slow_device() {
    let slow = LlamaLoader::new(LlamaOptions {
        max_step: Duration::from_millis(1),
        ..loader(1).options
    });
    let mut runner = slow.load_parts(1, &|_| ()).expect("the model loads").1;
    runner.admit(Slot(0), greedy(&unrelated(300), 1)).unwrap();
    // The first part is for measuring. The last one has the rest, because no part may have fewer than 64 rows.
    for rows in [64, 128, 108] {
        step(&mut runner, None);
        assert_eq!(runner.batch.n_tokens(), rows);
    }
}

#[test]
fn a_running_sequence_gets_a_token_between_two_parts_of_a_long_prompt() {
    let mut runner = runner(2);
    runner.admit(Slot(1), greedy(&text(5), 100)).unwrap();
    run(&mut runner, Slot(1), 1);
    runner.admit(Slot(0), greedy(&unrelated(300), 1)).unwrap();
    let mut slots = Vec::new();
    for _ in 0..8 {
        let outputs = step(&mut runner, None);
        slots.push(outputs.first().map(|output| output.slot));
        // The runner measures the first part, and then adapts the length of the others to steps of 10 seconds.
        assert!(runner.batch.n_tokens() == 1 || runner.batch.n_tokens() >= 64);
    }
    let first = slots.iter().position(|slot| *slot == Some(Slot(0)));
    let until_first = &slots[..first.expect("the prompt is finished within 8 steps")];
    assert!(
        until_first
            .windows(2)
            .all(|pair| pair.contains(&Some(Slot(1)))),
        "{slots:?}"
    );
}

#[test]
fn a_sequence_without_credit_is_skipped_and_loses_no_token() {
    let mut runner = runner(2);
    let sequence = greedy(&text(30), 8);
    runner.admit(Slot(0), sequence.clone()).unwrap();
    let undisturbed = ids(&run(&mut runner, Slot(0), 8));
    runner.release(Slot(0));

    assert_eq!(
        runner.next_step(&CreditExcept(None)),
        NextStep::Idle,
        "there is no sequence"
    );
    runner.admit(Slot(1), sequence).unwrap();
    let mut made = ids(&run(&mut runner, Slot(1), 3));
    let full = CreditExcept(Some(Slot(1)));
    assert_eq!(runner.next_step(&full), NextStep::Idle);
    assert!(step(&mut runner, Some(Slot(1))).is_empty());
    runner.admit(Slot(0), greedy(&unrelated(5), 8)).unwrap();
    assert_eq!(runner.next_step(&full), NextStep::Now);
    assert_eq!(step(&mut runner, Some(Slot(1))).len(), 1);
    assert_eq!(runner.batch.n_tokens(), 5);
    made.extend(ids(&run(&mut runner, Slot(1), 5)));
    assert_eq!(made, undisturbed);
    runner.release(Slot(0));
    assert_eq!(
        runner.next_step(&CreditExcept(None)),
        NextStep::Idle,
        "the sequence has max_tokens tokens"
    );
}

#[test]
fn a_scored_prompt_never_emits_more_tokens_than_its_credit() {
    struct Credit(usize);
    impl SlotCredit for Credit {
        fn credit(&self, _slot: Slot) -> usize {
            self.0
        }
    }
    let mut runner = runner(1);
    let mut scored = greedy(&text(300), 1);
    scored.scores_prompt = true;
    scored.options.logprobs = Some(0);
    runner.admit(Slot(0), scored).unwrap();
    // In turn less and more than the rows of a call.
    let credits = [50, 7, 90].into_iter().cycle().take(60);
    let mut emitted = Vec::new();
    for credit in credits {
        let mut emissions = Vec::new();
        let limit = Credit(credit);
        runner.step(&mut Step::new(&limit, &mut emissions)).unwrap();
        assert!(emissions.len() <= credit, "{}", emissions.len());
        emitted.append(&mut emissions);
    }
    let prompt_tokens = emitted
        .iter()
        .filter(|emission| matches!(emission, Emission::Prompt(..)));
    assert_eq!((prompt_tokens.count(), emitted.len()), (300, 301));
}

#[test]
fn sequences_that_would_abort_llama_cpp_are_rejected() {
    let mut runner = runner(1);
    let rejection = |runner: &mut LlamaRunner, slot, sequence| {
        runner.admit(Slot(slot), sequence).unwrap_err().to_string()
    };
    let resumed = |delivered| Sequence {
        delivered,
        ..greedy(&[1], 2)
    };
    for (sequence, reason) in [
        (greedy(&[], 4), "empty"),
        (
            greedy(&[1, 49_152], 4),
            "49152 is not in this model's vocabulary",
        ),
        (resumed(vec![u32::MAX]), "not in this model's vocabulary"),
        (resumed(vec![1, 2]), "already has `max_tokens` tokens"),
        (greedy(&text(2000), 49), "context is 2048"),
        (greedy(&[1], u32::MAX), "context is 2048"),
    ] {
        let error = rejection(&mut runner, 0, sequence);
        assert!(error.contains(reason), "{error}");
    }
    assert!(rejection(&mut runner, 1, greedy(&[1], 4)).contains("no slot 1"));
    runner.admit(Slot(0), greedy(&text(3), 4)).unwrap();
    assert!(rejection(&mut runner, 0, greedy(&[1], 4)).contains("already has a sequence"));
    runner.release(Slot(7));
    assert_eq!(run(&mut runner, Slot(0), 4).len(), 4);
}

#[test]
fn a_full_kv_cache_fails_its_sequences_and_the_device_continues() {
    // The model's context length is set higher than the context has KV cells. A loader never does that.
    let loader = loader(1);
    let backend = init_backend().unwrap();
    let devices = SelectedDevices::select(&loader.options).unwrap();
    let llama = load_file(
        backend,
        devices.layers(&loader.options),
        &loader.options.model_path,
        &|_| (),
    )
    .unwrap();
    let guarantees = Guarantees {
        resumption: Resumption::No,
        reuses_prefixes: false,
    };
    let model = GgufModel::new(llama, String::new(), 2048, guarantees).unwrap();
    let params = loader.context_params(2, 256).unwrap();
    let context = Context::try_new(Arc::new(model), |model| {
        model.llama().new_context(backend, params)
    });
    let mut runner = LlamaRunner::new(context.unwrap(), device_options(2, false));

    runner.admit(Slot(0), greedy(&text(300), 4)).unwrap();
    let mut emissions = Vec::new();
    for _ in 0..MAX_STEPS {
        if !emissions.is_empty() {
            break;
        }
        let credit = CreditExcept(None);
        runner
            .step(&mut Step::new(&credit, &mut emissions))
            .unwrap();
    }
    let error = ModelError::Failed("The KV cache is full.".to_owned());
    assert_eq!(emissions, [Emission::Failed(Slot(0), error)]);
    runner.release(Slot(0));
    for slot in [Slot(0), Slot(1)] {
        runner.admit(slot, greedy(&text(200), 4)).unwrap();
        assert_eq!(run(&mut runner, slot, 4).len(), 4);
    }
}
