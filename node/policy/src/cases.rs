//! A bundle's own tests: requests with the answer that its author expects.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::archive::Files;
use crate::error::BundleError;
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
    /// The first failures, each with file, name, expectation and outcome.
    pub failures: Vec<String>,
}

/// Tests of a bundle, read and checked for form.
pub(crate) struct Cases(Vec<(String, Case)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    request: CaseRequest,
    expect: Expect,
    /// When given, exactly the policies that must have determined the answer.
    #[serde(default)]
    policies: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseRequest {
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
struct Uid {
    r#type: String,
    id: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resource {
    r#type: String,
    id: String,
    #[serde(default)]
    attributes: Map<String, Value>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expect {
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

impl Cases {
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

    pub(crate) fn run(&self, engine: &dyn Engine) -> TestReport {
        let mut report = TestReport {
            passed: 0,
            failed: 0,
            failures: Vec::new(),
        };
        for (path, case) in &self.0 {
            let evaluation = engine.evaluate(&case.request.to_policy());
            let good = case.expect.fits(evaluation.verdict)
                && case.policies.as_ref().is_none_or(|expected| {
                    let mut expected = expected.clone();
                    expected.sort_unstable();
                    expected == evaluation.policies
                });
            if good {
                report.passed += 1;
                continue;
            }
            report.failed += 1;
            if report.failures.len() < FAILURES_LISTED_MAX {
                report.failures.push(failure(path, case, &evaluation));
            }
        }
        report
    }
}

fn failure(path: &str, case: &Case, evaluation: &Evaluation) -> String {
    let outcome = match evaluation.verdict {
        Verdict::Permit => "allow",
        Verdict::Forbid => "deny (forbid)",
        Verdict::NoMatch => "deny (no policy matches)",
        Verdict::Error => "error",
    };
    let mut text = format!(
        "{path}: `{}` expects {}, got {outcome} by [{}]",
        case.name,
        case.expect.word(),
        evaluation.policies.join(", ")
    );
    if let Some(expected) = &case.policies {
        text.push_str(&format!(", expected by [{}]", expected.join(", ")));
    }
    for error in &evaluation.errors {
        text.push_str(": ");
        text.push_str(error);
    }
    crate::error::clip(&text)
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
