//! Big segments that arrive in ranges, from one peer or several at once.
//!
//! An [`Assembly`] is the store's partial of one segment, shared by the sessions that fetch ranges of
//! it. It is opened when the first of them has its turn and closed, synced, when the last one lets go;
//! what has arrived stays on the disk for the next contact. Which range goes to whom is said by
//! [`Claims`](crate::registry::Claims).

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tidelock_segments::{Partial, PartialError, SegmentId, SegmentRef, StoreError};

use super::{Admitted, MeshEvent, Shared, driver::Link, lock};
use crate::{
    limits::{MAX_PARTIAL_BYTES_PER_SESSION, MAX_PARTIALS_PER_SESSION},
    registry::{Busy, SessionId},
    session::{Fault, Refusal},
};

impl From<PartialError> for Refusal {
    fn from(error: PartialError) -> Self {
        let (code, fault) = match &error {
            PartialError::Slice(_) => ("slice", Fault::Peer),
            PartialError::Format(_) => ("format", Fault::Peer),
            PartialError::Claim { .. } => ("listed_otherwise", Fault::Peer),
            PartialError::Store(StoreError::Domain(_)) => ("format", Fault::Peer),
            _ => ("store", Fault::Local),
        };
        Self {
            code,
            message: error.to_string(),
            fault,
        }
    }
}

/// A segment that is being put together.
#[derive(Debug)]
pub(super) struct Assembly {
    partial: Partial,
    is_finishing: AtomicBool,
}

impl Assembly {
    pub(super) fn missing(&self) -> Vec<Range<u64>> {
        self.partial.missing()
    }

    /// Makes durable what has arrived, before it is let go. What a failed sync loses is fetched again.
    pub(super) fn rest(&self) {
        if let Err(error) = self.partial.sync() {
            let id = self.partial.reference().id;
            tracing::debug!(%id, %error, "a partial was closed without its last map");
        }
    }

    /// Whether nothing of it has arrived: its room is all that there is of it.
    fn is_empty(&self) -> bool {
        let whole = 0..self.partial.reference().size_bytes;
        self.missing() == [whole]
    }
}

#[derive(Debug)]
enum State {
    Opening,
    Open(Arc<Assembly>),
    Closing,
}

fn is_open(state: &State, as_this: &Arc<Assembly>) -> bool {
    matches!(state, State::Open(assembly) if Arc::ptr_eq(assembly, as_this))
}

#[derive(Debug)]
struct Entry {
    state: State,
    reference: SegmentRef,
    sessions: BTreeSet<SessionId>,
    since: Duration,
    /// Whether somebody waits who was told otherwise of the segment.
    is_contested: bool,
}

/// What a session finds that wants a range.
pub(super) enum Attached {
    Open(Arc<Assembly>),
    /// It has to be opened, by this session.
    New,
    /// As well, after this has been let go: its claim had its time.
    InsteadOf(Arc<Assembly>),
    Busy(Busy),
}

/// How opening went.
pub(super) enum Opened {
    Open(Arc<Assembly>),
    /// The store got the segment on another way.
    Held,
    Busy,
    Refused(Refusal),
}

/// The segments that are being put together. At most as many as the store allows partials.
///
/// What peers say of a segment besides its id is proven last, so one that says it falsely and sends
/// next to nothing could keep the segment from those who say it rightly. A claim therefore gives way
/// after `patience` to whoever waits with another one; what has arrived stays, where the size is the
/// same or proven.
#[derive(Debug)]
pub(super) struct Assemblies {
    all: Mutex<BTreeMap<SegmentId, Entry>>,
    patience: Duration,
}

impl Assemblies {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            all: Mutex::default(),
            patience,
        }
    }

    /// Joins a session to a segment, as far as it may.
    pub(super) fn attach(
        &self,
        session: SessionId,
        reference: &SegmentRef,
        now: Duration,
    ) -> Attached {
        let mut all = lock(&self.all);
        let joined = all
            .get(&reference.id)
            .is_some_and(|entry| entry.sessions.contains(&session));
        if !joined {
            // INV-13: a quarter of the store's partials, in number and in bytes.
            let own = all.values().filter(|e| e.sessions.contains(&session));
            let (count, bytes) = own.fold((0, 0u64), |(count, bytes), entry| {
                (count + 1, bytes.saturating_add(entry.reference.size_bytes))
            });
            let fits = bytes.saturating_add(reference.size_bytes) <= MAX_PARTIAL_BYTES_PER_SESSION;
            if count >= MAX_PARTIALS_PER_SESSION || !(fits || count == 0) {
                return Attached::Busy(Busy::NoRoom);
            }
        }
        let opening = Entry {
            state: State::Opening,
            reference: reference.clone(),
            sessions: BTreeSet::from([session]),
            since: now,
            is_contested: false,
        };
        let Some(entry) = all.get_mut(&reference.id) else {
            all.insert(reference.id, opening);
            return Attached::New;
        };
        match &entry.state {
            State::Open(assembly) if entry.reference == *reference => {
                entry.sessions.insert(session);
                Attached::Open(Arc::clone(assembly))
            }
            State::Open(assembly)
                if now >= entry.since + self.patience
                    && !assembly.is_finishing.load(Ordering::Acquire) =>
            {
                let assembly = Arc::clone(assembly);
                *entry = opening;
                Attached::InsteadOf(assembly)
            }
            _ => {
                entry.is_contested = true;
                Attached::Busy(Busy::Elsewhere)
            }
        }
    }

    /// Segments whose claim has had its time while somebody waits with another one.
    pub(super) fn contested(&self, now: Duration) -> Vec<SegmentId> {
        let all = lock(&self.all);
        all.iter()
            .filter(|(_, entry)| entry.is_contested && now >= entry.since + self.patience)
            .map(|(id, _)| *id)
            .collect()
    }

    /// The segment that this session helps to put together.
    fn get(&self, session: SessionId, id: &SegmentId) -> Option<Arc<Assembly>> {
        let all = lock(&self.all);
        let entry = all.get(id)?;
        match &entry.state {
            State::Open(assembly) if entry.sessions.contains(&session) => {
                Some(Arc::clone(assembly))
            }
            _ => None,
        }
    }

    /// The segments that this session is joined to.
    pub(super) fn of(&self, session: SessionId) -> Vec<SegmentId> {
        let all = lock(&self.all);
        all.iter()
            .filter(|(_, entry)| entry.sessions.contains(&session))
            .map(|(id, _)| *id)
            .collect()
    }

    /// Forgets a segment, unless it is another's by now.
    fn remove(&self, id: &SegmentId, is_it: impl FnOnce(&State) -> bool) {
        let mut all = lock(&self.all);
        if all.get(id).is_some_and(|entry| is_it(&entry.state)) {
            all.remove(id);
        }
    }

    /// Lets a session go. What nobody holds any more is to be closed.
    fn detach(&self, session: SessionId, id: &SegmentId) -> Option<Arc<Assembly>> {
        let mut all = lock(&self.all);
        let entry = all.get_mut(id)?;
        entry.sessions.remove(&session);
        if !entry.sessions.is_empty() {
            return None;
        }
        match std::mem::replace(&mut entry.state, State::Closing) {
            State::Open(assembly) => Some(assembly),
            State::Opening => {
                // A session leaves while it opens only by a fault of this node; nothing was opened.
                all.remove(id);
                None
            }
            State::Closing => None,
        }
    }
}

impl Shared {
    /// Opens the partial of a segment that [`Assemblies::attach`] said is new. Blocks.
    pub(super) fn open_assembly(&self, session: SessionId, reference: &SegmentRef) -> Opened {
        let id = &reference.id;
        let opened = match self.hooks.partial(reference) {
            Ok(partial) => {
                let assembly = Arc::new(Assembly {
                    partial,
                    is_finishing: AtomicBool::new(false),
                });
                // The session cannot have left meanwhile: it is the one that is asking.
                if let Some(entry) = lock(&self.assemblies.all).get_mut(id) {
                    entry.state = State::Open(Arc::clone(&assembly));
                }
                Opened::Open(assembly)
            }
            Err(error) => {
                self.assemblies
                    .remove(id, |state| matches!(state, State::Opening));
                match error {
                    PartialError::AlreadyHeld(_) => Opened::Held,
                    PartialError::Busy(_) | PartialError::TooMany => Opened::Busy,
                    other => Opened::Refused(other.into()),
                }
            }
        };
        self.released(Some(session), &[*id]);
        opened
    }

    /// A session has no more to do with a segment: its ranges go to others, and the last one closes
    /// the partial.
    pub(super) fn leave_assembly(self: &Arc<Self>, session: SessionId, id: &SegmentId) {
        if let Some(assembly) = self.assemblies.detach(session, id) {
            let (shared, id) = (Arc::clone(self), *id);
            tokio::task::spawn_blocking(move || {
                // Room for what a peer only claimed, or for what came on another way, is given back.
                if assembly.is_empty() || shared.hooks.reference(&id).is_some() {
                    if let Err(error) = assembly.partial.abandon() {
                        tracing::debug!(%id, %error, "an empty partial was not removed");
                    }
                } else {
                    assembly.rest();
                }
                drop(assembly);
                shared
                    .assemblies
                    .remove(&id, |state| matches!(state, State::Closing));
                shared.released(None, &[id]);
            });
        }
    }

    /// The partial is gone, broken or refused: others open it anew.
    fn end_assembly(&self, by: SessionId, id: &SegmentId, ended: &Arc<Assembly>) {
        self.assemblies.remove(id, |state| is_open(state, ended));
        self.released(Some(by), &[*id]);
    }
}

/// Verifies and writes a slice, and stores the segment when it was the last one. Blocks. Gives whether
/// the segment is stored now.
pub(super) fn admit_slice(
    link: &Link,
    id: &SegmentId,
    range: &Range<u64>,
    slice: &[u8],
) -> Result<bool, Refusal> {
    let shared = &link.shared;
    alive(link)?;
    let Some(assembly) = shared.assemblies.get(link.session(), id) else {
        // Stored or given up while this was on its way.
        return Ok(false);
    };
    match assembly.partial.accept(range, slice) {
        Ok(accepted) => {
            link.counted(|stats| stats.bytes_in += accepted.new_bytes);
            if accepted.complete {
                return finish(link, id, &assembly);
            }
            Ok(false)
        }
        Err(PartialError::Ended) => Ok(false),
        Err(error @ PartialError::Slice(_)) => Err(error.into()),
        Err(error) => {
            shared.end_assembly(link.session(), id, &assembly);
            Err(error.into())
        }
    }
}

/// INV-09: a session that was closed meanwhile, by a revocation above all, stores nothing.
pub(super) fn alive(link: &Link) -> Result<(), Refusal> {
    if link.is_alive() {
        return Ok(());
    }
    Err(Refusal {
        code: "session_closed",
        message: "session was closed before the segment was stored".to_owned(),
        fault: Fault::Local,
    })
}

/// Hands a complete segment to the node. Blocks. False: another session is doing it.
pub(super) fn finish(
    link: &Link,
    id: &SegmentId,
    assembly: &Arc<Assembly>,
) -> Result<bool, Refusal> {
    let shared = &link.shared;
    alive(link)?;
    if assembly.is_finishing.swap(true, Ordering::AcqRel) {
        return Ok(false);
    }
    match shared.hooks.admit_partial(&link.peer, &assembly.partial) {
        Ok((held, admitted)) => {
            shared
                .assemblies
                .remove(id, |state| is_open(state, assembly));
            link.counted(|stats| stats.segments_in += 1);
            if admitted == Admitted::Stored {
                shared.event(MeshEvent::Stored {
                    peer: link.peer.clone(),
                    reference: held.clone(),
                });
            }
            shared.announce(&held);
            Ok(true)
        }
        Err(refusal) => {
            // What is left of it, if anything, is opened again by whoever comes next: a judgement
            // that was refused here may be made again, and damage shows as missing.
            shared.end_assembly(link.session(), id, assembly);
            Err(refusal)
        }
    }
}
