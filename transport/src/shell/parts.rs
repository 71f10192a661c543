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
    limits::{MAX_PARTIAL_BYTES_PER_SESSION, MAX_PARTIALS_PER_SESSION, PARTIAL_SHARE_BYTES},
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

    /// Gives its room back, and what has arrived with it.
    fn abandon(&self) {
        if let Err(error) = self.partial.abandon() {
            let id = self.partial.reference().id;
            tracing::debug!(%id, %error, "a partial was not removed");
        }
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

/// The segments that are being put together. At most as many as the store allows partials, and where
/// there is no room for one more it is shared out between the sessions, see [`Assemblies::give_way`].
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

    /// Opens the partial of a segment that [`attach`](Self::attach) said is new. Where the store has no
    /// room for one more, another session may have to give one up; which, is told too. Blocks.
    fn open(
        &self,
        session: SessionId,
        reference: &SegmentRef,
        now: Duration,
        partial: impl Fn() -> Result<Partial, PartialError>,
    ) -> (Opened, Option<SegmentId>) {
        let id = &reference.id;
        let mut made = partial();
        let mut given_up = None;
        if matches!(made, Err(PartialError::TooMany))
            && let Some((other, assembly)) = self.give_way(session, now)
        {
            // What has arrived stays until its room is needed.
            if assembly.is_empty() {
                assembly.abandon();
            } else {
                assembly.rest();
            }
            drop(assembly);
            given_up = Some(other);
            made = partial();
        }
        let opened = match made {
            Ok(partial) => {
                let assembly = Arc::new(Assembly {
                    partial,
                    is_finishing: AtomicBool::new(false),
                });
                // The session cannot have left meanwhile: it is the one that is asking.
                if let Some(entry) = lock(&self.all).get_mut(id) {
                    entry.state = State::Open(Arc::clone(&assembly));
                }
                Opened::Open(assembly)
            }
            Err(error) => {
                self.remove(id, |state| matches!(state, State::Opening));
                match error {
                    PartialError::AlreadyHeld(_) => Opened::Held,
                    PartialError::Busy(_) | PartialError::TooMany => Opened::Busy,
                    other => Opened::Refused(other.into()),
                }
            }
        };
        (opened, given_up)
    }

    /// INV-13: takes a segment, last in turn, from those that hold most room, for a session that holds
    /// less than they even with the one that it opens. So sessions that drip cannot keep all room for
    /// themselves, and two never take from each other in turn: what the most holds only falls. What is
    /// younger than `patience` is let be, because it may be done soon.
    fn give_way(&self, session: SessionId, now: Duration) -> Option<(SegmentId, Arc<Assembly>)> {
        let mut all = lock(&self.all);
        let mut held: BTreeMap<SessionId, (u64, u64)> = BTreeMap::new();
        for entry in all.values() {
            for holder in &entry.sessions {
                let (shares, bytes) = held.entry(*holder).or_default();
                *shares = shares.saturating_add(PARTIAL_SHARE_BYTES);
                *bytes = bytes.saturating_add(entry.reference.size_bytes);
            }
        }
        // By number or by bytes, whichever is the greater part of what there is.
        let weight = |of: &SessionId| held.get(of).map_or(0, |(shares, bytes)| *shares.max(bytes));
        let own = weight(&session);
        let (.., id) = all
            .iter()
            .filter_map(|(id, entry)| {
                let State::Open(assembly) = &entry.state else {
                    return None;
                };
                let least = entry.sessions.iter().map(weight).min()?;
                let may = least > own
                    && now >= entry.since + self.patience
                    && !assembly.is_finishing.load(Ordering::Acquire);
                let SegmentRef {
                    kind,
                    sequence,
                    origin,
                    ..
                } = &entry.reference;
                may.then_some((least, *kind, *sequence, origin, *id))
            })
            .max()?;
        match all.remove(&id)?.state {
            State::Open(assembly) => Some((id, assembly)),
            State::Opening | State::Closing => None,
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
        let make = || self.hooks.partial(reference);
        let (opened, given_up) = self.assemblies.open(session, reference, self.now(), make);
        self.released(Some(session), &[reference.id]);
        if let Some(id) = given_up {
            tracing::info!(%id, "a partial gave way to one of a session that holds less");
            self.released(None, &[id]);
        }
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
                    assembly.abandon();
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tidelock_segments::{
        Charge, DomainId, Kind, Origin, Root, RootOptions, Store, limits, testing::SimDisk,
    };

    use super::*;
    use crate::registry::{Entry as Session, Registry};

    const PATIENCE: Duration = Duration::from_secs(30);
    const KIB: u64 = 1024;

    struct Bench {
        store: Arc<Store>,
        assemblies: Assemblies,
        sessions: Vec<SessionId>,
        made: u64,
    }

    impl Bench {
        fn new(sessions: usize) -> Self {
            let options = RootOptions {
                ceiling_bytes: 4 << 30,
                reserve_bytes: 64 << 20,
            };
            let root = Root::open(SimDisk::new().disk(), Path::new("/sim/root"), options).unwrap();
            let mut registry = Registry::default();
            let session = |at: usize| Session {
                peer: tidelock_segments::NodeId::new(&format!("n{at}")).unwrap(),
                outbound: true,
                papers: (),
                established: true,
                handle: (),
            };
            Self {
                store: Store::open(root, DomainId::new("site").unwrap()).unwrap(),
                assemblies: Assemblies::new(PATIENCE),
                sessions: (0..sessions)
                    .map(|at| registry.insert(session(at)).unwrap())
                    .collect(),
                made: 0,
            }
        }

        fn segment(&mut self, size_bytes: u64) -> SegmentRef {
            self.made += 1;
            SegmentRef {
                id: SegmentId::of(&self.made.to_le_bytes()),
                kind: Kind::Audit,
                origin: Origin::parse("audit/n/0123456789abcdef/0").unwrap(),
                sequence: self.made,
                size_bytes,
                prev: None,
            }
        }

        /// Whether a session gets room for another segment, and who gave way for it.
        fn take(&mut self, session: usize, size_bytes: u64, now: Duration) -> (bool, usize) {
            let session = self.sessions[session];
            let wanted = self.segment(size_bytes);
            match self.assemblies.attach(session, &wanted, now) {
                Attached::New => {}
                Attached::Busy(_) => return (false, 0),
                Attached::Open(_) | Attached::InsteadOf(_) => panic!("it is new"),
            }
            let make = || self.store.partial(&wanted, Charge::Custody);
            let (opened, given_up) = self.assemblies.open(session, &wanted, now, make);
            let is_open = match opened {
                Opened::Open(_) => true,
                Opened::Busy => false,
                Opened::Held => panic!("nobody has it"),
                Opened::Refused(refusal) => panic!("{refusal}"),
            };
            (is_open, usize::from(given_up.is_some()))
        }

        fn held(&self) -> Vec<usize> {
            let held = self.sessions.iter().map(|of| self.assemblies.of(*of).len());
            held.collect()
        }
    }

    #[test]
    fn inv_13_who_holds_most_room_for_partials_gives_way_to_who_holds_less() {
        // Four sessions that drip held all of it, for as long as they dripped.
        let mut bench = Bench::new(6);
        let small = 300 * KIB;
        for session in 0..4 {
            while bench.take(session, small, Duration::ZERO).0 {}
        }
        assert_eq!(bench.held(), [16, 16, 16, 16, 0, 0], "the control");
        let soon = PATIENCE - Duration::from_millis(1);
        assert_eq!(
            bench.take(4, small, soon),
            (false, 0),
            "it may be done soon"
        );
        // Everybody gets an even part and then nobody takes from anybody.
        for _ in 0..40 {
            for session in 0..6 {
                bench.take(session, small, PATIENCE);
            }
        }
        let held = bench.held();
        assert_eq!(held.iter().sum::<usize>(), limits::MAX_PARTIALS);
        assert!(held.iter().all(|held| (10..=11).contains(held)), "{held:?}");
        for session in 0..6 {
            assert_eq!(bench.take(session, small, 3 * PATIENCE), (false, 0));
        }
        assert_eq!(bench.store.partials().len(), limits::MAX_PARTIALS);
    }

    #[test]
    fn inv_13_a_few_big_partials_give_way_like_many_small_ones() {
        let mut bench = Bench::new(5);
        let (big, small) = (limits::MAX_SEGMENT_BYTES, 300 * KIB);
        for session in 0..4 {
            while bench.take(session, big, Duration::ZERO).0 {}
        }
        let each = usize::try_from(limits::MAX_PARTIAL_BYTES / big).unwrap() / 4;
        assert_eq!(bench.held(), [each, each, each, each, 0], "the control");
        assert_eq!(bench.take(4, small, PATIENCE), (true, 1));
        // There is room for more of them now; for one as big as that a second has to go.
        assert_eq!(bench.take(4, small, PATIENCE), (true, 0));
        assert_eq!(bench.take(4, big, PATIENCE), (true, 1));
        let shared: u64 = bench.held().iter().map(|held| *held as u64).sum();
        assert_eq!(bench.store.partials().len() as u64, shared);
    }
}
