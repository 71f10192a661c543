//! What opening the log finds: which files hold records, in which order, and whether each is whole.

use std::sync::Arc;

use super::LogConfig;
use super::LogError;
use super::core::{Served, active_path};
use super::event::NamedHead;
use super::state::{Contradicted, LogState, Named, SealedEnd};
use crate::body;
use crate::checkpoint;
use crate::disk::OpenMode;
use crate::format::SegmentRef;
use crate::frame::{self, BATCH_ALIGN, Content, LogHeader, MARK_BYTES, Scan, classify, scan};
use crate::id::Origin;
use crate::keys::{LogKey, LogPublicKey};
use crate::ledger::Charge;
use crate::limits::{MAX_BATCH_BYTES, MAX_OTHER_HEADS, MAX_QUARANTINED_NAMED};
use crate::merkle::Frontier;
use crate::root::{Root, RootError};
use crate::store::{Store, StoreError};

/// A file below `log/`.
pub(super) struct LogFile {
    pub(super) incarnation: u64,
    pub(super) sequence: u64,
    pub(super) path: String,
}

/// Incarnation and sequence in a file's name.
pub(crate) fn parse_name(name: &str) -> Option<(u64, u64)> {
    let (incarnation, sequence) = name.strip_suffix(".log")?.split_once('-')?;
    Some((incarnation.parse().ok()?, sequence.parse().ok()?))
}

/// The log files that lie in the root, by incarnation and sequence.
pub(super) fn log_files(root: &Root) -> Result<Vec<LogFile>, LogError> {
    let mut files: Vec<(u64, u64)> = root
        .list("log")?
        .iter()
        .filter_map(|name| parse_name(name))
        .collect();
    files.sort_unstable();
    Ok(files
        .into_iter()
        .map(|(incarnation, sequence)| LogFile {
            incarnation,
            sequence,
            path: active_path(incarnation, sequence),
        })
        .collect())
}

/// A file with records that are not sealed.
pub(super) struct OpenFile {
    pub(super) path: String,
    pub(super) header: LogHeader,
    pub(super) scan: Scan,
    bytes: Vec<u8>,
}

/// What recovery found of the current incarnation.
pub(super) struct Recovered {
    /// The end of what is sealed.
    pub(super) sealed: SealedEnd,
    /// In order; the last is the active one.
    pub(super) open: Vec<OpenFile>,
    /// Files whose segment is in the store while the stored state does not know it, and their records.
    pub(super) stored: Vec<Served>,
    pub(super) stored_records: Vec<Vec<u8>>,
    /// Files that were made ready and not taken into use, and those that the state knows as sealed.
    pub(super) prepared: Vec<String>,
    /// Of the last batch, cut off and never acknowledged.
    pub(super) torn_bytes: u64,
    pub(super) torn_records: u64,
}

pub(super) enum Recover {
    /// Acknowledged data is damaged: a new incarnation follows.
    Damaged(String),
    /// The disk or the root refused.
    Log(LogError),
}

impl<E: Into<LogError>> From<E> for Recover {
    fn from(error: E) -> Self {
        Self::Log(error.into())
    }
}

/// Reads the files of the current incarnation and finds out where the log stands.
///
/// They must follow each other without a gap, each beginning with the very tree that the one before
/// ends with: the header of a file attests everything in the file before it, as a mark attests
/// everything below it. So a tail can be torn in the last file only.
pub(super) fn recover(
    root: &Arc<Root>,
    store: &Store,
    config: &LogConfig,
    key: &LogKey,
    state: &LogState,
) -> Result<Recovered, Recover> {
    let damaged = |why: String| Recover::Damaged(why);
    let stored_next = store
        .last(&state.origin)
        .map_or(0, |newest| newest.sequence.saturating_add(1));
    let mut found = Recovered {
        sealed: state.sealed.clone(),
        open: Vec::new(),
        stored: Vec::new(),
        stored_records: Vec::new(),
        prepared: Vec::new(),
        torn_bytes: 0,
        torn_records: 0,
    };
    let mut end = Some(
        state
            .sealed
            .tree()
            .map_err(|_| LogError::Config("the state file is wrong"))?,
    );
    let mut next = state.sealed.next_sequence;
    let line = checkpoint::origin_line(&config.domain, &state.origin).unwrap_or_default();
    for file in log_files(root)? {
        if file.incarnation != state.incarnation {
            continue;
        }
        let LogFile { sequence, path, .. } = file;
        if sequence < state.sealed.next_sequence {
            // Sealed, and the state says so; the crash came before its removal.
            found.prepared.push(path);
            continue;
        }
        let bytes = root.read(&path)?.unwrap_or_default();
        let header = match classify(&bytes, &config.domain, &state.origin, sequence, key) {
            Content::Begun(header) => *header,
            Content::Prepared(torn) => {
                if let Some(mark) = torn {
                    found.torn_bytes = u64::from(mark.bytes);
                    found.torn_records = u64::from(mark.count);
                }
                found.prepared.push(path);
                continue;
            }
            Content::Damaged(why) => return Err(damaged(format!("{path}: {why}"))),
        };
        if end.is_none() || sequence != next {
            // Segments are in the store of which the state does not know, and no file tells of them.
            if found.open.is_empty() && sequence >= next && sequence <= stored_next.max(next) {
                let sealed = sealed_end(store, state, sequence)?;
                end = Some(sealed.tree().map_err(|_| LogError::Memory)?);
                found.sealed = sealed;
            } else {
                return Err(damaged(format!("{path}: the file before it is missing")));
            }
        }
        let before = header.tree().map_err(|e| damaged(format!("{path}: {e}")))?;
        if end.as_ref() != Some(&before) {
            return Err(damaged(format!(
                "{path} does not continue the log where the part before it ends"
            )));
        }
        let scan = scan(&bytes, &header, &line).map_err(|e| damaged(format!("{path}: {e}")))?;
        end = Some(scan.tree.clone());
        next = sequence.saturating_add(1);
        if sequence < stored_next
            && let Some(reference) = store.find(&state.origin, sequence)
        {
            let same = store.audit_span(&reference.id).is_some_and(|span| {
                span.root == scan.tree.root() && span.last.checked_add(1) == Some(scan.tree.size())
            });
            if !same || !found.open.is_empty() {
                return Err(damaged(format!(
                    "{path} and the sealed segment {sequence} differ"
                )));
            }
            found.sealed = SealedEnd::of(next, Some(reference.id), &scan.tree);
            found.stored.push(Served {
                path,
                file_bytes: header.file_bytes,
                sound: false,
            });
            found.stored_records.push(scan.records);
            continue;
        }
        found.torn_bytes = scan.torn_bytes;
        found.torn_records = scan.torn_records;
        found.open.push(OpenFile {
            path,
            header,
            scan,
            bytes,
        });
    }
    if found.open.is_empty() && found.sealed.next_sequence < stored_next {
        found.sealed = sealed_end(store, state, stored_next)?;
    }
    Ok(found)
}

/// Where the part of the log ends that is sealed below `next`, read from the store.
fn sealed_end(store: &Store, state: &LogState, next: u64) -> Result<SealedEnd, Recover> {
    let damaged = |why: String| Recover::Damaged(why);
    let newest: SegmentRef = next
        .checked_sub(1)
        .and_then(|sequence| store.find(&state.origin, sequence))
        .ok_or_else(|| damaged(format!("the sealed segment before {next} is missing")))?;
    let segment = match store.get(&newest.id) {
        Err(StoreError::Damaged { reason, .. }) => {
            return Err(damaged(format!(
                "the newest sealed segment is damaged: {reason}"
            )));
        }
        other => other?,
    };
    let header = segment.header();
    let key = segment.endorsement().map(|endorsement| endorsement.log_key);
    let tree = body::parse_body(segment.body(), &header.domain, &header.origin)
        .and_then(|body| match body.frontier_after() {
            // Signed with the segment, and it leads to the root in the checkpoint.
            Some(after) => Ok(after.clone()),
            None => body.check_tree(&key.unwrap_or(LogPublicKey::from_bytes([0; 32])), None),
        })
        .map_err(|e| damaged(format!("the newest sealed segment is wrong: {e}")))?;
    Ok(SealedEnd::of(next, Some(newest.id), &tree))
}

/// Writes what was read and syncs it, before anything in it counts: whoever ran before may have had a
/// failed sync, and then the cache shows bytes that the device never got. Zeros follow, as far as a
/// batch that was cut off can reach, so that nothing of this file's salt is behind its end.
pub(super) fn rewrite(root: &Root, open: &OpenFile) -> Result<(), LogError> {
    let mut bytes = open.bytes.clone();
    let end = bytes.len().min(open.scan.end);
    let cleared = bytes
        .len()
        .min(end + MAX_BATCH_BYTES + MARK_BYTES + BATCH_ALIGN);
    let dirty = bytes
        .get(end..cleared)
        .is_some_and(|tail| tail.iter().any(|byte| *byte != 0));
    if let Some(tail) = bytes.get_mut(end..cleared) {
        tail.fill(0);
    }
    let write = if dirty { cleared } else { end };
    let handle = root.open_file(&open.path, OpenMode::ReadWrite)?;
    handle
        .write_at(0, bytes.get(..write).unwrap_or_default())
        .map_err(RootError::Disk)?;
    handle.sync_data().map_err(RootError::Disk)?;
    Ok(())
}

/// Whether a file is the one that its name says, and ends with the very head of the stored segment of
/// its place.
fn is_stored(store: &Store, file: &LogFile, bytes: &[u8]) -> bool {
    let Ok(header) = LogHeader::decode(bytes) else {
        return false;
    };
    let incarnation = header.origin.audit_parts().map(|parts| parts.2);
    if (incarnation, header.sequence) != (Some(file.incarnation), file.sequence) {
        return false;
    }
    store
        .find(&header.origin, header.sequence)
        .and_then(|stored| store.audit_span(&stored.id))
        .and_then(|span| Some((span.last.checked_add(1)?, span.root)))
        .is_some_and(|end| frame::highest_head(bytes, &header) == Some(end))
}

/// Files that went to the quarantine: as many as a record may name, and how many more there were.
#[derive(Debug, Default)]
pub(super) struct Aside {
    pub(super) paths: Vec<String>,
    pub(super) more: u64,
}

impl Aside {
    pub(super) fn push(&mut self, path: String) {
        if self.paths.len() < MAX_QUARANTINED_NAMED {
            self.paths.push(path);
        } else {
            self.more = self.more.saturating_add(1);
        }
    }

    pub(super) fn append(&mut self, other: Self) {
        for path in other.paths {
            self.push(path);
        }
        self.more = self.more.saturating_add(other.more);
    }
}

/// Puts the files of older incarnations into the quarantine, unless nothing in them is missing from the
/// store: what a peer had may stand there in the same place, so the content counts.
pub(super) fn set_aside(
    root: &Arc<Root>,
    store: &Store,
    aside: &mut Aside,
) -> Result<(), LogError> {
    for file in log_files(root)? {
        let bytes = root.read(&file.path)?.unwrap_or_default();
        if frame::was_not_begun(&bytes) || is_stored(store, &file, &bytes) {
            root.remove(&file.path)?;
        } else {
            aside.push(root.move_to_quarantine(&file.path, Charge::Normal)?);
        }
    }
    Ok(())
}

/// The place of the last segment that is linked to `first`, itself perhaps. Beyond a hole may be what
/// peers brought.
///
/// # Errors
/// [`LogError::OwnFork`] if somebody gave a receipt for one of them: two contents are out then.
pub(super) fn last_linked(store: &Store, first: &SegmentRef) -> Result<u64, LogError> {
    let mut last = first.clone();
    loop {
        if store.custodian_count(&last.id) > 0 {
            return Err(LogError::OwnFork {
                origin: last.origin,
                sequence: last.sequence,
            });
        }
        let next = last.sequence.checked_add(1);
        match next.and_then(|next| store.find(&last.origin, next)) {
            Some(next) if next.prev == Some(last.id) => last = next,
            Some(_) | None => return Ok(last.sequence),
        }
    }
}

/// Puts the own segments into the quarantine that contradict what a peer holds, if they are still
/// there. The newest first, so that what stays is linked whenever this is cut off.
///
/// # Errors
/// As [`last_linked`], and the store's refusal.
pub(super) fn set_contradicted_aside(
    store: &Store,
    contradicted: &Contradicted,
    aside: &mut Aside,
) -> Result<(), LogError> {
    let Some(first) = store.reference(&contradicted.id) else {
        return Ok(());
    };
    for sequence in (first.sequence..=last_linked(store, &first)?).rev() {
        let Some(newest) = store.find(&first.origin, sequence) else {
            continue;
        };
        let path = store.set_aside(&newest.id, "a peer holds another segment in its place")?;
        path.into_iter().for_each(|path| aside.push(path));
    }
    Ok(())
}

/// What the first record of a new incarnation says of this node's earlier logs.
pub(super) struct Lineage {
    /// The number of the new one: higher than any that is known.
    pub(super) incarnation: u64,
    /// The log before it.
    pub(super) previous: Option<Origin>,
    /// The highest head of that.
    pub(super) head: Option<NamedHead>,
    /// The highest heads of others, newest first: a peer that never had the log before this one finds
    /// the one that it knows.
    pub(super) others: Vec<NamedHead>,
}

impl Lineage {
    pub(super) fn named(&self) -> Vec<Named> {
        let heads = self.head.iter().chain(&self.others);
        heads
            .map(|head| Named {
                origin: head.origin.clone(),
                size: head.size,
            })
            .collect()
    }
}

/// The highest number of an incarnation that this root knows of; 0 if none.
pub(super) fn highest_incarnation(
    root: &Root,
    store: &Store,
    config: &LogConfig,
    known: Option<&LogState>,
) -> Result<u64, LogError> {
    Ok(store
        .own_logs(&config.node_id)
        .iter()
        .filter_map(|origin| origin.audit_parts().map(|parts| parts.2))
        .chain(log_files(root)?.iter().map(|file| file.incarnation))
        .chain(known.iter().map(|state| state.incarnation))
        .max()
        .unwrap_or(0))
}

/// Finds out what a new incarnation names (ruling 7): the highest head of the newest log, and those of
/// the others that are held.
pub(super) fn lineage(
    root: &Root,
    store: &Store,
    config: &LogConfig,
    known: Option<&LogState>,
) -> Result<Lineage, LogError> {
    let highest = highest_incarnation(root, store, config, known)?;
    let stored = store.own_logs(&config.node_id);
    let superseded = known.is_some_and(|state| state.superseded);
    // A superseded log of which nothing is sealed exists for nobody else.
    let current = known
        .map(|state| &state.origin)
        .filter(|origin| !superseded || stored.contains(origin));
    let number = |origin: &Origin| origin.audit_parts().map(|parts| parts.2);
    let previous = match (current, stored.last()) {
        (Some(current), Some(newest)) if number(newest) > number(current) => Some(newest),
        (Some(current), _) => Some(current),
        (None, newest) => newest,
    };
    let head = match previous {
        // What a superseded log holds beyond its sealed end is signed by nobody.
        Some(origin) if superseded => stored_head(store, origin),
        Some(origin) => Some(highest_head(root, store, origin, known)?),
        None => None,
    };
    let others = stored
        .iter()
        .rev()
        .filter(|origin| Some(*origin) != previous)
        .filter_map(|origin| stored_head(store, origin))
        .take(MAX_OTHER_HEADS)
        .collect();
    Ok(Lineage {
        incarnation: highest.saturating_add(1),
        previous: previous.cloned(),
        head,
        others,
    })
}

/// The head at the end of the newest segment that is held of a log.
fn stored_head(store: &Store, origin: &Origin) -> Option<NamedHead> {
    let span = store.audit_span(&store.last(origin)?.id)?;
    Some(NamedHead {
        origin: origin.clone(),
        root: span.root,
        size: span.last.saturating_add(1),
    })
}

/// The highest head of a log that this root can still tell of: from the state, the last sealed segment,
/// or what is readable of its files.
fn highest_head(
    root: &Root,
    store: &Store,
    origin: &Origin,
    state: Option<&LogState>,
) -> Result<NamedHead, LogError> {
    let mut heads = Vec::new();
    if let Some(state) = state
        && state.origin == *origin
        && let Ok(tree) = state.sealed.tree()
    {
        heads.push((tree.size(), tree.root()));
    }
    heads.extend(stored_head(store, origin).map(|head| (head.size, head.root)));
    for file in log_files(root)? {
        let bytes = root.read(&file.path)?.unwrap_or_default();
        if let Ok(header) = LogHeader::decode(&bytes)
            && header.origin == *origin
        {
            heads.extend(frame::highest_head(&bytes, &header));
        }
    }
    let highest = heads.into_iter().max_by_key(|(size, _)| *size);
    let none = (0, Frontier::new().root());
    let (size, root) = highest.unwrap_or(none);
    Ok(NamedHead {
        origin: origin.clone(),
        root,
        size,
    })
}
