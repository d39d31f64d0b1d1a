//! A plan with helpers for tests: it advances the time, admits requests and ends jobs.

use super::*;

#[derive(Clone, Debug)]
pub(super) struct NamedJob {
    pub(super) id: AssignmentId,
    pub(super) name: &'static str,
    pub(super) max_tokens: u32,
    pub(super) prompt: PromptBlocks,
    pub(super) has_reader: Rc<Cell<bool>>,
}

/// Jobs whose name starts with this prefix are crash suspects.
pub(super) const SUSPECT: &str = "suspect";

impl QueuedChoice for NamedJob {
    fn id(&self) -> AssignmentId {
        self.id
    }

    fn max_tokens(&self) -> u32 {
        self.max_tokens
    }

    fn prompt_blocks(&self) -> &PromptBlocks {
        &self.prompt
    }

    fn has_reader(&self) -> bool {
        self.has_reader.get()
    }

    fn is_suspect(&self) -> bool {
        self.name.starts_with(SUSPECT)
    }
}

pub(super) fn job(name: &'static str) -> NamedJob {
    NamedJob {
        id: AssignmentId(0),
        name,
        max_tokens: 16,
        prompt: PromptBlocks::default(),
        has_reader: Rc::new(Cell::new(true)),
    }
}

pub(super) fn names(placements: &[Placement<NamedJob>]) -> Vec<(&'static str, usize)> {
    placements
        .iter()
        .map(|placement| (placement.job.name, placement.worker.0))
        .collect()
}

/// A plan, and the jobs that it has placed. All requests of [`TestPlan::admit`] have the same caller.
pub(super) struct TestPlan {
    pub(super) plan: Plan<NamedJob>,
    pub(super) running: Vec<Placement<NamedJob>>,
    pub(super) now: Instant,
    pub(super) next_id: u64,
}

impl TestPlan {
    pub(super) fn new(models: &Models, queue_depths: impl IntoIterator<Item = usize>) -> Self {
        let now = Instant::now();
        Self {
            plan: Plan::new(models.map_values(queue_depths), now),
            running: Vec::new(),
            now,
            next_id: 0,
        }
    }

    /// Advances the time of the next events.
    pub(super) fn advance(&mut self, time: Duration) {
        self.now += time;
        self.plan.set_now(self.now);
    }

    pub(super) fn admit(
        &mut self,
        model: ModelId,
        priority: i32,
        choices: Vec<NamedJob>,
    ) -> (Admission, Vec<Placement<NamedJob>>) {
        let admitting = self.admit_work(NewWork {
            model,
            caller: CallerShare::default(),
            priority,
            deadline: self.now + Duration::from_secs(3_600),
            choices,
        });
        assert!(admitting.displaced.is_empty(), "there is one caller");
        (admitting.admission, admitting.placements)
    }

    pub(super) fn admit_work(&mut self, mut work: NewWork<NamedJob>) -> Admitting<NamedJob> {
        for choice in &mut work.choices {
            self.set_id(choice);
        }
        let admitting = self.plan.admit(work);
        self.running.extend(admitting.placements.iter().cloned());
        admitting
    }

    pub(super) fn resume(
        &mut self,
        model: ModelId,
        priority: i32,
        job: NamedJob,
    ) -> Vec<Placement<NamedJob>> {
        self.resume_for(CallerShare::default(), model, priority, job)
    }

    pub(super) fn resume_for(
        &mut self,
        caller: CallerShare,
        model: ModelId,
        priority: i32,
        mut job: NamedJob,
    ) -> Vec<Placement<NamedJob>> {
        self.set_id(&mut job);
        let placements = self.plan.resume(model, caller, priority, job);
        self.record(placements)
    }

    pub(super) fn set_worker_ready(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        slots: usize,
    ) -> Vec<Placement<NamedJob>> {
        let placements = self.plan.set_worker_ready(worker, generation, slots);
        self.record(placements)
    }

    pub(super) fn set_stuck(
        &mut self,
        worker: WorkerId,
        is_stuck: bool,
    ) -> Vec<Placement<NamedJob>> {
        let placements = self.plan.set_stuck(worker, is_stuck);
        self.record(placements)
    }

    pub(super) fn clear_suspect(
        &mut self,
        worker: WorkerId,
        generation: Generation,
    ) -> Vec<Placement<NamedJob>> {
        let placements = self.plan.clear_suspect(worker, generation);
        self.record(placements)
    }

    /// Ends the job that a worker has run for the longest time.
    pub(super) fn release(&mut self, worker: usize) -> Vec<Placement<NamedJob>> {
        let at = self
            .running
            .iter()
            .position(|placed| placed.worker.0 == worker);
        let ended = self.running.remove(at.expect("the worker runs a job"));
        let placements = self
            .plan
            .release_slot(ended.worker, ended.generation, ended.job.id);
        self.record(placements)
    }

    pub(super) fn record(
        &mut self,
        placements: Vec<Placement<NamedJob>>,
    ) -> Vec<Placement<NamedJob>> {
        self.running.extend(placements.iter().cloned());
        placements
    }

    pub(super) fn set_id(&mut self, job: &mut NamedJob) {
        job.id = AssignmentId(self.next_id);
        self.next_id += 1;
    }
}

/// Creates a plan with one model, and one ready worker for each entry of `slots`.
pub(super) fn plan(slots: &[usize], queue_depth: usize) -> TestPlan {
    let mut plan = TestPlan::new(&Models::for_test(&["a"]), [queue_depth]);
    for (worker, slots) in slots.iter().enumerate() {
        add_ready(&mut plan, worker, model(0), *slots);
    }
    plan
}

/// Creates a plan with two models and no workers.
pub(super) fn two_models(queue_depths: [usize; 2]) -> TestPlan {
    TestPlan::new(&Models::for_test(&["a", "b"]), queue_depths)
}

/// Returns the id of the first or second model of [`two_models`].
pub(super) fn model(index: usize) -> ModelId {
    Models::for_test(&["a", "b"]).entries()[index].id
}

/// Adds a ready worker.
pub(super) fn add_ready(plan: &mut TestPlan, worker: usize, model: ModelId, slots: usize) {
    plan.plan.add_worker(WorkerId(worker), model);
    assert!(
        plan.set_worker_ready(WorkerId(worker), Generation(1), slots)
            .is_empty()
    );
}

pub(super) fn admit(plan: &mut TestPlan, priority: i32, name: &'static str) -> Admission {
    plan.admit(model(0), priority, vec![job(name)]).0
}

pub(super) fn release(plan: &mut TestPlan, worker: usize) -> Vec<(&'static str, usize)> {
    names(&plan.release(worker))
}
