//! Tests of the choice among targets: single decisions, and simulations of engines under load.

use std::collections::VecDeque;
use std::hash::RandomState;

use super::*;
use crate::prefix_index::{BlockHasher, PrefixIndex, PromptBlocks};

/// Tokens of each block of a simulated prompt.
const BLOCK_TOKENS: u64 = 100;
/// Sequences that a simulated engine runs at the same time for each unit of its weight.
const SLOTS: usize = 8;
/// Prompt tokens that a simulated engine processes in the time of one token of a completion.
const PREFILL_TOKENS: u64 = 200;

/// Returns the choice among targets with these loads, warm tokens and weights.
fn best(targets: &[(u64, u64, u32)]) -> usize {
    let candidates = targets.iter().enumerate().map(|(target, it)| {
        let &(tokens, warm_tokens, weight) = it;
        Candidate {
            target,
            load: WeightedLoad { tokens, weight },
            warm_tokens,
        }
    });
    let candidates: Vec<_> = candidates.collect();
    best_candidate(&candidates).expect("there are candidates")
}

#[test]
fn a_request_goes_where_its_prefix_is_warm_unless_that_target_is_ahead_by_more_than_reuse_saves() {
    assert_eq!(best(&[(0, 0, 1), (0, 500, 1)]), 1);
    assert_eq!(best(&[(0, 0, 1), (499, 500, 1)]), 1);
    assert_eq!(best(&[(0, 0, 1), (501, 500, 1)]), 0);
    assert_eq!(best(&[(0, 300, 1), (100, 500, 1)]), 1);
    assert_eq!(best(&[(0, 300, 1), (201, 500, 1)]), 0);
}

#[test]
fn without_a_difference_in_warm_tokens_the_load_decides_and_the_first_of_equals_gets_the_request() {
    for warm in [0, 7_000] {
        assert_eq!(best(&[(5, warm, 1), (4, warm, 1)]), 1);
        assert_eq!(best(&[(5, warm, 1), (5, warm, 1)]), 0);
        assert_eq!(best(&[(18, warm, 2), (10, warm, 1)]), 0);
        assert_eq!(best(&[(20, warm, 2), (10, warm, 1)]), 0);
        assert_eq!(best(&[(21, warm, 2), (10, warm, 1)]), 1);
        assert_eq!(best(&[(u64::MAX, warm, u32::MAX), (0, warm, 1)]), 1);
    }
}

#[test]
fn a_prefix_moves_the_balance_of_weighted_targets_by_as_much_in_both_directions() {
    // The large target has 100 tokens per unit of weight, so the loads are balanced if the small one has 100.
    let has_large_prefix = |load| best(&[(900, 450, 9), (load, 0, 1)]);
    let has_small_prefix = |load| best(&[(900, 0, 9), (load, 450, 1)]);
    assert_eq!((has_large_prefix(49), has_large_prefix(51)), (1, 0));
    assert_eq!((has_small_prefix(149), has_small_prefix(151)), (1, 0));
}

/// A request that runs on a simulated engine, or waits for a slot.
struct Running {
    prompt: u64,
    /// Prompt tokens that the engine has to process.
    cold: u64,
    completion: u64,
    /// The prompt counts as outstanding until the first token.
    has_first_token: bool,
}

#[derive(Default)]
struct Engine {
    weight: u32,
    requests: VecDeque<Running>,
    /// Number of requests that were sent to it.
    received: usize,
    /// Prompt tokens that it did not have to process.
    reused: u64,
}

impl Engine {
    fn slots(&self) -> usize {
        SLOTS * usize::try_from(self.weight).expect("it is small")
    }

    fn load(&self) -> u64 {
        let outstanding =
            |it: &Running| it.completion + if it.has_first_token { 0 } else { it.prompt };
        self.requests.iter().map(outstanding).sum()
    }

    /// Lets the time of one token pass.
    fn step(&mut self) {
        let slots = self.slots();
        for request in self.requests.iter_mut().take(slots) {
            if request.cold > 0 {
                request.cold = request.cold.saturating_sub(PREFILL_TOKENS);
            } else {
                request.has_first_token = true;
                request.completion -= 1;
            }
        }
        self.requests.retain(|request| request.completion > 0);
    }
}

/// Engines, and the gateway's memory of the prompts that it sent to them.
struct Simulation {
    engines: Vec<Engine>,
    index: PrefixIndex<usize>,
    key: RandomState,
    /// False if requests are placed by load alone.
    by_prefix: bool,
    longest_queue: usize,
}

impl Simulation {
    fn new(weights: &[u32], by_prefix: bool) -> Self {
        let engine = |weight: &u32| Engine {
            weight: *weight,
            ..Engine::default()
        };
        Self {
            engines: weights.iter().map(engine).collect(),
            index: PrefixIndex::new(100_000),
            key: RandomState::new(),
            by_prefix,
            longest_queue: 0,
        }
    }

    /// Returns a prompt that consists of a shared part and a part of its own.
    fn prompt(&self, shared: &[u64], own: &[u64]) -> PromptBlocks {
        let mut hasher = BlockHasher::new(&self.key, &"");
        let blocks = shared.iter().chain(own);
        blocks.for_each(|block| hasher.push(block, BLOCK_TOKENS));
        hasher.finish()
    }

    /// Sends a request. Returns its engine.
    fn send(&mut self, prompt: &PromptBlocks, tokens: u64, completion: u64) -> usize {
        let candidates = self.engines.iter().enumerate().map(|(target, engine)| {
            let warm_tokens = self.index.warm_tokens(prompt, target);
            Candidate {
                target,
                load: WeightedLoad {
                    tokens: engine.load(),
                    weight: engine.weight,
                },
                warm_tokens: if self.by_prefix { warm_tokens } else { 0 },
            }
        });
        let candidates: Vec<_> = candidates.collect();
        let target = best_candidate(&candidates).expect("there are candidates");
        let reused = self.index.warm_tokens(prompt, target);
        self.index.record(prompt, target);
        let engine = &mut self.engines[target];
        engine.received += 1;
        engine.reused += reused;
        engine.requests.push_back(Running {
            prompt: tokens,
            cold: tokens - reused,
            completion,
            has_first_token: false,
        });
        let waiting = engine.requests.len().saturating_sub(engine.slots());
        self.longest_queue = self.longest_queue.max(waiting);
        target
    }

    fn step(&mut self) {
        self.engines.iter_mut().for_each(Engine::step);
    }

    fn received(&self) -> Vec<usize> {
        self.engines.iter().map(|engine| engine.received).collect()
    }

    fn reused(&self) -> u64 {
        self.engines.iter().map(|engine| engine.reused).sum()
    }
}

/// Sends 1,000 requests with the same first 2,000 tokens to four engines. The time between two requests is that of
/// `interval` tokens.
fn one_popular_prefix(interval: usize, completion: u64, by_prefix: bool) -> Simulation {
    let mut simulation = Simulation::new(&[1; 4], by_prefix);
    let shared: Vec<u64> = (0..20).collect();
    for number in 0..1_000 {
        let prompt = simulation.prompt(&shared, &[1_000 + number]);
        simulation.send(&prompt, 2_100, completion);
        (0..interval).for_each(|_| simulation.step());
    }
    simulation
}

#[test]
fn one_popular_prefix_does_not_pull_everything_to_one_target() {
    // The requests keep 16 to 25 of the 32 slots busy.
    for (interval, completion) in [(4, 100), (2, 50), (8, 200), (1, 16)] {
        let simulation = one_popular_prefix(interval, completion, true);
        let received = simulation.received();
        let expected = 200..=300;
        assert!(
            received.iter().all(|it| expected.contains(it)),
            "{received:?}"
        );
        let waiting = simulation.longest_queue;
        assert!(waiting <= 4, "{waiting} requests waited at one engine");
        let by_load = one_popular_prefix(interval, completion, false);
        assert!(simulation.reused() >= by_load.reused());
    }
}

#[test]
fn conversations_stay_on_their_targets_while_the_loads_are_equal() {
    let mut simulation = Simulation::new(&[1; 4], true);
    let mut engines = [None; 16];
    for turn in 0..5 {
        // The order is reversed in every other turn, so that load alone would choose other targets.
        for number in 0..16 {
            let conversation = if turn % 2 == 0 { number } else { 15 - number };
            let own: Vec<_> = (0..=turn).map(|it| conversation * 100 + it).collect();
            let prompt = simulation.prompt(&[], &own);
            let engine = simulation.send(&prompt, (turn + 1) * BLOCK_TOKENS, 20);
            let known = &mut engines[usize::try_from(conversation).expect("it is small")];
            assert_eq!(*known.get_or_insert(engine), engine, "turn {turn}");
        }
        (0..100).for_each(|_| simulation.step());
    }
    assert_eq!(simulation.received(), [20; 4]);
}

/// Simulates many growing conversations at a time, all with the same prefix, on a large and a small target. Returns the
/// share of the requests that the small target got, and the share of the prompt tokens that were reused.
fn canary(by_prefix: bool) -> (f64, f64) {
    let mut simulation = Simulation::new(&[9, 1], by_prefix);
    let shared: Vec<u64> = (0..10).collect();
    let (mut requests, mut tokens) = (0, 0);
    for group in 0..40 {
        for turn in 0..10 {
            for conversation in 0..20 {
                let first = 1_000 + (group * 20 + conversation) * 100;
                let own: Vec<_> = (first..=first + 2 * turn).collect();
                let prompt = simulation.prompt(&shared, &own);
                let prompt_tokens = (10 + 2 * turn + 1) * BLOCK_TOKENS;
                simulation.send(&prompt, prompt_tokens, 40 + conversation);
                requests += 1;
                tokens += prompt_tokens;
                (0..3).for_each(|_| simulation.step());
            }
        }
    }
    let small = simulation.received()[1];
    let ratio = |part: u64, whole: u64| {
        let number = |it: u64| f64::from(u32::try_from(it).expect("it is small"));
        number(part) / number(whole)
    };
    let small = u64::try_from(small).expect("it is small");
    (ratio(small, requests), ratio(simulation.reused(), tokens))
}

#[test]
fn prefixes_leave_a_canary_its_share_of_the_requests() {
    let (by_load, _) = canary(false);
    let (by_prefix, reused) = canary(true);
    assert!(
        (by_prefix - by_load).abs() < 0.03,
        "{by_prefix}, {by_load} by load alone"
    );
    assert!(reused > 0.5, "{reused}");
}
