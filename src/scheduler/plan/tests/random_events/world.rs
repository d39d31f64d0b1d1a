//! The plan, and a model of it: plain lists that are searched for each decision.

use super::*;

/// A request with choices that wait.
#[derive(Clone, Debug)]
struct Request {
    caller: usize,
    weight: usize,
    priority: i32,
    arrival: u64,
    reaches_all: bool,
    is_resumed: bool,
    has_started: bool,
    choices: Vec<NamedJob>,
}

#[derive(Clone, Debug, Default)]
struct Caller {
    weight: usize,
    reaches_all: bool,
    /// Weight that the plan knows, from the caller's last request.
    known_weight: usize,
    time: Duration,
    had_slot: bool,
    since: u64,
}

#[derive(Clone, Debug)]
struct Worker {
    is_known: bool,
    generation: u64,
    /// `None` while the worker is not ready.
    slots: Option<usize>,
    is_stuck: bool,
    has_suspect: bool,
}

#[derive(Clone, Debug)]
struct Running {
    job: NamedJob,
    worker: usize,
    generation: u64,
    caller: usize,
    started: Instant,
}

/// The plan, and the model of it.
pub(super) struct World {
    plan: Plan<NamedJob>,
    now: Instant,
    /// Number of the next job, arrival and turn.
    next: u64,
    callers: Vec<Caller>,
    workers: Vec<Worker>,
    waiting: Vec<Request>,
    running: Vec<Running>,
    /// The callers and jobs whose workers were lost.
    lost: Vec<(usize, NamedJob)>,
    ended: Vec<Running>,
}

impl World {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        let worker = Worker {
            is_known: false,
            generation: 0,
            slots: None,
            is_stuck: false,
            has_suspect: false,
        };
        let caller = Caller {
            weight: 1,
            known_weight: 1,
            ..Caller::default()
        };
        let mut world = Self {
            plan: Plan::new(Models::for_test(&["a"]).map_values([DEPTH]), now),
            now,
            next: 0,
            callers: vec![caller; CALLERS],
            workers: vec![worker; WORKERS],
            waiting: Vec::new(),
            running: Vec::new(),
            lost: Vec::new(),
            ended: Vec::new(),
        };
        world.apply(&Event::Ready {
            worker: 0,
            slots: 2,
        });
        world
    }

    pub(super) fn apply(&mut self, event: &Event) {
        match *event {
            Event::Advance(milliseconds) => {
                self.now += Duration::from_millis(milliseconds.into());
                self.plan.set_now(self.now);
            }
            Event::Submit {
                caller,
                priority,
                choices,
            } => self.submit(caller, priority, choices),
            Event::Finish(index) => self.finish(index),
            Event::FinishAgain => {
                if let Some(ended) = self.ended.last() {
                    let generation = Generation(ended.generation);
                    let worker = WorkerId(ended.worker);
                    let started = self.plan.release_slot(worker, generation, ended.job.id);
                    assert!(started.is_empty(), "the slot was free before");
                }
            }
            Event::Cancel { job, whole_request } => self.cancel(job, whole_request),
            Event::DropAbandoned => {
                self.plan.drop_abandoned();
                self.drop_abandoned();
            }
            Event::Ready { worker, slots } => self.set_ready(worker, slots),
            Event::Lose(worker) => {
                self.plan.set_worker_lost(WorkerId(worker));
                self.lose(worker);
            }
            Event::Leave(worker) => {
                self.plan.remove_worker(WorkerId(worker));
                self.lose(worker);
                self.workers[worker].is_known = false;
            }
            Event::Stick { worker, is_stuck } => {
                let started = self.plan.set_stuck(WorkerId(worker), is_stuck);
                if self.workers[worker].is_known {
                    self.workers[worker].is_stuck = is_stuck;
                    self.expect_started(started);
                }
            }
            Event::Resume { job, is_suspect } => self.resume(job, is_suspect),
            Event::ClearSuspect(worker) => {
                let generation = Generation(self.workers[worker].generation);
                let started = self.plan.clear_suspect(WorkerId(worker), generation);
                if self.workers[worker].slots.is_some() {
                    self.workers[worker].has_suspect = false;
                    self.expect_started(started);
                }
            }
            Event::Reload {
                caller,
                weight,
                reaches_all,
            } => {
                self.callers[caller].weight = weight;
                self.callers[caller].reaches_all = reaches_all;
            }
        }
        self.forget_if_idle();
        assert_eq!(self.plan.queued(), self.queued(|_| true));
        assert!(self.plan.queued() <= DEPTH);
    }

    fn share(&self, caller: usize) -> CallerShare {
        CallerShare {
            key: Some(format!("key-{caller}").parse().unwrap()),
            weight: self.callers[caller].weight.to_string().parse().unwrap(),
            priority_reach: match self.callers[caller].reaches_all {
                true => PriorityReach::AllRequests,
                false => PriorityReach::OwnRequests,
            },
        }
    }

    fn new_job(&mut self, is_suspect: bool) -> NamedJob {
        self.next += 1;
        NamedJob {
            id: AssignmentId(self.next),
            ..job(if is_suspect { SUSPECT } else { "job" })
        }
    }

    fn submit(&mut self, caller: usize, priority: i32, choices: usize) {
        let choices: Vec<_> = (0..choices).map(|_| self.new_job(false)).collect();
        let admitting = self.plan.admit(NewWork {
            model: model(0),
            caller: self.share(caller),
            priority,
            deadline: self.now + Duration::from_secs(100_000),
            choices: choices.clone(),
        });
        let is_any_up = self.workers.iter().any(Worker::is_up);
        if !is_any_up {
            assert_eq!(admitting.admission, Admission::NoWorker);
            return;
        }
        let weight = self.callers[caller].weight;
        self.join(caller, weight);
        let arrival = self.next;
        self.waiting.push(Request {
            caller,
            weight,
            priority,
            arrival,
            reaches_all: self.callers[caller].reaches_all,
            is_resumed: false,
            has_started: false,
            choices,
        });
        self.expect_started(admitting.placements);
        let displaced = admitting.displaced.first().map(|job| job.id);
        let removed = self.make_room(arrival, displaced);
        let ids = |jobs: &[NamedJob]| jobs.iter().map(|job| job.id).collect::<Vec<_>>();
        let (expected, displaced) = match &removed {
            None => (Admission::Admitted, vec![]),
            Some(request) if request.arrival == arrival => (Admission::QueueFull, vec![]),
            Some(request) => (Admission::Admitted, ids(&request.choices)),
        };
        assert_eq!(admitting.admission, expected);
        assert_eq!(ids(&admitting.displaced), displaced);
    }

    /// Removes the request that does not fit into the queue. `displaced` decides between callers with equally long
    /// queues.
    fn make_room(&mut self, arrival: u64, displaced: Option<AssignmentId>) -> Option<Request> {
        if self.queued(|_| true) <= DEPTH {
            return None;
        }
        let per_weight = |caller: usize| {
            let queued = self.queued(|request| request.caller == caller);
            queued * MULTIPLE / self.callers[caller].known_weight
        };
        let at = |found: &dyn Fn(&Request) -> bool| self.waiting.iter().position(found);
        let newest = at(&|request| request.arrival == arrival).expect("it waits");
        let own = per_weight(self.waiting[newest].caller);
        let longest = (0..CALLERS)
            .map(per_weight)
            .max()
            .expect("there are callers");
        if longest == own {
            return Some(self.waiting.remove(newest));
        }
        let displaced = displaced.expect("another caller has a longer queue");
        let has_displaced = |request: &Request| request.choices.iter().any(|it| it.id == displaced);
        let at = at(&has_displaced).expect("it waits");
        let caller = self.waiting[at].caller;
        assert_eq!(per_weight(caller), longest);
        let queued = self
            .waiting
            .iter()
            .filter(|it| it.counts() && it.caller == caller);
        let last = queued.map(Request::order).max();
        assert_eq!(Some(self.waiting[at].order()), last);
        Some(self.waiting.remove(at))
    }

    fn finish(&mut self, index: usize) {
        if self.running.is_empty() {
            return;
        }
        let ended = self.running.remove(index % self.running.len());
        self.charge(&ended);
        let (worker, generation) = (WorkerId(ended.worker), Generation(ended.generation));
        let started = self.plan.release_slot(worker, generation, ended.job.id);
        self.ended.push(ended);
        self.forget_if_idle();
        self.expect_started(started);
    }

    fn cancel(&mut self, index: usize, whole_request: bool) {
        let jobs = self.waiting.iter().flat_map(|request| &request.choices);
        let count = jobs.clone().count();
        let Some(job) = index.checked_rem(count).and_then(|at| jobs.clone().nth(at)) else {
            return;
        };
        let request = self.waiting.iter().find(|request| {
            let mut ids = request.choices.iter().map(|it| it.id);
            ids.any(|id| id == job.id)
        });
        for choice in &request.expect("the job waits").choices {
            if whole_request || choice.id == job.id {
                choice.has_reader.set(false);
            }
        }
    }

    fn drop_abandoned(&mut self) {
        for request in &mut self.waiting {
            request.choices.retain(QueuedChoice::has_reader);
        }
        self.waiting.retain(|request| !request.choices.is_empty());
    }

    fn set_ready(&mut self, worker: usize, slots: usize) {
        if !std::mem::replace(&mut self.workers[worker].is_known, true) {
            self.plan.add_worker(WorkerId(worker), model(0));
        }
        self.lose(worker);
        self.forget_if_idle();
        let state = &mut self.workers[worker];
        state.generation += 1;
        state.slots = Some(slots);
        let generation = Generation(state.generation);
        let started = self
            .plan
            .set_worker_ready(WorkerId(worker), generation, slots);
        self.expect_started(started);
    }

    fn lose(&mut self, worker: usize) {
        let running = self.running.drain(..);
        let (lost, left): (Vec<_>, Vec<_>) = running.partition(|it| it.worker == worker);
        self.running = left;
        for lost in lost {
            self.charge(&lost);
            self.lost.push((lost.caller, lost.job.clone()));
            self.ended.push(lost);
        }
        let state = &mut self.workers[worker];
        (state.slots, state.is_stuck, state.has_suspect) = (None, false, false);
    }

    fn resume(&mut self, index: usize, is_suspect: bool) {
        if self.lost.is_empty() {
            return;
        }
        let (caller, lost) = self.lost.swap_remove(index % self.lost.len());
        let priority = i32::try_from(lost.id.0 % 3).expect("a small number");
        let job = self.new_job(is_suspect);
        let share = self.share(caller);
        let started = self.plan.resume(model(0), share, priority, job.clone());
        self.waiting.push(Request {
            caller,
            weight: self.callers[caller].weight,
            priority,
            arrival: self.next,
            reaches_all: false,
            is_resumed: true,
            has_started: true,
            choices: vec![job],
        });
        self.expect_started(started);
    }

    /// Asserts that the plan has started the right jobs, and starts them in the model.
    fn expect_started(&mut self, started: Vec<Placement<NamedJob>>) {
        let mut started = started.into_iter();
        loop {
            let (next, actual) = (self.next_request(), started.next());
            let (at, placement) = match (next, actual) {
                (None, None) => return,
                (Some(at), Some(placement)) => (at, placement),
                (Some(at), None) => panic!("a slot idles while {:?} waits", self.waiting[at]),
                (None, Some(placement)) => panic!("{placement:?} has no slot"),
            };
            self.start(at, &placement);
        }
    }

    fn start(&mut self, at: usize, placement: &Placement<NamedJob>) {
        let request = &mut self.waiting[at];
        let job = request.choices.remove(0);
        assert_eq!(placement.job.id, job.id, "{request:?}");
        let first_start = !std::mem::replace(&mut request.has_started, true);
        let request = request.clone();
        if request.choices.is_empty() {
            self.waiting.remove(at);
        }
        let worker = placement.worker.0;
        assert!(
            self.may_run(worker, &job),
            "worker {worker} has no slot for {job:?}"
        );
        let generation = self.workers[worker].generation;
        assert_eq!(placement.generation, Generation(generation));
        if first_start && !request.reaches_all {
            self.check_bound(&request);
        }
        if request.is_resumed {
            self.join(request.caller, request.weight);
        }
        self.next += 1;
        let state = &mut self.callers[request.caller];
        (state.had_slot, state.since) = (true, self.next);
        self.workers[worker].has_suspect |= job.is_suspect();
        self.running.push(Running {
            job,
            worker,
            generation,
            caller: request.caller,
            started: self.now,
        });
    }

    /// Asserts that no other caller waits without a slot, if the caller of the request that starts has one.
    fn check_bound(&self, started: &Request) {
        if self.slots(started.caller) == 0 {
            return;
        }
        let without_slot = self.waiting.iter().find(|request| {
            let is_not_behind = !request.reaches_all || request.priority <= 0;
            let is_alive = request.choices.iter().all(QueuedChoice::has_reader);
            let is_candidate = !request.is_resumed && is_not_behind && is_alive;
            let first = self.first_request(request.caller);
            let is_first = first.is_some_and(|at| self.waiting[at].arrival == request.arrival);
            is_candidate && is_first && self.slots(request.caller) == 0
        });
        assert!(
            without_slot.is_none(),
            "{without_slot:?} before {started:?}"
        );
    }

    /// Returns the request whose first choice gets a slot now. Drops the abandoned choices that the plan drops.
    fn next_request(&mut self) -> Option<usize> {
        let resumed = self.waiting.iter().filter(|request| request.is_resumed);
        let mut resumed: Vec<_> = resumed.map(Request::order).collect();
        resumed.sort_unstable();
        for order in resumed {
            let at = self
                .waiting
                .iter()
                .position(|it| it.is_resumed && it.order() == order);
            let at = at.expect("it waits");
            let choice = &self.waiting[at].choices[0];
            if !choice.has_reader() {
                self.waiting.remove(at);
            } else if self.is_placeable(choice) {
                return Some(at);
            } else if !choice.is_suspect() {
                return None;
            }
        }
        loop {
            let callers = (0..CALLERS).filter_map(|caller| Some((self.turn(caller)?, caller)));
            let (_, caller) = callers.min()?;
            let at = self.first_request(caller).expect("it waits");
            if self.waiting[at].choices[0].has_reader() {
                return self
                    .is_placeable(&self.waiting[at].choices[0])
                    .then_some(at);
            }
            self.drop_abandoned_first(caller);
        }
    }

    /// Drops the choices at the front of a caller's queue whose readers were dropped.
    fn drop_abandoned_first(&mut self, caller: usize) {
        while let Some(at) = self.first_request(caller) {
            let choices = &mut self.waiting[at].choices;
            if choices[0].has_reader() {
                return;
            }
            choices.remove(0);
            if choices.is_empty() {
                self.waiting.remove(at);
            }
        }
    }

    /// Returns the first of a caller's new requests.
    fn first_request(&self, caller: usize) -> Option<usize> {
        let waiting = self.waiting.iter().enumerate();
        let own = waiting.filter(|(_, it)| !it.is_resumed && it.caller == caller);
        let first = own.min_by_key(|(_, it)| it.order());
        first.map(|(at, _)| at)
    }

    /// Returns the sort key of a caller that waits.
    fn turn(&self, caller: usize) -> Option<(i32, usize, Duration, bool, u64)> {
        let first = &self.waiting[self.first_request(caller)?];
        let priority = if first.reaches_all { first.priority } else { 0 };
        let state = &self.callers[caller];
        let slots = self.slots(caller) * MULTIPLE / state.known_weight;
        Some((priority, slots, state.time, state.had_slot, state.since))
    }

    fn join(&mut self, caller: usize, weight: usize) {
        let active = (0..CALLERS).filter(|it| self.is_active(*it));
        let floor = active.map(|it| self.callers[it].time).min();
        let is_active = self.is_active(caller);
        self.next += 1;
        let state = &mut self.callers[caller];
        state.known_weight = weight;
        if !is_active {
            state.time = state.time.max(floor.unwrap_or_default());
            (state.had_slot, state.since) = (false, self.next);
        }
    }

    fn charge(&mut self, ended: &Running) {
        let state = &mut self.callers[ended.caller];
        let weight = u32::try_from(state.known_weight).expect("a small number");
        state.time += (self.now - ended.started) / weight;
    }

    /// Forgets all used time once no caller waits or runs.
    fn forget_if_idle(&mut self) {
        if !(0..CALLERS).any(|caller| self.is_active(caller)) {
            for caller in &mut self.callers {
                caller.time = Duration::ZERO;
            }
        }
    }

    fn is_active(&self, caller: usize) -> bool {
        self.slots(caller) > 0 || self.first_request(caller).is_some()
    }

    fn slots(&self, caller: usize) -> usize {
        let running = self.running.iter();
        running.filter(|it| it.caller == caller).count()
    }

    /// Counts the requests that wait for their first slot.
    fn queued(&self, counts: impl Fn(&Request) -> bool) -> usize {
        let waiting = self.waiting.iter();
        waiting.filter(|it| it.counts() && counts(it)).count()
    }

    fn is_placeable(&self, job: &NamedJob) -> bool {
        (0..WORKERS).any(|worker| self.may_run(worker, job))
    }

    fn may_run(&self, worker: usize, job: &NamedJob) -> bool {
        let state = &self.workers[worker];
        let used = self.running.iter().filter(|it| it.worker == worker).count();
        let has_slot = state.is_up() && state.slots.is_some_and(|slots| used < slots);
        has_slot && !(job.is_suspect() && state.has_suspect)
    }

    /// Ends running jobs until no waiting job has a reader.
    pub(super) fn drain(&mut self) {
        self.set_ready(0, 1);
        while !self.running.is_empty() {
            self.apply(&Event::ClearSuspect(0));
            self.apply(&Event::Finish(0));
        }
        self.apply(&Event::DropAbandoned);
        assert_eq!(self.waiting.len(), 0, "{:?}", self.waiting);
        assert_eq!(self.plan.clear().len(), 0);
    }
}

impl Request {
    fn order(&self) -> (i32, u64) {
        (self.priority, self.arrival)
    }

    /// Returns true if the request takes a place in the queue.
    fn counts(&self) -> bool {
        !self.has_started
    }
}

impl Worker {
    fn is_up(&self) -> bool {
        self.slots.is_some() && !self.is_stuck
    }
}
