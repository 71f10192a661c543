//! `tidelock audit prove` and `tidelock audit verify --proof`: one record for an outsider.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, ValueHint};
use serde_json::{Value, json};
use tidelock_segments::{
    LogPublicKey, Origin, Sha256Hash,
    offline::{LogProof, LogProofError, Offline},
};
use tidelock_transport::{
    endorse::verify_endorsement,
    identity::IdentityRules,
    revocation::{Revocation, RevocationOptions, RevocationState},
    verifier::Trust,
};

use super::{Exit, Failure, Output, audit::record};
use crate::clock::wall_unix_ms;

/// Largest proof document; a record, a chain of certificates and two paths have room in it.
const PROOF_BYTES_MAX: u64 = 1024 * 1024;

/// Which record.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Which {
    /// The record's index in its log.
    pub index: Option<u64>,
    /// The leaf hash of the record, as an answer of the decision API names it.
    #[arg(long)]
    pub leaf: Option<Sha256Hash>,
}

/// How to prove it.
#[derive(Debug, Args)]
pub struct ProveArgs {
    #[command(flatten)]
    which: Which,
    /// The log; the own log if not given.
    #[arg(long, value_parser = Origin::parse)]
    origin: Option<Origin>,
    /// Prove as well that the newest checkpoint held continues the one that the record is proven
    /// against. Reads every segment in between.
    #[arg(long)]
    latest: bool,
    /// Write the proof to this file, which must not exist.
    #[arg(long, value_hint = ValueHint::FilePath)]
    out: Option<PathBuf>,
}

pub(super) fn prove(
    offline: &Offline<'_>,
    args: &ProveArgs,
    output: Output,
) -> Result<Exit, Failure> {
    let origin = match &args.origin {
        Some(origin) => origin.clone(),
        None => offline.own_origin()?,
    };
    let index = match (args.which.index, &args.which.leaf) {
        (Some(index), _) => index,
        (None, Some(leaf)) => offline.find_leaf(&origin, leaf)?.ok_or_else(|| {
            Failure::failed(format!("no record with leaf {leaf} is held of {origin}"))
        })?,
        (None, None) => return Err(Failure::cannot_run("name an index or a --leaf")),
    };
    let proof = match offline.prove(&origin, index, args.latest) {
        Ok(proof) => proof,
        Err(LogProofError::Offline(error)) => return Err(error.into()),
        Err(refused) => return Err(Failure::failed(refused.to_string())),
    };
    let text = serde_json::to_string_pretty(&proof)?;
    match &args.out {
        None => output.say(&proof, || text),
        Some(path) => {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(path)
                .map_err(|e| Failure::at(path, &e))?;
            std::io::Write::write_all(&mut file, text.as_bytes())
                .map_err(|e| Failure::at(path, &e))?;
            output.say(
                &json!({"file": path, "origin": origin, "index": index}),
                || {
                    format!(
                        "record {index} of {origin}: proof written to {}",
                        path.display()
                    )
                },
            );
        }
    }
    Ok(Exit::Done)
}

/// On whose word the log's key is taken.
enum Authority {
    /// A CA: the endorsement's certificate must come from it.
    Ca(Trust),
    /// The key itself, known from elsewhere.
    Key(LogPublicKey),
}

impl Authority {
    fn of(key_of: &str) -> Result<Self, Failure> {
        if let Ok(key) = Sha256Hash::from_hex(key_of) {
            return Ok(Self::Key(LogPublicKey::from_bytes(*key.as_bytes())));
        }
        let path = Path::new(key_of);
        let pem = fs::read(path).map_err(|e| {
            Failure::cannot_run(format!(
                "--key-of {key_of} is neither a CA's certificate file ({e}) nor a log key of 64 hex digits"
            ))
        })?;
        Ok(Self::Ca(Trust::from_pem(&pem)?))
    }
}

/// Checks a proof without a node, a root or a config.
pub(super) fn verify(path: &Path, key_of: &str, output: Output) -> Result<Exit, Failure> {
    let authority = Authority::of(key_of)?;
    let length = fs::metadata(path).map_err(|e| Failure::at(path, &e))?.len();
    if length > PROOF_BYTES_MAX {
        return Err(Failure::at(path, &"too long for a proof"));
    }
    let bytes = fs::read(path).map_err(|e| Failure::at(path, &e))?;
    let judged = serde_json::from_slice::<LogProof>(&bytes)
        .map_err(|e| format!("not a proof: {e}"))
        .and_then(|proof| judge(&proof, &authority));
    let (value, exit) = match judged {
        Ok(found) => (found, Exit::Done),
        Err(why) => (json!({"ok": false, "why": why}), Exit::Failed),
    };
    output.say(&value, || text(&value));
    Ok(exit)
}

fn judge(proof: &LogProof, authority: &Authority) -> Result<Value, String> {
    let endorsement = &proof.endorsement;
    let key = match authority {
        Authority::Ca(_) => &endorsement.log_key,
        Authority::Key(key) => key,
    };
    let newest = proof.verify(key).map_err(|e| e.to_string())?;
    let shown = record(proof.proof.index, &proof.proof.record);
    if let Authority::Ca(trust) = authority {
        let now = wall_unix_ms();
        // When the record was made, by the record itself, which the tree covers: the certificate must
        // have been valid then, not today.
        let made = ["/record/at", "/record/unix_ms"]
            .iter()
            .find_map(|at| shown.pointer(at).and_then(Value::as_u64));
        // Revocation needs a CRL and so a node; what was recorded before it stays valid (ruling 4).
        let options = RevocationOptions {
            grace_ms: u64::MAX,
            allow_missing: true,
        };
        let revocation = Revocation::new(RevocationState::new(options));
        let rules = IdentityRules {
            domain: proof.domain.clone(),
            allow_without_domain: false,
        };
        verify_endorsement(
            endorsement,
            trust,
            &revocation,
            &rules,
            made.unwrap_or(now),
            now,
        )
        .map_err(|e| format!("{}: {e}", e.code()))?;
    }
    Ok(json!({
        "ok": true,
        "domain": proof.domain,
        "origin": proof.origin,
        "node": endorsement.node_id,
        "key_by": match authority {
            Authority::Ca(_) => "certificate",
            Authority::Key(_) => "given",
        },
        "index": proof.proof.index,
        "leaf": shown.get("leaf"),
        "record": shown.get("record"),
        "checkpoint_size": newest.size,
        "checkpoint_root": newest.root,
        "latest": proof.consistency.is_some(),
    }))
}

fn text(value: &Value) -> String {
    let get = |key: &str| match value.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    };
    if value.get("ok") != Some(&Value::Bool(true)) {
        return format!("BAD: {}", get("why"));
    }
    let by = if get("key_by") == "certificate" {
        "its certificate comes from the CA given; its revocation was not asked about"
    } else {
        "its log key is the one given; no certificate was judged"
    };
    format!(
        "good: record {} of {} stands in the log of node {} of domain {}, whose signed checkpoint \
         has {} records\n{by}\n{}",
        get("index"),
        get("origin"),
        get("node"),
        get("domain"),
        get("checkpoint_size"),
        get("record"),
    )
}
