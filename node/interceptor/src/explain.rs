//! Explanations: asked of the policies after the answer was found, on the engines' own threads.

use std::sync::{Arc, Mutex, PoisonError};

use tidelock_policy::{
    ActivePolicy, Engine, Evaluation, Failure, PolicyNote, PolicyRequest, REGO_ENTRY, Verdict,
    VerifiedBundle, limits::COMPILE_STACK_BYTES,
};

use crate::{
    answer::{Explanation, Provenance},
    engines::{Engines, Evaluated},
    limits::MAX_POLICY_ID_BYTES,
    reason::Reason,
    record::Findings,
    redact,
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

/// What must be otherwise where this is the ground of a deny. Where no Cedar policy is called so, it is a
/// text in `deny` of the Rego decision, which a rule may have made of the request.
fn without(ground: &str, bundle: Option<&VerifiedBundle>) -> String {
    match bundle {
        Some(bundle) if bundle.has_rego() && !bundle.is_cedar_policy(ground) => {
            let ground = redact::message(ground, MAX_POLICY_ID_BYTES);
            format!("`deny` of {REGO_ENTRY} must not hold `{ground}`")
        }
        _ => format!("forbid {ground} must not apply"),
    }
}

/// The ways in which a request that nothing permits would be permitted: any one is enough.
fn permitting(nearest: &[PolicyNote], bundle: Option<&VerifiedBundle>) -> Vec<String> {
    let mut ways: Vec<String> = nearest
        .iter()
        .map(|note| {
            let needs: Vec<&str> = note.unmet.iter().map(|u| u.needs.as_str()).collect();
            format!("for {} to permit: {}", note.policy, needs.join("; "))
        })
        .collect();
    let in_rego = bundle.is_some_and(VerifiedBundle::has_rego);
    let in_cedar = bundle.is_none_or(VerifiedBundle::has_cedar);
    if ways.is_empty() && in_cedar {
        let kind = if in_rego { "Cedar permit" } else { "permit" };
        ways.push(format!("the bundle needs a {kind} for this action"));
    }
    if in_rego {
        ways.push(format!(
            "for the Rego lane to permit: `allow` of {REGO_ENTRY} must be true; no rule made it so with the \
             request as `input` and the bundle's data as `data`, and which conditions of the rules did not \
             hold cannot be told"
        ));
    }
    ways
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
            .map(|ground| without(ground, policy.map(|policy| policy.bundle())))
            .collect(),
        Reason::NoMatch => permitting(&nearest, policy.map(|policy| policy.bundle())),
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tidelock_policy::{
        BundleBuilder, Unmet, template,
        testing::{Authority, template_builder},
    };

    use super::*;

    const CREATED: u64 = 1_769_860_800_000;

    /// A bundle for `fs.read` whose Cedar lane, if it has one, has a permit and a forbid.
    fn bundle(engine: &str) -> VerifiedBundle {
        let authority = Authority::new("test", 1).unwrap();
        if engine == "cedar" {
            let template = template_builder("x", "test", CREATED).unwrap();
            return authority.load(template).unwrap();
        }
        let files = template("x", "test", CREATED).unwrap();
        let mut manifest: Value = serde_json::from_slice(&files[0].1).unwrap();
        manifest["engine"] = json!(engine);
        let mut builder = BundleBuilder::new()
            .file("manifest.json", manifest.to_string().into())
            .file(
                "input-schema.json",
                br#"{"format": 1, "actions": {"fs.read": {"principal": ["Agent"], "resource": ["File"]}}}"#
                    .to_vec(),
            )
            .file(
                "policies/main.rego",
                b"package tidelock\n\ndecision := {\"allow\": false}\n".to_vec(),
            );
        if engine == "cedar+rego" {
            builder = builder
                .file(
                    "schema.cedarschema",
                    b"entity Agent; entity File; action \"fs.read\" appliesTo { principal: [Agent], resource: [File] };"
                        .to_vec(),
                )
                .file(
                    "policies/base.cedar",
                    b"@id(\"guard\") forbid (principal, action, resource);".to_vec(),
                );
        }
        authority.load(builder).unwrap()
    }

    #[test]
    fn of_a_deny_in_rego_the_text_is_the_ground_and_of_one_in_cedar_the_forbid() {
        let [cedar, rego, both] = ["cedar", "rego", "cedar+rego"].map(bundle);
        let said = "`deny` of data.tidelock.decision must not hold `secrets`";
        assert_eq!(without("secrets", Some(&rego)), said);
        assert_eq!(without("secrets", Some(&both)), said);
        // A rule may quote the request.
        let quoting = without("password=hunter2", Some(&rego));
        assert!(!quoting.contains("hunter2"), "{quoting}");
        // The controls: what Cedar forbids.
        for bundle in [&both, &cedar] {
            assert_eq!(
                without("guard", Some(bundle)),
                "forbid guard must not apply"
            );
        }
    }

    #[test]
    fn where_no_rule_in_rego_allowed_what_was_asked_is_told_and_no_permit_demanded() {
        let [cedar, rego, both] = ["cedar", "rego", "cedar+rego"].map(bundle);
        let of_rego = |said: &str| {
            said.starts_with("for the Rego lane to permit: `allow` of data.tidelock.decision")
                && ["`input`", "`data`", "cannot be told"]
                    .iter()
                    .all(|word| said.contains(word))
        };
        let said = permitting(&[], Some(&rego));
        assert!(said.len() == 1 && of_rego(&said[0]), "{said:?}");
        // Beside Cedar, each lane's way is told.
        let said = permitting(&[], Some(&both));
        assert_eq!(said[0], "the bundle needs a Cedar permit for this action");
        assert!(said.len() == 2 && of_rego(&said[1]), "{said:?}");
        let near = PolicyNote {
            policy: "reads".to_owned(),
            unmet: vec![Unmet {
                part: "when",
                needs: "when { false }".to_owned(),
                errored: false,
            }],
        };
        let said = permitting(std::slice::from_ref(&near), Some(&both));
        assert_eq!(said[0], "for reads to permit: when { false }");
        assert!(said.len() == 2 && of_rego(&said[1]), "{said:?}");
        // The controls: Cedar alone has no word of Rego.
        assert_eq!(
            permitting(&[], Some(&cedar)),
            ["the bundle needs a permit for this action"]
        );
        assert_eq!(
            permitting(&[near], Some(&cedar)),
            ["for reads to permit: when { false }"]
        );
    }
}
