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

/// What a solver says of one script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Unsat,
    Sat,
    Unknown,
}

/// One answer for each question, of one of its scripts; all of them are asked in one go. Where a script is empty, it is
/// known that the answer is `sat`.
fn answers_of(
    asked: &[&Question],
    script: impl Fn(&Question) -> &String,
    solve: &mut Solve<'_>,
) -> Result<Vec<Answer>, Widening> {
    let mut whole = String::new();
    for question in asked.iter().filter(|question| !script(question).is_empty()) {
        whole.push_str(script(question));
        whole.push('\n');
    }
    let said = match whole.is_empty() {
        true => String::new(),
        false => solve(&whole)?,
    };
    let mut said = said.lines();
    let mut answers = Vec::new();
    for question in asked {
        answers.push(match script(question).is_empty() {
            true => Answer::Sat,
            false => match said.next() {
                Some("unsat") => Answer::Unsat,
                Some("sat") => Answer::Sat,
                Some("unknown") => Answer::Unknown,
                other => return Err(misunderstood(other.unwrap_or("nothing more"))),
            },
        });
    }
    match said.next() {
        None => Ok(answers),
        Some(surplus) => Err(misunderstood(surplus)),
    }
}

fn settle_asked(
    asked: &[Question],
    solve: &mut Solve<'_>,
    confirm: &mut Confirm<'_>,
) -> Result<Widening, Widening> {
    // What the first script does not settle, the whole one does, or nothing.
    let all: Vec<&Question> = asked.iter().collect();
    let answers = answers_of(&all, |question| &question.first, solve)?;
    let left: Vec<&Question> = all
        .into_iter()
        .zip(answers)
        .filter(|(_, answer)| *answer != Answer::Unsat)
        .map(|(question, _)| question)
        .collect();
    let answers = answers_of(&left, |question| &question.script, solve)?;
    let mut open = Vec::new();
    let mut unknown = None;
    for (question, answer) in left.into_iter().zip(answers) {
        match answer {
            Answer::Unsat => {}
            Answer::Sat => open.push(question),
            Answer::Unknown => unknown = unknown.or(Some(question)),
        }
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
