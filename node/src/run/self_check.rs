//! The self-check after a switch: whether the engine that serves answers as the bundle's own tests say.
//!
//! Pure: who is asked, how long one may wait and what the time is come from outside.

use serde_json::{Map, Value};
use tidelock_interceptor::ProbeFault;
use tidelock_policy::{Evaluation, OwnCase, PolicyRequest, Verdict};

/// How often one question is asked while the answer is late: a machine that was busy for a moment is no fault
/// of the bundle's, and a bundle that is late each time serves no caller either.
const ASKED_MAX: u32 = 5;

/// Something that no bundle knows, so that also one without tests is asked something.
fn unknown() -> PolicyRequest {
    PolicyRequest {
        principal_type: "Tidelock".to_owned(),
        principal_id: "self-check".to_owned(),
        action: "tidelock.self-check".to_owned(),
        resource_type: "Tidelock".to_owned(),
        resource_id: "self-check".to_owned(),
        resource_attributes: Map::new(),
        params: Value::Null,
        context: Value::Null,
    }
}

/// The surroundings of a self-check.
pub(super) struct Surroundings<'a> {
    /// The engine that serves.
    pub(super) ask: &'a dyn Fn(PolicyRequest) -> Result<Evaluation, ProbeFault>,
    /// Waits a moment before a question is asked again.
    pub(super) wait: &'a dyn Fn(),
    /// Whether there is time for more.
    pub(super) has_time: &'a dyn Fn() -> bool,
}

/// What is wrong, for people.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// An answer is wrong, or does not come in time.
    Bundle(String),
    /// It could not be asked: no engine was free or had time for a single try, or a disk did not answer. That
    /// says nothing of the bundle.
    Engines(String),
}

impl From<String> for Fault {
    fn from(why: String) -> Self {
        Self::Bundle(why)
    }
}

/// How many questions were answered as they must be. When time runs out on a machine that is merely slow,
/// those that were answered suffice; one must be.
///
/// # Errors
/// The first [`Fault`].
pub(super) fn self_check(cases: &[OwnCase], around: &Surroundings<'_>) -> Result<u64, Fault> {
    let first = ask(&unknown(), around)?;
    if first.verdict == Verdict::Permit {
        let why = "it permits an action that it does not know".to_owned();
        return Err(why.into());
    }
    let mut answered = 1;
    for case in cases {
        if !(around.has_time)() {
            break;
        }
        let answer = ask(&case.request(), around).map_err(|fault| match fault {
            Fault::Bundle(why) => Fault::Bundle(format!("{case:?}: {why}")),
            engines @ Fault::Engines(_) => engines,
        })?;
        case.judge(answer).map_err(|failure| failure.to_string())?;
        answered += 1;
    }
    Ok(answered)
}

fn ask(request: &PolicyRequest, around: &Surroundings<'_>) -> Result<Evaluation, Fault> {
    let mut asked = 1;
    let mut was_asked = false;
    loop {
        let answer = (around.ask)(request.clone());
        was_asked |= !matches!(answer, Err(ProbeFault::Busy | ProbeFault::Starved));
        match answer {
            Ok(evaluation) => return Ok(evaluation),
            Err(fault) if fault.may_pass() && asked < ASKED_MAX => {
                asked += 1;
                (around.wait)();
            }
            Err(fault) => {
                let why = format!("{}, asked {asked} times", fault.as_str());
                return Err(match was_asked {
                    true => Fault::Bundle(why),
                    false => Fault::Engines(why),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use tidelock_policy::testing::{Authority, template_builder};

    use super::*;

    const CREATED: u64 = 1_769_860_800_000;

    /// The tests of the starter bundle, and its own engine.
    fn bundle() -> tidelock_policy::VerifiedBundle {
        let authority = Authority::new("harbour", 1).unwrap();
        let builder = template_builder("site", "harbour", CREATED).unwrap();
        authority.load(builder).unwrap()
    }

    /// Checks a bundle whose engine answers as it does but where the script says otherwise.
    fn check(
        script: &dyn Fn(u32) -> Option<Result<Evaluation, ProbeFault>>,
        has_time: &dyn Fn() -> bool,
    ) -> (Result<u64, Fault>, u32, u32) {
        let bundle = bundle();
        let engine = bundle.engine();
        let cases = bundle.own_cases(64).unwrap();
        assert!(cases.len() > 1, "the starter has tests");
        let (asked, waited) = (Cell::new(0), Cell::new(0));
        let checked = self_check(
            &cases,
            &Surroundings {
                ask: &|request| {
                    asked.set(asked.get() + 1);
                    script(asked.get()).unwrap_or_else(|| Ok(engine.evaluate(&request)))
                },
                wait: &|| waited.set(waited.get() + 1),
                has_time,
            },
        );
        (checked, asked.get(), waited.get())
    }

    fn said(checked: Result<u64, Fault>) -> String {
        match checked {
            Err(Fault::Bundle(why)) => why,
            other => format!("{other:?}"),
        }
    }

    fn says(verdict: Verdict) -> Option<Result<Evaluation, ProbeFault>> {
        Some(Ok(Evaluation {
            verdict,
            policies: Vec::new(),
            errors: Vec::new(),
        }))
    }

    #[test]
    fn the_own_tests_pass_on_the_engine_that_they_were_written_for() {
        let (checked, asked, waited) = check(&|_| None, &|| true);
        assert_eq!((checked, waited), (Ok(u64::from(asked)), 0));
        assert!(asked > 2);
    }

    #[test]
    fn one_late_answer_is_no_fault_and_none_at_all_is() {
        for fault in [ProbeFault::Late, ProbeFault::Busy, ProbeFault::Starved] {
            let late = |times: u32| move |asked: u32| (asked <= times).then_some(Err(fault));
            let (checked, _, waited) = check(&late(ASKED_MAX - 1), &|| true);
            assert!(checked.is_ok(), "{checked:?}");
            assert_eq!(waited, ASKED_MAX - 1);
            let (checked, asked, _) = check(&late(ASKED_MAX), &|| true);
            let why = format!("{}, asked 5 times", fault.as_str());
            // What never came to an engine says nothing of the bundle.
            let expected = match fault {
                ProbeFault::Busy | ProbeFault::Starved => Fault::Engines(why),
                _ => Fault::Bundle(why),
            };
            assert_eq!(checked, Err(expected));
            assert_eq!(asked, ASKED_MAX, "it is bounded");
        }
        // An engine that it holds itself does.
        let holds = |asked: u32| {
            Some(Err(match asked {
                1 => ProbeFault::Late,
                _ => ProbeFault::Busy,
            }))
        };
        let (checked, _, _) = check(&holds, &|| true);
        assert!(matches!(checked, Err(Fault::Bundle(_))), "{checked:?}");
        // A panic does not pass by itself.
        let (checked, asked, _) = check(&|_| Some(Err(ProbeFault::Panicked)), &|| true);
        assert!(said(checked).contains("panicked"));
        assert_eq!(asked, 1);
    }

    #[test]
    fn another_answer_than_the_author_expects_is_a_fault() {
        let second = |verdict| move |asked: u32| (asked == 2).then(|| says(verdict)).flatten();
        let (checked, _, _) = check(&second(Verdict::Error), &|| true);
        assert!(said(checked).contains("expects"));
        let (checked, _, _) = check(&|_| says(Verdict::Permit), &|| true);
        assert!(said(checked).contains("does not know"));
    }

    #[test]
    fn a_slow_machine_ends_the_check_and_not_the_bundle() {
        let left = RefCell::new(vec![true, true]);
        let (checked, _, _) = check(&|_| None, &|| left.borrow_mut().pop().unwrap_or(false));
        assert_eq!(checked, Ok(3));
        // But one answer there must be.
        let (checked, _, _) = check(&|_| Some(Err(ProbeFault::Late)), &|| false);
        assert!(checked.is_err());
    }
}
