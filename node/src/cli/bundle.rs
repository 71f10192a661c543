//! `tidelock bundle …`

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::{Args, Subcommand, ValueHint};
use serde_json::{Value, json};
use tidelock_policy::{
    ContentId, Coverage, Freshness, LoadContext, OpaFile, OpaImport, OpaKey, OpaProblem, Package,
    Starter, TestReport, build_dir, decode_signature, import_opa, limits::ARCHIVE_BYTES_MAX,
    run_tests, sign, starter,
};

use super::{
    ConfigArg, Exit, Failure, Output, node,
    output::table,
    policy::describe_activated,
    trust::{self, SignedArgs},
};
use crate::{
    ca::replace,
    clock::wall_unix_ms,
    worker::{self, For, KeptPasses, Terms, Vetter},
};

/// What to do with a bundle.
#[derive(Debug, Subcommand)]
pub enum BundleCommand {
    /// Write a working bundle directory to begin from, with comments, and tests that cover it.
    #[command(
        after_help = "Starters:\n  coding-agent      files, URLs, programs, repositories, tools\n  \
                      operations-agent  hosts, units, logs, diagnostics\n  \
                      service-mesh      which service may call which URL\n\n\
                      Example:\n  tidelock bundle new policy --name site --domain harbour \
                      --starter operations-agent\n  tidelock bundle test policy --watch"
    )]
    New {
        /// The directory to write.
        #[arg(value_hint = ValueHint::DirPath)]
        dir: PathBuf,
        /// What to begin from.
        #[arg(long, value_enum, default_value = "coding-agent")]
        starter: StarterName,
        /// The bundle's name.
        #[arg(long)]
        name: String,
        /// The domain it is for.
        #[arg(long)]
        domain: String,
    },
    /// Build the deterministic archive of a bundle directory.
    #[command(after_help = "Example:\n  tidelock bundle build policy --out site-1.tar")]
    Build {
        /// The bundle directory.
        #[arg(value_hint = ValueHint::DirPath)]
        dir: PathBuf,
        /// The archive to write.
        #[arg(long, value_hint = ValueHint::FilePath)]
        out: PathBuf,
    },
    /// Sign an archive with an ECDSA P-256 key; `openssl` and `cosign sign-blob` do the same.
    #[command(
        after_help = "Examples:\n  tidelock bundle sign site-1.tar --key alice.key\n  \
                      openssl dgst -sha256 -sign alice.key -out site-1.tar.sig site-1.tar\n  \
                      cosign sign-blob --key cosign.key --output-signature site-1.tar.sig site-1.tar"
    )]
    Sign {
        /// The archive.
        #[arg(value_hint = ValueHint::FilePath)]
        archive: PathBuf,
        /// The private key, PEM.
        #[arg(long, value_hint = ValueHint::FilePath)]
        key: PathBuf,
        /// The signature to write; default: ARCHIVE.sig
        #[arg(long, value_hint = ValueHint::FilePath)]
        out: Option<PathBuf>,
    },
    /// Check everything that a node would check before activating: signatures, digests, schema, tests.
    Verify {
        #[command(flatten)]
        package: PackageArgs,
        /// The node's trust file.
        #[arg(long, value_hint = ValueHint::FilePath)]
        trust: PathBuf,
    },
    /// Compile a bundle directory or an archive, run its own tests, and name the policies that no
    /// test covers.
    #[command(after_help = "Examples:\n  tidelock bundle test policy --watch\n  \
                      tidelock bundle test site-1.tar --require-coverage\n\nA policy is covered when it \
                      determined the answer of a test that passed. Of Rego rules that is not \
                      measured. Exit codes: 0 all passed, 1 a test failed or a policy is not covered, 2 \
                      it does not compile.")]
    Test {
        /// The bundle directory, or the archive.
        #[arg(value_hint = ValueHint::AnyPath)]
        bundle: PathBuf,
        /// Fail where a policy is not covered, and where coverage is not measured: in a bundle with Rego.
        #[arg(long)]
        require_coverage: bool,
        /// Run again whenever a file changes, until interrupted.
        #[arg(long)]
        watch: bool,
    },
    /// Show what an archive holds, without judging its signatures.
    Inspect(PackageArgs),
    /// Make a bundle directory out of an OPA bundle, with a report of what in it a node does not run.
    #[command(
        name = "import-opa",
        after_help = "Example:\n  tidelock bundle import-opa bundle.tar.gz --key site=opa.pub --dir policy --name authz \\\n    \
                      --domain harbour --action fs.read --allow-rule data.authz.allow\n\n\
                      Nothing is written where the report has problems."
    )]
    ImportOpa(ImportOpaArgs),
    /// Give a signed bundle to a running node; its peers get it from there.
    #[command(
        after_help = "Examples:\n  tidelock bundle install site-1.tar           the plan\n  \
                      tidelock bundle install site-1.tar --apply   the act"
    )]
    Install {
        #[command(flatten)]
        package: PackageArgs,
        #[command(flatten)]
        config: ConfigArg,
        /// Act on the printed plan.
        #[arg(long)]
        apply: bool,
    },
    /// The authority's word that a bundle is still in force: the age of the policy counts from it.
    #[command(subcommand)]
    Freshness(FreshnessCommand),
}

/// What to do with a freshness statement.
#[derive(Debug, Subcommand)]
pub enum FreshnessCommand {
    /// Write a statement that a bundle is in force now. It is to be signed like the bundle.
    #[command(
        after_help = "Example:\n  tidelock bundle freshness make site-7.tar --out fresh.json\n  \
                      openssl dgst -sha256 -sign alice.key -out fresh.json.sig fresh.json"
    )]
    Make {
        /// The archive.
        #[arg(value_hint = ValueHint::FilePath)]
        archive: PathBuf,
        /// The statement to write.
        #[arg(long, value_hint = ValueHint::FilePath)]
        out: PathBuf,
    },
    /// Check a signed statement against a trust file.
    Verify {
        #[command(flatten)]
        signed: SignedArgs,
        /// The trust file or document.
        #[arg(long, value_hint = ValueHint::FilePath)]
        trust: PathBuf,
    },
    /// Give a signed statement to a running node; its peers get it from there.
    #[command(
        after_help = "Examples:\n  tidelock bundle freshness install fresh.json --sig fresh.json.sig           the plan\n  \
                      tidelock bundle freshness install fresh.json --sig fresh.json.sig --apply   the act"
    )]
    Install {
        #[command(flatten)]
        signed: SignedArgs,
        #[command(flatten)]
        config: ConfigArg,
        /// Act on the printed plan.
        #[arg(long)]
        apply: bool,
    },
}

/// A starter, as the command line names it.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum StarterName {
    /// An agent that changes code.
    CodingAgent,
    /// An agent that keeps machines running.
    OperationsAgent,
    /// Services that call each other.
    ServiceMesh,
}

impl From<StarterName> for Starter {
    fn from(name: StarterName) -> Self {
        match name {
            StarterName::CodingAgent => Self::CodingAgent,
            StarterName::OperationsAgent => Self::OperationsAgent,
            StarterName::ServiceMesh => Self::ServiceMesh,
        }
    }
}

/// An OPA bundle, and what is to become of it.
#[derive(Debug, Args)]
pub struct ImportOpaArgs {
    /// The OPA bundle, .tar.gz.
    #[arg(value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// A key that may have signed it: its id and the file of the public key in PEM. May be repeated.
    #[arg(long = "key", value_name = "ID=FILE")]
    keys: Vec<String>,
    /// Scope that the signature must name.
    #[arg(long)]
    scope: Option<String>,
    /// Take a bundle that nobody signed.
    #[arg(long)]
    allow_unsigned: bool,
    /// The directory to write.
    #[arg(long, value_hint = ValueHint::DirPath)]
    dir: PathBuf,
    /// The bundle's name.
    #[arg(long)]
    name: String,
    /// The domain it is for.
    #[arg(long)]
    domain: String,
    /// An action that it decides. May be repeated.
    #[arg(long = "action", required = true)]
    actions: Vec<String>,
    /// A type of principals. May be repeated.
    #[arg(long = "principal", default_value = "Agent")]
    principals: Vec<String>,
    /// A type of resources. May be repeated.
    #[arg(long = "resource", default_value = "File")]
    resources: Vec<String>,
    /// The rule that is true where the request is allowed; without it the bundle must have
    /// data.tidelock.decision.
    #[arg(long)]
    allow_rule: Option<String>,
}

/// An archive with its signatures.
#[derive(Debug, Args)]
pub struct PackageArgs {
    /// The archive.
    #[arg(value_hint = ValueHint::FilePath)]
    archive: PathBuf,
    /// Its detached signatures; default: ARCHIVE.sig where that exists.
    #[arg(long = "sig", value_hint = ValueHint::FilePath)]
    signatures: Vec<PathBuf>,
}

impl PackageArgs {
    pub(super) fn load(&self) -> Result<Package, Failure> {
        let archive = read_archive(&self.archive)?;
        let mut paths = self.signatures.clone();
        let beside = beside(&self.archive);
        if paths.is_empty() && beside.exists() {
            paths.push(beside);
        }
        let signatures = paths
            .iter()
            .map(|path| decode_signature(&read(path)?).map_err(|e| Failure::at(path, &e)))
            .collect::<Result<_, Failure>>()?;
        Ok(Package {
            archive,
            signatures,
        })
    }
}

fn beside(archive: &Path) -> PathBuf {
    let mut name = archive.as_os_str().to_owned();
    name.push(".sig");
    PathBuf::from(name)
}

/// An archive, looked at before it is read: whatever came by mail may be of any size.
pub(super) fn read_archive(path: &Path) -> Result<Vec<u8>, Failure> {
    let bytes = fs::metadata(path).map_err(|e| Failure::at(path, &e))?;
    if bytes.len() > ARCHIVE_BYTES_MAX as u64 {
        return Err(Failure::failed(format!(
            "BUNDLE_FORMAT: {} is larger than {ARCHIVE_BYTES_MAX} bytes, which no bundle is",
            path.display()
        )));
    }
    read(path)
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|e| Failure::at(path, &e))
}

fn text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|e| Failure::at(path, &e))
}

pub(super) fn run(command: BundleCommand, output: &Output) -> Result<Exit, Failure> {
    match command {
        BundleCommand::New {
            dir,
            starter,
            name,
            domain,
        } => new(&dir, starter.into(), &name, &domain, output),
        BundleCommand::Build { dir, out } => {
            let archive = build_dir(&dir)?;
            let package = Package {
                archive,
                signatures: Vec::new(),
            };
            replace(&out, &package.archive, 0o644)?;
            let id = package.content_id();
            output.say(
                &json!({"archive": out, "content": id, "bytes": package.archive.len()}),
                || {
                    format!(
                        "{} {id}\nnext: tidelock bundle sign {} --key KEY",
                        out.display(),
                        out.display()
                    )
                },
            );
            Ok(Exit::Done)
        }
        BundleCommand::Sign { archive, key, out } => {
            let signature = sign(&read(&archive)?, &text(&key)?)?;
            let out = out.unwrap_or_else(|| beside(&archive));
            replace(&out, BASE64_STANDARD.encode(&signature).as_bytes(), 0o644)?;
            output.say(&json!({"signature": out}), || {
                format!("signature written to {}", out.display())
            });
            Ok(Exit::Done)
        }
        BundleCommand::Verify { package, trust } => {
            let trust = trust::load(&trust)?;
            let context = LoadContext::new(trust.domain(), env!("CARGO_PKG_VERSION"))?;
            let vetted = Vetter::new(KeptPasses::default()).vet(
                package.load()?,
                &trust,
                &context,
                For::Operator,
                Terms::default(),
            );
            match vetted.and_then(|vetted| vetted.load(&trust, &context)) {
                Ok(bundle) => {
                    let m = bundle.manifest();
                    output.say(
                        &json!({"ok": true, "name": m.name, "epoch": m.epoch,
                                "content": bundle.content_id(), "signers": bundle.signers()}),
                        || {
                            format!(
                                "{} epoch {} {} verifies, signed by {}",
                                m.name,
                                m.epoch,
                                bundle.content_id(),
                                bundle.signers().join(", ")
                            )
                        },
                    );
                    Ok(Exit::Done)
                }
                Err(error) => Err(Failure::failed(format!("{}: {error}", error.code()))),
            }
        }
        BundleCommand::Test {
            bundle,
            require_coverage,
            watch: false,
        } => test(&bundle, require_coverage, output),
        BundleCommand::Test {
            bundle,
            require_coverage,
            watch: true,
        } => watch(&bundle, require_coverage, output),
        BundleCommand::Inspect(package) => {
            let package = package.load()?;
            let mut seen = worker::inspect(&package.archive, Terms::default())
                .map_err(|error| Failure::cannot_run(format!("{}: {error}", error.code())))?;
            // The worker is given the archive alone.
            if let Some(seen) = seen.as_object_mut() {
                seen.insert("signatures".to_owned(), package.signatures.len().into());
            }
            output.say(&seen, || describe(&seen));
            Ok(Exit::Done)
        }
        BundleCommand::ImportOpa(arguments) => import(arguments, output),
        BundleCommand::Freshness(command) => freshness(command, output),
        BundleCommand::Install {
            package,
            config,
            apply,
        } => {
            let body = json!({"package": BASE64_STANDARD.encode(package.load()?.encode()?)});
            let answer = node::operate(&config, "bundle.install", &body, apply)?;
            output.say(&answer, || match apply {
                true => describe_activated(&answer),
                false => node::describe(&answer, false),
            });
            Ok(Exit::Done)
        }
    }
}

/// What `inspect` found, for people.
fn describe(seen: &Value) -> String {
    let text = |pointer: &str| match seen.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    };
    let files = seen.pointer("/manifest/files").and_then(Value::as_object);
    let files: Vec<Vec<String>> = files
        .into_iter()
        .flatten()
        .map(|(name, digest)| vec![name.clone(), digest.as_str().unwrap_or_default().to_owned()])
        .collect();
    let policies = seen.pointer("/policies").and_then(Value::as_array);
    format!(
        "{} epoch {} version {} for domain {}\n{}\n{} signature(s), {} policies, {} tests passed\n{}",
        text("/manifest/name"),
        text("/manifest/epoch"),
        text("/manifest/version"),
        text("/manifest/domain"),
        text("/content_id"),
        text("/signatures"),
        policies.map_or(0, Vec::len),
        text("/tests/passed"),
        table(&["file", "digest"], &files)
    )
}

/// Runs the tests of a directory or an archive once.
fn test(bundle: &Path, require_coverage: bool, output: &Output) -> Result<Exit, Failure> {
    let archive = if bundle.is_dir() {
        build_dir(bundle)?
    } else {
        read(bundle)?
    };
    let report = run_tests(&archive)?;
    output.say(&report, || report_text(&report));
    let measured = report.coverage == Coverage::Measured;
    if require_coverage && !measured {
        // Standard output has the report, one document with `--json`.
        let _ = writeln!(std::io::stderr(), "tidelock: {NOT_MEASURED}");
    }
    let covered = measured && report.uncovered.as_ref().is_some_and(Vec::is_empty);
    Ok(
        if report.failures.is_empty() && (covered || !require_coverage) {
            Exit::Done
        } else {
            Exit::Failed
        },
    )
}

/// Why a bundle with Rego rules is never taken for covered.
const NOT_MEASURED: &str = "--require-coverage: coverage is of Cedar policies; which Rego rules were at work is \
                            not known, so this bundle cannot be called covered. Write a test for each \
                            Rego rule, with the nearest request that it must not take, and run without \
                            --require-coverage";

/// A report for people: each failure with what was expected above what came.
fn report_text(report: &TestReport) -> String {
    let mut lines = Vec::new();
    for failure in &report.failures {
        lines.push(format!("FAILED {}: {}", failure.file, failure.name));
        if let Some(because) = &failure.because {
            lines.push(format!("  because   {because}"));
        }
        lines.push(format!("- expected  {}", failure.expected));
        lines.push(format!("+ got       {}", failure.got));
        let errors = failure.errors.iter();
        lines.extend(errors.map(|error| format!("  error     {error}")));
    }
    let unlisted = report.failed.saturating_sub(report.failures.len());
    if unlisted > 0 {
        lines.push(format!("and {unlisted} more failures"));
    }
    if let Some(uncovered) = report.uncovered.as_ref().filter(|ids| !ids.is_empty()) {
        lines.push(format!("covered by no test: {}", uncovered.join(", ")));
    }
    if report.coverage != Coverage::Measured {
        lines.push("coverage of Rego rules: not measured".to_owned());
    }
    lines.push(format!(
        "{} passed, {} failed",
        report.passed, report.failed
    ));
    lines.join("\n")
}

/// Between two looks at the files.
const WATCH_EVERY: Duration = Duration::from_millis(300);

/// Runs the tests now and after each change. It ends with the process.
fn watch(bundle: &Path, require_coverage: bool, output: &Output) -> Result<Exit, Failure> {
    let mut seen = None;
    loop {
        let now = stamps(bundle);
        if seen.as_ref() != Some(&now) {
            // What does not compile is the author's next change away from it.
            if let Err(failure) = test(bundle, require_coverage, output) {
                output.failure(&failure);
            }
            seen = Some(now);
        }
        std::thread::sleep(WATCH_EVERY);
    }
}

/// Size and time of change of every file that may be of the bundle. One that cannot be read has none, and
/// a change of that is a change.
fn stamps(bundle: &Path) -> BTreeMap<PathBuf, (u64, Option<SystemTime>)> {
    let files_in = |dir: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    [bundle.to_owned()]
        .into_iter()
        .chain(files_in(bundle))
        .chain(files_in(&bundle.join("policies")))
        .chain(files_in(&bundle.join("tests")))
        .filter_map(|path| {
            let meta = fs::metadata(&path).ok().filter(fs::Metadata::is_file)?;
            Some((path, (meta.len(), meta.modified().ok())))
        })
        .collect()
}

fn new(
    dir: &Path,
    kind: Starter,
    name: &str,
    domain: &str,
    output: &Output,
) -> Result<Exit, Failure> {
    let files = starter(kind, name, domain, wall_unix_ms())?;
    write_new(dir, &files)?;
    let names: Vec<&str> = files.iter().map(|(path, _)| path.as_str()).collect();
    output.say(&json!({"dir": dir, "files": names}), || {
        written(dir, &names)
    });
    Ok(Exit::Done)
}

fn freshness(command: FreshnessCommand, output: &Output) -> Result<Exit, Failure> {
    match command {
        FreshnessCommand::Make { archive, out } => {
            let archive = read_archive(&archive)?;
            let seen = worker::inspect(&archive, Terms::default())
                .map_err(|error| Failure::cannot_run(format!("{}: {error}", error.code())))?;
            let member = |pointer: &str| seen.pointer(pointer).cloned().unwrap_or_default();
            let statement = Freshness {
                domain: serde_json::from_value(member("/manifest/domain"))?,
                bundle: serde_json::from_value(member("/manifest/name"))?,
                epoch: serde_json::from_value(member("/manifest/epoch"))?,
                content_id: ContentId::of(&archive),
                issued_unix_ms: wall_unix_ms(),
            };
            replace(&out, &statement.document()?, 0o644)?;
            output.say(&json!({"statement": out, "says": statement}), || {
                format!(
                    "{} says that {} epoch {} is in force\nnext: let enough `policy` keys sign it",
                    out.display(),
                    statement.bundle,
                    statement.epoch
                )
            });
            Ok(Exit::Done)
        }
        FreshnessCommand::Verify { signed, trust } => {
            match Freshness::verify(&signed.load()?, &trust::load(&trust)?) {
                Ok(statement) => {
                    output.say(&json!({"ok": true, "says": statement}), || {
                        format!(
                            "{} epoch {} is in force, says the authority",
                            statement.bundle, statement.epoch
                        )
                    });
                    Ok(Exit::Done)
                }
                Err(error) => Err(Failure::failed(format!("{}: {error}", error.code()))),
            }
        }
        FreshnessCommand::Install {
            signed,
            config,
            apply,
        } => trust::install(&signed, &config, apply, output),
    }
}

/// Writes files that are not there yet; one that is there keeps all from being written.
fn write_new(dir: &Path, files: &[(String, Vec<u8>)]) -> Result<(), Failure> {
    if let Some((path, _)) = files.iter().find(|(path, _)| dir.join(path).exists()) {
        return Err(Failure::cannot_run(format!(
            "{} exists already; choose another directory, nothing was written",
            dir.join(path).display()
        )));
    }
    for (path, bytes) in files {
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|e| Failure::at(parent, &e))?;
        }
        fs::write(&path, bytes).map_err(|e| Failure::at(&path, &e))?;
    }
    Ok(())
}

fn written(dir: &Path, names: &[&str]) -> String {
    format!(
        "{}\n{}\nnext: tidelock bundle test {}",
        dir.display(),
        names
            .iter()
            .map(|n| format!("  {n}"))
            .collect::<Vec<_>>()
            .join("\n"),
        dir.display()
    )
}

fn import(arguments: ImportOpaArgs, output: &Output) -> Result<Exit, Failure> {
    let mut keys = Vec::new();
    for pinned in &arguments.keys {
        let (id, path) = pinned
            .split_once('=')
            .filter(|(id, path)| !id.is_empty() && !path.is_empty())
            .ok_or_else(|| {
                Failure::cannot_run(format!("`{pinned}` is not ID=FILE, such as site=opa.pub"))
            })?;
        keys.push(OpaKey::from_pem(id, &text(Path::new(path))?)?);
    }
    let wanted = OpaImport {
        name: arguments.name,
        domain: arguments.domain,
        created_unix_ms: wall_unix_ms(),
        actions: arguments.actions.into_iter().collect(),
        principals: arguments.principals.into_iter().collect(),
        resources: arguments.resources.into_iter().collect(),
        allow: arguments.allow_rule,
        keys,
        scope: arguments.scope,
        allow_unsigned: arguments.allow_unsigned,
    };
    let (files, report) = import_opa(&read(&arguments.file)?, &wanted)?;
    let ready = report.problems.is_empty();
    if ready {
        write_new(&arguments.dir, &files)?;
    }
    let names: Vec<&str> = files.iter().map(|(path, _)| path.as_str()).collect();
    output.say(
        &json!({"ready": ready, "dir": ready.then_some(&arguments.dir), "files": names, "report": report}),
        || {
            let rows = |file: &OpaFile| vec![file.path.clone(), file.becomes.clone()];
            let problem = |p: &OpaProblem| {
                let line = if p.line == 0 { String::new() } else { p.line.to_string() };
                vec![p.path.clone(), line, p.message.clone()]
            };
            let files: Vec<Vec<String>> = report.files.iter().map(rows).collect();
            let problems: Vec<Vec<String>> = report.problems.iter().map(problem).collect();
            let signed = match &report.signed_by {
                Some(id) => format!("signed by `{id}`"),
                None => "NOT SIGNED: taken because --allow-unsigned says so".to_owned(),
            };
            let head = format!(
                "revision `{}`, roots {:?}, {signed}\n{}",
                report.revision,
                report.roots,
                table(&["file", "becomes"], &files)
            );
            if ready {
                format!("{head}\n{}", written(&arguments.dir, &names))
            } else {
                format!(
                    "{head}\n{}\nnothing was written: mend these in the OPA bundle",
                    table(&["file", "line", "problem"], &problems)
                )
            }
        },
    );
    Ok(if ready { Exit::Done } else { Exit::Failed })
}
