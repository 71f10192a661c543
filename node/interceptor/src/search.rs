//! Searches: candidates out of the bundle, each judged as an action would be, none of them permitted.
//!
//! A search is bounded three times: by the candidates that one page judges, by the results that it
//! carries, and by the time that it takes. What is left is on the next page, whose token says where
//! the search goes on and for which question under which bundle; it is no secret and no authority.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tidelock_policy::{ActivePolicy, Posture};
use tidelock_segments::Sha256Hash;

use crate::{
    action::{Action, InvalidRequest, canonical_bytes, check_action_name, check_type, speaks_for},
    answer::{BundleInfo, RecordPosition},
    authzen::{Search, SearchFor, bad_token},
    caller::{Caller, Principal},
    limits::{MAX_SEARCH_CANDIDATES, SEARCH_BUDGET},
    normalise,
    reason::{Decision, Reason},
};

/// One result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum FoundOne {
    /// A subject or a resource.
    Entity {
        /// Its type.
        #[serde(rename = "type")]
        kind: String,
        /// Its id.
        id: String,
    },
    /// An action.
    Action {
        /// Its name.
        name: String,
    },
}

/// One page of a search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Who or what may.
    pub results: Vec<FoundOne>,
    /// For the next page; empty after the last one.
    pub next_token: String,
    /// Candidates judged for this page.
    pub judged: usize,
    /// The bundle that was searched.
    pub bundle: Option<BundleInfo>,
    /// The node's posture.
    pub posture: Posture,
    /// Where the search is recorded; none when it is summarised.
    pub record: Option<RecordPosition>,
    /// The summary window that it is counted in instead.
    pub window: Option<String>,
}

/// Why a search was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SearchRefused {
    /// It was not understood, or asks for what the caller may not ask for.
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    /// A quota is spent.
    #[error("a quota is spent")]
    RateLimited {
        /// When to try again.
        retry_after_ms: Option<u64>,
    },
    /// Another policy came into force before the page was full: some of it would be of either.
    #[error("the policy changed while it was searched, begin again")]
    PolicyChanged,
    /// It could not be recorded.
    #[error("the search could not be recorded")]
    Unrecorded(Reason),
}

impl SearchRefused {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invalid(_) => Reason::InvalidRequest.as_str(),
            Self::RateLimited { .. } => Reason::RateLimitExceeded.as_str(),
            Self::PolicyChanged => "POLICY_CHANGED",
            Self::Unrecorded(reason) => reason.as_str(),
        }
    }
}

/// Takes the outcome of one search, once.
pub type SearchDone = Box<dyn FnOnce(Result<Found, SearchRefused>) + Send>;

/// What one judged candidate came to.
pub(crate) struct Judged {
    pub(crate) decision: Decision,
    pub(crate) reason: Reason,
    pub(crate) retry_after_ms: Option<u64>,
}

/// A page before it is recorded.
pub(crate) struct Page {
    pub(crate) results: Vec<FoundOne>,
    pub(crate) next_token: String,
    pub(crate) judged: usize,
    pub(crate) from: usize,
    pub(crate) candidates: usize,
}

/// Checks that the caller may ask this at all, whatever the candidates are.
pub(crate) fn check(search: &Search, caller: &Caller) -> Result<(), InvalidRequest> {
    let own = caller.principal()?;
    let subject = match &search.subject.1 {
        Some(id) => Principal::new(&search.subject.0, id)?,
        // Subjects are looked for: they are others.
        None => Principal::new(&search.subject.0, "any")?,
    };
    speaks_for(subject, &own, caller)?;
    check_type("resource type", &search.resource.0)?;
    if let Some(name) = &search.action {
        check_action_name(name)?;
    }
    if let Some(id) = &search.resource.1 {
        normalise::normalise(&search.resource.0, id)?;
    }
    Ok(())
}

/// Names a search under a bundle: what a page token belongs to.
fn question(search: &Search, bundle: &str) -> Result<Sha256Hash, InvalidRequest> {
    let question = json!({
        "wanted": search.wanted.as_str(),
        "subject": search.subject,
        "action": search.action,
        "resource": search.resource,
        "params": search.params,
        "context": search.context,
        "bundle": bundle,
    });
    Ok(Sha256Hash::of(&canonical_bytes(&question)?))
}

fn token(question: &Sha256Hash, offset: usize) -> String {
    // As many digits as tell two searches of one caller apart; nothing depends on more.
    let mark: String = question.to_string().chars().skip(7).take(24).collect();
    format!("{mark}.{offset}")
}

fn offset(search: &Search, question: &Sha256Hash) -> Result<usize, InvalidRequest> {
    let Some(given) = &search.token else {
        return Ok(0);
    };
    given
        .rsplit_once('.')
        .and_then(|(_, offset)| offset.parse().ok())
        // One spelling: the token that would be given for it.
        .filter(|offset| token(question, *offset) == *given)
        .ok_or_else(bad_token)
}

/// Judges candidates until the page is full.
pub(crate) fn page(
    search: &Search,
    caller: &Caller,
    policy: Option<&ActivePolicy>,
    now: &dyn Fn() -> Duration,
    judge: &mut dyn FnMut(&Action) -> Judged,
) -> Result<Page, SearchRefused> {
    let bundle = policy.map(ActivePolicy::bundle);
    let candidates: Vec<&str> = match (bundle, search.wanted) {
        (None, _) => Vec::new(),
        (Some(bundle), SearchFor::Subject) => bundle.entity_ids(&search.subject.0),
        (Some(bundle), SearchFor::Resource) => bundle.entity_ids(&search.resource.0),
        (Some(bundle), SearchFor::Action) => bundle.action_names(),
    };
    let content = bundle.map_or("", |bundle| bundle.content_id().as_str());
    let question = question(search, content)?;
    let from = offset(search, &question)?;
    let begun = now();
    let mut page = Page {
        results: Vec::new(),
        next_token: String::new(),
        judged: 0,
        from,
        candidates: candidates.len(),
    };
    for (at, candidate) in candidates.iter().enumerate().skip(from) {
        // What cannot be named takes its time too, and each page comes further by one at least.
        let seen = at - from;
        let is_full = page.results.len() >= search.limit
            || seen >= MAX_SEARCH_CANDIDATES
            || (seen > 0 && now().saturating_sub(begun) > SEARCH_BUDGET);
        if is_full {
            page.next_token = token(&question, at);
            break;
        }
        // What requests cannot name is no result: nobody could ask for it.
        let Ok(action) = Action::from_parts(search.with(candidate), caller) else {
            continue;
        };
        if search.wanted == SearchFor::Resource && action.resource_id() != *candidate {
            continue;
        }
        let judged = judge(&action);
        if judged.reason == Reason::RateLimitExceeded {
            if page.judged == 0 {
                return Err(SearchRefused::RateLimited {
                    retry_after_ms: judged.retry_after_ms,
                });
            }
            page.next_token = token(&question, at);
            break;
        }
        page.judged += 1;
        if judged.decision == Decision::Allow {
            page.results.push(match search.wanted {
                SearchFor::Action => FoundOne::Action {
                    name: (*candidate).to_owned(),
                },
                SearchFor::Subject => entity(&search.subject.0, candidate),
                SearchFor::Resource => entity(&search.resource.0, candidate),
            });
        }
    }
    Ok(page)
}

fn entity(kind: &str, id: &str) -> FoundOne {
    FoundOne::Entity {
        kind: kind.to_owned(),
        id: id.to_owned(),
    }
}

/// What the record says of a search and its page. Texts are redacted by the record's own rules.
pub(crate) fn described(search: &Search, page: &Page) -> Value {
    let entity = |(kind, id): &(String, Option<String>)| match id {
        Some(id) => json!({"type": kind, "id": id}),
        None => json!({"type": kind}),
    };
    json!({
        "search": search.wanted.as_str(),
        "principal": entity(&search.subject),
        "action": search.action,
        "resource": entity(&search.resource),
        "params": search.params,
        "context": search.context,
        "candidates": page.candidates,
        "from": page.from,
        "judged": page.judged,
        "found": page.results.len(),
    })
}
