//! The place of a solver in the compiler, where none is asked: what it would be asked is written down.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use cedar_policy_symcc::{
    CedarSymCompiler, SmtLibScript as _,
    solver::{Decision, DecisionWithModel, Solver, SolverError},
};
use tokio::io::AsyncWrite;

use crate::questions::{Refusal, unsupported};

/// A solver that only writes down what it is asked; with a model, it answers with that.
#[derive(Default)]
pub(crate) struct Scribe {
    script: Vec<u8>,
    model: Option<String>,
}

impl Scribe {
    pub(crate) fn answering(model: &str) -> Self {
        Self {
            model: Some(model.to_owned()),
            ..Self::default()
        }
    }

    pub(crate) fn take(&mut self) -> Result<String, Refusal> {
        let script = String::from_utf8(std::mem::take(&mut self.script));
        spoken(&script.map_err(|error| unsupported(&error))?)
            .ok_or_else(|| unsupported(&"a name with a control character"))
    }
}

impl Solver for &mut Scribe {
    fn smtlib_input(&mut self) -> &mut (dyn AsyncWrite + Unpin + Send) {
        &mut self.script
    }

    async fn enable_models(&mut self) -> Result<(), SolverError> {
        let input = self.smtlib_input();
        Ok(input.set_option("produce-models", "true").await?)
    }

    async fn check_sat(&mut self) -> Result<Decision, SolverError> {
        self.smtlib_input().check_sat().await?;
        Ok(Decision::Unknown)
    }

    async fn check_sat_with_model(&mut self) -> Result<DecisionWithModel, SolverError> {
        self.smtlib_input().check_sat().await?;
        self.smtlib_input().get_model().await?;
        Ok(match self.model.take() {
            Some(model) => DecisionWithModel::Sat { model },
            None => DecisionWithModel::Unknown,
        })
    }
}

pub(crate) fn compiler(solver: &mut Scribe) -> Result<CedarSymCompiler<&mut Scribe>, Refusal> {
    CedarSymCompiler::new(solver).map_err(|error| unsupported(&error))
}

/// A script without its comments, into which the compiler writes names as they are: whoever can end a comment
/// speaks to the solver. None where a control character is left, which would end one elsewhere.
fn spoken(script: &str) -> Option<String> {
    let lines = script.split('\n');
    let kept: Vec<&str> = lines
        .filter(|line| !line.trim_start().starts_with(';'))
        .collect();
    let clean = kept.iter().all(|line| !line.chars().any(char::is_control));
    clean.then(|| kept.join("\n"))
}

/// What a future comes to that never waits: everything is written to memory.
pub(crate) fn at_once<T>(future: impl Future<Output = T>) -> Result<T, Refusal> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Ok(value),
        Poll::Pending => Err(unsupported(&"the compiler waits for something")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The compiler writes names into comments as they are, and the solver ends a comment at a carriage return.
    #[test]
    fn who_names_an_attribute_says_nothing_to_the_solver() {
        let named = |name: &str| spoken(&format!("(a)\n; {name}\n(check-sat)\n"));
        let plain = Some("(a)\n(check-sat)\n".to_owned());
        assert_eq!(named("day"), plain);
        assert_eq!(named("x\r(assert false)(check-sat)(exit);"), plain);
        assert_eq!(spoken("(declare x) ; x\r(exit)\n"), None);
        assert_eq!(spoken("(a)\u{85}\n"), None);
    }
}
