//! Signed policy bundles, and the decision whether one allows an action.
//!
//! A bundle is a deterministic archive of manifest, policies in Cedar, in Rego or in both, schema, entities, data and
//! tests, with detached signatures. [`VerifiedBundle::load`] turns bytes into a bundle that may decide;
//! [`Slots`] keeps the active and the last known good one, forward-only; [`Engine::evaluate`] answers
//! one [`PolicyRequest`]; [`posture()`] says what the age of the bundle still permits.
//!
//! What this crate is not: it opens no socket, reads no clock, knows no peers and no audit log. Time
//! is an argument, storage a trait, transport somebody else's. It answers what the policies say, not
//! whether the action happens: quota, posture gate, record and permit belong to the interceptor.
//!
//! Start reading in `bundle.rs` (every check between bytes and a policy that decides), then
//! `slots.rs` (what survives a restart), then `cedar.rs` and `rego.rs` (what a request costs). The bundle format
//! for authors is described in the book, in `policy.md`.

mod archive;
mod aside;
mod bundle;
mod cases;
mod cedar;
mod chain;
mod consult;
mod contents;
mod diff;
mod error;
mod explain;
mod freshness;
mod input_schema;
mod json;
pub mod limits;
mod manifest;
mod nesting;
mod opa;
mod package;
mod posture;
mod rego;
mod rego_builtins;
mod rego_host;
mod rego_pattern;
mod rego_program;
mod rego_rewrite;
mod rego_source;
mod rego_text;
mod rego_walk;
mod release;
mod request;
pub mod schemas;
mod scope;
mod signed;
mod slots;
mod template;
pub mod testing;
mod trust;
mod validity;
mod values;

pub use archive::{DATA, ENTITIES, INPUT_SCHEMA, LINKS, MANIFEST, SCHEMA};
pub use aside::{AsideCause, SetAside};
pub use bundle::{
    BundleBuilder, Examined, Inspection, LoadContext, VerifiedBundle, build_dir, examine, inspect,
    run_tests, signed_manifest, vouched,
};
pub use cases::{CaseFailure, Coverage, Outcome, OwnCase, TestReport};
pub use cedar::CedarEngine;
pub use chain::{Extended, NewestTrust, TRUST_NEWEST_SLOT, TRUST_ORIGIN, TRUST_SLOT, TrustChain};
pub use consult::{ConsultTerms, WhenUnreachable};
pub use contents::Contents;
pub use diff::{Changes, Difference, difference};
pub use error::{ActivateError, BuildError, BundleError, KeyError, StatementError};
pub use explain::{PolicyNote, Unmet};
pub use freshness::{FRESHNESS_ORIGIN, Freshness};
pub use manifest::{ClassLimits, Manifest, WhenRestricted};
pub use opa::{OpaError, OpaFile, OpaFiles, OpaImport, OpaKey, OpaProblem, OpaReport, import_opa};
pub use package::{ContentId, Package, decode_signature, sign};
pub use posture::{Posture, posture};
pub use rego::{REGO_ENTRY, RegoEngine};
pub use release::{ReleaseError, ReleaseStep, VerifiedRelease, lock_fingerprint, verify_release};
pub use request::{Engine, Evaluation, Failure, Lanes, NODE_MEMBER, PolicyRequest, Verdict};
pub use scope::{Joined, ScopeIndex};
pub use semver::Version;
pub use signed::{HintedSignature, SignedDocument, is_signed_document};
pub use slots::{
    Activation, ActivationKind, ActivePolicy, Floor, LoadPackage, NotRead, Reverted, SlotFault,
    SlotStorage, Slots, Source, Standby,
};
pub use template::{Starter, starter, template};
pub use trust::{ActivationRules, BlockOn, KeyInfo, Quorum, Role, TrustError, TrustFile};
pub use validity::{Validity, WhenExpired};
