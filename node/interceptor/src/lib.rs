//! From the bytes of a request to a decision, a durable record and a permit.
//!
//! What this crate is: the one way to an allow. [`Interceptor::decide`] parses strictly into an
//! [`Action`], charges the principal's quota, asks the active policy under the posture of the
//! moment, redacts, records, and only when the record is durable makes a [`Permit`] (INV-14). Every
//! early exit is a deny with a [`Reason`], and is recorded or counted.
//!
//! What it is not: it opens no socket and no file, authenticates nobody, and executes nothing. Its
//! only threads are the few that engines run on, where decisions go on to their records, and the one
//! that watches them, so that an engine without an end delays nobody for long. Time comes from a [`Clock`], records go to a [`Recorder`], policies come from a closure.
//!
//! Where to start: [`Interceptor`], then `action.rs` (what a request is), `record.rs` (what is
//! recorded; the layout is in `docs/src/records.md`) and `redact.rs`.

mod action;
mod answer;
mod authzen;
mod caller;
mod clock;
mod consult;
mod engines;
mod envoy;
mod explain;
mod interceptor;
mod json;
pub mod limits;
mod normalise;
mod pending;
mod permit;
mod probe;
mod quotas;
mod reason;
mod record;
mod recorder;
mod redact;
mod replay;
mod report;
mod search;
mod stats;
mod summary;
pub mod testing;

pub use action::{Action, InvalidCode, InvalidRequest};
pub use answer::{
    Answer, BundleInfo, Done, Explanation, Mode, Outcome, Provenance, RecordPosition,
};
pub use authzen::{Evaluation, Evaluations, Search, SearchFor, Semantic};
pub use caller::{Caller, Principal, StatedBy};
pub use clock::{Clock, ThreadCpu};
pub use consult::{
    AnswerDone, ConsultCount, ConsultFailure, ConsultStats, Consulted, Heard, KeptAnswer,
    KeptAnswers, Question, UpstreamAnswer, UpstreamIdentity, UpstreamStats, Upstreams,
    VerifySigned,
};
pub use envoy::{Check, Proxied, ProxyTerms, ProxyTermsError, Subject};
pub use interceptor::{
    Ask, Interceptor, InterceptorConfig, InterceptorConfigError, Pending, PolicySource,
};
pub use json::parse as strict_json;
pub use normalise::ResourceError;
pub use permit::Permit;
pub use probe::ProbeFault;
pub use quotas::{Bucket, BucketStats, QuotaRates};
pub use reason::{Decision, Reason};
pub use recorder::{AppendDone, Recorder};
pub use redact::{redact, redact_text};
pub use replay::{NotReplayable, recorded_request};
pub use report::{ActionOutcome, EarlierRecords, History, ReportDone, ReportRefused, Reported};
pub use search::{Found, FoundOne, SearchDone, SearchRefused};
pub use stats::Stats;
pub use tidelock_policy::Posture;
