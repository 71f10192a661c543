//! Evaluations under a deadline that an engine cannot get round.
//!
//! An engine runs on a worker thread, and the caller waits for it outside. Two things end the wait
//! without the engine's consent: its thread has used up the budget of CPU time, or, however little
//! it ran, the wait has taken its limit, `ENGINE_WAIT` by default. The evaluation is then abandoned: it is denied, its
//! answer will not be looked at, and its worker is busy until it ends by itself, since nothing can
//! end a thread. There are [`ENGINE_WORKERS`] workers and no more; when all of them are abandoned
//! everything is denied at once, and the first one that ends is used again.
//!
//! The budget is CPU time because a thread that was merely not scheduled is late, not expensive.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tidelock_policy::{Engine, Evaluation, PolicyRequest};

use crate::{
    clock::{Clock, ThreadCpu},
    limits::{ENGINE_STACK_BYTES, ENGINE_WORKERS},
};

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
    /// Every worker is at an abandoned evaluation, or none could be started.
    Exhausted,
}

struct Job {
    engine: Arc<dyn Engine>,
    request: PolicyRequest,
}

/// What a worker is doing.
enum Phase {
    Idle,
    /// Its caller waits, and it has not begun.
    Given(Box<Job>),
    /// Its caller waits; the thread's CPU time when it began.
    Running(Duration),
    /// Its caller has yet to take the result; with the CPU time that it took. `None`: it panicked.
    Ended(Option<Evaluation>, Duration),
    /// Nobody waits any more.
    Abandoned,
}

struct Worker {
    phase: Phase,
    /// Tells the CPU time of its thread, where the clock can.
    cpu: Option<ThreadCpu>,
}

#[derive(Default)]
struct State {
    workers: Vec<Worker>,
    /// Callers that wait for a worker.
    waiting: usize,
    closed: bool,
}

impl State {
    fn phase(&mut self, number: usize) -> Option<&mut Phase> {
        self.workers.get_mut(number).map(|worker| &mut worker.phase)
    }

    fn abandoned(&self) -> usize {
        self.workers
            .iter()
            .filter(|worker| matches!(worker.phase, Phase::Abandoned))
            .count()
    }
}

/// How the two sides of one worker wake each other.
#[derive(Default)]
struct Signals {
    given: Condvar,
    ended: Condvar,
}

struct Shared {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// A worker became idle.
    freed: Condvar,
    signals: [Signals; ENGINE_WORKERS],
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No foreign code runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The workers. Made empty; a thread starts when it is first needed.
pub(crate) struct Engines {
    shared: Arc<Shared>,
    budget: Duration,
    wait: Duration,
}

impl Engines {
    pub(crate) fn new(clock: Arc<dyn Clock>, budget: Duration, wait: Duration) -> Self {
        Self {
            shared: Arc::new(Shared {
                clock,
                state: Mutex::default(),
                freed: Condvar::new(),
                signals: Default::default(),
            }),
            budget,
            wait,
        }
    }

    /// How many workers are at an evaluation that nobody waits for.
    pub(crate) fn abandoned(&self) -> usize {
        self.shared.state().abandoned()
    }

    /// Judges one request; with the CPU time that it took, as far as that is known. Returns within
    /// the wait for a worker and the wait for the engine, whatever the engine does.
    pub(crate) fn evaluate(
        &self,
        engine: Arc<dyn Engine>,
        request: PolicyRequest,
    ) -> (Evaluated, Duration) {
        // The bound is of real time, as the waits are, whatever clock the rest runs on.
        let came = Instant::now();
        let mut state = self.shared.state();
        let number = loop {
            match self.free_worker(&mut state) {
                Ok(Some(number)) => break number,
                Ok(None) => {}
                Err(evaluated) => return (evaluated, Duration::ZERO),
            }
            let left = self.wait.saturating_sub(came.elapsed());
            if left.is_zero() {
                return (Evaluated::Late { abandoned: false }, Duration::ZERO);
            }
            state.waiting += 1;
            let (woken, _) = self
                .shared
                .freed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.waiting -= 1;
        };
        let Some(signals) = self.shared.signals.get(number) else {
            return (Evaluated::Exhausted, Duration::ZERO);
        };
        if let Some(phase) = state.phase(number) {
            *phase = Phase::Given(Box::new(Job { engine, request }));
        }
        drop(state);
        signals.given.notify_one();

        // What it waited for a worker is not the evaluation's.
        let given = Instant::now();
        let mut state = self.shared.state();
        loop {
            let waited = given.elapsed();
            if let Some(phase @ Phase::Ended(..)) = state.phase(number) {
                let ended = std::mem::replace(phase, Phase::Idle);
                self.pass_on(state);
                if waited >= self.wait {
                    return (Evaluated::Late { abandoned: false }, self.budget);
                }
                return self.result(ended);
            }
            if self.is_over(&mut state, number, waited) {
                return (self.abandon(state, number), self.budget);
            }
            let left = self.wait.saturating_sub(waited);
            let (woken, _) = signals
                .ended
                .wait_timeout(state, self.budget.min(left))
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
    }

    /// An idle worker, a new one, or none for the moment.
    fn free_worker(&self, state: &mut State) -> Result<Option<usize>, Evaluated> {
        let idle = state
            .workers
            .iter()
            .position(|worker| matches!(worker.phase, Phase::Idle));
        if idle.is_some() {
            return Ok(idle);
        }
        let number = state.workers.len();
        if number < ENGINE_WORKERS {
            let shared = Arc::clone(&self.shared);
            let started = std::thread::Builder::new()
                .name(format!("engine-{number}"))
                .stack_size(ENGINE_STACK_BYTES)
                .spawn(move || work(&shared, number));
            match started {
                Ok(_) => {
                    state.workers.push(Worker {
                        phase: Phase::Idle,
                        cpu: None,
                    });
                    return Ok(Some(number));
                }
                // Those that there are may come free.
                Err(error) if number > 0 => tracing::warn!(%error, "no further engine thread"),
                Err(error) => {
                    tracing::error!(%error, "no engine thread, actions are denied");
                    return Err(Evaluated::Exhausted);
                }
            }
        }
        if state.abandoned() == state.workers.len() {
            return Err(Evaluated::Exhausted);
        }
        Ok(None)
    }

    /// Whether the evaluation has had its budget. A thread whose CPU time cannot be read from
    /// outside has until the end of the wait.
    fn is_over(&self, state: &mut State, number: usize, waited: Duration) -> bool {
        if waited >= self.wait {
            return true;
        }
        if waited < self.budget {
            return false;
        }
        let Some(worker) = state.workers.get(number) else {
            return true;
        };
        match (&worker.phase, &worker.cpu) {
            (Phase::Running(began), Some(cpu)) => {
                cpu().is_some_and(|now| now.saturating_sub(*began) > self.budget)
            }
            _ => false,
        }
    }

    fn abandon(&self, mut state: MutexGuard<'_, State>, number: usize) -> Evaluated {
        let abandoned = match state.phase(number) {
            // It never began: its worker was not scheduled in all this time.
            Some(phase @ Phase::Given(_)) => {
                *phase = Phase::Idle;
                false
            }
            Some(phase) => {
                *phase = Phase::Abandoned;
                true
            }
            None => false,
        };
        if !abandoned {
            self.pass_on(state);
        } else if state.abandoned() == state.workers.len() {
            // Those who wait for a worker wait in vain.
            drop(state);
            self.shared.freed.notify_all();
        }
        Evaluated::Late { abandoned }
    }

    fn result(&self, ended: Phase) -> (Evaluated, Duration) {
        match ended {
            Phase::Ended(None, took) => (Evaluated::Panicked, took),
            Phase::Ended(_, took) if took > self.budget => {
                (Evaluated::Late { abandoned: false }, took)
            }
            Phase::Ended(Some(evaluation), took) => (Evaluated::Done(evaluation), took),
            _ => (Evaluated::Late { abandoned: false }, Duration::ZERO),
        }
    }

    /// Lets the next caller have the worker.
    fn pass_on(&self, state: MutexGuard<'_, State>) {
        let somebody_waits = state.waiting > 0;
        drop(state);
        if somebody_waits {
            self.shared.freed.notify_one();
        }
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        for signals in &self.shared.signals {
            signals.given.notify_all();
        }
    }
}

/// The life of one worker.
fn work(shared: &Shared, number: usize) {
    let cpu = shared.clock.thread_cpu_from_outside();
    let Some(signals) = shared.signals.get(number) else {
        return;
    };
    let mut state = shared.state();
    if let Some(worker) = state.workers.get_mut(number) {
        worker.cpu = cpu;
    }
    loop {
        let began = shared.clock.thread_cpu();
        let Some(phase) = state.phase(number) else {
            return;
        };
        if !matches!(phase, Phase::Given(_)) {
            if state.closed {
                return;
            }
            state = signals
                .given
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let Phase::Given(job) = std::mem::replace(phase, Phase::Running(began)) else {
            return;
        };
        drop(state);
        let Job { engine, request } = *job;
        // Both are dropped inside, before anybody is told: the last reference to a bundle may be this one.
        let evaluation = catch_unwind(AssertUnwindSafe(move || engine.evaluate(&request))).ok();
        let took = shared.clock.thread_cpu().saturating_sub(began);
        state = shared.state();
        let Some(phase) = state.phase(number) else {
            return;
        };
        if matches!(phase, Phase::Abandoned) {
            *phase = Phase::Idle;
            let somebody_waits = state.waiting > 0;
            drop(state);
            if somebody_waits {
                shared.freed.notify_one();
            }
        } else {
            *phase = Phase::Ended(evaluation, took);
            drop(state);
            signals.ended.notify_one();
        }
        state = shared.state();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
            mpsc,
        },
        time::Instant,
    };

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

    fn quick() -> Arc<dyn Engine> {
        Arc::new(ScriptedEngine::new(|request| permit(&request.action)))
    }

    fn engines() -> Engines {
        Engines::new(TestClock::new(0), BUDGET, ENGINE_WAIT)
    }

    /// A quick evaluation, asked again where the machine was too busy for it.
    fn served(engines: &Engines) -> bool {
        let (evaluated, _) = engines.evaluate(quick(), request("quick"));
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
            for caller in 0..16 {
                let (engines, engine) = (&engines, &engine);
                scope.spawn(move || {
                    for turn in 0..200 {
                        let action = format!("{caller}-{turn}");
                        let (evaluated, _) = engines.evaluate(Arc::clone(engine), request(&action));
                        // A machine too busy for a thread to run in time denies, and says so.
                        assert!(
                            evaluated == Evaluated::Done(permit(&action))
                                || matches!(evaluated, Evaluated::Late { .. }),
                            "{evaluated:?}"
                        );
                    }
                });
            }
        });
        assert!(engines.shared.state().workers.len() <= ENGINE_WORKERS);
    }

    /// INV-07: what an engine without an end can hold is bounded, and it comes back.
    #[test]
    fn inv_07_engines_without_an_end_hold_a_bounded_number_of_threads() {
        let (engines, gate) = (engines(), Gate::shut());
        let late = Evaluated::Late { abandoned: true };
        for number in 1..=ENGINE_WORKERS {
            // The control: as long as a worker is left, it serves.
            eventually("a worker that is left serves", || served(&engines));
            let (evaluated, _) = engines.evaluate(gate.engine(), request("hangs"));
            assert_eq!(evaluated, late);
            eventually("only what hangs is held", || engines.abandoned() == number);
        }
        let begun = Instant::now();
        for _ in 0..1_000 {
            let (evaluated, _) = engines.evaluate(quick(), request("quick"));
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

    /// Those who wait for a worker are told when the last one is given up.
    #[test]
    fn callers_that_wait_for_a_worker_do_not_wait_for_ever() {
        let (engines, gate) = (engines(), Gate::shut());
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..3 * ENGINE_WORKERS {
                let (engines, gate, sender) = (&engines, &gate, sender.clone());
                scope.spawn(move || {
                    let (evaluated, _) = engines.evaluate(gate.engine(), request("hangs"));
                    sender.send(evaluated).unwrap();
                });
            }
        });
        drop(sender);
        let all: Vec<Evaluated> = receiver.iter().collect();
        let given_up = Evaluated::Late { abandoned: true };
        let held = all.iter().filter(|one| **one == given_up).count();
        assert_eq!(held, ENGINE_WORKERS, "{all:?}");
        for evaluated in all.iter().filter(|one| **one != given_up) {
            assert!(
                matches!(
                    evaluated,
                    Evaluated::Exhausted | Evaluated::Late { abandoned: false }
                ),
                "{evaluated:?}"
            );
        }
        gate.open();
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
                    engines.evaluate(Arc::clone(&engine), request(action)).0 == expected
                });
            }
        }
        eventually("no worker is lost", || engines.abandoned() == 0);
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
            engines.evaluate(spins(5_000), request("a"))
                == (Evaluated::Done(permit("spins")), BUDGET)
        });
        let (evaluated, _) = engines.evaluate(spins(5_001), request("a"));
        assert_eq!(evaluated, Evaluated::Late { abandoned: true });
        stop.store(true, Ordering::SeqCst);
        eventually("the worker comes back", || engines.abandoned() == 0);
        // Too much, though it ended: what it says is not used either.
        let (evaluated, _) = engines.evaluate(spins(5_001), request("a"));
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
