//! What the solver's answers come to.

use crate::limits::{ANSWER_SHOWN_CHARS_MAX, PROOF_OPEN_MAX};
use crate::questions::{Question, Questions};
use crate::widening::{Counterexample, WhyUnproven, Widening};

/// What runs scripts: what the solver wrote, or why there is nothing.
pub type Solve<'a> = dyn FnMut(&str) -> Result<String, Widening> + 'a;

/// What tells whether a model, the solver's answer to the model script of this number, stands for a request
/// that is permitted newly.
pub type Confirm<'a> =
    dyn FnMut(&Question, usize, &str) -> Result<Option<Counterexample>, Widening> + 'a;

/// Asks a solver what [`questions`](crate::questions()) found, and makes a verdict of the answers.
/// Nothing but one `unsat` for each question is a proof; a model counts if it is confirmed.
pub fn settle(questions: &Questions, solve: &mut Solve<'_>, confirm: &mut Confirm<'_>) -> Widening {
    let asked = match questions {
        Questions::Asked(asked) => asked,
        Questions::None { reason, detail } => return Widening::unproven(*reason, detail),
    };
    match settle_asked(asked, solve, confirm) {
        Ok(widening) | Err(widening) => widening,
    }
}

fn settle_asked(
    asked: &[Question],
    solve: &mut Solve<'_>,
    confirm: &mut Confirm<'_>,
) -> Result<Widening, Widening> {
    let mut script = String::new();
    for question in asked {
        script.push_str(&question.script);
        script.push('\n');
    }
    let mut answers = Vec::new();
    if asked.iter().any(|question| !question.script.is_empty()) {
        answers.extend(solve(&script)?.lines().map(str::to_owned));
    }
    let mut answers = answers.into_iter();
    let mut open = Vec::new();
    let mut unknown = None;
    for question in asked {
        let answer = match question.script.is_empty() {
            true => Some("sat".to_owned()),
            false => answers.next(),
        };
        match answer.as_deref() {
            Some("unsat") => {}
            Some("sat") => open.push(question),
            Some("unknown") => unknown = unknown.or(Some(question)),
            other => return Err(misunderstood(other.unwrap_or("nothing more"))),
        }
    }
    if let Some(surplus) = answers.next() {
        return Err(misunderstood(&surplus));
    }
    for question in open.iter().take(PROOF_OPEN_MAX) {
        for (number, script) in question.models.iter().enumerate() {
            // What needs no solver has no answer.
            let answer = match script.is_empty() {
                true => "sat".to_owned(),
                false => solve(script)?,
            };
            let (word, model) = answer.split_once('\n').unwrap_or((&answer, ""));
            if word != "sat" {
                continue;
            }
            if let Some(found) = confirm(question, number, model)? {
                return Ok(Widening::Wider {
                    looser: Vec::new(),
                    counterexample: Some(Box::new(found)),
                });
            }
        }
    }
    Ok(match (open.first(), unknown) {
        (None, None) => Widening::NotWider,
        (None, Some(question)) => Widening::unproven(
            WhyUnproven::SolverUnknown,
            format!("the solver does not know about {}", question.about),
        ),
        (Some(question), _) => Widening::unproven(
            question.otherwise,
            match question.otherwise {
                WhyUnproven::Schema => format!(
                    "{}: the schemas differ in it, and the policies permit some of it",
                    question.about
                ),
                _ => format!(
                    "{}: more seems to be permitted, but no request was found that shows it",
                    question.about
                ),
            },
        ),
    })
}

fn misunderstood(said: &str) -> Widening {
    let shown: String = said.chars().take(ANSWER_SHOWN_CHARS_MAX).collect();
    Widening::unproven(
        WhyUnproven::SolverFailed,
        format!("the solver said `{shown}`, which is no answer"),
    )
}
