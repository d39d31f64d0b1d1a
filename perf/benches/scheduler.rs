//! Cost of the scheduler's decisions for a request: admission, and the placement on a slot that becomes free. All
//! requests of an engine pass through them one after the other.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::LazyLock;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use tokenway::models::{ModelId, ModelSpec, Models, UnknownModelPolicy};
use tokenway::prefix_index::PromptBlocks;
use tokenway::scheduler::plan::{Admission, CallerShare, NewWork, Placement, Plan, QueuedChoice};
use tokenway::worker::{AssignmentId, Generation, WorkerId};
use tokio::time::Instant;

/// Number of requests that the queue can hold.
const QUEUE_DEPTH: usize = 1_024;
/// Number of slots of each worker.
const SLOTS: usize = 8;
/// The only generation of every worker.
const GENERATION: Generation = Generation(1);
/// `max_tokens` of every request.
const MAX_TOKENS: u32 = 256;

/// A choice of a request whose client is still connected.
struct Choice(AssignmentId);

/// Prompt blocks of a model whose runner reuses no prefixes: none.
static NO_PROMPT: LazyLock<PromptBlocks> = LazyLock::new(PromptBlocks::default);

impl QueuedChoice for Choice {
    fn id(&self) -> AssignmentId {
        self.0
    }

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

/// A plan, and the jobs that it has placed on its workers.
struct BusyPlan {
    plan: Plan<Choice>,
    model: ModelId,
    callers: Vec<CallerShare>,
    running: VecDeque<(WorkerId, AssignmentId)>,
    admitted: u64,
    start: Instant,
}

impl BusyPlan {
    /// Creates the plan of one model on this many ready workers. Its requests come from this many callers in turn.
    fn new(workers: usize, callers: usize) -> Self {
        let spec = ModelSpec {
            name: "model".to_owned(),
            aliases: Vec::new(),
            runner: "none",
            created: 0,
        };
        let models = Models::new(vec![spec], UnknownModelPolicy::Refuse);
        let model = models.entries()[0].id;
        let start = Instant::now();
        let mut plan = Plan::new(models.map_values([QUEUE_DEPTH]), start);
        for worker in 0..workers {
            plan.add_worker(WorkerId(worker), model);
            let placements = plan.set_worker_ready(WorkerId(worker), GENERATION, SLOTS);
            assert!(placements.is_empty());
        }
        let callers = (0..callers).map(|caller| CallerShare {
            key: Some(format!("key-{caller}").parse().expect("a key's name")),
            ..CallerShare::default()
        });
        Self {
            plan,
            model,
            callers: callers.collect(),
            running: VecDeque::new(),
            admitted: 0,
            start,
        }
    }

    /// Occupies every slot and fills the queue.
    fn full(workers: usize, callers: usize, mut priority: impl FnMut() -> i32) -> Self {
        let mut plan = Self::new(workers, callers);
        for _ in 0..workers * SLOTS + QUEUE_DEPTH {
            assert_eq!(plan.admit(priority()), Admission::Admitted);
        }
        plan
    }

    fn admit(&mut self, priority: i32) -> Admission {
        self.admitted += 1;
        let callers = u64::try_from(self.callers.len()).expect("a small number");
        let caller = usize::try_from(self.admitted % callers).expect("a small number");
        let now = self.start + Duration::from_millis(self.admitted);
        self.plan.set_now(now);
        let admitting = self.plan.admit(NewWork {
            model: self.model,
            caller: self.callers[caller].clone(),
            priority,
            deadline: now + Duration::from_secs(600),
            choices: vec![Choice(AssignmentId(self.admitted))],
        });
        self.record(admitting.placements);
        admitting.admission
    }

    /// Ends the oldest job. Returns the number of jobs that start.
    fn release(&mut self) -> usize {
        let (worker, job) = self.running.pop_front().expect("a running job");
        let placements = self.plan.release_slot(worker, GENERATION, job);
        let started = placements.len();
        self.record(placements);
        started
    }

    fn record(&mut self, placements: Vec<Placement<Choice>>) {
        let placed = placements.into_iter();
        self.running
            .extend(placed.map(|placed| (placed.worker, placed.job.0)));
    }
}

/// Measures admitting and releasing one request after the other, each on a free slot.
fn free_slots(group: &mut BenchmarkGroup<'_, WallTime>) {
    for workers in [1, 8, 256] {
        let mut plan = BusyPlan::new(workers, 1);
        group.bench_function(
            format!("admit and release, workers: {workers}"),
            |bencher| {
                bencher.iter(|| {
                    assert_eq!(plan.admit(black_box(0)), Admission::Admitted);
                    black_box(plan.release());
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
    bench_turns(group, "release and admit, full queue", 1, same);
    let name = "release and admit, full queue of 7 priorities";
    bench_turns(group, name, 1, different);
    for callers in [8, QUEUE_DEPTH] {
        let name = format!("release and admit, full queue of {callers} callers");
        bench_turns(group, &name, callers, same);
    }
    for callers in [1, QUEUE_DEPTH] {
        let name = format!("reject, full queue of {callers} callers");
        group.bench_function(name, |bencher| {
            let mut plan = BusyPlan::full(8, callers, same);
            bencher.iter(|| assert_eq!(plan.admit(black_box(0)), Admission::QueueFull));
        });
    }
    group.bench_function("sweep, full queue", |bencher| {
        let mut plan = BusyPlan::full(8, 1, same);
        bencher.iter(|| plan.plan.drop_abandoned());
    });
}

/// Measures one turn: a slot becomes free, the first queued request takes it, and another request is queued.
fn bench_turns(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    callers: usize,
    mut priority: impl FnMut() -> i32,
) {
    group.bench_function(name, |bencher| {
        let mut plan = BusyPlan::full(8, callers, &mut priority);
        bencher.iter(|| {
            assert_eq!(plan.release(), 1);
            assert_eq!(plan.admit(priority()), Admission::Admitted);
        });
    });
}
