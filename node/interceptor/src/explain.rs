//! Explanations: asked of the policies after the answer was found, on the engines' own threads.

use std::sync::{Arc, Mutex, PoisonError};

use tidelock_policy::{
    ActivePolicy, Engine, Evaluation, Failure, PolicyNote, PolicyRequest, Verdict,
    limits::COMPILE_STACK_BYTES,
};

use crate::{
    answer::{Explanation, Provenance},
    engines::{Engines, Evaluated},
    reason::Reason,
    record::Findings,
};

/// Looks for the nearest permits where an engine would evaluate, within the same budget. What it
/// answers as an engine is thrown away.
struct Explaining {
    policy: Arc<ActivePolicy>,
    notes: Mutex<Vec<PolicyNote>>,
}

impl Engine for Explaining {
    fn evaluate(&self, request: &PolicyRequest) -> Evaluation {
        // Explaining takes policies apart and writes them down, which needs the stack that they were
        // compiled on. Whoever waits for this thread is abandoned like an engine.
        let notes = std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("explain".to_owned())
                .stack_size(COMPILE_STACK_BYTES)
                .spawn_scoped(scope, || self.policy.bundle().explain(request))
                .ok()
                .and_then(|explaining| explaining.join().ok())
                .unwrap_or_default()
        });
        *self.notes.lock().unwrap_or_else(PoisonError::into_inner) = notes;
        Evaluation {
            verdict: Verdict::NoMatch,
            policies: Vec::new(),
            errors: Vec::new(),
        }
    }
}

/// What is wrong with the request itself, if that is what this error of an engine says. It names what the
/// caller sent, so the caller may have it without asking for an explanation.
pub(crate) fn of_request(error: &str) -> Option<&str> {
    [Failure::Request, Failure::UnknownAction]
        .into_iter()
        .find_map(|failure| error.strip_prefix(failure.code())?.strip_prefix(": "))
}

fn nearest(
    engines: &Engines,
    caller: &Arc<str>,
    request: PolicyRequest,
    policy: &Arc<ActivePolicy>,
) -> Vec<PolicyNote> {
    let explaining = Arc::new(Explaining {
        policy: Arc::clone(policy),
        notes: Mutex::default(),
    });
    let engine = Arc::clone(&explaining) as Arc<dyn Engine>;
    match engines.evaluate(engine, request, caller).0 {
        Evaluated::Done(_) => {
            let mut notes = explaining
                .notes
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *notes)
        }
        // Late or exhausted: an answer without them.
        _ => Vec::new(),
    }
}

/// What is to be said of these findings.
pub(crate) fn explanation(
    engines: &Engines,
    caller: &Arc<str>,
    request: Option<PolicyRequest>,
    policy: Option<&Arc<ActivePolicy>>,
    findings: &Findings,
) -> Explanation {
    let nearest = match (findings.reason, request, policy) {
        (Reason::NoMatch, Some(request), Some(policy)) => nearest(engines, caller, request, policy),
        _ => Vec::new(),
    };
    let to_allow = match findings.reason {
        Reason::PolicyAllow => Vec::new(),
        Reason::PolicyDeny => findings
            .policies
            .iter()
            .take(crate::limits::MAX_LISTED)
            .map(|policy| format!("forbid {policy} must not apply"))
            .collect(),
        Reason::NoMatch if nearest.is_empty() => {
            vec!["the bundle needs a permit for this action".to_owned()]
        }
        Reason::NoMatch => nearest
            .iter()
            .map(|note| {
                let needs: Vec<&str> = note.unmet.iter().map(|u| u.needs.as_str()).collect();
                format!("for {} to permit: {}", note.policy, needs.join("; "))
            })
            .collect(),
        Reason::ConsultNeeded => vec![
            "the decision point that its class is referred to must agree; it is asked when the action is \
             decided, and not before"
                .to_owned(),
        ],
        Reason::NoPolicy => vec!["a bundle must be installed".to_owned()],
        Reason::InvalidRequest => vec!["the request must be put right".to_owned()],
        Reason::RateLimitExceeded => vec!["wait until the quota lets it pass".to_owned()],
        Reason::EvaluationError => {
            vec!["the request must fit the schema, and no policy may err; see errors".to_owned()]
        }
        Reason::PostureRestricted | Reason::PostureClosed => vec![
            "the policy must be newer, or what doctor shows of clock and disk be mended".to_owned(),
        ],
        _ => vec!["the node must recover; ask again".to_owned()],
    };
    Explanation {
        nearest,
        to_allow,
        provenance: policy.map(|policy| {
            let bundle = policy.bundle();
            Provenance {
                version: bundle.manifest().version.clone(),
                created_at: bundle.manifest().created_at.clone(),
                signers: bundle.signers().to_vec(),
                source: policy.source(),
            }
        }),
    }
}
