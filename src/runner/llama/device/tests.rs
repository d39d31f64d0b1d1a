//! What only the device's inside shows: the bits of its logits, and how it recovers.

use std::path::PathBuf;

use super::*;
use crate::request::{Caller, Sampling};
use crate::runner::llama::{LlamaLoader, LlamaOptions};
use crate::runner::Emission;

struct AlwaysRoom;

impl Room for AlwaysRoom {
    fn room(&self, _slot: Slot) -> usize {
        usize::MAX
    }
}

fn runner(threads: usize, slots: usize) -> LlamaRunner {
    let model_path = std::env::var_os("TOKENWAY_TEST_MODEL").map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            PathBuf::from(home).join(".cache/tokenway/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    let loader = LlamaLoader::new(LlamaOptions {
        model_path,
        threads,
        context_length: None,
    });
    let loaded = loader.load_parts(slots, &|_| ());
    loaded.expect("the model loads: `make model` fetches it").1
}

fn sequence(prompt: &str, runner: &LlamaRunner, max_tokens: u32) -> Sequence {
    Sequence {
        prompt: runner.model.tokenize(prompt).unwrap().into(),
        delivered: Vec::new(),
        choice: 0,
        seed: 0,
        max_tokens,
        sampling: Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        stamps: false,
        caller: Caller::default(),
    }
}

/// Steps once; the bits of each slot's logits with the token that was sampled from them.
fn step(runner: &mut LlamaRunner) -> Vec<(Slot, Vec<u32>, TokenId)> {
    let mut emissions = Vec::new();
    runner.step(&mut Step::new(&AlwaysRoom, &mut emissions)).unwrap();
    let parts = runner.parts.iter().filter_map(|part| Some((part.slot, part.output?)));
    let mut outputs = Vec::new();
    for ((slot, row), emission) in parts.zip(emissions) {
        let bits = runner.context.with_dependent(|_, context| {
            context.get_logits_ith(row).iter().map(|logit| logit.to_bits()).collect()
        });
        let (Emission::Token(of, token) | Emission::EndOfSequence(of, token)) = emission else {
            panic!("{emission:?}");
        };
        assert_eq!(slot, of);
        outputs.push((slot, bits, token.id));
    }
    outputs
}

fn run(runner: &mut LlamaRunner, slot: Slot, count: usize) -> Vec<(Vec<u32>, TokenId)> {
    let mut made = Vec::new();
    while made.len() < count {
        for (of, bits, id) in step(runner) {
            if of == slot { made.push((bits, id)); }
        }
    }
    made
}

fn prose(words: usize) -> String {
    let w = ["The", " river", " was", " wide", " and", " the", " old", " bridge", " over", " it", ",", " long", " closed", " had", " 17", " arches", ".", " People", " said", " that"];
    (0..words).map(|i| w[(i * i + i / 7) % w.len()]).collect()
}

#[test]
fn experiment() {
    for threads in [1, 2] {
        for len in [20, 230, 700] {
            let mut r = runner(threads, 8);
            let s = sequence(&prose(len), &r, 60);
            let n = s.prompt.len();
            r.admit(Slot(0), s.clone()).unwrap();
            let alone = run(&mut r, Slot(0), 40);
            r.release(Slot(0));
            // again: deterministic?
            r.admit(Slot(0), s.clone()).unwrap();
            let again = run(&mut r, Slot(0), 40);
            r.release(Slot(0));
            let diff = |a: &[(Vec<u32>, u32)], b: &[(Vec<u32>, u32)]| {
                let rows = a.iter().zip(b).filter(|(x, y)| x.0 != y.0).count();
                let toks = a.iter().zip(b).filter(|(x, y)| x.1 != y.1).count();
                let maxd = a.iter().zip(b).flat_map(|(x, y)| x.0.iter().zip(&y.0).map(|(p, q)| (f32::from_bits(*p) - f32::from_bits(*q)).abs())).fold(0.0f32, f32::max);
                format!("rows {rows} tokens {toks} max {maxd}")
            };
            eprintln!("t{threads} n{n} again: {}", diff(&alone, &again));
            // batch
            for (i, l) in [(1, 50), (2, 400)] {
                let o = sequence(&prose(l)[4..], &r, 500);
                r.admit(Slot(i), o).unwrap();
            }
            r.admit(Slot(3), s.clone()).unwrap();
            let batch = run(&mut r, Slot(3), 40);
            eprintln!("t{threads} n{n} batch: {}", diff(&alone, &batch));
            for i in 1..4 { r.release(Slot(i)); }
            let mut d = s.clone();
            d.delivered = alone[..20].iter().map(|x| x.1).collect();
            r.admit(Slot(0), d.clone()).unwrap();
            let res = run(&mut r, Slot(0), 20);
            eprintln!("t{threads} n{n} resumed: {}", diff(&alone[20..], &res));
            r.release(Slot(0));
            r.admit(Slot(1), sequence(&prose(100)[4..], &r, 500)).unwrap();
            r.admit(Slot(0), d).unwrap();
            let res = run(&mut r, Slot(0), 20);
            eprintln!("t{threads} n{n} resumed in batch: {}", diff(&alone[20..], &res));
        }
    }
}
