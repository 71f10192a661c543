//! `tidelock bundle …`

use std::{
    fs,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::{Args, Subcommand, ValueHint};
use serde_json::{Value, json};
use tidelock_policy::{
    LoadContext, Package, TrustFile, build_dir, decode_signature, limits::ARCHIVE_BYTES_MAX,
    run_tests, sign, template,
};

use super::{ConfigArg, Exit, Failure, Output, node, output::table};
use crate::{
    ca::replace,
    clock::wall_unix_ms,
    worker::{self, For, KeptPasses, Terms, Vetter},
};

/// What to do with a bundle.
#[derive(Debug, Subcommand)]
pub enum BundleCommand {
    /// Write a small, working bundle directory to begin from.
    #[command(
        after_help = "Example:\n  tidelock bundle init --dir policy --name site --domain harbour"
    )]
    Init {
        /// The directory to write.
        #[arg(long, value_hint = ValueHint::DirPath)]
        dir: PathBuf,
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
    /// Compile an archive and run its own tests.
    Test {
        /// The archive.
        #[arg(value_hint = ValueHint::FilePath)]
        archive: PathBuf,
    },
    /// Show what an archive holds, without judging its signatures.
    Inspect(PackageArgs),
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
        BundleCommand::Init { dir, name, domain } => init(&dir, &name, &domain, output),
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
            let trust = TrustFile::parse(&text(&trust)?)?;
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
        BundleCommand::Test { archive } => {
            let report = run_tests(&read(&archive)?)?;
            output.say(&report, || {
                let mut lines: Vec<String> = report
                    .failures
                    .iter()
                    .map(|f| format!("FAILED {f}"))
                    .collect();
                lines.push(format!(
                    "{} passed, {} failed",
                    report.passed,
                    report.failures.len()
                ));
                lines.join("\n")
            });
            Ok(if report.failures.is_empty() {
                Exit::Done
            } else {
                Exit::Failed
            })
        }
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
        BundleCommand::Install {
            package,
            config,
            apply,
        } => {
            let body = json!({"package": BASE64_STANDARD.encode(package.load()?.encode()?)});
            let answer = node::operate(&config, "bundle.install", &body, apply)?;
            output.say(&answer, || node::describe(&answer, apply));
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

fn init(dir: &Path, name: &str, domain: &str, output: &Output) -> Result<Exit, Failure> {
    let files = template(name, domain, wall_unix_ms())?;
    if let Some((path, _)) = files.iter().find(|(path, _)| dir.join(path).exists()) {
        return Err(Failure::cannot_run(format!(
            "{} exists already; choose another --dir, nothing was written",
            dir.join(path).display()
        )));
    }
    for (path, bytes) in &files {
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|e| Failure::at(parent, &e))?;
        }
        fs::write(&path, bytes).map_err(|e| Failure::at(&path, &e))?;
    }
    let names: Vec<&str> = files.iter().map(|(path, _)| path.as_str()).collect();
    output.say(&json!({"dir": dir, "files": names}), || {
        format!(
            "{}\n{}\nnext: tidelock bundle build {} --out {name}-1.tar",
            dir.display(),
            names
                .iter()
                .map(|n| format!("  {n}"))
                .collect::<Vec<_>>()
                .join("\n"),
            dir.display()
        )
    });
    Ok(Exit::Done)
}
