//! A bundle's own tests: requests with the answer that its author expects.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::archive::Files;
use crate::cedar::CedarEngine;
use crate::error::{BundleError, clip};
use crate::json;
use crate::limits::{FAILURES_LISTED_MAX, TESTS_MAX};
use crate::request::{Engine, Evaluation, PolicyRequest, Verdict};

/// How a bundle's own tests went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TestReport {
    /// Tests that came out as expected.
    pub passed: usize,
    /// Tests that did not.
    pub failed: usize,
    /// The first failures.
    pub failures: Vec<CaseFailure>,
    /// Of which policies `uncovered` speaks.
    pub coverage: Coverage,
    /// Cedar policies that determined the answer of no test that passed, sorted: what they say may be
    /// changed without any test noticing. `None` where coverage is not measured: an empty list would
    /// say that all is covered.
    pub uncovered: Option<Vec<String>>,
}

/// Of which policies a report knows whether a test covers them. The ids in a Rego decision are texts that
/// its rules choose, and the register machine does not tell which rules it entered: a decision that names
/// a rule says nothing of whether the rule was at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Coverage {
    /// Of all: they are Cedar's.
    #[serde(rename = "measured")]
    Measured,
    /// Of the Cedar policies; there are Rego rules beside them.
    #[serde(rename = "cedar only")]
    CedarOnly,
    /// Of none: they are Rego's.
    #[serde(rename = "not measured")]
    NotMeasured,
}

/// A test that did not come out as expected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CaseFailure {
    /// File of the archive that the test stands in.
    pub file: String,
    /// Its name.
    pub name: String,
    /// Why its author expects what it expects.
    pub because: Option<String>,
    /// What it expects.
    pub expected: Outcome,
    /// What it got.
    pub got: Outcome,
    /// What went wrong in the evaluation.
    pub errors: Vec<String>,
}

/// An answer, as tests speak of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// `allow`, `deny` or `error`; of what was got, with the reason of a deny.
    pub answer: &'static str,
    /// The policies that determined it; `None` where the test does not say.
    pub policies: Option<Vec<String>>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.answer)?;
        match &self.policies {
            Some(policies) => write!(f, " by [{}]", policies.join(", ")),
            None => Ok(()),
        }
    }
}

impl fmt::Display for CaseFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            name,
            expected,
            got,
            ..
        } = self;
        write!(f, "{file}: `{name}` expects {expected}, got {got}")?;
        self.errors
            .iter()
            .try_for_each(|error| write!(f, ": {error}"))
    }
}

/// Tests of a bundle, read and checked for form.
pub(crate) struct Cases(Vec<(String, Case)>);

#[derive(Deserialize)]
#[serde(try_from = "RawCase")]
pub(crate) struct Case {
    name: String,
    because: Option<String>,
    given: CaseRequest,
    expect: Expect,
    policies: Option<Vec<String>>,
}

/// A test as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename = "Case")]
struct RawCase {
    name: String,
    /// Why the author expects it; shown when the test fails.
    #[serde(default)]
    because: Option<String>,
    #[serde(default, deserialize_with = "there")]
    given: Option<CaseRequest>,
    /// The older word for `given`.
    #[serde(default, deserialize_with = "there")]
    request: Option<CaseRequest>,
    expect: Expect,
    /// When given, exactly the policies that must have determined the answer.
    #[serde(default)]
    policies: Option<Vec<String>>,
}

/// What stands there must be one: `null` is not the same as nothing.
fn there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<CaseRequest>, D::Error> {
    CaseRequest::deserialize(deserializer).map(Some)
}

impl TryFrom<RawCase> for Case {
    type Error = String;

    fn try_from(raw: RawCase) -> Result<Self, String> {
        let given = match (raw.given, raw.request) {
            (Some(given), None) | (None, Some(given)) => given,
            (Some(_), Some(_)) => {
                return Err(format!(
                    "`{}` has both `given` and `request`, which is the older word for it: remove one",
                    clip(&raw.name)
                ));
            }
            (None, None) => return Err(format!("`{}` has no `given`", clip(&raw.name))),
        };
        Ok(Self {
            name: raw.name,
            because: raw.because,
            given,
            expect: raw.expect,
            policies: raw.policies,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CaseRequest {
    principal: Uid,
    action: String,
    resource: Resource,
    #[serde(default)]
    params: Value,
    #[serde(default)]
    context: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Uid {
    r#type: String,
    id: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Resource {
    r#type: String,
    id: String,
    #[serde(default)]
    attributes: Map<String, Value>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Expect {
    /// A policy permits and none forbids.
    Allow,
    /// No policy permits, or one forbids. An evaluation error is not this: a test that errs by
    /// mistake must not pass for a deny.
    Deny,
    /// The evaluation errs, which denies as well.
    Error,
}

impl Expect {
    fn fits(self, verdict: Verdict) -> bool {
        match self {
            Self::Allow => verdict == Verdict::Permit,
            Self::Deny => matches!(verdict, Verdict::Forbid | Verdict::NoMatch),
            Self::Error => verdict == Verdict::Error,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Error => "error",
        }
    }
}

impl Case {
    fn is_met_by(&self, evaluation: &Evaluation) -> bool {
        self.expect.fits(evaluation.verdict)
            && self.policies.as_ref().is_none_or(|expected| {
                let mut expected = expected.clone();
                expected.sort_unstable();
                expected == evaluation.policies
            })
    }
}

/// One of a bundle's own tests, to be put to the engine that serves.
pub struct OwnCase {
    file: String,
    case: Case,
}

impl fmt::Debug for OwnCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.case.name)
    }
}

impl OwnCase {
    /// What is asked.
    #[must_use]
    pub fn request(&self) -> PolicyRequest {
        self.case.given.to_policy()
    }

    /// Whether this is the answer that its author expects.
    ///
    /// # Errors
    /// [`CaseFailure`]: it is not.
    pub fn judge(&self, evaluation: Evaluation) -> Result<(), Box<CaseFailure>> {
        match self.case.is_met_by(&evaluation) {
            true => Ok(()),
            false => Err(Box::new(failure(&self.file, &self.case, evaluation))),
        }
    }
}

impl Cases {
    /// At most so many of them, from all over.
    pub(crate) fn some(self, most: usize) -> Vec<OwnCase> {
        let step = self.0.len().div_ceil(most.max(1)).max(1);
        let some = self.0.into_iter().step_by(step);
        some.map(|(file, case)| OwnCase { file, case }).collect()
    }

    pub(crate) fn read(files: &Files) -> Result<Self, BundleError> {
        let mut cases = Vec::new();
        for (path, bytes) in files.iter().filter(|(path, _)| path.starts_with("tests/")) {
            let read: Vec<Case> = json::parse_as(bytes)
                .map_err(|error| BundleError::format(format!("{path}: {error}")))?;
            cases.extend(read.into_iter().map(|case| (path.clone(), case)));
            if cases.len() > TESTS_MAX {
                return Err(BundleError::format(format!("more than {TESTS_MAX} tests")));
            }
        }
        Ok(Self(cases))
    }

    /// Runs all tests against the engine of a bundle. Of its lanes the Cedar one is measured.
    pub(crate) fn run(
        &self,
        engine: &dyn Engine,
        cedar: Option<&CedarEngine>,
        rego: bool,
    ) -> TestReport {
        let mut report = TestReport {
            passed: 0,
            failed: 0,
            failures: Vec::new(),
            coverage: match (cedar.is_some(), rego) {
                (true, false) => Coverage::Measured,
                (true, true) => Coverage::CedarOnly,
                (false, _) => Coverage::NotMeasured,
            },
            uncovered: None,
        };
        let mut covered = BTreeSet::new();
        for (path, case) in &self.0 {
            let request = case.given.to_policy();
            let evaluation = engine.evaluate(&request);
            if case.is_met_by(&evaluation) {
                report.passed += 1;
                match cedar {
                    // A Rego decision may name a Cedar policy: only the lane's own word counts, where it
                    // is the answer.
                    Some(cedar) if rego => {
                        let own = cedar.evaluate(&request);
                        if own.verdict == evaluation.verdict {
                            covered.extend(own.policies);
                        }
                    }
                    Some(_) => covered.extend(evaluation.policies),
                    None => {}
                }
                continue;
            }
            report.failed += 1;
            if report.failures.len() < FAILURES_LISTED_MAX {
                report.failures.push(failure(path, case, evaluation));
            }
        }
        report.uncovered = cedar.map(|cedar| {
            let ids = cedar.policy_ids().iter();
            ids.filter(|id| !covered.contains(*id)).cloned().collect()
        });
        report
    }
}

fn failure(path: &str, case: &Case, evaluation: Evaluation) -> CaseFailure {
    let answer = match evaluation.verdict {
        Verdict::Permit => "allow",
        Verdict::Forbid => "deny (forbid)",
        Verdict::NoMatch => "deny (no policy matches)",
        Verdict::Error => "error",
    };
    // Of a failure that crosses into records and answers, every part is bounded.
    let bounded = |texts: &[String]| -> Vec<String> {
        let some = texts.iter().take(FAILURES_LISTED_MAX);
        some.map(|text| clip(text)).collect()
    };
    CaseFailure {
        file: path.to_owned(),
        name: clip(&case.name),
        because: case.because.as_deref().map(clip),
        expected: Outcome {
            answer: case.expect.word(),
            policies: case.policies.as_deref().map(bounded),
        },
        got: Outcome {
            answer,
            policies: Some(bounded(&evaluation.policies)),
        },
        errors: bounded(&evaluation.errors),
    }
}

impl CaseRequest {
    fn to_policy(&self) -> PolicyRequest {
        PolicyRequest {
            principal_type: self.principal.r#type.clone(),
            principal_id: self.principal.id.clone(),
            action: self.action.clone(),
            resource_type: self.resource.r#type.clone(),
            resource_id: self.resource.id.clone(),
            resource_attributes: self.resource.attributes.clone(),
            params: self.params.clone(),
            context: self.context.clone(),
        }
    }
}
