//! Loading in a child process: what a bundle could do to a process, it does to a worker.
//!
//! A compiler is a large program that is given bytes from outside. Signed ones, but an authority can err, and its
//! keys can be stolen: a bundle that overflows the compiler's stack, or never ends, would take every node of a
//! site with it. So the same program, as `tidelock policy-worker`, compiles each bundle first: without
//! privileges, memory, files or time that could harm ([`confine`]), on half the stack that the node has.
//! What the worker passed is a [`Vetted`], and nothing else is loaded by a node.
//!
//! Start reading at [`Vetter::vet`], then `parent.rs` (how a worker is ended), then `confine.rs`.

pub(crate) mod child;
mod confine;
pub(crate) mod limits;
mod parent;
mod proof;
mod solver;
mod wire;

use std::{
    collections::VecDeque,
    fs,
    os::unix::fs::MetadataExt as _,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidelock_policy::{
    BundleError, ContentId, Examined, LoadContext, Package, TrustFile, VerifiedBundle,
    limits::ARCHIVE_BYTES_MAX, vouched,
};

pub(crate) use self::parent::Terms;
pub(crate) use self::proof::{ProofTerms, Prover, prove_policies};
pub(crate) use self::solver::{Solver, version as solver_version};
pub(crate) use self::wire::Confinement;
use self::{
    limits::{FAILED_FOR, PASSED_MAX, REFUSED_FOR, REFUSED_MAX, START_DEADLINE, WAITING_MAX},
    parent::{WorkerError, ask},
    wire::{Answer, Ask, Verdict},
};

/// A package that enough trusted keys signed and a worker passed. Only a [`Vetter`] makes one.
#[derive(Debug)]
pub(crate) struct Vetted(Package);

impl Vetted {
    /// Loads it into this process, every check once more.
    ///
    /// # Errors
    /// What [`VerifiedBundle::load`] finds.
    pub(crate) fn load(
        self,
        trust: &TrustFile,
        context: &LoadContext,
    ) -> Result<VerifiedBundle, BundleError> {
        VerifiedBundle::load(self.0, trust, context)
    }
}

/// Who wants a package examined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum For {
    /// A person: what was refused is tried again.
    Operator,
    /// A peer, a medium or the store: what was refused stays so for a while.
    Peer,
    /// The slots, at start and reload: time is allowed for.
    Slots,
}

/// What has passed under which program, as it is kept over a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeptPasses {
    program: String,
    passed: VecDeque<ContentId>,
}

/// The one worker of a node, and what it has said so far.
#[derive(Debug)]
pub(crate) struct Vetter {
    program: String,
    state: Mutex<State>,
    free: Condvar,
}

#[derive(Debug, Default)]
struct State {
    busy: bool,
    waiting: usize,
    passed: VecDeque<ContentId>,
    refused: VecDeque<Refused>,
    confinement: Option<Confinement>,
    counts: Counts,
}

#[derive(Debug)]
struct Refused {
    content_id: ContentId,
    error: BundleError,
    at: Instant,
    /// How long it stays refused to peers.
    during: Duration,
}

#[derive(Debug, Default, Clone, Copy, Serialize)]
struct Counts {
    passed: u64,
    refused: u64,
    failed: u64,
    remembered: u64,
    busy: u64,
}

impl Vetter {
    /// A vetter that has seen nothing but what this very program passed before.
    pub(crate) fn new(kept: KeptPasses) -> Self {
        let program = program();
        let passed = if kept.program == program {
            kept.passed.into_iter().take(PASSED_MAX).collect()
        } else {
            VecDeque::new()
        };
        Self {
            program,
            state: Mutex::new(State {
                passed,
                ..State::default()
            }),
            free: Condvar::new(),
        }
    }

    /// Judges a package: signatures here, which parse nothing of the archive, then everything else in a worker,
    /// unless it is known what that would say.
    ///
    /// # Errors
    /// The first check that fails, or [`BundleError::Worker`].
    pub(crate) fn vet(
        &self,
        package: Package,
        trust: &TrustFile,
        context: &LoadContext,
        asker: For,
        terms: Terms,
    ) -> Result<Vetted, BundleError> {
        vouched(&package, trust, context)?;
        let content_id = package.content_id();
        let _turn = match self.turn(&content_id, asker, terms)? {
            Some(turn) => turn,
            None => return Ok(Vetted(package)),
        };
        let terms = match asker {
            For::Slots => Terms {
                deadline: terms.deadline.max(START_DEADLINE),
                ..terms
            },
            For::Operator | For::Peer => terms,
        };
        let outcome = run(&examination(context), &package.archive, terms);
        let mut state = self.lock();
        if let Ok(answer) = &outcome {
            state.confinement = Some(answer.confinement.clone());
        }
        match judge(outcome, &content_id) {
            Ok(_) => {
                state.counts.passed += 1;
                state.pass(content_id);
                Ok(Vetted(package))
            }
            Err(error) => {
                if is_failure(error.code()) {
                    state.counts.failed += 1;
                } else {
                    state.counts.refused += 1;
                }
                // That no child could be had says nothing of the bundle.
                if error.code() != "BUNDLE_WORKER_UNAVAILABLE" {
                    state.refuse(content_id, error.clone());
                }
                Err(error)
            }
        }
    }

    /// The turn to run the worker, or nothing for content that has passed.
    fn turn(
        &self,
        content_id: &ContentId,
        asker: For,
        terms: Terms,
    ) -> Result<Option<Turn<'_>>, BundleError> {
        let mut state = self.lock();
        if let Some(known) = state.known(content_id, asker) {
            return known.map(|()| None);
        }
        if state.busy {
            if state.waiting >= WAITING_MAX {
                return Err(state.is_busy());
            }
            state.waiting += 1;
            let (waited, _) = self
                .free
                .wait_timeout_while(state, terms.deadline, |state| state.busy)
                .unwrap_or_else(PoisonError::into_inner);
            state = waited;
            state.waiting -= 1;
            if state.busy {
                return Err(state.is_busy());
            }
            // Whoever had the turn may have brought the same.
            if let Some(known) = state.known(content_id, asker) {
                self.free.notify_one();
                return known.map(|()| None);
            }
        }
        state.busy = true;
        Ok(Some(Turn(self)))
    }

    /// What to keep over a restart.
    pub(crate) fn kept(&self) -> KeptPasses {
        KeptPasses {
            program: self.program.clone(),
            passed: self.lock().passed.clone(),
        }
    }

    /// For `status`.
    pub(crate) fn status(&self, terms: Terms) -> Value {
        let state = self.lock();
        json!({
            "deadline_ms": u64::try_from(terms.deadline.as_millis()).unwrap_or(u64::MAX),
            "memory_bytes": limits::MEMORY_BYTES,
            "confinement": state.confinement,
            "counts": state.counts,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to run the worker; given on when it is dropped.
struct Turn<'v>(&'v Vetter);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().busy = false;
        self.0.free.notify_one();
    }
}

impl State {
    fn known(&mut self, content_id: &ContentId, asker: For) -> Option<Result<(), BundleError>> {
        if self.passed.contains(content_id) {
            return Some(Ok(()));
        }
        if asker != For::Peer {
            return None;
        }
        let refused = self.refused.iter().find(|refused| {
            refused.content_id == *content_id && refused.at.elapsed() < refused.during
        })?;
        self.counts.remembered += 1;
        Some(Err(refused.error.clone()))
    }

    fn pass(&mut self, content_id: ContentId) {
        self.refused
            .retain(|refused| refused.content_id != content_id);
        self.passed.retain(|passed| *passed != content_id);
        while self.passed.len() >= PASSED_MAX {
            self.passed.pop_front();
        }
        self.passed.push_back(content_id);
    }

    fn refuse(&mut self, content_id: ContentId, error: BundleError) {
        let before = self
            .refused
            .iter()
            .position(|refused| refused.content_id == content_id)
            .and_then(|at| self.refused.remove(at));
        // A worker that failed may have been the machine's fault, and soon gets another one; should it be
        // the bundle that ends its workers, they come ever more seldom.
        let during = match before {
            _ if !is_failure(error.code()) => REFUSED_FOR,
            Some(before) => before.during.saturating_mul(2).min(REFUSED_FOR),
            None => FAILED_FOR,
        };
        while self.refused.len() >= REFUSED_MAX {
            self.refused.pop_front();
        }
        self.refused.push_back(Refused {
            content_id,
            error,
            at: Instant::now(),
            during,
        });
    }

    fn is_busy(&mut self) -> BundleError {
        self.counts.busy += 1;
        BundleError::Worker {
            code: "BUNDLE_WORKER_BUSY",
            message: "other bundles are being compiled; offer it again".to_owned(),
        }
    }
}

/// Whether the code says that a worker failed, rather than the bundle before it.
pub(crate) fn is_failure(code: &str) -> bool {
    code.starts_with("BUNDLE_WORKER_")
}

fn examination(context: &LoadContext) -> Ask {
    Ask::Examine {
        domain: context.domain().to_owned(),
        node_version: context.node_version().to_string(),
    }
}

/// Runs one worker; one that could not confine itself is none.
fn run(question: &Ask, archive: &[u8], terms: Terms) -> Result<Answer, WorkerError> {
    let answer = ask(question, archive, terms)?;
    match answer.verdict {
        Verdict::Unconfined(why) => Err(WorkerError::Unavailable(why)),
        _ => Ok(answer),
    }
}

/// What an answer to [`Ask::Examine`] says of this very content.
fn judge(
    outcome: Result<Answer, WorkerError>,
    content_id: &ContentId,
) -> Result<Examined, BundleError> {
    let failed = |error: WorkerError| BundleError::Worker {
        code: error.code(),
        message: error.to_string(),
    };
    match outcome.map_err(failed)?.verdict {
        Verdict::Passed(examined) if examined.content_id == *content_id => Ok(examined),
        Verdict::Refused { code, message } => Err(BundleError::told(&code, &message)
            .unwrap_or_else(|| failed(WorkerError::Answer(format!("`{code}` is no code"))))),
        _ => Err(failed(WorkerError::Answer(
            "it is about something else".to_owned(),
        ))),
    }
}

/// What a foreign archive holds, by a worker's word, for people.
///
/// # Errors
/// Why it cannot be told.
pub(crate) fn inspect(archive: &[u8], terms: Terms) -> Result<Value, BundleError> {
    let failed = |error: WorkerError| BundleError::Worker {
        code: error.code(),
        message: error.to_string(),
    };
    if archive.len() > ARCHIVE_BYTES_MAX {
        return Err(BundleError::Format(format!(
            "the archive is larger than {ARCHIVE_BYTES_MAX} bytes"
        )));
    }
    match run(&Ask::Inspect, archive, terms).map_err(failed)?.verdict {
        Verdict::Inspected(seen) => Ok(seen),
        Verdict::Refused { code, message } => Err(BundleError::told(&code, &message)
            .unwrap_or_else(|| failed(WorkerError::Answer(format!("`{code}` is no code"))))),
        _ => Err(failed(WorkerError::Answer(
            "it is about something else".to_owned(),
        ))),
    }
}

/// How a worker is confined on this machine, by trying.
///
/// # Errors
/// Why there can be none.
pub(crate) fn probe(terms: Terms) -> Result<Confinement, String> {
    let answer = run(&Ask::Probe, &[], terms).map_err(|e| e.to_string())?;
    Ok(answer.confinement)
}

/// Which program this is: what it passed, another one may not. Version, size and time of the file tell a changed
/// program apart without reading it; taking the same one for another costs one worker.
fn program() -> String {
    let file = fs::metadata("/proc/self/exe")
        .map(|meta| format!("{}-{}.{}", meta.len(), meta.mtime(), meta.mtime_nsec()))
        .unwrap_or_default();
    format!("{} {file}", env!("CARGO_PKG_VERSION"))
}

/// The terms of a machine without a config.
impl Default for Terms {
    fn default() -> Self {
        Self {
            deadline: Duration::from_millis(limits::DEADLINE_MS),
            allow_without_seccomp: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> ContentId {
        ContentId::of(&number.to_le_bytes())
    }

    fn error() -> BundleError {
        BundleError::told("BUNDLE_WORKER_CRASHED", "signal: 6").unwrap()
    }

    #[test]
    fn what_killed_a_worker_costs_peers_none_and_an_operator_may_try() {
        let vetter = Vetter::new(KeptPasses::default());
        vetter.lock().refuse(id(1), error());
        let terms = Terms::default();
        let refused = vetter.turn(&id(1), For::Peer, terms);
        assert_eq!(refused.err(), Some(error()));
        assert!(vetter.turn(&id(1), For::Operator, terms).unwrap().is_some());
        // Another content is judged on its own.
        assert!(vetter.turn(&id(2), For::Peer, terms).unwrap().is_some());
        // What passed in the end is refused to nobody.
        vetter.lock().pass(id(1));
        assert!(vetter.turn(&id(1), For::Peer, terms).unwrap().is_none());
    }

    #[test]
    fn a_worker_that_failed_is_held_against_a_bundle_shortly_and_what_it_said_for_long() {
        let vetter = Vetter::new(KeptPasses::default());
        let during = |number| {
            let state = vetter.lock();
            let mut refused = state.refused.iter();
            refused.find(|r| r.content_id == id(number)).unwrap().during
        };
        vetter.lock().refuse(id(1), error());
        assert_eq!(during(1), FAILED_FOR);
        // A bundle that ends each of its workers costs ever fewer of them.
        vetter.lock().refuse(id(1), error());
        assert_eq!(during(1), 2 * FAILED_FOR);
        for _ in 0..40 {
            vetter.lock().refuse(id(1), error());
        }
        assert_eq!(during(1), REFUSED_FOR);
        let said = BundleError::told("BUNDLE_COMPILE", "no").unwrap();
        vetter.lock().refuse(id(2), said);
        assert_eq!(during(2), REFUSED_FOR);
    }

    #[test]
    fn inv_07_passes_and_refusals_are_remembered_up_to_a_bound() {
        let vetter = Vetter::new(KeptPasses::default());
        for number in 0..1_000 {
            vetter.lock().refuse(id(number), error());
            vetter.lock().pass(id(1_000 + number));
        }
        assert_eq!(vetter.lock().refused.len(), REFUSED_MAX);
        assert_eq!(vetter.kept().passed.len(), PASSED_MAX);
        assert!(vetter.lock().passed.contains(&id(1_999)));
    }

    #[test]
    fn inv_07_one_worker_runs_and_few_wait() {
        let vetter = Vetter::new(KeptPasses::default());
        let terms = Terms {
            deadline: Duration::from_millis(50),
            ..Terms::default()
        };
        let turn = vetter.turn(&id(1), For::Peer, terms).unwrap();
        let busy = vetter.turn(&id(2), For::Peer, terms).err().unwrap();
        assert_eq!(busy.code(), "BUNDLE_WORKER_BUSY");
        vetter.lock().waiting = WAITING_MAX;
        let busy = vetter.turn(&id(2), For::Operator, Terms::default());
        assert_eq!(busy.err().unwrap().code(), "BUNDLE_WORKER_BUSY");
        vetter.lock().waiting = 0;
        drop(turn);
        assert!(vetter.turn(&id(2), For::Peer, terms).unwrap().is_some());
    }

    #[test]
    fn passes_hold_for_the_program_that_gave_them() {
        let vetter = Vetter::new(KeptPasses::default());
        vetter.lock().pass(id(1));
        let mut kept = vetter.kept();
        let again = Vetter::new(kept.clone());
        assert!(
            again
                .turn(&id(1), For::Slots, Terms::default())
                .unwrap()
                .is_none()
        );
        kept.program = "0.0.9 1-1.1".to_owned();
        let newer = Vetter::new(kept);
        assert!(
            newer
                .turn(&id(1), For::Slots, Terms::default())
                .unwrap()
                .is_some()
        );
    }

    #[test]
    fn a_verdict_counts_for_the_bytes_that_were_sent_only() {
        let examined = |content_id| {
            Ok(Answer {
                confinement: Confinement::default(),
                verdict: Verdict::Passed(Examined {
                    name: "site".to_owned(),
                    epoch: 1,
                    content_id,
                    policies: 1,
                    warnings: Vec::new(),
                    tests_passed: 0,
                }),
            })
        };
        assert!(judge(examined(id(1)), &id(1)).is_ok());
        let other = judge(examined(id(2)), &id(1)).unwrap_err();
        assert_eq!(other.code(), "BUNDLE_WORKER_ANSWER");
        let unknown = Answer {
            confinement: Confinement::default(),
            verdict: Verdict::Refused {
                code: "BUNDLE_GOOD".to_owned(),
                message: String::new(),
            },
        };
        let unknown = judge(Ok(unknown), &id(1)).unwrap_err();
        assert_eq!(unknown.code(), "BUNDLE_WORKER_ANSWER");
    }
}
