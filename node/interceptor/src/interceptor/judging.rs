//! One action on its way through quota, posture and engine.
//!
//! The steps without whoever waits between them: a decision goes on on the engine's thread, an
//! explanation and a search wait on their own.

use std::{sync::Arc, time::Duration};

use tidelock_policy::{
    ActivePolicy, Engine, Evaluation, PolicyRequest, Posture, Verdict, WhenRestricted,
};

use super::{Inner, add, bundle_info, holder, whole_ms};
use crate::{
    action::Action,
    caller::Caller,
    engines::Evaluated,
    reason::{Decision, Reason},
    record::{Findings, Form, Judgement, Request},
};

/// How often an action is judged where each time another policy or posture is in force afterwards.
pub(super) const JUDGED_AT_MOST: usize = 3;

/// Faults that wait for the log at most; they come seldom.
const FAULTS_MAX: usize = 8;

/// Something that operators should hear of an engine.
#[derive(Debug)]
pub(super) struct EngineFault {
    what: &'static str,
    action: String,
    caller: Arc<str>,
    more: u64,
}

impl EngineFault {
    pub(super) fn log(&self) {
        let Self {
            what,
            action,
            caller,
            more,
        } = self;
        tracing::error!(%action, %caller, more, "{what}");
    }
}

/// What is to be done next.
#[expect(
    clippy::large_enum_variant,
    reason = "made and taken apart at once, never stored"
)]
pub(super) enum Step {
    /// This engine is to be asked this, and [`Judging::heard`] goes on.
    Ask(Arc<dyn Engine>, PolicyRequest),
    /// That is all.
    Found(Findings),
}

/// How far the judging of one action has come.
pub(super) struct Judging {
    policy: Option<Arc<ActivePolicy>>,
    holder: Arc<str>,
    posture: Posture,
    form: Form,
    rounds: usize,
}

impl Judging {
    /// Begins with the quota.
    pub(super) fn charged(inner: &Inner, action: &Action, caller: &Caller) -> (Self, Step) {
        let now = inner.clock.now();
        let Err((bucket, retry_after)) = inner.quotas.check(action, caller, now) else {
            return Self::again(inner, action, caller);
        };
        let policy = (inner.policy)();
        let posture = inner.posture_of(action, policy.as_deref());
        let findings = Findings {
            retry_after_ms: Some(whole_ms(retry_after)),
            errors: vec![format!("quota {} is spent", bucket.as_str())],
            ..Findings::new(Reason::RateLimitExceeded, posture)
        };
        (Self::new(policy, caller, posture), Step::Found(findings))
    }

    /// Begins with the posture, for what has been charged.
    pub(super) fn again(inner: &Inner, action: &Action, caller: &Caller) -> (Self, Step) {
        let mut judging = Self::new((inner.policy)(), caller, Posture::Closed);
        let step = judging.ask(inner, action);
        (judging, step)
    }

    fn new(policy: Option<Arc<ActivePolicy>>, caller: &Caller, posture: Posture) -> Self {
        Self {
            policy,
            holder: holder(caller),
            posture,
            form: Form::Full,
            rounds: 0,
        }
    }

    /// Whose evaluation it is.
    pub(super) fn holder(&self) -> Arc<str> {
        Arc::clone(&self.holder)
    }

    /// The policy that it was judged by.
    pub(super) fn policy(&self) -> Option<&Arc<ActivePolicy>> {
        self.policy.as_ref()
    }

    /// What came of it, for the record.
    pub(super) fn judgement(self, action: Box<Action>, findings: Findings) -> Judgement {
        Judgement {
            findings,
            bundle: self.policy.as_deref().map(bundle_info),
            policy: self.policy,
            request: Request::Action(action),
        }
    }

    /// Waits for the engines on this thread, until there is nothing left to ask.
    pub(super) fn wait(&mut self, inner: &Inner, action: &Action, mut step: Step) -> Findings {
        loop {
            let (engine, request) = match step {
                Step::Found(findings) => return findings,
                Step::Ask(engine, request) => (engine, request),
            };
            let (evaluated, took) = inner.engines.evaluate(engine, request, &self.holder);
            step = self.heard(inner, action, evaluated, took);
        }
    }

    /// Posture, and what the engine is to be asked, as of now.
    fn ask(&mut self, inner: &Inner, action: &Action) -> Step {
        let posture = inner.posture_of(action, self.policy.as_deref());
        self.posture = posture;
        let Some(policy) = self.policy.as_deref() else {
            return Step::Found(Findings::new(Reason::NoPolicy, posture));
        };
        // Posture gates every request, before anything that could be cached (ruling 16).
        self.form = match posture {
            Posture::Closed => {
                return Step::Found(Findings::new(Reason::PostureClosed, posture));
            }
            Posture::Restricted => match policy.when_restricted(action.name()) {
                WhenRestricted::Deny => {
                    return Step::Found(Findings::new(Reason::PostureRestricted, posture));
                }
                WhenRestricted::Degrade => Form::Short,
                WhenRestricted::Continue => Form::Full,
            },
            Posture::Normal | Posture::Stale => Form::Full,
        };
        let mut request = PolicyRequest::from(action);
        match policy.describe_node(&mut request, posture, inner.clock.unix_ms()) {
            Ok(()) => Step::Ask(policy.shared_engine(), request),
            Err(error) => Step::Found(self.failed(Reason::EvaluationError, &error)),
        }
    }

    /// Goes on with what came of an evaluation, and the CPU time that it took.
    pub(super) fn heard(
        &mut self,
        inner: &Inner,
        action: &Action,
        evaluated: Evaluated,
        took: Duration,
    ) -> Step {
        let counters = &inner.counters;
        add(
            &counters.engine_us,
            u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        );
        add(
            &counters.evaluations,
            u64::from(evaluated != Evaluated::Exhausted),
        );
        let findings = self.findings(inner, action, evaluated);
        if findings.reason.decision() != Decision::Allow {
            return Step::Found(findings);
        }
        // An allow is of the policy and the posture in force after the engine was waited for.
        let in_force = (inner.policy)();
        let is_same = match (self.policy.as_ref(), in_force.as_ref()) {
            (Some(judged), Some(now)) => Arc::ptr_eq(judged, now),
            _ => false,
        };
        if is_same && inner.posture_of(action, self.policy.as_deref()) == self.posture {
            return Step::Found(findings);
        }
        self.policy = in_force;
        self.rounds += 1;
        if self.rounds < JUDGED_AT_MOST {
            return self.ask(inner, action);
        }
        self.posture = inner.posture_of(action, self.policy.as_deref());
        let error = "the policy changed each time that it was asked";
        Step::Found(self.failed(Reason::Deadline, error))
    }

    fn note(&self, inner: &Inner, action: &Action, what: &'static str, more: Option<u64>) {
        let mut faults = inner.engine_faults();
        if let Some(more) = more.filter(|_| faults.len() < FAULTS_MAX) {
            faults.push(EngineFault {
                what,
                action: action.name().to_owned(),
                caller: Arc::clone(&self.holder),
                more,
            });
        }
    }

    fn failed(&self, reason: Reason, error: &str) -> Findings {
        Findings {
            errors: vec![error.to_owned()],
            form: self.form,
            ..Findings::new(reason, self.posture)
        }
    }

    fn findings(&self, inner: &Inner, action: &Action, evaluated: Evaluated) -> Findings {
        let counters = &inner.counters;
        let Evaluation {
            verdict,
            policies,
            errors,
        } = match evaluated {
            Evaluated::Done(evaluation) => evaluation,
            Evaluated::Panicked => {
                add(&counters.panics, 1);
                let more = inner.told_panicked.tell(inner.clock.now());
                self.note(inner, action, "policy engine panicked, action denied", more);
                return self.failed(Reason::EvaluationError, "policy engine panicked");
            }
            Evaluated::Late { abandoned: false } => {
                return self.failed(Reason::Deadline, "policy engine was late");
            }
            Evaluated::Late { abandoned: true } => {
                add(&counters.abandoned, 1);
                let more = inner.told_abandoned.tell(inner.clock.now());
                self.note(
                    inner,
                    action,
                    "policy engine does not end, action denied",
                    more,
                );
                return self.failed(Reason::Deadline, "policy engine was given up");
            }
            Evaluated::Exhausted => {
                return self.failed(Reason::EngineExhausted, "no engine came free in time");
            }
        };
        let reason = match verdict {
            Verdict::Forbid => Reason::PolicyDeny,
            // An error beside any other verdict may be a forbid that was skipped.
            _ if !errors.is_empty() => Reason::EvaluationError,
            Verdict::Permit => Reason::PolicyAllow,
            Verdict::NoMatch => Reason::NoMatch,
            Verdict::Error => Reason::EvaluationError,
        };
        Findings {
            policies,
            errors,
            form: self.form,
            ..Findings::new(reason, self.posture)
        }
    }
}
