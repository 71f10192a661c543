//! What a bundle says of the decision point that a class of actions is referred to.

use serde::{Deserialize, Serialize};

use crate::archive::is_name;
use crate::limits::{CONSULT_DEADLINE_MS_MAX, CONSULT_DEADLINE_MS_MIN, CONSULT_LIFETIME_S_MAX};

/// What an action comes to that the local policies permit while its decision point cannot be reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenUnreachable {
    /// It is denied.
    #[default]
    Deny,
    /// It waits: neither allowed nor denied.
    Hold,
    /// The decision point's last answer to the same question serves, if it is within its lifetime; without
    /// one the action is denied. Loud: `doctor` shows it.
    Cached,
}

/// How a class of actions is referred to an upstream decision point, which can turn a local permit into a
/// deny or a hold and nothing else into anything (ruling 17).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsultTerms {
    /// Name of the upstream, as the node's config has it.
    pub upstream: String,
    /// How long one decision waits for its answer, in milliseconds.
    pub deadline_ms: u64,
    /// What its absence means.
    #[serde(default)]
    pub when_unreachable: WhenUnreachable,
    /// For how long an answer that allows may serve again, in seconds; 0: never.
    #[serde(default)]
    pub allow_lifetime_s: u64,
    /// For how long an answer that denies is remembered, in seconds; 0: not at all.
    #[serde(default)]
    pub deny_lifetime_s: u64,
}

impl ConsultTerms {
    /// What is wrong with the terms of this class.
    pub(crate) fn problems(&self, class: &str) -> Vec<String> {
        let mut problems = Vec::new();
        if !is_name(&self.upstream) {
            problems.push(format!(
                "class `{class}`: consult.upstream must be 1 to 63 of letters, digits, `.`, `_`, `-`"
            ));
        }
        if !(CONSULT_DEADLINE_MS_MIN..=CONSULT_DEADLINE_MS_MAX).contains(&self.deadline_ms) {
            problems.push(format!(
                "class `{class}`: consult.deadline_ms must be {CONSULT_DEADLINE_MS_MIN} to \
                 {CONSULT_DEADLINE_MS_MAX}"
            ));
        }
        for (key, lifetime_s) in [
            ("allow_lifetime_s", self.allow_lifetime_s),
            ("deny_lifetime_s", self.deny_lifetime_s),
        ] {
            if lifetime_s > CONSULT_LIFETIME_S_MAX {
                problems.push(format!(
                    "class `{class}`: consult.{key} must be at most {CONSULT_LIFETIME_S_MAX}"
                ));
            }
        }
        // One without the other is a mistake of whoever thought that it does something.
        if (self.when_unreachable == WhenUnreachable::Cached) != (self.allow_lifetime_s > 0) {
            problems.push(format!(
                "class `{class}`: consult.when_unreachable `cached` and an allow_lifetime_s above 0 \
                 go together"
            ));
        }
        problems
    }
}
