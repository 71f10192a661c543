//! What the solver's answers come to.

use crate::limits::{ANSWER_SHOWN_CHARS_MAX, PROOF_FIRST_MODELS_MAX, PROOF_OPEN_MAX};
use crate::questions::{ModelOf, Question, Questions};
use crate::widening::{Counterexample, WhyUnproven, Widening};

/// What runs scripts: what the solver wrote, or why there is nothing.
pub type Solve<'a> = dyn FnMut(&str) -> Result<String, Widening> + 'a;

/// What tells whether a model that the solver has found stands for a request that is permitted newly.
pub type Confirm<'a> =
    dyn FnMut(&Question, ModelOf, &str) -> Result<Option<Counterexample>, Widening> + 'a;

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

/// One answer for each script; all of them are asked in one go. Where one is empty, it is known that the answer is `sat`.
fn answers(scripts: &[&str], solve: &mut Solve<'_>) -> Result<Vec<Answer>, Widening> {
    let asked = scripts.iter().filter(|script| !script.is_empty());
    let whole: String = asked.flat_map(|script| [*script, "\n"]).collect();
    let said = match whole.is_empty() {
        true => String::new(),
        false => solve(&whole)?,
    };
    let mut said = said.lines();
    let mut answers = Vec::new();
    for script in scripts {
        answers.push(match script.is_empty() {
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

/// The request that a model of this script stands for, if there is one that is permitted newly.
fn shown(
    (question, whose, script): (&Question, ModelOf, &str),
    solve: &mut Solve<'_>,
    confirm: &mut Confirm<'_>,
) -> Result<Option<Widening>, Widening> {
    // What needs no solver has no answer.
    let answer = match script.is_empty() {
        true => "sat".to_owned(),
        false => solve(script)?,
    };
    let (word, model) = answer.split_once('\n').unwrap_or((&answer, ""));
    if word != "sat" {
        return Ok(None);
    }
    let found = confirm(question, whose, model)?;
    Ok(found.map(|found| Widening::Wider {
        looser: Vec::new(),
        counterexample: Some(Box::new(found)),
    }))
}

fn settle_asked(
    asked: &[Question],
    solve: &mut Solve<'_>,
    confirm: &mut Confirm<'_>,
) -> Result<Widening, Widening> {
    // What the parts do not settle, the whole script does, or nothing.
    let scripts = asked.iter().flat_map(|question| &question.first);
    let scripts: Vec<&str> = scripts.map(|part| part.script.as_str()).collect();
    let mut said = answers(&scripts, solve)?.into_iter();
    let mut left = Vec::new();
    let mut may_show = Vec::new();
    for question in asked {
        let said: Vec<Answer> = said.by_ref().take(question.first.len()).collect();
        let is_settled = !said.is_empty() && said.iter().all(|answer| *answer == Answer::Unsat);
        if !is_settled {
            left.push(question);
        }
        for (part, answer) in question.first.iter().zip(said) {
            if let (Answer::Sat, Some(model)) = (answer, &part.model) {
                may_show.push((question, ModelOf::First(part.number), model.as_str()));
            }
        }
    }
    for one in may_show.into_iter().take(PROOF_FIRST_MODELS_MAX) {
        if let Some(wider) = shown(one, solve, confirm)? {
            return Ok(wider);
        }
    }
    let scripts: Vec<&str> = left
        .iter()
        .map(|question| question.script.as_str())
        .collect();
    let answers = answers(&scripts, solve)?;
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
            let one = (*question, ModelOf::Whole(number), script.as_str());
            if let Some(wider) = shown(one, solve, confirm)? {
                return Ok(wider);
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
