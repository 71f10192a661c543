//! What comes and goes by removable media, on the node's side.
//!
//! A volume is read and written by the command line; each segment and receipt in it comes through here,
//! at the operator's door of a running node or in the process of the command on a stopped one, and takes
//! the way of one that came in a session: the same wishes, the same admission, the same custody.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, PoisonError},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};
use tidelock_gateway::OperatorError;
use tidelock_segments::{
    CustodyReceipt, Kind, NodeId, PutOutcome, SegmentId, SegmentRef,
    limits::MAX_SEGMENT_BYTES,
    verify_segment,
    volume::{EntryMark, ReceiptMark},
};

use super::{
    admit::Denied,
    doors::{bad, unrecorded},
    hooks::RECEIPT_OF_NOTHING,
    node::Node,
};
use crate::{cli::Failure, config::Config};

/// Most entries of one request, and so most results of an answer: about 300 bytes each.
pub(crate) const ENTRIES_MAX: usize = 256;
/// Most refused entries that the record of a request names; all are counted.
const REFUSED_RECORDED: usize = 16;
/// How long a segment that comes in parts may wait for the next one.
const PARTS_PATIENCE: Duration = Duration::from_secs(120);

/// A segment that is too long for one request: at most one at a time, 32 MiB (INV-07).
#[derive(Debug)]
pub(super) struct Parts {
    id: SegmentId,
    bytes: Vec<u8>,
    touched: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Import {
    exporter: NodeId,
    export: String,
    number: u32,
    /// Audit that earlier requests of the same plan would have taken.
    #[serde(default)]
    planned_bytes: u64,
    entries: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    mark: EntryMark,
    /// Base64; absent if the bytes came in parts.
    bytes: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    id: SegmentId,
    offset: u64,
    bytes: String,
}

/// What becomes of an entry.
enum Fate {
    /// Taken, or would be.
    New,
    /// Held already.
    Held,
    /// Good for nothing here: its own log, or older than what is held.
    NotWanted(&'static str),
    Refused(Denied),
}

impl From<Result<PutOutcome, Denied>> for Fate {
    fn from(admitted: Result<PutOutcome, Denied>) -> Self {
        match admitted {
            Ok(PutOutcome::Stored) => Self::New,
            Ok(PutOutcome::AlreadyHeld) => Self::Held,
            Err(denied) => Self::Refused(denied),
        }
    }
}

impl Fate {
    fn word(&self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Held => "held",
            Self::NotWanted(_) => "not_wanted",
            Self::Refused(_) => "refused",
        }
    }

    fn describe(&self) -> Value {
        match self {
            Self::New | Self::Held => json!({"fate": self.word()}),
            Self::NotWanted(code) => json!({"fate": self.word(), "code": code}),
            Self::Refused(denied) => json!({
                "fate": self.word(), "code": denied.code, "message": denied.message,
                "forged": denied.bringer,
            }),
        }
    }
}

fn decoded(text: &str) -> Result<Vec<u8>, OperatorError> {
    BASE64_STANDARD
        .decode(text)
        .map_err(|e| bad(format!("`bytes` is not base64: {e}")))
}

fn read<T: for<'a> Deserialize<'a>>(body: &Value) -> Result<T, OperatorError> {
    T::deserialize(body).map_err(|e| bad(e.to_string()))
}

impl Node {
    /// Takes one part of a segment that is too long for one request.
    pub(super) fn operate_media_part(&self, body: &Value) -> Result<Value, OperatorError> {
        let part: Part = read(body)?;
        let bytes = decoded(&part.bytes)?;
        let now = self.clock.monotonic();
        let mut held = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if part.offset == 0 {
            if held.as_ref().is_some_and(|other| other.id != part.id) {
                return Err(bad("another segment is coming in parts; try again later"));
            }
            *held = Some(Parts {
                id: part.id,
                bytes: Vec::new(),
                touched: now,
            });
        }
        let parts = held
            .as_mut()
            .filter(|parts| parts.id == part.id && parts.bytes.len() as u64 == part.offset)
            .ok_or_else(|| bad("the part does not follow the last one; begin at offset 0"))?;
        if part.offset.saturating_add(bytes.len() as u64) > MAX_SEGMENT_BYTES {
            *held = None;
            return Err(bad("a segment is not so long"));
        }
        parts.bytes.extend_from_slice(&bytes);
        parts.touched = now;
        Ok(json!({"have_bytes": parts.bytes.len()}))
    }

    /// Forgets parts that nobody went on with.
    pub(super) fn drop_stale_parts(&self) {
        let now = self.clock.monotonic();
        let mut held = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if held
            .as_ref()
            .is_some_and(|parts| now.saturating_sub(parts.touched) > PARTS_PATIENCE)
        {
            *held = None;
        }
    }

    fn take_parts(&self, id: &SegmentId) -> Result<Vec<u8>, OperatorError> {
        let mut held = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        held.take_if(|parts| parts.id == *id)
            .map(|parts| parts.bytes)
            .ok_or_else(|| bad(format!("no parts of {id} are here; begin at offset 0")))
    }

    /// Judges entries of a volume, or takes them.
    pub(super) fn operate_media_import(
        &self,
        body: &Value,
        apply: bool,
    ) -> Result<Value, OperatorError> {
        let import: Import = read(body)?;
        if import.entries.len() > ENTRIES_MAX {
            return Err(bad(format!("at most {ENTRIES_MAX} entries at once")));
        }
        let of = json!({
            "exporter": import.exporter, "export": import.export, "volume": import.number,
            "entries": import.entries.len(),
        });
        // All of it, before anything takes effect: a malformed request has none.
        let mut entries = Vec::new();
        for Entry { mark, bytes } in import.entries {
            let bytes = match (&mark, bytes) {
                (EntryMark::Segment(reference), None) => self.take_parts(&reference.id)?,
                (_, text) => decoded(text.as_deref().unwrap_or_default())?,
            };
            entries.push((mark, bytes));
        }
        // What can change nothing is not worth two records, however often a medium is read; it is judged
        // only, so that nothing unrecorded takes effect (INV-14).
        let acts = apply && entries.iter().any(|(mark, _)| self.media_may_act(mark));
        if acts {
            // Before anything of it takes effect.
            self.record_act("media_import", of.clone())
                .map_err(unrecorded)?;
        }
        let mut planned_bytes = import.planned_bytes;
        let mut planned = BTreeSet::new();
        let mut results = Vec::new();
        let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut codes: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut refused = Vec::new();
        for (mark, bytes) in entries {
            let fate = match &mark {
                // By the time that it is its turn it will be.
                mark if !acts && planned.contains(&mark.key()) => Fate::Held,
                EntryMark::Segment(reference) => {
                    let planned = (!acts).then_some(&mut planned_bytes);
                    self.media_segment(&import.exporter, reference, bytes, planned)
                }
                EntryMark::Receipt(mark) => self.media_receipt(mark, &bytes, acts),
            };
            if matches!(fate, Fate::New) {
                planned.insert(mark.key());
            }
            *counts.entry(fate.word()).or_default() += 1;
            if let Fate::Refused(denied) = &fate {
                *codes.entry(denied.code).or_default() += 1;
                if refused.len() < REFUSED_RECORDED {
                    let id = match &mark {
                        EntryMark::Segment(reference) => reference.id,
                        EntryMark::Receipt(mark) => mark.segment_id,
                    };
                    refused.push(json!({"segment": id, "code": denied.code}));
                }
            }
            results.push(fate.describe());
        }
        if acts || (apply && !refused.is_empty()) {
            let mut detail = of;
            if let Some(detail) = detail.as_object_mut() {
                detail.insert("fates".to_owned(), json!(counts));
                detail.insert("refused_by_code".to_owned(), json!(codes));
                detail.insert("refused".to_owned(), json!(refused));
            }
            self.event("media_imported", detail);
        }
        Ok(json!({"results": results, "planned_bytes": planned_bytes}))
    }

    /// Whether an entry, if it is what it says, could change anything here. One that is not is refused, and
    /// changes nothing.
    fn media_may_act(&self, mark: &EntryMark) -> bool {
        match mark {
            EntryMark::Segment(reference) => self.media_wish(reference, 0).is_none(),
            EntryMark::Receipt(mark) => {
                self.store.contains(&mark.segment_id)
                    && !self
                        .store
                        .custodians(&mark.segment_id)
                        .contains(&mark.custodian)
            }
        }
    }

    /// What a session would ask for it, in the same words.
    fn media_wish(&self, reference: &SegmentRef, planned_bytes: u64) -> Option<Fate> {
        if self.store.contains(&reference.id) {
            return Some(Fate::Held);
        }
        if self.is_own(&reference.origin) {
            return Some(Fate::NotWanted("OWN_AUDIT"));
        }
        if self.is_forked(&reference.origin) {
            return Some(Fate::Refused(Denied::local(
                "AUDIT_FORK",
                "this log contradicts itself; nothing more of it is taken until an operator says so, \
                 see tidelock audit accept",
            )));
        }
        let counted = SegmentRef {
            size_bytes: self
                .root
                .allocation_bound(reference.size_bytes)
                .saturating_add(planned_bytes),
            ..reference.clone()
        };
        match reference.kind {
            Kind::Witness => None,
            _ if self.wants(&counted) => None,
            Kind::Audit => Some(Fate::Refused(Denied::local(
                "CUSTODY_FULL",
                "no room is left for the audit of others; see audit.custody_max_bytes",
            ))),
            Kind::Revocation | Kind::Policy => Some(Fate::NotWanted("SUPERSEDED")),
        }
    }

    /// With `planned_bytes` it is judged only.
    fn media_segment(
        &self,
        exporter: &NodeId,
        listed: &SegmentRef,
        bytes: Vec<u8>,
        planned_bytes: Option<&mut u64>,
    ) -> Fate {
        let domain = self.config.load().node.domain.clone();
        let planned = planned_bytes.is_some();
        let refuse = |denied: Denied| {
            if !planned {
                self.note_media_refusal(exporter, listed, &denied);
            }
            Fate::Refused(denied)
        };
        let segment = match verify_segment(bytes, Some(listed.id), &domain) {
            Ok(segment) => segment,
            Err(error) => return refuse(Denied::bringer("format", error)),
        };
        let reference = segment.reference();
        if reference != *listed {
            let denied = Denied::bringer(
                "listed_otherwise",
                format!(
                    "it is {} of {}, listed as {} of {}",
                    reference.sequence, reference.origin, listed.sequence, listed.origin
                ),
            );
            return refuse(denied);
        }
        let before = planned_bytes.as_ref().map_or(0, |bytes| **bytes);
        match self.media_wish(&reference, before) {
            Some(Fate::Refused(denied)) => return refuse(denied),
            Some(fate) => return fate,
            None => {}
        }
        if let Some(planned_bytes) = planned_bytes {
            let fate = Fate::from(self.judge(&segment));
            if matches!(fate, Fate::New) && reference.kind == Kind::Audit {
                let bound = self.root.allocation_bound(reference.size_bytes);
                *planned_bytes = planned_bytes.saturating_add(bound);
            }
            return fate;
        }
        let fate = Fate::from(self.admit(exporter, &segment));
        if matches!(fate, Fate::New) && reference.kind == Kind::Audit {
            // The other kinds were offered where they took effect.
            self.offered(reference);
        }
        fate
    }

    /// A refusal before admission, noted as admission notes its own.
    fn note_media_refusal(&self, exporter: &NodeId, listed: &SegmentRef, denied: &Denied) {
        self.journal.note(
            self.clock.unix_ms(),
            "segment_refused",
            json!({
                "segment": listed.id, "kind": listed.kind, "origin": listed.origin,
                "sequence": listed.sequence, "peer": exporter, "code": denied.code,
                "message": denied.message,
            }),
        );
    }

    fn media_receipt(&self, listed: &ReceiptMark, bytes: &[u8], apply: bool) -> Fate {
        let judged = CustodyReceipt::decode(bytes)
            .map_err(|e| Denied::bringer("RECEIPT_FORMAT", e))
            .and_then(|receipt| {
                if (&receipt.segment_id, &receipt.custodian)
                    != (&listed.segment_id, &listed.custodian)
                {
                    return Err(Denied::bringer(
                        "listed_otherwise",
                        format!("it is of {} for {}", receipt.custodian, receipt.segment_id),
                    ));
                }
                receipt
                    .verify_signature()
                    .map_err(|e| Denied::bringer("RECEIPT_REFUSED", e))?;
                self.check_receipt(&receipt)?;
                Ok(receipt)
            });
        let receipt = match judged {
            Ok(receipt) => receipt,
            Err(denied) => return Fate::Refused(denied),
        };
        if receipt.custodian == self.config.load().node.id {
            return Fate::NotWanted("OWN_RECEIPT");
        }
        if !self.store.contains(&receipt.segment_id) {
            return Fate::NotWanted(RECEIPT_OF_NOTHING);
        }
        if self
            .store
            .custodians(&receipt.segment_id)
            .contains(&receipt.custodian)
        {
            return Fate::Held;
        }
        if !apply {
            return Fate::New;
        }
        match self.keep_receipt(&receipt) {
            Ok(()) => {
                self.journal.note(
                    self.clock.unix_ms(),
                    "receipt_taken",
                    json!({"peer": receipt.custodian, "segment": receipt.segment_id}),
                );
                Fate::New
            }
            Err(denied) if denied.code == RECEIPT_OF_NOTHING => Fate::NotWanted(RECEIPT_OF_NOTHING),
            Err(denied) => Fate::Refused(denied),
        }
    }

    /// Receipts to carry home: this node's own for each of the segments, and those of others that it
    /// holds.
    pub(super) fn operate_media_receipts(&self, body: &Value) -> Result<Value, OperatorError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Asked {
            ids: Vec<SegmentId>,
        }
        let asked: Asked = read(body)?;
        if asked.ids.len() > ENTRIES_MAX {
            return Err(bad(format!("at most {ENTRIES_MAX} segments at once")));
        }
        let mut all = Vec::new();
        for id in &asked.ids {
            let mut receipts = self.store.receipts(id);
            match self.log.issue_receipt(id) {
                Ok(own) => {
                    receipts.retain(|other| other.custodian != own.custodian);
                    receipts.push(own);
                }
                // Evicted meanwhile, or damaged: a custodian vouches for what it holds whole.
                Err(error) => tracing::warn!(%id, %error, "no custody receipt is given"),
            }
            for receipt in receipts {
                if let Ok(bytes) = receipt.encode() {
                    all.push(json!({
                        "segment_id": receipt.segment_id,
                        "custodian": receipt.custodian,
                        "bytes": BASE64_STANDARD.encode(bytes),
                    }));
                }
            }
        }
        Ok(json!({"receipts": all}))
    }
}

/// A stopped node, opened for one command as the node itself would open it.
pub(crate) struct Stopped(Arc<Node>);

impl Stopped {
    /// Takes the root's lock and opens what the node has; no door and no mesh.
    pub(crate) fn open(config_path: &Path, config: Config) -> Result<Self, Failure> {
        Node::open(config_path, config).map(Self)
    }

    /// An operation as the running node does it.
    pub(crate) fn operate(&self, op: &str, body: &Value, apply: bool) -> Result<Value, Failure> {
        self.0
            .operate(op, body, apply)
            .map_err(|e| Failure::failed(format!("{}: {}", e.code, e.message)))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.settle();
        self.0.close();
    }
}
