//! The proof that a bundle permits nothing new: a worker makes the questions, a solver answers them, a worker
//! looks at what it found. Neither runs in this process; this one pipes text.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tidelock_policy::{ContentId, VerifiedBundle};
use tidelock_prover::{Questions, WhyUnproven, Widening, compare_limits, settle};

use super::{
    For, Terms,
    limits::{PROOF_DEADLINE_MS, PROOFS_KEPT_MAX, REFUSED_FOR},
    run,
    solver::Solver,
    wire::{Ask, Verdict},
};

/// How a proof may be had.
#[derive(Debug, Clone)]
pub(crate) struct ProofTerms {
    /// For all of it together.
    pub(crate) deadline: Duration,
    /// Whether the children may go on where the kernel takes no filter of system calls.
    pub(crate) allow_without_seccomp: bool,
    /// The solver that the config names.
    pub(crate) solver: Option<PathBuf>,
}

impl Default for ProofTerms {
    fn default() -> Self {
        Self {
            deadline: Duration::from_millis(PROOF_DEADLINE_MS),
            allow_without_seccomp: false,
            solver: None,
        }
    }
}

/// What was proved, or not, of which pair of bundles. One proof runs at a time.
#[derive(Debug, Default)]
pub(crate) struct Prover {
    turn: Mutex<()>,
    known: Mutex<VecDeque<Known>>,
}

#[derive(Debug)]
struct Known {
    before: ContentId,
    after: ContentId,
    said: Widening,
    at: Instant,
}

impl Prover {
    /// What is known of a pair without any work, or compared without a solver.
    pub(crate) fn glance(
        &self,
        before: &VerifiedBundle,
        after: &VerifiedBundle,
        now_unix_ms: u64,
    ) -> Option<Widening> {
        let (old, new) = (&before.package().archive, &after.package().archive);
        match compare_limits(old, new, now_unix_ms) {
            Ok(None) => self.known(before.content_id(), after.content_id(), For::Peer),
            Ok(settled) => settled,
            Err(error) => Some(Widening::unproven(WhyUnproven::Prover, error.to_string())),
        }
    }

    /// Proves it, or says why not. A person's question is asked anew where the last answer was none.
    pub(crate) fn prove(
        &self,
        before: &VerifiedBundle,
        after: &VerifiedBundle,
        now_unix_ms: u64,
        asker: For,
        terms: &ProofTerms,
    ) -> Widening {
        let (old, new) = (&before.package().archive, &after.package().archive);
        match compare_limits(old, new, now_unix_ms) {
            Ok(None) => {}
            Ok(Some(settled)) => return settled,
            Err(error) => return Widening::unproven(WhyUnproven::Prover, error.to_string()),
        }
        let ids = (before.content_id(), after.content_id());
        let _turn = held(&self.turn);
        if let Some(said) = self.known(ids.0, ids.1, asker) {
            return said;
        }
        let said = prove_policies(old, new, terms);
        let mut known = held(&self.known);
        known.retain(|one| (&one.before, &one.after) != ids);
        while known.len() >= PROOFS_KEPT_MAX {
            known.pop_front();
        }
        known.push_back(Known {
            before: ids.0.clone(),
            after: ids.1.clone(),
            said: said.clone(),
            at: Instant::now(),
        });
        said
    }

    fn known(&self, before: &ContentId, after: &ContentId, asker: For) -> Option<Widening> {
        let known = held(&self.known);
        let found = known
            .iter()
            .find(|one| one.before == *before && one.after == *after)?;
        // What was not proved may have been the machine's fault.
        let holds = match &found.said {
            Widening::NotWider | Widening::Wider { .. } => true,
            _ => asker == For::Peer && found.at.elapsed() < REFUSED_FOR,
        };
        holds.then(|| found.said.clone())
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a solver says of two archives of which [`compare_limits`] says nothing.
pub(crate) fn prove_policies(before: &[u8], after: &[u8], terms: &ProofTerms) -> Widening {
    let begun = Instant::now();
    let left = || Terms {
        deadline: terms.deadline.saturating_sub(begun.elapsed()),
        allow_without_seccomp: terms.allow_without_seccomp,
    };
    let both = [before, after].concat();
    let asked = Ask::Questions {
        before_bytes: before.len(),
    };
    let questions: Questions = match worked(&asked, &both, left()) {
        Ok(Verdict::Questions(questions)) => questions,
        Ok(_) => return prover_failed("it is about something else"),
        Err(why) => return why,
    };
    let mut solver = None;
    let mut solve = |script: &str| -> Result<String, Widening> {
        let found = match &mut solver {
            Some(found) => found,
            none => {
                let found = Solver::find(terms.solver.as_deref());
                none.insert(found.map_err(|why| Widening::unproven(WhyUnproven::NoSolver, why))?)
            }
        };
        found.run(script, left())
    };
    settle(&questions, &mut solve, &mut |question, whose, model| {
        let asked = Ask::Confirm {
            before_bytes: before.len(),
            after_bytes: after.len(),
            about: question.about.clone(),
            whose,
        };
        let all = [both.as_slice(), model.as_bytes()].concat();
        match worked(&asked, &all, left())? {
            Verdict::Confirmed(found) => Ok(found.map(|found| *found)),
            _ => Err(prover_failed("it is about something else")),
        }
    })
}

fn worked(asked: &Ask, bytes: &[u8], terms: Terms) -> Result<Verdict, Widening> {
    let answer = run(asked, bytes, terms).map_err(|error| prover_failed(&error.to_string()))?;
    match answer.verdict {
        Verdict::Refused { message, .. } => Err(prover_failed(&message)),
        verdict => Ok(verdict),
    }
}

fn prover_failed(why: &str) -> Widening {
    Widening::unproven(
        WhyUnproven::Prover,
        format!("the worker that makes the questions: {why}"),
    )
}
