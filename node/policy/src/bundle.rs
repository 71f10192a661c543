//! Loading a bundle: every check that stands between bytes and a policy that decides.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use semver::Version;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::archive::{
    self, DATA, DATA_DIR, ENTITIES, Files, INPUT_SCHEMA, LINKS, MANIFEST, POLICIES_DIR, SCHEMA,
    is_name,
};
use crate::cases::{Cases, OwnCase, TestReport};
use crate::cedar::CedarEngine;
use crate::error::{BuildError, BundleError, clip};
use crate::explain::PolicyNote;
use crate::json;
use crate::limits::{
    AGE_S_MAX, COMPILE_STACK_BYTES, FILE_BYTES_MAX, WARNINGS_LISTED_MAX, WORKER_COMPILE_STACK_BYTES,
};
use crate::manifest::{ClassLimits, Manifest, rfc3339};
use crate::package::{ContentId, Package, sha256};
use crate::posture::Posture;
use crate::rego::{RegoEngine, rego_name};
use crate::request::{Engine, Evaluation, Failure, Lanes, NODE_MEMBER, PolicyRequest, error_text};
use crate::trust::{Role, Signed, TrustFile};

/// What the node is, as far as a bundle may ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadContext {
    domain: String,
    node_version: Version,
}

impl LoadContext {
    /// Domain of the node and its version, for instance `env!("CARGO_PKG_VERSION")`.
    ///
    /// # Errors
    /// [`BundleError::Format`] if the domain is not a name or the version not a semantic version.
    pub fn new(domain: &str, node_version: &str) -> Result<Self, BundleError> {
        if !is_name(domain) {
            return Err(BundleError::format(format!("`{domain}` is not a domain")));
        }
        let node_version = Version::parse(node_version)
            .map_err(|error| BundleError::format(format!("node version: {error}")))?;
        Ok(Self {
            domain: domain.to_owned(),
            node_version,
        })
    }

    /// The domain.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The version.
    #[must_use]
    pub fn node_version(&self) -> &Version {
        &self.node_version
    }
}

/// A bundle that passed every check: enough distinct trusted signatures, digests, domain, node
/// version, compiler, schema, its own tests. Only [`load`](Self::load) makes one.
///
/// ```compile_fail
/// // No part can be put together by hand.
/// let bundle = tidelock_policy::VerifiedBundle { };
/// ```
///
/// ```compile_fail
/// # fn demo(package: tidelock_policy::Package) {
/// // A package does not turn into one without a trust file.
/// let bundle: tidelock_policy::VerifiedBundle = package.into();
/// # }
/// ```
pub struct VerifiedBundle {
    package: Package,
    content_id: ContentId,
    manifest: Manifest,
    signers: Vec<String>,
    compiled: Arc<Compiled>,
}

impl fmt::Debug for VerifiedBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifiedBundle")
            .field("name", &self.manifest.name)
            .field("epoch", &self.manifest.epoch)
            .field("content_id", &self.content_id)
            .field("signers", &self.signers)
            .finish_non_exhaustive()
    }
}

impl VerifiedBundle {
    /// Verifies and compiles a package. Signatures come first: nothing of an archive is parsed
    /// before enough trusted keys have vouched for its bytes.
    ///
    /// INV-06: the outcome depends on the arguments alone. There is no clock and no network in here.
    ///
    /// # Errors
    /// The first check that fails, as [`BundleError`].
    pub fn load(
        package: Package,
        trust: &TrustFile,
        context: &LoadContext,
    ) -> Result<Self, BundleError> {
        let (contents, signers) = Contents::signed(&package, trust, context)?;
        let compiled = contents.compile(COMPILE_STACK_BYTES)?;
        compiled.check_tests()?;
        Ok(Self {
            content_id: package.content_id(),
            package,
            manifest: contents.manifest,
            signers,
            compiled: Arc::new(compiled),
        })
    }

    /// The same content under the signatures of `package` and by this trust: all of
    /// [`load`](Self::load) but the compiler, which has said all that it can say of these bytes.
    ///
    /// # Errors
    /// As [`load`](Self::load); [`BundleError::Format`] for another content.
    pub fn signed_again(
        &self,
        package: Package,
        trust: &TrustFile,
        context: &LoadContext,
    ) -> Result<Self, BundleError> {
        if package.content_id() != self.content_id {
            return Err(BundleError::format("the package is of another content"));
        }
        let (contents, signers) = Contents::signed(&package, trust, context)?;
        Ok(Self {
            package,
            content_id: self.content_id.clone(),
            manifest: contents.manifest,
            signers,
            compiled: Arc::clone(&self.compiled),
        })
    }

    /// The checked manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The package it was loaded from, for storing and passing on.
    #[must_use]
    pub fn package(&self) -> &Package {
        &self.package
    }

    /// Identity of the archive.
    #[must_use]
    pub fn content_id(&self) -> &ContentId {
        &self.content_id
    }

    /// Position in the forward-only sequence.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.manifest.epoch
    }

    /// Ids of the distinct trusted keys that signed, sorted.
    #[must_use]
    pub fn signers(&self) -> &[String] {
        &self.signers
    }

    /// Class of an action: name and limits. `None` for an action that no class covers.
    #[must_use]
    pub fn class_of(&self, action: &str) -> Option<(&str, &ClassLimits)> {
        self.manifest.class_of(action)
    }

    /// The compiled policies, all lanes as one engine.
    #[must_use]
    pub fn engine(&self) -> Arc<dyn Engine> {
        Arc::clone(&self.compiled.engine)
    }

    /// Ids of all Cedar policies and names of all Rego files, sorted.
    #[must_use]
    pub fn policy_ids(&self) -> &[String] {
        &self.compiled.policy_ids
    }

    /// Whether rules in Rego judge each request, alone or beside Cedar.
    #[must_use]
    pub fn has_rego(&self) -> bool {
        self.compiled.has_rego
    }

    /// Whether policies in Cedar judge each request, alone or beside Rego.
    #[must_use]
    pub fn has_cedar(&self) -> bool {
        self.compiled.cedar.is_some()
    }

    /// Whether this is the id of a Cedar policy.
    #[must_use]
    pub fn is_cedar_policy(&self, id: &str) -> bool {
        let cedar = self.compiled.cedar.as_ref();
        cedar.is_some_and(|cedar| cedar.policy_ids().iter().any(|one| one == id))
    }

    /// Ids of the bundle's entities of one type, sorted: what a search can find.
    #[must_use]
    pub fn entity_ids(&self, kind: &str) -> Vec<&str> {
        let cedar = self.compiled.cedar.as_ref();
        cedar
            .map(|cedar| cedar.entity_ids(kind))
            .unwrap_or_default()
    }

    /// The actions that requests may name, sorted.
    #[must_use]
    pub fn action_names(&self) -> Vec<&str> {
        self.compiled.actions.iter().map(String::as_str).collect()
    }

    /// The Cedar permits that come nearest to a request that none of them permits, and what does not hold.
    /// Of Rego rules that cannot be told.
    #[must_use]
    pub fn explain(&self, request: &PolicyRequest) -> Vec<PolicyNote> {
        let cedar = self.compiled.cedar.as_ref();
        cedar
            .map(|cedar| cedar.explain(request))
            .unwrap_or_default()
    }

    /// Puts a posture and an age of the policy, in seconds, into a request's context, as `tidelock`, where
    /// the schema declares it for the action. For what decides it is the node's own word,
    /// [`ActivePolicy::describe_node`](crate::ActivePolicy::describe_node).
    ///
    /// # Errors
    /// A text that denies the request, if its context holds `tidelock` already.
    pub fn describe_node(
        &self,
        request: &mut PolicyRequest,
        posture: Posture,
        age_s: u64,
    ) -> Result<(), String> {
        if request.context.get(NODE_MEMBER).is_some() {
            let message = format!("context: must not contain `{NODE_MEMBER}`");
            return Err(error_text(Failure::Request, &message));
        }
        if !self.compiled.told_of_node.contains(&request.action) {
            return Ok(());
        }
        // A policy older than any limit is as old as the oldest one.
        let age_s = age_s.min(AGE_S_MAX);
        let own = serde_json::json!({"posture": posture.as_str(), "policy_age_s": age_s});
        match &mut request.context {
            Value::Object(context) => _ = context.insert(NODE_MEMBER.to_owned(), own),
            // Anything but an object is refused by the engine.
            context if context.is_null() => *context = serde_json::json!({NODE_MEMBER: own}),
            _ => {}
        }
        Ok(())
    }

    /// What the compiler found odd without refusing it.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.compiled.warnings
    }

    /// How many tests of its own the bundle passed.
    #[must_use]
    pub fn tests_passed(&self) -> usize {
        self.compiled.tests.passed
    }

    /// Tests of its own, at most so many and from all over, for asking the engine that serves.
    ///
    /// # Errors
    /// [`BundleError`]; cannot happen to what was loaded.
    pub fn own_cases(&self, most: usize) -> Result<Vec<OwnCase>, BundleError> {
        let files = archive::read(&self.package.archive)?;
        Ok(Cases::read(&files)?.some(most))
    }
}

impl Engine for VerifiedBundle {
    fn evaluate(&self, request: &PolicyRequest) -> Evaluation {
        self.compiled.engine.evaluate(request)
    }
}

/// The first part of [`VerifiedBundle::load`], which parses nothing of the archive: whether enough
/// distinct trusted keys of some role signed it. It decides who may cost this machine a worker.
///
/// # Errors
/// [`BundleError::Domain`], [`BundleError::Format`] or [`BundleError::Signature`].
pub fn vouched(
    package: &Package,
    trust: &TrustFile,
    context: &LoadContext,
) -> Result<(), BundleError> {
    signed_by(package, trust, context).map(|_| ())
}

/// All of [`VerifiedBundle::load`] that comes before the compiler: who signed it in which role and when,
/// digests, domain, node version. What it costs is bounded by the size of the archive, so that a bundle
/// whose epoch is over is refused before anything is spent on compiling it.
///
/// # Errors
/// The first check that fails, as [`BundleError`].
pub fn signed_manifest(
    package: &Package,
    trust: &TrustFile,
    context: &LoadContext,
) -> Result<Manifest, BundleError> {
    Contents::signed(package, trust, context).map(|(contents, _)| contents.manifest)
}

fn signed_by<'t>(
    package: &Package,
    trust: &'t TrustFile,
    context: &LoadContext,
) -> Result<Signed<'t>, BundleError> {
    if trust.domain() != context.domain {
        return Err(BundleError::Domain {
            what: "the trust file",
            expected: context.domain.clone(),
            found: trust.domain().to_owned(),
        });
    }
    // Also bounds the sizes: what cannot be encoded is not looked at.
    package.encode()?;
    let signed = trust.signed_package(package);
    let by_policy = signed.quorum(Role::Policy, None);
    let by_break_glass = signed.quorum(Role::BreakGlass, None);
    if !by_policy.is_reached() && !by_break_glass.is_reached() {
        return Err(BundleError::Signature {
            valid: by_policy.ids.len(),
            needed: trust.threshold(),
            unknown: by_policy.unknown,
        });
    }
    Ok(signed)
}

/// What a worker says of a bundle that it compiled and tested without fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Examined {
    /// Name of the bundle.
    pub name: String,
    /// Its epoch.
    pub epoch: u64,
    /// Identity of the archive that was examined.
    pub content_id: ContentId,
    /// How many policies it has.
    pub policies: usize,
    /// What the compiler found odd, the first of it.
    pub warnings: Vec<String>,
    /// Tests of its own that it passed.
    pub tests_passed: usize,
}

/// The rest of [`VerifiedBundle::load`], on half its stack (ruling 18), for the worker in which a
/// bundle is compiled before the node does it. Says nothing about who signed it.
///
/// # Errors
/// The first check that fails, as [`BundleError`].
pub fn examine(archive: &[u8], context: &LoadContext) -> Result<Examined, BundleError> {
    let contents = Contents::read(archive)?;
    contents.check_for(context)?;
    let compiled = contents.compile(WORKER_COMPILE_STACK_BYTES)?;
    compiled.check_tests()?;
    let warnings = compiled.warnings.iter();
    Ok(Examined {
        name: contents.manifest.name,
        epoch: contents.manifest.epoch,
        content_id: ContentId::of(archive),
        policies: compiled.policy_ids.len(),
        warnings: warnings
            .take(WARNINGS_LISTED_MAX)
            .map(|warning| clip(warning))
            .collect(),
        tests_passed: compiled.tests.passed,
    })
}

/// An archive whose form, manifest and digests are right. Nothing is said about who signed it.
struct Contents {
    manifest: Manifest,
    files: Files,
}

/// Compiled policies, all lanes as one engine, and how the bundle's own tests went.
struct Compiled {
    /// Actions whose context declares what the node says of itself.
    told_of_node: BTreeSet<String>,
    /// The Cedar lane, where there is one.
    cedar: Option<Arc<CedarEngine>>,
    has_rego: bool,
    engine: Arc<dyn Engine>,
    policy_ids: Vec<String>,
    actions: BTreeSet<String>,
    warnings: Vec<String>,
    tests: TestReport,
}

impl Contents {
    /// An archive that enough keys of its role signed for this node, and their ids.
    fn signed(
        package: &Package,
        trust: &TrustFile,
        context: &LoadContext,
    ) -> Result<(Self, Vec<String>), BundleError> {
        let signed = signed_by(package, trust, context)?;
        let contents = Self::read(&package.archive)?;
        let signers = contents.check_role(&signed)?;
        contents.check_for(context)?;
        Ok((contents, signers))
    }

    fn read(archive: &[u8]) -> Result<Self, BundleError> {
        let files = archive::read(archive)?;
        let manifest = Manifest::of(&files)?;
        for (path, bytes) in files.iter().filter(|(path, _)| *path != MANIFEST) {
            let stated = manifest.files.get(path).ok_or_else(|| {
                BundleError::format(format!("`{path}` is not listed in the manifest's files"))
            })?;
            if *stated != sha256(bytes) {
                return Err(BundleError::Digest { file: path.clone() });
            }
        }
        if let Some(missing) = manifest
            .files
            .keys()
            .find(|path| !files.contains_key(*path))
        {
            return Err(BundleError::format(format!(
                "`{missing}` is listed in the manifest's files and not in the archive"
            )));
        }
        if manifest.files.contains_key(MANIFEST) {
            return Err(BundleError::format(format!(
                "{MANIFEST} cannot list itself"
            )));
        }
        Ok(Self { manifest, files })
    }

    /// Whether enough keys of the role that the manifest states signed, at a time that is theirs by
    /// the bundle's own word: no clock is asked. Answers their ids.
    fn check_role(&self, signed: &Signed<'_>) -> Result<Vec<String>, BundleError> {
        let stated = self.manifest.role;
        let quorum = signed.quorum(stated, None);
        let Some(needed) = quorum.needed.filter(|_| quorum.is_reached()) else {
            return Err(BundleError::Role {
                stated,
                valid: quorum.ids.len(),
                needed: quorum.needed,
            });
        };
        let in_time = signed.quorum(stated, Some(self.manifest.created_unix_ms));
        if !in_time.is_reached() {
            return Err(BundleError::KeyTime {
                valid: in_time.ids.len(),
                needed,
                created_at: self.manifest.created_at.clone(),
            });
        }
        Ok(in_time.ids)
    }

    fn check_for(&self, context: &LoadContext) -> Result<(), BundleError> {
        if self.manifest.domain != context.domain {
            return Err(BundleError::Domain {
                what: "the bundle",
                expected: context.domain.clone(),
                found: self.manifest.domain.clone(),
            });
        }
        let needed = Version::parse(&self.manifest.min_node_version)
            .map_err(|error| BundleError::format(format!("min_node_version: {error}")))?;
        if context.node_version < needed {
            return Err(BundleError::NodeVersion {
                needed: needed.to_string(),
                running: context.node_version.to_string(),
            });
        }
        Ok(())
    }

    /// A file of a lane that the engine does not name would be a policy that nobody obeys.
    fn check_lanes(&self, cedar: bool, rego: bool) -> Result<(), BundleError> {
        for path in self.files.keys() {
            let named = match lane_of(path) {
                Some("cedar") => cedar,
                Some(_) => rego,
                None => true,
            };
            if !named {
                return Err(BundleError::format(format!(
                    "`{path}` says nothing in a bundle of engine `{}`: remove it, or name the engine \
                     that it is for",
                    self.manifest.engine
                )));
            }
        }
        Ok(())
    }

    fn compile_lanes(&self, cedar: bool, rego: bool) -> Result<Compiled, BundleError> {
        let cedar = cedar
            .then(|| CedarEngine::compile(&self.files).map(Arc::new))
            .transpose()?;
        let rego = rego
            .then(|| RegoEngine::compile(&self.files).map(Arc::new))
            .transpose()?;
        let mut policy_ids = Vec::new();
        let mut warnings = Vec::new();
        let mut lanes: Vec<Arc<dyn Engine>> = Vec::new();
        let mut known: Vec<BTreeSet<String>> = Vec::new();
        if let Some(engine) = &cedar {
            policy_ids.extend_from_slice(engine.policy_ids());
            warnings.extend_from_slice(engine.warnings());
            known.push(engine.actions());
            lanes.push(Arc::clone(engine) as Arc<dyn Engine>);
        }
        if let Some(engine) = &rego {
            policy_ids.extend_from_slice(engine.policy_ids());
            known.push(engine.actions());
            lanes.push(Arc::clone(engine) as Arc<dyn Engine>);
        }
        policy_ids.sort_unstable();
        let mut known = known.into_iter();
        let actions = known.next().unwrap_or_default();
        for others in known {
            // An action that one lane does not know is denied whatever the other says.
            if let Some(action) = actions.symmetric_difference(&others).next() {
                return Err(BundleError::schema(
                    INPUT_SCHEMA,
                    format!("action `{action}` is declared here or in {SCHEMA}, not in both"),
                ));
            }
        }
        let mut told_of_node = BTreeSet::new();
        for action in &actions {
            let by_cedar = cedar
                .as_ref()
                .map(|lane| lane.declares_context(action, NODE_MEMBER));
            let by_rego = rego
                .as_ref()
                .map(|lane| lane.takes_context(action, NODE_MEMBER));
            let disagree = match (by_cedar, by_rego) {
                (Some(true), Some((takes, _))) => !takes,
                (Some(false), Some((_, names))) => names,
                _ => false,
            };
            if disagree {
                return Err(BundleError::schema(
                    INPUT_SCHEMA,
                    format!(
                        "action `{action}`: `{NODE_MEMBER}` in the context is declared here or in {SCHEMA}, \
                         not in both"
                    ),
                ));
            }
            if by_cedar.or(by_rego.map(|(takes, _)| takes)) == Some(true) {
                told_of_node.insert(action.clone());
            }
        }
        self.manifest.check_actions(&actions)?;
        let mut lanes = lanes.into_iter();
        let first = lanes
            .next()
            .ok_or_else(|| BundleError::Engine(self.manifest.engine.clone()))?;
        let engine: Arc<dyn Engine> = Arc::new(Lanes::new(first, lanes.collect()));
        let tests =
            Cases::read(&self.files)?.run(engine.as_ref(), cedar.as_deref(), rego.is_some());
        Ok(Compiled {
            told_of_node,
            cedar,
            has_rego: rego.is_some(),
            engine,
            policy_ids,
            actions,
            warnings,
            tests,
        })
    }

    /// Compiles and runs the tests on a thread whose stack is the same everywhere, so that a bundle
    /// that loads on the author's machine loads on every node.
    fn compile(&self, stack_bytes: usize) -> Result<Compiled, BundleError> {
        let (with_cedar, with_rego) = match self.manifest.engine.as_str() {
            "cedar" => (true, false),
            "rego" => (false, true),
            "cedar+rego" => (true, true),
            other => return Err(BundleError::Engine(other.to_owned())),
        };
        self.check_lanes(with_cedar, with_rego)?;
        on_stack(stack_bytes, || self.compile_lanes(with_cedar, with_rego))
    }
}

/// Does something with policies on a thread whose stack is the same on every machine.
pub(crate) fn on_stack<T: Send>(
    stack_bytes: usize,
    work: impl FnOnce() -> Result<T, BundleError> + Send,
) -> Result<T, BundleError> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("bundle-compile".to_owned())
            .stack_size(stack_bytes)
            .spawn_scoped(scope, work)
            .map_err(|error| BundleError::Compiler(format!("no thread: {error}")))?
            .join()
            .unwrap_or_else(|_| Err(BundleError::Compiler("it panicked".to_owned())))
    })
}

/// What of an archive is for one lane only.
fn lane_of(path: &str) -> Option<&'static str> {
    match path {
        SCHEMA | ENTITIES | LINKS => Some("cedar"),
        INPUT_SCHEMA | DATA => Some("rego"),
        _ if path.starts_with(DATA_DIR) || rego_name(path).is_some() => Some("rego"),
        _ if path.starts_with(POLICIES_DIR) => Some("cedar"),
        _ => None,
    }
}

impl Compiled {
    fn check_tests(&self) -> Result<(), BundleError> {
        if self.tests.failed == 0 {
            return Ok(());
        }
        Err(BundleError::Tests {
            failed: self.tests.failed,
            total: self.tests.failed + self.tests.passed,
            first: self
                .tests
                .failures
                .first()
                .map(|failure| clip(&failure.to_string()))
                .unwrap_or_default(),
        })
    }
}

/// Assembles an archive: fills in the digests and checks form and manifest.
#[derive(Debug, Clone, Default)]
pub struct BundleBuilder {
    files: Files,
    overrides: BTreeMap<&'static str, Value>,
    created_unix_ms: Option<u64>,
}

impl BundleBuilder {
    /// A bundle without files.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes every file of a directory. A file or directory that has no place in a bundle is an
    /// error, not skipped: a private key that lies beside the policies must not go unnoticed.
    ///
    /// # Errors
    /// [`BuildError`] if something cannot be read or has no place in a bundle.
    pub fn from_dir(dir: &Path) -> Result<Self, BuildError> {
        let mut builder = Self::new();
        builder.take_dir(dir, "")?;
        Ok(builder)
    }

    fn take_dir(&mut self, dir: &Path, prefix: &str) -> Result<(), BuildError> {
        let failed = |path: &Path, error: &dyn fmt::Display| BuildError::Read {
            path: path.display().to_string(),
            message: error.to_string(),
        };
        let entries = std::fs::read_dir(dir).map_err(|error| failed(dir, &error))?;
        for entry in entries {
            let entry = entry.map_err(|error| failed(dir, &error))?;
            let path = entry.path();
            let name = entry.file_name();
            let name = name
                .to_str()
                .ok_or_else(|| failed(&path, &"the name is not UTF-8"))?;
            // Not following links: what is signed should be what lies here.
            let meta = path
                .symlink_metadata()
                .map_err(|error| failed(&path, &error))?;
            if meta.is_dir() && prefix.is_empty() && matches!(name, "policies" | "tests" | "data") {
                self.take_dir(&path, &format!("{name}/"))?;
                continue;
            }
            let bundle_path = format!("{prefix}{name}");
            if !meta.is_file() || !archive::is_bundle_path(&bundle_path) {
                return Err(BundleError::format(format!(
                    "{} has no place in a bundle: move it elsewhere",
                    path.display()
                ))
                .into());
            }
            if meta.len() > FILE_BYTES_MAX as u64 {
                return Err(BundleError::format(format!(
                    "{} is larger than {FILE_BYTES_MAX} bytes",
                    path.display()
                ))
                .into());
            }
            let bytes = std::fs::read(&path).map_err(|error| failed(&path, &error))?;
            self.files.insert(bundle_path, bytes);
        }
        Ok(())
    }

    /// Adds or replaces a file.
    #[must_use]
    pub fn file(mut self, path: &str, bytes: Vec<u8>) -> Self {
        self.files.insert(path.to_owned(), bytes);
        self
    }

    /// Sets the manifest's epoch.
    #[must_use]
    pub fn epoch(mut self, epoch: u64) -> Self {
        self.overrides.insert("epoch", Value::from(epoch));
        self
    }

    /// Sets the manifest's domain.
    #[must_use]
    pub fn domain(mut self, domain: &str) -> Self {
        self.overrides.insert("domain", Value::from(domain));
        self
    }

    /// Sets the manifest's oldest epoch that may serve as last known good.
    #[must_use]
    pub fn min_fallback_epoch(mut self, epoch: u64) -> Self {
        self.overrides
            .insert("min_fallback_epoch", Value::from(epoch));
        self
    }

    /// Sets the manifest's time of making.
    #[must_use]
    pub fn created_unix_ms(mut self, at: u64) -> Self {
        self.created_unix_ms = Some(at);
        self
    }

    /// Writes the archive. The digests of the manifest are computed here; whatever stood there is
    /// replaced. Policies are not compiled: see [`run_tests`].
    ///
    /// # Errors
    /// [`BundleError`] if the files do not make a bundle.
    pub fn build(self) -> Result<Vec<u8>, BundleError> {
        let Self {
            mut files,
            mut overrides,
            created_unix_ms,
        } = self;
        if let Some(at) = created_unix_ms {
            overrides.insert("created_at", Value::from(rfc3339(at)?));
        }
        let manifest = files
            .remove(MANIFEST)
            .ok_or_else(|| BundleError::format(format!("the bundle has no {MANIFEST}")))?;
        let manifest = json::parse(&manifest)
            .map_err(|error| BundleError::format(format!("{MANIFEST}: {error}")))?;
        let Value::Object(mut manifest) = manifest else {
            return Err(BundleError::format(format!("{MANIFEST} must be an object")));
        };
        for (key, value) in overrides {
            manifest.insert(key.to_owned(), value);
        }
        let digests = files
            .iter()
            .map(|(path, bytes)| (path.clone(), sha256(bytes).into()));
        manifest.insert("files".to_owned(), Value::Object(digests.collect()));
        let bytes = json::to_sorted_bytes(&manifest)
            .map_err(|error| BundleError::format(format!("{MANIFEST}: {error}")))?;
        files.insert(MANIFEST.to_owned(), bytes);
        let archive = archive::write(&files)?;
        Contents::read(&archive)?;
        Ok(archive)
    }
}

/// Builds the archive of a directory: [`BundleBuilder::from_dir`], then
/// [`build`](BundleBuilder::build). The same files make the same bytes.
///
/// # Errors
/// [`BuildError`] if something cannot be read or the files do not make a bundle.
pub fn build_dir(dir: &Path) -> Result<Vec<u8>, BuildError> {
    Ok(BundleBuilder::from_dir(dir)?.build()?)
}

/// Compiles an archive and runs its tests, whoever signed it: `tidelock bundle test`.
///
/// # Errors
/// [`BundleError`] if it does not compile; failed tests are in the report.
pub fn run_tests(archive: &[u8]) -> Result<TestReport, BundleError> {
    Ok(Contents::read(archive)?.compile(COMPILE_STACK_BYTES)?.tests)
}

/// What a package holds, for people: `tidelock bundle inspect`. Says nothing about trust.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Identity of the archive.
    pub content_id: ContentId,
    /// Bytes of the archive.
    pub archive_bytes: usize,
    /// Signatures on the package, unverified.
    pub signatures: usize,
    /// The manifest.
    pub manifest: Manifest,
    /// Ids of the policies.
    pub policies: Vec<String>,
    /// Actions that the policies can judge.
    pub actions: BTreeSet<String>,
    /// What the compiler found odd.
    pub warnings: Vec<String>,
    /// How its own tests went.
    pub tests: TestReport,
}

/// Reads and compiles a package without judging its signatures.
///
/// # Errors
/// [`BundleError`] if it is ill-formed or does not compile.
pub fn inspect(package: &Package) -> Result<Inspection, BundleError> {
    let contents = Contents::read(&package.archive)?;
    let compiled = contents.compile(COMPILE_STACK_BYTES)?;
    Ok(Inspection {
        content_id: package.content_id(),
        archive_bytes: package.archive.len(),
        signatures: package.signatures.len(),
        manifest: contents.manifest,
        policies: compiled.policy_ids,
        actions: compiled.actions,
        warnings: compiled.warnings,
        tests: compiled.tests,
    })
}
