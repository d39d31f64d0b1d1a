//! Cost of the scheduler's decisions for a request: admission, and the placement on a slot that becomes free. All
//! requests of an engine pass through them one after the other.

use std::hint::black_box;
use std::iter::repeat_with;
use std::sync::LazyLock;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use tokenway::models::{ModelId, ModelSpec, Models, UnknownModelPolicy};
use tokenway::prefix_index::PromptBlocks;
use tokenway::scheduler::plan::{Admission, Placement, Plan, QueuedChoice};
use tokenway::worker::{Generation, WorkerId};

/// Number of requests that the queue can hold.
const QUEUE_DEPTH: usize = 1_024;
/// Number of slots of each worker.
const SLOTS: usize = 8;
/// The only generation of every worker.
const GENERATION: Generation = Generation(1);
/// `max_tokens` of every request.
const MAX_TOKENS: u32 = 256;

/// A choice of a request whose client is still connected.
struct Choice;

/// Prompt blocks of a model whose runner reuses no prefixes: none.
static NO_PROMPT: LazyLock<PromptBlocks> = LazyLock::new(PromptBlocks::default);

impl QueuedChoice for Choice {
    fn max_tokens(&self) -> u32 {
        MAX_TOKENS
    }

    fn prompt_blocks(&self) -> &PromptBlocks {
        &NO_PROMPT
    }

    fn has_reader(&self) -> bool {
        true
    }

    fn is_suspect(&self) -> bool {
        false
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("scheduler");
    group.throughput(Throughput::Elements(1));
    free_slots(&mut group);
    full_queue(&mut group);
    group.finish();
    criterion.final_summary();
}

/// Measures admitting and releasing one request after the other, each on a free slot.
fn free_slots(group: &mut BenchmarkGroup<'_, WallTime>) {
    for workers in [1, 8, 256] {
        let (mut plan, model) = empty_plan(workers);
        group.bench_function(
            format!("admit and release, workers: {workers}"),
            |bencher| {
                bencher.iter(|| {
                    let (admission, placements) = plan.admit(model, black_box(0), vec![Choice]);
                    assert_eq!(admission, Admission::Admitted);
                    release_slots(&mut plan, &placements);
                });
            },
        );
    }
}

/// Measures each operation with all slots occupied and a full queue.
fn full_queue(group: &mut BenchmarkGroup<'_, WallTime>) {
    let same = || 0;
    let mut turn = 0;
    let different = || {
        turn = (turn + 1) % 7;
        turn - 3
    };
    bench_turns(group, "release and admit, full queue", same);
    bench_turns(
        group,
        "release and admit, full queue of 7 priorities",
        different,
    );
    group.bench_function("reject, full queue", |bencher| {
        let (mut plan, model) = full_plan(8, repeat_with(same));
        bencher.iter(|| {
            let (admission, _) = plan.admit(model, black_box(0), vec![Choice]);
            assert_eq!(admission, Admission::QueueFull);
        });
    });
    group.bench_function("sweep, full queue", |bencher| {
        let (mut plan, _) = full_plan(8, repeat_with(same));
        bencher.iter(|| plan.drop_abandoned());
    });
}

/// Measures one turn: a slot becomes free, the first queued request takes it, and another request is queued.
fn bench_turns(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    mut priority: impl FnMut() -> i32,
) {
    group.bench_function(name, |bencher| {
        let (mut plan, model) = full_plan(8, repeat_with(&mut priority));
        let mut worker = (0..8).cycle().map(WorkerId);
        bencher.iter(|| {
            let worker = worker.next().expect("the cycle is endless");
            assert_eq!(plan.release_slot(worker, GENERATION, MAX_TOKENS).len(), 1);
            let (admission, placements) = plan.admit(model, priority(), vec![Choice]);
            assert_eq!(admission, Admission::Admitted);
            black_box(placements);
        });
    });
}

fn release_slots(plan: &mut Plan<Choice>, placements: &[Placement<Choice>]) {
    for placement in placements {
        let next = plan.release_slot(placement.worker, placement.generation, MAX_TOKENS);
        black_box(next);
    }
}

/// Returns the plan of one model on this many ready workers, without requests.
fn empty_plan(workers: usize) -> (Plan<Choice>, ModelId) {
    let spec = ModelSpec {
        name: "model".to_owned(),
        aliases: Vec::new(),
        runner: "none",
        created: 0,
    };
    let models = Models::new(vec![spec], UnknownModelPolicy::Refuse);
    let model = models.entries()[0].id;
    let mut plan = Plan::new(models.map_values([QUEUE_DEPTH]));
    for worker in 0..workers {
        plan.add_worker(WorkerId(worker), model);
        plan.set_worker_ready(WorkerId(worker), GENERATION, SLOTS);
    }
    (plan, model)
}

/// Returns the plan of one model on this many workers, with every slot occupied and a full queue.
fn full_plan(workers: usize, priorities: impl Iterator<Item = i32>) -> (Plan<Choice>, ModelId) {
    let (mut plan, model) = empty_plan(workers);
    for priority in priorities.take(workers * SLOTS + QUEUE_DEPTH) {
        let (admission, _) = plan.admit(model, priority, vec![Choice]);
        assert_eq!(admission, Admission::Admitted);
    }
    (plan, model)
}
