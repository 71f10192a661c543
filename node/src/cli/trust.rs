//! `tidelock trust …`

use std::{
    fs,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::{Args, Subcommand, ValueHint};
use serde_json::json;
use tidelock_policy::{
    Extended, HintedSignature, Role, SignedDocument, TrustChain, TrustFile, decode_signature, sign,
};

use super::{ConfigArg, Exit, Failure, Output, node, output::table};
use crate::{ca::replace, clock::wall_unix_ms};

/// What to do about the keys that a domain trusts.
#[derive(Debug, Subcommand)]
pub enum TrustCommand {
    /// Write a trust file of format 2.
    #[command(
        after_help = "Example:\n  tidelock trust init --domain harbour --key alice=alice.pub:policy,trust \\\n    \
                      --key bob=bob.pub:policy,trust --threshold policy=2 --threshold trust=2 --out trust.toml"
    )]
    Init {
        /// The domain that the keys speak for.
        #[arg(long)]
        domain: String,
        /// A key, its public key file and its roles: policy, break-glass, release, trust.
        #[arg(long = "key", value_name = "ID=FILE:ROLE,ROLE", required = true)]
        keys: Vec<String>,
        /// How many keys of a role must sign; 1 where nothing is said.
        #[arg(long = "threshold", value_name = "ROLE=NUMBER")]
        thresholds: Vec<String>,
        /// The file to write.
        #[arg(long, value_hint = ValueHint::FilePath)]
        out: PathBuf,
    },
    /// Show a trust file or document, or without one what a running node trusts now.
    #[command(
        after_help = "Examples:\n  tidelock trust show trust.toml\n  tidelock trust show -c tidelock.toml --toml"
    )]
    Show {
        /// A trust file (TOML) or a trust document (JSON).
        #[arg(value_hint = ValueHint::FilePath)]
        file: Option<PathBuf>,
        /// Print it as a trust file.
        #[arg(long)]
        toml: bool,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Make the document that follows the current one, with the keys of another trust file. It is to be
    /// signed by enough `trust` keys of both.
    #[command(
        after_help = "Example:\n  tidelock trust rotate --from trust.toml --to next.toml --out trust-2.json\n  \
                      tidelock trust sign trust-2.json --key alice.key --out alice.sig\n  \
                      openssl dgst -sha256 -sign carol.key -out carol.sig trust-2.json"
    )]
    Rotate {
        /// The current trust file or document.
        #[arg(long, value_hint = ValueHint::FilePath)]
        from: PathBuf,
        /// A trust file with the keys and thresholds to come.
        #[arg(long, value_hint = ValueHint::FilePath)]
        to: PathBuf,
        /// The document to write.
        #[arg(long, value_hint = ValueHint::FilePath)]
        out: PathBuf,
    },
    /// Sign a document with an ECDSA P-256 key; `openssl` and `cosign sign-blob` do the same.
    Sign {
        /// The document.
        #[arg(value_hint = ValueHint::FilePath)]
        document: PathBuf,
        /// The private key, PEM.
        #[arg(long, value_hint = ValueHint::FilePath)]
        key: PathBuf,
        /// The signature to write.
        #[arg(long, value_hint = ValueHint::FilePath)]
        out: PathBuf,
    },
    /// Check that a signed document follows the current one.
    Verify {
        #[command(flatten)]
        signed: SignedArgs,
        /// The current trust file or document.
        #[arg(long, value_hint = ValueHint::FilePath)]
        trust: PathBuf,
    },
    /// Give a signed document to a running node; its peers get it from there. The plan says whether the
    /// bundle that decides stays trusted. If not, give its policies a new epoch first, signed by enough keys
    /// of both versions, and wait until every node has it.
    #[command(
        after_help = "Examples:\n  tidelock trust install trust-2.json --sig alice.sig --sig carol.sig\n  \
                      tidelock trust install trust-2.json --sig alice.sig --sig carol.sig --apply"
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

/// A document with its signatures.
#[derive(Debug, Args)]
pub struct SignedArgs {
    /// The document.
    #[arg(value_hint = ValueHint::FilePath)]
    document: PathBuf,
    /// Its detached signatures. `ID=FILE` says which key made it; it is a hint and no more.
    #[arg(long = "sig", value_name = "[ID=]FILE", required = true)]
    signatures: Vec<String>,
}

impl SignedArgs {
    pub(super) fn load(&self) -> Result<SignedDocument, Failure> {
        let signatures = self
            .signatures
            .iter()
            .map(|text| {
                let (key_hint, path) = match text.split_once('=') {
                    Some((id, path)) if !Path::new(text).exists() => (Some(id.to_owned()), path),
                    _ => (None, text.as_str()),
                };
                let path = Path::new(path);
                let bytes = fs::read(path).map_err(|e| Failure::at(path, &e))?;
                let der = decode_signature(&bytes).map_err(|e| Failure::at(path, &e))?;
                Ok(HintedSignature { der, key_hint })
            })
            .collect::<Result<_, Failure>>()?;
        Ok(SignedDocument {
            document: read(&self.document)?,
            signatures,
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|e| Failure::at(path, &e))
}

fn text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|e| Failure::at(path, &e))
}

/// A trust file or a trust document, whichever it is.
pub(super) fn load(path: &Path) -> Result<TrustFile, Failure> {
    let bytes = read(path)?;
    if bytes.first() == Some(&b'{') {
        return TrustFile::from_document(&bytes).map_err(|e| Failure::at(path, &e));
    }
    TrustFile::parse(&text(path)?).map_err(|e| Failure::at(path, &e))
}

/// Writes a detached signature, base64, as `bundle sign` does.
pub(super) fn sign_file(document: &Path, key: &Path, out: &Path) -> Result<(), Failure> {
    let signature = sign(&read(document)?, &text(key)?)?;
    replace(out, BASE64_STANDARD.encode(&signature).as_bytes(), 0o644)?;
    Ok(())
}

/// Gives a signed document to a running node.
pub(super) fn install(
    signed: &SignedArgs,
    config: &ConfigArg,
    apply: bool,
    output: &Output,
) -> Result<Exit, Failure> {
    let body = json!({"statement": BASE64_STANDARD.encode(signed.load()?.encode()?)});
    let answer = node::operate(config, "statement.install", &body, apply)?;
    output.say(&answer, || node::describe(&answer, apply));
    Ok(Exit::Done)
}

pub(super) fn run(command: TrustCommand, output: &Output) -> Result<Exit, Failure> {
    match command {
        TrustCommand::Init {
            domain,
            keys,
            thresholds,
            out,
        } => {
            let trust = TrustFile::parse(&file_text(&domain, &keys, &thresholds)?)?;
            if out.exists() {
                return Err(Failure::cannot_run(format!(
                    "{} exists already; nothing was written",
                    out.display()
                )));
            }
            replace(&out, trust.to_toml()?.as_bytes(), 0o644)?;
            show(&trust, output)?;
        }
        TrustCommand::Show { file, toml, config } => match file {
            Some(file) => {
                let trust = load(&file)?;
                if toml {
                    let text = trust.to_toml()?;
                    output.say(&json!({"toml": text}), || text.clone());
                } else {
                    show(&trust, output)?;
                }
            }
            None => {
                let answer = node::operate(&config, "trust.show", &json!({}), false)?;
                let text = answer
                    .get("toml")
                    .and_then(serde_json::Value::as_str)
                    .unwrap_or_default()
                    .to_owned();
                if toml {
                    output.say(&json!({"toml": text}), || text.clone());
                } else if output.is_json() {
                    output.say(&answer, String::new);
                } else {
                    show(&TrustFile::parse(&text)?, output)?;
                }
            }
        },
        TrustCommand::Rotate { from, to, out } => {
            let before = load(&from)?;
            let next = load(&to)?.following(&before, before.id()?, wall_unix_ms());
            let document = next.document()?;
            TrustFile::from_document(&document)?;
            replace(&out, &document, 0o644)?;
            let id = next.id()?;
            output.say(
                &json!({"document": out, "version": next.version(), "id": id}),
                || {
                    format!(
                        "{} version {} {id}\nnext: let enough `trust` keys of both versions sign it",
                        out.display(),
                        next.version()
                    )
                },
            );
        }
        TrustCommand::Sign { document, key, out } => {
            sign_file(&document, &key, &out)?;
            output.say(&json!({"signature": out}), || {
                format!("signature written to {}", out.display())
            });
        }
        TrustCommand::Verify { signed, trust } => {
            let mut chain = TrustChain::new(load(&trust)?)?;
            match chain.extend(signed.load()?) {
                Ok(outcome) => {
                    let version = chain.current().version();
                    let known = outcome == Extended::Known;
                    let id = chain.current_id().clone();
                    output.say(
                        &json!({"ok": true, "version": version, "id": id, "known": known}),
                        || format!("version {version} {id} follows"),
                    );
                }
                Err(error) => return Err(Failure::failed(format!("{}: {error}", error.code()))),
            }
        }
        TrustCommand::Install {
            signed,
            config,
            apply,
        } => return install(&signed, &config, apply, output),
    }
    Ok(Exit::Done)
}

fn show(trust: &TrustFile, output: &Output) -> Result<(), Failure> {
    let id = trust.id()?;
    let thresholds: Vec<(Role, usize)> = Role::ALL
        .into_iter()
        .filter_map(|role| Some((role, trust.threshold_of(role)?)))
        .collect();
    let words: serde_json::Map<String, serde_json::Value> = thresholds
        .iter()
        .map(|(role, threshold)| (role.to_string(), json!(threshold)))
        .collect();
    output.say(
        &json!({
            "domain": trust.domain(), "version": trust.version(), "id": id,
            "previous": trust.previous(), "thresholds": words, "keys": trust.keys(),
        }),
        || {
            let mut rows: Vec<Vec<String>> = thresholds
                .iter()
                .map(|(role, threshold)| {
                    let keys: Vec<String> = trust
                        .keys()
                        .into_iter()
                        .filter(|key| key.roles.contains(role))
                        .map(|key| key.id)
                        .collect();
                    vec![
                        format!("  {role}"),
                        format!("{threshold} of {}", keys.join(", ")),
                    ]
                })
                .collect();
            rows.insert(0, vec!["  document".to_owned(), id.to_string()]);
            let head = format!(
                "domain {}, trust version {}",
                trust.domain(),
                trust.version()
            );
            table(&[&head, ""], &rows)
        },
    );
    Ok(())
}

/// The text of a trust file out of what was typed; `TrustFile::parse` judges it.
fn file_text(domain: &str, keys: &[String], thresholds: &[String]) -> Result<String, Failure> {
    let wrong = |text: &str, form: &str| Failure::cannot_run(format!("`{text}` is not {form}"));
    let mut needed: Vec<(Role, String)> = Vec::new();
    for text in thresholds {
        let form = "ROLE=NUMBER, with a role of policy, break-glass, release, trust";
        let (role, number) = text.split_once('=').ok_or_else(|| wrong(text, form))?;
        let role = Role::parse(role).ok_or_else(|| wrong(text, form))?;
        let number: u8 = number.parse().map_err(|_| wrong(text, form))?;
        needed.push((role, number.to_string()));
    }
    let mut blocks = String::new();
    let mut used: Vec<Role> = Vec::new();
    for text in keys {
        let form = "ID=FILE:ROLE,ROLE, with roles of policy, break-glass, release, trust";
        let (id, rest) = text.split_once('=').ok_or_else(|| wrong(text, form))?;
        let (file, roles) = rest.rsplit_once(':').ok_or_else(|| wrong(text, form))?;
        let roles = roles
            .split(',')
            .map(Role::parse)
            .collect::<Option<Vec<Role>>>()
            .ok_or_else(|| wrong(text, form))?;
        used.extend(&roles);
        let file = Path::new(file);
        let words: Vec<String> = roles.iter().map(|role| format!("\"{role}\"")).collect();
        let pem = fs::read_to_string(file).map_err(|e| Failure::at(file, &e))?;
        if id.contains('"') || pem.contains('"') {
            return Err(wrong(text, form));
        }
        blocks.push_str(&format!(
            "\n[[keys]]\nid = \"{id}\"\nroles = [{}]\npublic_key_pem = \"\"\"\n{}\n\"\"\"\n",
            words.join(", "),
            pem.trim()
        ));
    }
    for role in used {
        if needed.iter().all(|(known, _)| *known != role) {
            needed.push((role, "1".to_owned()));
        }
    }
    if domain.contains('"') {
        return Err(wrong(domain, "a domain"));
    }
    let mut head = format!("format = 2\ndomain = \"{domain}\"\n\n[thresholds]\n");
    for (role, number) in needed {
        head.push_str(&format!("{role} = {number}\n"));
    }
    Ok(head + &blocks)
}
