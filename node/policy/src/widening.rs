//! Whether a bundle permits anything that another one does not: the verdict, and the part of it that
//! needs no solver.
//!
//! `NotWider` is a security claim: a trust file may let such a bundle decide with fewer signatures. So
//! everything of a bundle that bears on a permit is either compared here (limits of age, times, the
//! engines, the entities) or proved by `prover.rs` (policies and schema); whatever is neither ends in
//! `Unproven`. The fields of the manifest are named one by one: a new one does not compile until somebody
//! has said what its loosening is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::archive::{self, ENTITIES, Files, INPUT_SCHEMA, MANIFEST, SCHEMA};
use crate::consult::{ConsultTerms, WhenUnreachable};
use crate::error::{BundleError, clip};
use crate::json;
use crate::limits::{CREATED_AHEAD_S_MAX, PROOF_OPEN_MAX};
use crate::manifest::{ClassLimits, Manifest, WhenRestricted};
use crate::prover::{Question, Questions};
use crate::request::Verdict;
use crate::trust::Role;
use crate::validity::{Validity, WhenExpired};

/// Whether a bundle permits anything that the one before does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Widening {
    /// Proved: under equal circumstances it permits no request that the other one does not.
    NotWider,
    /// It permits more.
    Wider {
        /// What of its manifest is looser, in words. Empty where the policies are.
        looser: Vec<String>,
        /// A request that it permits and the other one does not, asked of both.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        counterexample: Option<Box<Counterexample>>,
    },
    /// Neither could be shown.
    Unproven {
        /// Why, by a stable word.
        reason: WhyUnproven,
        /// The same for people, with what would help.
        detail: String,
    },
}

/// Why nothing was proved. The words are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum WhyUnproven {
    /// No bundle has decided here: there is nothing to compare with.
    First,
    /// The bundle to compare with is damaged, and another one stands in for it.
    BaseDamaged,
    /// The bundle to compare with was for an emergency, or is past its end.
    BaseEnded,
    /// Nobody demands the proof, or enough keys signed: no time was spent on it.
    NotAsked,
    /// One of the two has another engine than Cedar.
    OtherEngine,
    /// Their entities differ.
    Entities,
    /// Their schemas differ in what requests or entities are.
    Schema,
    /// The policies may look at posture or age of the policy, and limits differ.
    PostureRead,
    /// The older bundle may refuse requests that reach too many of its entities.
    Reach,
    /// The symbolic compiler cannot express the policies.
    Unsupported,
    /// Too many kinds of request, or too long a question.
    TooLarge,
    /// The process that compiles the question failed.
    Prover,
    /// No solver that may be used.
    NoSolver,
    /// It took too long.
    SolverTimeout,
    /// The solver failed, or said what cannot be understood.
    SolverFailed,
    /// The solver does not know.
    SolverUnknown,
    /// The solver's counterexample is none when both bundles are asked.
    Unconfirmed,
}

impl WhyUnproven {
    /// Every reason, in the order of the documentation.
    pub const ALL: [Self; 17] = [
        Self::First,
        Self::BaseDamaged,
        Self::BaseEnded,
        Self::NotAsked,
        Self::OtherEngine,
        Self::Entities,
        Self::Schema,
        Self::PostureRead,
        Self::Reach,
        Self::Unsupported,
        Self::TooLarge,
        Self::Prover,
        Self::NoSolver,
        Self::SolverTimeout,
        Self::SolverFailed,
        Self::SolverUnknown,
        Self::Unconfirmed,
    ];

    /// The word in records and answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::BaseDamaged => "base_damaged",
            Self::BaseEnded => "base_ended",
            Self::NotAsked => "not_asked",
            Self::OtherEngine => "other_engine",
            Self::Entities => "entities",
            Self::Schema => "schema",
            Self::PostureRead => "posture_read",
            Self::Reach => "reach",
            Self::Unsupported => "unsupported",
            Self::TooLarge => "too_large",
            Self::Prover => "prover",
            Self::NoSolver => "no_solver",
            Self::SolverTimeout => "solver_timeout",
            Self::SolverFailed => "solver_failed",
            Self::SolverUnknown => "solver_unknown",
            Self::Unconfirmed => "unconfirmed",
        }
    }
}

/// A request that one bundle permits and the other does not, as both answered it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counterexample {
    /// Type and id of the principal.
    pub principal: (String, String),
    /// The action.
    pub action: String,
    /// Type and id of the resource.
    pub resource: (String, String),
    /// Attributes of the resource, which the node derives from its id.
    pub attributes: Value,
    /// Parameters of the action.
    pub params: Value,
    /// The remaining context.
    pub context: Value,
    /// What the entities are supposed to be; `None`: what the bundles say of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entities: Option<Value>,
    /// What the older bundle says.
    pub before: Verdict,
    /// The policies of the newer one that permit it.
    pub permitted_by: Vec<String>,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}::{:?} may do {} on {}::{:?}",
            self.principal.0, self.principal.1, self.action, self.resource.0, self.resource.1
        )?;
        let is_said = |value: &Value| value.as_object().is_some_and(|map| !map.is_empty());
        for (what, value) in [
            ("which has", &self.attributes),
            ("params", &self.params),
            ("context", &self.context),
        ] {
            if is_said(value) {
                write!(f, ", {what} {value}")?;
            }
        }
        if let Some(entities) = &self.entities {
            write!(f, ", supposing entities {entities}")?;
        }
        write!(f, ", by {}", self.permitted_by.join(", "))
    }
}

impl Widening {
    /// Nothing was proved.
    #[must_use]
    pub fn unproven(reason: WhyUnproven, detail: impl Into<String>) -> Self {
        Self::Unproven {
            reason,
            detail: detail.into(),
        }
    }

    /// The verdict in one word: `not_wider`, `wider`, or `unproven(…)` with the reason.
    #[must_use]
    pub fn word(&self) -> String {
        match self {
            Self::NotWider => "not_wider".to_owned(),
            Self::Wider { .. } => "wider".to_owned(),
            Self::Unproven { reason, .. } => format!("unproven({})", reason.as_str()),
        }
    }
}

impl fmt::Display for Widening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWider => f.write_str("proved: it permits nothing that is not permitted now"),
            Self::Wider {
                looser,
                counterexample,
            } => {
                f.write_str("it permits more")?;
                if !looser.is_empty() {
                    write!(f, ": {}", looser.join("; "))?;
                }
                match counterexample {
                    Some(found) => write!(f, ": {found}"),
                    None => Ok(()),
                }
            }
            Self::Unproven { reason, detail } => {
                write!(f, "not proved ({}): {detail}", reason.as_str())
            }
        }
    }
}

/// What can be said of two archives without a solver; nothing where the policies have to be proved.
///
/// `now_unix_ms` is the trusted time of who asks: a bundle made in the future would not age.
///
/// # Errors
/// [`BundleError`] where one of them is no bundle.
pub fn compare_limits(
    before: &[u8],
    after: &[u8],
    now_unix_ms: u64,
) -> Result<Option<Widening>, BundleError> {
    let (before, after) = (Side::read(before)?, Side::read(after)?);
    let looser = loosened(&before.manifest, &after.manifest, now_unix_ms);
    if !looser.is_empty() {
        return Ok(Some(Widening::Wider {
            looser,
            counterexample: None,
        }));
    }
    let cedar_alone = before.is_cedar_alone() && after.is_cedar_alone();
    if differs_in_time(&before.manifest, &after.manifest)
        && (!cedar_alone || before.may_read_posture() || after.may_read_posture())
    {
        return Ok(Some(Widening::unproven(
            WhyUnproven::PostureRead,
            "the limits of an action class or the bundle's times differ, and policies may look at `tidelock` \
             in the context: change the limits and the policies in two bundles",
        )));
    }
    if before.deciding() == after.deciding() && before.manifest.engine == after.manifest.engine {
        return Ok(Some(Widening::NotWider));
    }
    if !cedar_alone {
        return Ok(Some(Widening::unproven(
            WhyUnproven::OtherEngine,
            "policies in Rego differ or stand beside those that do: only Cedar can be proved",
        )));
    }
    if before.entities()? != after.entities()? {
        return Ok(Some(Widening::unproven(
            WhyUnproven::Entities,
            format!(
                "{ENTITIES} differs: who is what, and member of what, is not a matter of proof"
            ),
        )));
    }
    Ok(None)
}

struct Side {
    manifest: Manifest,
    files: Files,
}

impl Side {
    fn read(archive: &[u8]) -> Result<Self, BundleError> {
        let files = archive::read(archive)?;
        let manifest = Manifest::of(&files)?;
        Ok(Self { manifest, files })
    }

    fn is_cedar_alone(&self) -> bool {
        self.manifest.engine == "cedar"
    }

    /// The files that bear on a decision, all but the manifest, which is compared by its fields.
    fn deciding(&self) -> BTreeMap<&String, &Vec<u8>> {
        let decides = |path: &str| path != MANIFEST && !path.starts_with("tests/");
        self.files
            .iter()
            .filter(|(path, _)| decides(path))
            .collect()
    }

    /// Whether a policy could look at what the node says of itself: only where a schema lets it in.
    fn may_read_posture(&self) -> bool {
        let says = |path: &str| {
            self.files
                .get(path)
                .map(|text| String::from_utf8_lossy(text))
                // A name can be written in escapes too.
                .is_some_and(|text| text.contains("tidelock") || text.contains('\\'))
        };
        says(SCHEMA) || says(INPUT_SCHEMA)
    }

    /// The entities by their names; the order in which they and their parents are listed says nothing.
    fn entities(&self) -> Result<BTreeMap<String, Value>, BundleError> {
        let Some(bytes) = self.files.get(ENTITIES) else {
            return Ok(BTreeMap::new());
        };
        let listed = json::parse(bytes)
            .map_err(|error| BundleError::format(format!("{ENTITIES}: {error}")))?;
        let mut entities = BTreeMap::new();
        for entity in listed.as_array().into_iter().flatten() {
            let mut entity = entity.clone();
            if let Some(parents) = entity.get_mut("parents").and_then(Value::as_array_mut) {
                parents.sort_by_key(ToString::to_string);
            }
            let name = entity.get("uid").map(ToString::to_string);
            entities.insert(name.unwrap_or_default(), entity);
        }
        Ok(entities)
    }
}

/// How long after its making a bundle ends; `None`: never.
fn lifetime_ms(manifest: &Manifest) -> Option<u64> {
    let end = manifest.validity.expires_unix_ms?;
    Some(end.saturating_sub(manifest.created_unix_ms))
}

/// What of the manifest lets more be permitted, in words. Times count from the making of each bundle:
/// that a newer bundle is younger is what it is made for.
fn loosened(before: &Manifest, after: &Manifest, now_unix_ms: u64) -> Vec<String> {
    let Manifest {
        // Names, positions and versions decide nothing; which engine and files is compared elsewhere.
        name: _,
        domain: _,
        epoch: _,
        version: _,
        engine: _,
        min_node_version: _,
        files: _,
        // Texts of what `validity` and `created_unix_ms` hold.
        created_at: _,
        role: _,
        not_before: _,
        expires_at: _,
        // What stands in for this bundle is the one that it replaced, which decided before.
        min_fallback_epoch: _,
        // Action by action, below.
        classes: _,
        default_class: _,
        created_unix_ms,
        validity,
    } = after;
    let Validity {
        // Which keys had to sign it is judged where signatures are.
        role: _,
        not_before_unix_ms,
        expires_unix_ms,
        when_expired,
    } = validity;
    let mut looser = Vec::new();
    let ahead_ms = created_unix_ms.saturating_sub(now_unix_ms);
    if ahead_ms > CREATED_AHEAD_S_MAX * 1000 {
        looser.push(format!(
            "created_at lies {} hours ahead, and until then the bundle does not age",
            ahead_ms / 3_600_000
        ));
    }
    if not_before_unix_ms.unwrap_or(0) < before.validity.not_before_unix_ms.unwrap_or(0) {
        looser.push("not_before is earlier".to_owned());
    }
    // Not counted from the making: what is granted for a day would be renewed every day.
    match (before.validity.expires_unix_ms, *expires_unix_ms) {
        (Some(_), None) => looser.push("it does not expire".to_owned()),
        (Some(old), Some(new)) if new > old => {
            looser.push(format!("it expires {} s later", (new - old) / 1000));
        }
        _ => {}
    }
    if (before.validity.when_expired, *when_expired) == (WhenExpired::Close, WhenExpired::Restrict)
    {
        looser.push("when_expired is `restrict`, not `close`".to_owned());
    }
    for (action, old, new) in classes(before, after) {
        let ClassLimits {
            actions: _,
            stale_after_s,
            restrict_after_s,
            close_after_s,
            when_restricted,
            consult,
        } = new;
        for (limit, old, new) in [
            ("stale_after_s", old.stale_after_s, *stale_after_s),
            ("restrict_after_s", old.restrict_after_s, *restrict_after_s),
            ("close_after_s", old.close_after_s, *close_after_s),
        ] {
            if new > old {
                looser.push(format!("{action}: {limit} {new}, not {old}"));
            }
        }
        if old.when_restricted == WhenRestricted::Deny && *when_restricted != WhenRestricted::Deny {
            looser.push(format!("{action}: when_restricted is no longer `deny`"));
        }
        looser.extend(
            less_consulted(old.consult.as_ref(), consult.as_ref())
                .into_iter()
                .map(|what| format!("{action}: {what}")),
        );
    }
    looser
}

/// What lets more pass of the decision point that has to agree. Nothing that comes of its absence but an
/// earlier answer permits anything, and how long it is waited for does not either.
fn less_consulted(before: Option<&ConsultTerms>, after: Option<&ConsultTerms>) -> Vec<String> {
    let Some(old) = before else {
        return Vec::new();
    };
    let Some(ConsultTerms {
        upstream,
        deadline_ms: _,
        when_unreachable,
        allow_lifetime_s,
        // What denied is remembered as a deny or as nothing, and nothing permits nothing.
        deny_lifetime_s: _,
    }) = after
    else {
        return vec![format!("{} no longer has to agree", old.upstream)];
    };
    let mut looser = Vec::new();
    if *upstream != old.upstream {
        looser.push(format!("{upstream} has to agree, not {}", old.upstream));
    }
    if *when_unreachable == WhenUnreachable::Cached
        && old.when_unreachable != WhenUnreachable::Cached
    {
        looser.push("consult.when_unreachable is `cached`".to_owned());
    } else if *allow_lifetime_s > old.allow_lifetime_s {
        looser.push(format!(
            "consult.allow_lifetime_s {allow_lifetime_s}, not {}",
            old.allow_lifetime_s
        ));
    }
    looser
}

/// The limits of each action before and after, of those that both bundles have a class for. Actions
/// that neither names have the default class of each.
fn classes<'m>(
    before: &'m Manifest,
    after: &'m Manifest,
) -> Vec<(String, &'m ClassLimits, &'m ClassLimits)> {
    let both = [before, after].into_iter();
    let named: BTreeSet<&String> = both
        .flat_map(|manifest| manifest.classes.values())
        .flat_map(|class| &class.actions)
        .collect();
    let default = |manifest: &'m Manifest| manifest.classes.get(manifest.default_class.as_ref()?);
    let mut found: Vec<_> = named
        .into_iter()
        .filter_map(|action| {
            let (_, old) = before.class_of(action)?;
            let (_, new) = after.class_of(action)?;
            Some((format!("action {action}"), old, new))
        })
        .collect();
    if let (Some(old), Some(new)) = (default(before), default(after)) {
        found.push(("default class".to_owned(), old, new));
    }
    found
}

/// Whether posture can differ between the two at the same age.
fn differs_in_time(before: &Manifest, after: &Manifest) -> bool {
    let of = |manifest: &Manifest| {
        (
            manifest.role == Role::BreakGlass,
            manifest.validity.not_before_unix_ms,
            lifetime_ms(manifest),
            manifest.validity.when_expired,
        )
    };
    let limits = |class: &ClassLimits| {
        (
            class.stale_after_s,
            class.restrict_after_s,
            class.close_after_s,
            class.when_restricted,
        )
    };
    of(before) != of(after)
        || classes(before, after)
            .into_iter()
            .any(|(_, old, new)| limits(old) != limits(new))
}

/// What runs scripts: what the solver wrote, or why there is nothing.
pub type Solve<'a> = dyn FnMut(&str) -> Result<String, Widening> + 'a;

/// What tells whether a model, the solver's answer to the model script of this number, stands for a request
/// that is permitted newly.
pub type Confirm<'a> =
    dyn FnMut(&Question, usize, &str) -> Result<Option<Counterexample>, Widening> + 'a;

/// Asks a solver what [`questions`](crate::questions) found, and makes a verdict of the answers.
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
    Widening::unproven(
        WhyUnproven::SolverFailed,
        clip(&format!("the solver said `{said}`, which is no answer")),
    )
}
