//! Evaluations under a deadline that an engine cannot get round.
//!
//! An engine runs on a worker thread, and whoever asked goes on in `then`, which that worker calls when
//! the evaluation has ended: a decision is not handed back to the thread that it came from, and none
//! waits for it. Two things end an evaluation without the engine's consent: its thread has used up the
//! budget of CPU time, or, however little it ran, it has taken the limit of the wait, `ENGINE_WAIT` by
//! default. One more thread watches for both. What is over is then abandoned: it is denied, its answer
//! will not be looked at, and its worker is busy until it ends by itself, since nothing can end a thread.
//! There are [`ENGINE_WORKERS`] workers and no more, and one caller holds at most
//! [`ENGINE_WORKERS_PER_CALLER`] of them, so that none takes the engines from the others by what it asks.
//! What finds no worker waits its turn, up to the same limit; what would wait for evaluations that have
//! not ended in all that time is denied at once.
//!
//! The budget is CPU time because a thread that was merely not scheduled is late, not expensive.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use tidelock_policy::{Engine, Evaluation, PolicyRequest};

use crate::{
    clock::{Clock, ThreadCpu},
    limits::{ENGINE_STACK_BYTES, ENGINE_WORKERS, ENGINE_WORKERS_PER_CALLER},
};

/// The longest between two looks at what runs.
const LOOK_EVERY_AT_MOST: Duration = Duration::from_millis(10);
/// How many looks that find nothing to look at end the watch until the next evaluation.
const LOOKS_AT_NOTHING: u32 = 20;

/// What is waited beyond the limits before the word of the watch is done without.
const SLACK: Duration = Duration::from_secs(1);
/// What is told at most between two looks.
const TOLD_AT_ONCE: usize = 16;

/// How an evaluation came out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Evaluated {
    /// In time.
    Done(Evaluation),
    /// The engine panicked.
    Panicked,
    /// It came back after its budget, or did not come back.
    Late {
        /// Whether its worker is still at it.
        abandoned: bool,
    },
    /// It was not begun: no worker that its caller may have came free in time, or none could be
    /// started.
    Exhausted,
}

/// Goes on with what came of an evaluation, and the CPU time that it took as far as that is known.
/// Called exactly once while the engines are there, on any thread. It must not wait for an evaluation.
pub(crate) type Then = Box<dyn FnOnce(Evaluated, Duration) + Send>;

struct Job {
    engine: Arc<dyn Engine>,
    request: PolicyRequest,
    then: Then,
}

/// What a worker is doing.
enum Phase {
    Idle,
    /// It has yet to begin what it was given then.
    Given(Box<Job>, Instant),
    /// It evaluates.
    Running(Running),
    /// It tells what came of it.
    Telling,
    /// It evaluates what nobody waits for any more, since then.
    Abandoned(Instant),
}

struct Running {
    then: Then,
    given: Instant,
    /// The thread's CPU time when it began.
    began: Duration,
}

struct Worker {
    phase: Phase,
    /// Whose evaluation it is at, where it is not idle.
    caller: Arc<str>,
    /// Tells the CPU time of its thread, where the clock can.
    cpu: Option<ThreadCpu>,
}

/// A job whose turn has not come.
struct Waiting {
    caller: Arc<str>,
    job: Box<Job>,
    since: Instant,
}

/// What somebody has to be told: not under the lock.
type Told = (Then, Evaluated, Duration);

#[derive(Default)]
struct State {
    workers: Vec<Worker>,
    /// In the order in which they came. As long as their callers are: the doors bound them.
    waiting: VecDeque<Waiting>,
    /// Whether a thread looks at what runs, and whether it is awake.
    has_watch: bool,
    is_watched: bool,
    /// What the watch has taken out and is telling.
    telling: usize,
    closed: bool,
}

impl State {
    fn abandoned(&self) -> usize {
        self.workers
            .iter()
            .filter(|worker| matches!(worker.phase, Phase::Abandoned(_)))
            .count()
    }

    /// How many workers are at what `caller` asked.
    fn held_by(&self, caller: &str) -> usize {
        self.workers
            .iter()
            .filter(|worker| !matches!(worker.phase, Phase::Idle) && *worker.caller == *caller)
            .count()
    }

    /// Whether all that `caller` could wait for are evaluations that did not end in the time that it
    /// would wait.
    fn is_hopeless(&self, caller: &str, wait: Duration) -> bool {
        let endless = |worker: &&Worker| match worker.phase {
            Phase::Abandoned(since) => since.elapsed() >= wait,
            _ => false,
        };
        let all = self.workers.iter().filter(endless);
        let (all, own) = (
            all.clone().count(),
            all.filter(|w| *w.caller == *caller).count(),
        );
        all == ENGINE_WORKERS || own >= ENGINE_WORKERS_PER_CALLER
    }

    /// Gives an idle worker the first of what waits for those who hold the fewest.
    fn pass_on(&mut self, signals: &[Condvar]) {
        while let Some(number) = self.idle() {
            let mut next = None;
            for (at, one) in self.waiting.iter().enumerate() {
                let held = self.held_by(&one.caller);
                if held < next.map_or(ENGINE_WORKERS_PER_CALLER, |(least, _)| least) {
                    next = Some((held, at));
                }
                // Nobody holds fewer.
                if held == 0 {
                    break;
                }
            }
            let Some(one) = next.and_then(|(_, at)| self.waiting.remove(at)) else {
                return;
            };
            self.give(number, one.caller, one.job);
            if let Some(given) = signals.get(number) {
                given.notify_one();
            }
        }
    }

    fn idle(&self) -> Option<usize> {
        self.workers
            .iter()
            .position(|worker| matches!(worker.phase, Phase::Idle))
    }

    fn give(&mut self, number: usize, caller: Arc<str>, job: Box<Job>) {
        if let Some(worker) = self.workers.get_mut(number) {
            // What it waited for a worker is not the evaluation's.
            worker.phase = Phase::Given(job, Instant::now());
            worker.caller = caller;
        }
    }

    fn set_phase(&mut self, number: usize, phase: Phase) {
        if let Some(worker) = self.workers.get_mut(number) {
            worker.phase = phase;
        }
    }

    fn is_at_rest(&self) -> bool {
        let is_idle = |worker: &Worker| matches!(worker.phase, Phase::Idle | Phase::Abandoned(_));
        self.waiting.is_empty() && self.workers.iter().all(is_idle)
    }

    /// Takes out what is over: what its worker has had its budget for or never began, and what has
    /// waited its time for a worker.
    fn take_overdue(&mut self, budget: Duration, wait: Duration) -> Vec<Told> {
        let mut told = Vec::new();
        for worker in &mut self.workers {
            match &worker.phase {
                Phase::Given(_, given) if given.elapsed() >= wait => {}
                Phase::Running(running) if worker.is_over(running, budget, wait) => {}
                _ => continue,
            }
            match std::mem::replace(&mut worker.phase, Phase::Idle) {
                // It never began: its worker was not scheduled in all this time.
                Phase::Given(job, _) => {
                    let late = Evaluated::Late { abandoned: false };
                    told.push((job.then, late, Duration::ZERO));
                }
                Phase::Running(running) => {
                    let took = worker.spent(&running);
                    worker.phase = Phase::Abandoned(Instant::now());
                    let late = Evaluated::Late { abandoned: true };
                    told.push((running.then, late, took));
                }
                other => worker.phase = other,
            }
        }
        // The oldest are in front. A few at a time: what runs is looked at again before the next ones.
        while told.len() < TOLD_AT_ONCE
            && let Some(one) = self.waiting.front()
            && one.since.elapsed() >= wait
            && let Some(one) = self.waiting.pop_front()
        {
            told.push((one.job.then, Evaluated::Exhausted, Duration::ZERO));
        }
        told
    }
}

impl Worker {
    /// Whether the evaluation has had its budget. A thread whose CPU time cannot be read from
    /// outside has until the end of the wait.
    fn is_over(&self, running: &Running, budget: Duration, wait: Duration) -> bool {
        let waited = running.given.elapsed();
        if waited < budget || waited >= wait {
            return waited >= wait;
        }
        let cpu = self.cpu.as_ref().and_then(|cpu| cpu());
        cpu.is_some_and(|now| now.saturating_sub(running.began) > budget)
    }

    /// The CPU time that an evaluation has had; all that was waited for it where that cannot be read.
    fn spent(&self, running: &Running) -> Duration {
        let cpu = self.cpu.as_ref().and_then(|cpu| cpu());
        cpu.map_or_else(
            || running.given.elapsed(),
            |now| now.saturating_sub(running.began),
        )
    }
}

struct Shared {
    clock: Arc<dyn Clock>,
    budget: Duration,
    wait: Duration,
    state: Mutex<State>,
    /// Tells a worker that it was given something.
    given: [Condvar; ENGINE_WORKERS],
    /// Tells the watch that there is something to watch.
    begun: Condvar,
    /// Whose callers have no answer: what went on after their evaluations panicked.
    lost: AtomicU64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No foreign code runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what came of an evaluation that has ended by itself.
    fn result(&self, ended: Option<Evaluation>, took: Duration, given: Instant) -> Evaluated {
        match ended {
            _ if given.elapsed() >= self.wait => Evaluated::Late { abandoned: false },
            None => Evaluated::Panicked,
            Some(_) if took > self.budget => Evaluated::Late { abandoned: false },
            Some(evaluation) => Evaluated::Done(evaluation),
        }
    }
}

/// The workers. Made empty; a thread starts when it is first needed.
pub(crate) struct Engines {
    shared: Arc<Shared>,
}

impl Engines {
    pub(crate) fn new(clock: Arc<dyn Clock>, budget: Duration, wait: Duration) -> Self {
        Self {
            shared: Arc::new(Shared {
                clock,
                budget,
                wait,
                state: Mutex::default(),
                given: Default::default(),
                begun: Condvar::new(),
                lost: AtomicU64::new(0),
            }),
        }
    }

    /// Whether an evaluation that took so much had all that it may have.
    pub(crate) fn is_over_budget(&self, took: Duration) -> bool {
        took > self.shared.budget
    }

    /// How many workers are at an evaluation that nobody waits for.
    pub(crate) fn abandoned(&self) -> usize {
        self.shared.state().abandoned()
    }

    /// How many were left without an answer by a panic in what went on after their evaluation.
    pub(crate) fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }

    /// How many evaluations somebody waits for, those that wait for a worker too.
    pub(crate) fn under_way(&self) -> usize {
        let state = self.shared.state();
        let is_at_it =
            |worker: &&Worker| !matches!(worker.phase, Phase::Idle | Phase::Abandoned(_));
        state.workers.iter().filter(is_at_it).count() + state.waiting.len() + state.telling
    }

    /// Judges one request of `caller` and waits for what comes of it: within the wait for a worker and
    /// the wait for the engine, whatever the engine does. Not for a worker's own thread.
    pub(crate) fn evaluate(
        &self,
        engine: Arc<dyn Engine>,
        request: PolicyRequest,
        caller: &Arc<str>,
    ) -> (Evaluated, Duration) {
        let (sender, receiver) = mpsc::sync_channel(1);
        let then = move |evaluated, took| {
            // The receiver waits.
            let _ = sender.send((evaluated, took));
        };
        self.submit(engine, request, caller, Box::new(then));
        // Longer than both waits: this is for when the watch itself is held up.
        let heard = receiver.recv_timeout(self.shared.wait.saturating_mul(2) + SLACK);
        heard.unwrap_or((Evaluated::Exhausted, Duration::ZERO))
    }

    /// Hands over one request of `caller`, and goes on in `then` within the wait for a worker and the wait
    /// for the engine, whatever the engine does.
    pub(crate) fn submit(
        &self,
        engine: Arc<dyn Engine>,
        request: PolicyRequest,
        caller: &Arc<str>,
        then: Then,
    ) {
        let shared = &self.shared;
        let job = Box::new(Job {
            engine,
            request,
            then,
        });
        let mut state = shared.state();
        // What nobody watches could go on for ever.
        let is_watched = self.watch(&mut state);
        // Nobody who could have an idle worker waits: see `pass_on`.
        let number = match state.held_by(caller) < ENGINE_WORKERS_PER_CALLER {
            true if is_watched => state.idle().or_else(|| self.start_worker(&mut state)),
            _ => None,
        };
        if let Some(number) = number {
            state.give(number, Arc::clone(caller), job);
            drop(state);
            if let Some(given) = shared.given.get(number) {
                given.notify_one();
            }
            return;
        }
        if !is_watched || state.workers.is_empty() || state.is_hopeless(caller, shared.wait) {
            drop(state);
            return (job.then)(Evaluated::Exhausted, Duration::ZERO);
        }
        state.waiting.push_back(Waiting {
            caller: Arc::clone(caller),
            job,
            since: Instant::now(),
        });
    }

    /// Sees to it that somebody looks at what runs.
    fn watch(&self, state: &mut State) -> bool {
        if !state.has_watch {
            let shared = Arc::clone(&self.shared);
            let started = std::thread::Builder::new()
                .name("engine-watch".to_owned())
                .spawn(move || watch(&shared));
            if let Err(error) = started {
                tracing::error!(%error, "no thread to watch the engines, actions are denied");
                return false;
            }
            state.has_watch = true;
            state.is_watched = true;
        }
        if !state.is_watched {
            state.is_watched = true;
            self.shared.begun.notify_one();
        }
        true
    }

    /// A worker more, where there may be one and its thread can be had.
    fn start_worker(&self, state: &mut State) -> Option<usize> {
        let number = state.workers.len();
        if number >= ENGINE_WORKERS {
            return None;
        }
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new()
            .name(format!("engine-{number}"))
            .stack_size(ENGINE_STACK_BYTES)
            .spawn(move || work(&shared, number));
        match started {
            Ok(_) => {
                state.workers.push(Worker {
                    phase: Phase::Idle,
                    caller: Arc::from(""),
                    cpu: None,
                });
                Some(number)
            }
            // Those that there are may come free.
            Err(error) if number > 0 => {
                tracing::warn!(%error, "no further engine thread");
                None
            }
            Err(error) => {
                tracing::error!(%error, "no engine thread, actions are denied");
                None
            }
        }
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.closed = true;
        // Nobody is told: whoever waited sees it in that its `then` is gone.
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        drop(waiting);
        for given in &self.shared.given {
            given.notify_all();
        }
        self.shared.begun.notify_all();
    }
}

/// Tells what came of an evaluation. A fault in what goes on from here costs its caller the answer, and
/// nobody the thread.
fn tell(shared: &Shared, (then, evaluated, took): Told) {
    if catch_unwind(AssertUnwindSafe(move || then(evaluated, took))).is_err() {
        shared.lost.fetch_add(1, Ordering::Relaxed);
        tracing::error!("what goes on after an evaluation panicked; its caller has no answer");
    }
}

/// The life of the thread that looks at what runs. It looks often while anything does, and sleeps
/// without a timer when nothing has for a while.
fn watch(shared: &Shared) {
    let look_every = shared
        .budget
        .min(shared.wait / 4)
        .clamp(Duration::from_millis(1), LOOK_EVERY_AT_MOST);
    let mut nothing: u32 = 0;
    let mut state = shared.state();
    while !state.closed {
        let told = state.take_overdue(shared.budget, shared.wait);
        if !told.is_empty() {
            state.telling = told.len();
            state.pass_on(&shared.given);
            drop(state);
            told.into_iter().for_each(|one| tell(shared, one));
            state = shared.state();
            state.telling = 0;
            continue;
        }
        nothing = match state.is_at_rest() {
            true => nothing + 1,
            false => 0,
        };
        state = if nothing > LOOKS_AT_NOTHING {
            nothing = 0;
            state.is_watched = false;
            let woken = shared.begun.wait(state);
            woken.unwrap_or_else(PoisonError::into_inner)
        } else {
            let woken = shared.begun.wait_timeout(state, look_every);
            woken.unwrap_or_else(PoisonError::into_inner).0
        };
    }
}

/// The life of one worker.
fn work(shared: &Shared, number: usize) {
    let cpu = shared.clock.thread_cpu_from_outside();
    let Some(given) = shared.given.get(number) else {
        return;
    };
    let mut state = shared.state();
    if let Some(worker) = state.workers.get_mut(number) {
        worker.cpu = cpu;
    }
    loop {
        let began = shared.clock.thread_cpu();
        let Some(worker) = state.workers.get_mut(number) else {
            return;
        };
        if !matches!(worker.phase, Phase::Given(..)) {
            if state.closed {
                return;
            }
            let woken = given.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let Phase::Given(job, at) = std::mem::replace(&mut worker.phase, Phase::Idle) else {
            return;
        };
        let Job {
            engine,
            request,
            then,
        } = *job;
        worker.phase = Phase::Running(Running {
            then,
            given: at,
            began,
        });
        drop(state);
        // Both are dropped inside, before anybody is told: the last reference to a bundle may be this one.
        let evaluation = catch_unwind(AssertUnwindSafe(move || engine.evaluate(&request))).ok();
        let took = shared.clock.thread_cpu().saturating_sub(began);
        state = shared.state();
        let Some(worker) = state.workers.get_mut(number) else {
            return;
        };
        if let Phase::Running(running) = std::mem::replace(&mut worker.phase, Phase::Telling) {
            drop(state);
            let evaluated = shared.result(evaluation, took, running.given);
            tell(shared, (running.then, evaluated, took));
            state = shared.state();
        }
        state.set_phase(number, Phase::Idle);
        state.pass_on(&shared.given);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use serde_json::{Map, Value};
    use tidelock_policy::{Verdict, testing::ScriptedEngine};

    use super::*;
    use crate::{limits::ENGINE_WAIT, testing::TestClock};

    const BUDGET: Duration = Duration::from_millis(5);

    fn request(action: &str) -> PolicyRequest {
        PolicyRequest {
            principal_type: "Agent".into(),
            principal_id: "a".into(),
            action: action.into(),
            resource_type: "File".into(),
            resource_id: "/a".into(),
            resource_attributes: Map::new(),
            params: Value::Null,
            context: Value::Null,
        }
    }

    fn permit(by: &str) -> Evaluation {
        Evaluation {
            verdict: Verdict::Permit,
            policies: vec![by.to_owned()],
            errors: Vec::new(),
        }
    }

    /// An engine that does not end while the gate is shut, and tells how many are in it.
    struct Gate {
        shut: Mutex<bool>,
        opened: Condvar,
        inside: AtomicUsize,
    }

    impl Gate {
        fn shut() -> Arc<Self> {
            Arc::new(Self {
                shut: Mutex::new(true),
                opened: Condvar::new(),
                inside: AtomicUsize::new(0),
            })
        }

        fn open(&self) {
            *self.shut.lock().unwrap() = false;
            self.opened.notify_all();
        }

        fn engine(self: &Arc<Self>) -> Arc<dyn Engine> {
            let gate = Arc::clone(self);
            Arc::new(ScriptedEngine::new(move |_| {
                gate.inside.fetch_add(1, Ordering::SeqCst);
                let mut shut = gate.shut.lock().unwrap();
                while *shut {
                    shut = gate.opened.wait(shut).unwrap();
                }
                drop(shut);
                gate.inside.fetch_sub(1, Ordering::SeqCst);
                permit("gate")
            }))
        }
    }

    fn caller(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    fn quick() -> Arc<dyn Engine> {
        Arc::new(ScriptedEngine::new(|request| permit(&request.action)))
    }

    fn engines() -> Engines {
        Engines::new(TestClock::new(0), BUDGET, ENGINE_WAIT)
    }

    /// A quick evaluation, asked again where the machine was too busy for it.
    fn served(engines: &Engines) -> bool {
        let (evaluated, _) = engines.evaluate(quick(), request("quick"), &caller("quick"));
        evaluated == Evaluated::Done(permit("quick"))
    }

    fn eventually(what: &str, reached: impl Fn() -> bool) {
        let begun = Instant::now();
        while !reached() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn many_callers_each_get_their_own_answer() {
        let (engines, engine) = (engines(), quick());
        std::thread::scope(|scope| {
            for number in 0..16 {
                let (engines, engine) = (&engines, &engine);
                let me = caller(&(number % 5).to_string());
                scope.spawn(move || {
                    for turn in 0..200 {
                        let action = format!("{number}-{turn}");
                        let (evaluated, _) =
                            engines.evaluate(Arc::clone(engine), request(&action), &me);
                        // A machine too busy for a thread to run in time denies, and says so.
                        assert!(
                            evaluated == Evaluated::Done(permit(&action))
                                || matches!(
                                    evaluated,
                                    Evaluated::Late { .. } | Evaluated::Exhausted
                                ),
                            "{evaluated:?}"
                        );
                    }
                });
            }
        });
        let state = engines.shared.state();
        assert!(state.workers.len() <= ENGINE_WORKERS);
        assert!(state.waiting.is_empty());
        assert!(state.workers.iter().all(|w| matches!(w.phase, Phase::Idle)));
    }

    /// INV-07: what an engine without an end can hold is bounded, and it comes back.
    #[test]
    fn inv_07_engines_without_an_end_hold_a_bounded_number_of_threads() {
        let (engines, gate) = (engines(), Gate::shut());
        let late = Evaluated::Late { abandoned: true };
        for number in 1..=ENGINE_WORKERS {
            // The control: as long as a worker is left, it serves.
            eventually("a worker that is left serves", || served(&engines));
            let hangs = caller(&number.to_string());
            let (evaluated, _) = engines.evaluate(gate.engine(), request("hangs"), &hangs);
            assert_eq!(evaluated, late);
            eventually("only what hangs is held", || engines.abandoned() == number);
        }
        // The first denials wait in vain; once it is clear that nothing ends, none does.
        assert!(!served(&engines));
        let begun = Instant::now();
        for _ in 0..1_000 {
            let (evaluated, _) = engines.evaluate(quick(), request("quick"), &caller("quick"));
            assert_eq!(evaluated, Evaluated::Exhausted);
        }
        assert!(
            begun.elapsed() < ENGINE_WAIT * 100,
            "a denial for want of a thread does not wait"
        );
        assert_eq!(gate.inside.load(Ordering::SeqCst), ENGINE_WORKERS);

        gate.open();
        eventually("the workers come back", || engines.abandoned() == 0);
        eventually("they serve again", || served(&engines));
    }

    /// INV-10: what one caller asks for without an end costs the others nothing.
    #[test]
    fn inv_10_a_caller_whose_evaluations_do_not_end_leaves_the_engines_to_others() {
        let (engines, gate) = (engines(), Gate::shut());
        let evaluated: Vec<Evaluated> = std::thread::scope(|scope| {
            let asked: Vec<_> = (0..3 * ENGINE_WORKERS)
                .map(|_| {
                    let (engines, gate) = (&engines, &gate);
                    scope.spawn(move || {
                        let hangs = caller("hangs");
                        engines.evaluate(gate.engine(), request("hangs"), &hangs).0
                    })
                })
                .collect();
            asked.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let count = |what: &Evaluated| evaluated.iter().filter(|one| *one == what).count();
        let given_up = Evaluated::Late { abandoned: true };
        assert_eq!(count(&given_up), ENGINE_WORKERS_PER_CALLER, "{evaluated:?}");
        // On a busy machine a worker may not have begun in time.
        let rest = count(&Evaluated::Exhausted) + count(&Evaluated::Late { abandoned: false });
        assert_eq!(
            rest,
            evaluated.len() - ENGINE_WORKERS_PER_CALLER,
            "{evaluated:?}"
        );
        assert_eq!(
            gate.inside.load(Ordering::SeqCst),
            ENGINE_WORKERS_PER_CALLER
        );
        for _ in 0..100 {
            eventually("the others are served", || served(&engines));
        }
        gate.open();
        eventually("the workers come back", || engines.abandoned() == 0);
        eventually("they serve this caller again", || {
            let said = engines.evaluate(quick(), request("quick"), &caller("hangs"));
            said.0 == Evaluated::Done(permit("quick"))
        });
    }

    /// Who finds all workers taken has the first one that comes free, though others asked before
    /// who have their share.
    #[test]
    fn who_waits_has_the_first_worker_that_it_may_have() {
        let engines = Engines::new(TestClock::new(0), BUDGET, Duration::from_secs(60));
        let gates = [Gate::shut(), Gate::shut()];
        std::thread::scope(|scope| {
            let ask = |engine: Arc<dyn Engine>, name: &'static str| {
                let engines = &engines;
                scope.spawn(move || engines.evaluate(engine, request("quick"), &caller(name)).0)
            };
            let inside = |gate: &Arc<Gate>, count: usize| {
                eventually("they are in it", || {
                    gate.inside.load(Ordering::SeqCst) == count
                });
            };
            let waiting = |count: usize| {
                eventually("they wait", || {
                    engines.shared.state().waiting.len() == count
                });
            };
            let share = ENGINE_WORKERS_PER_CALLER;
            let a: Vec<_> = (0..share).map(|_| ask(gates[0].engine(), "a")).collect();
            inside(&gates[0], share);
            let b: Vec<_> = (share..ENGINE_WORKERS)
                .map(|_| ask(gates[1].engine(), "b"))
                .collect();
            inside(&gates[1], ENGINE_WORKERS - share);
            let more_of_a = ask(quick(), "a");
            waiting(1);
            let c = ask(quick(), "c");
            waiting(2);
            gates[1].open();
            assert_eq!(c.join().unwrap(), Evaluated::Done(permit("quick")));
            for one in b {
                assert_eq!(one.join().unwrap(), Evaluated::Done(permit("gate")));
            }
            waiting(1);
            gates[0].open();
            assert_eq!(more_of_a.join().unwrap(), Evaluated::Done(permit("quick")));
            for one in a {
                assert_eq!(one.join().unwrap(), Evaluated::Done(permit("gate")));
            }
        });
    }

    #[test]
    fn a_panic_ends_the_evaluation_and_not_the_worker() {
        let engines = engines();
        let engine: Arc<dyn Engine> = Arc::new(ScriptedEngine::new(|request| {
            assert_ne!(request.action, "panics", "scripted");
            permit("quick")
        }));
        for _ in 0..3 * ENGINE_WORKERS {
            for (action, expected) in [
                ("panics", Evaluated::Panicked),
                ("quick", Evaluated::Done(permit("quick"))),
            ] {
                eventually(action, || {
                    engines
                        .evaluate(Arc::clone(&engine), request(action), &caller("a"))
                        .0
                        == expected
                });
            }
        }
        eventually("no worker is lost", || engines.abandoned() == 0);
    }

    #[test]
    fn a_panic_in_what_follows_is_counted_and_takes_no_worker() {
        let (engines, asked) = (engines(), caller("a"));
        for number in 1..=2 * ENGINE_WORKERS as u64 {
            let then: Then = Box::new(|_, _| panic!("on purpose"));
            engines.submit(quick(), request("a"), &asked, then);
            eventually("it is counted", || engines.lost() == number);
        }
        // The control.
        eventually("the others are served", || served(&engines));
        assert_eq!(engines.lost(), 2 * ENGINE_WORKERS as u64);
    }

    /// A clock whose threads have the CPU time that the test says.
    struct Metered(Arc<AtomicU64>);

    impl Clock for Metered {
        fn now(&self) -> Duration {
            Duration::ZERO
        }

        fn unix_ms(&self) -> u64 {
            0
        }

        fn thread_cpu(&self) -> Duration {
            Duration::from_micros(self.0.load(Ordering::SeqCst))
        }

        fn thread_cpu_from_outside(&self) -> Option<ThreadCpu> {
            let micros = Arc::clone(&self.0);
            Some(Box::new(move || {
                Some(Duration::from_micros(micros.load(Ordering::SeqCst)))
            }))
        }
    }

    #[test]
    fn the_budget_is_enforced_from_outside_while_the_engine_runs() {
        let micros = Arc::new(AtomicU64::new(0));
        let engines = Engines::new(
            Arc::new(Metered(Arc::clone(&micros))),
            BUDGET,
            Duration::from_secs(60),
        );
        let stop = Arc::new(AtomicBool::new(false));
        let spins = |spent_us: u64| -> Arc<dyn Engine> {
            let (micros, stop) = (Arc::clone(&micros), Arc::clone(&stop));
            Arc::new(ScriptedEngine::new(move |_| {
                micros.fetch_add(spent_us, Ordering::SeqCst);
                while spent_us > 5_000 && !stop.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                permit("spins")
            }))
        };
        // The control: the whole budget may be spent.
        eventually("within the budget", || {
            engines.evaluate(spins(5_000), request("a"), &caller("a"))
                == (Evaluated::Done(permit("spins")), BUDGET)
        });
        let (evaluated, _) = engines.evaluate(spins(5_001), request("a"), &caller("a"));
        assert_eq!(evaluated, Evaluated::Late { abandoned: true });
        stop.store(true, Ordering::SeqCst);
        eventually("the worker comes back", || engines.abandoned() == 0);
        // Too much, though it ended: what it says is not used either.
        let (evaluated, _) = engines.evaluate(spins(5_001), request("a"), &caller("a"));
        assert!(matches!(evaluated, Evaluated::Late { .. }));
    }

    #[test]
    fn dropping_the_engines_ends_their_threads() {
        let engines = engines();
        eventually("it serves", || served(&engines));
        let shared = Arc::downgrade(&engines.shared);
        drop(engines);
        eventually("the threads end", || shared.strong_count() == 0);
    }
}
