//! Several audit segments stored together, so that they share the syncs that one alone pays for.
//!
//! The order is that of one segment, each step for all of them: content written and synced, all
//! announced with one sync, named, the directory synced once. So whatever a crash leaves, each is
//! there whole or not at all, and none is told of before all of that is durable.
//!
//! What is stored in the end, and what is refused for which reason, is what [`Store::put`] does with
//! one after the other. Therefore only those are taken together of which none can decide on another:
//! as soon as a segment touches one before it, or there is no room for it beside them, the group ends
//! before it, and with it begins the next.

use super::*;
use crate::limits::MAX_PUT_GROUP;

// A group follows at most as many announcements as the catalog waits for, and all fit the ring.
const _: () = assert!(CHECKPOINT_AFTER + MAX_PUT_GROUP as u64 <= JOURNAL_BLOCKS);

/// A segment that is stored together with others.
struct Member<'g> {
    /// Its place among those that were handed over.
    at: usize,
    segment: &'g VerifiedSegment,
    reference: SegmentRef,
    account: Charge,
}

/// A member whose content is on the device.
struct Ready {
    at: usize,
    reference: SegmentRef,
    account: Charge,
    staged: Staged,
    entry: ChainEntry,
}

impl Ready {
    fn change(&self) -> Change {
        Change {
            origin: self.reference.origin.clone(),
            sequence: self.reference.sequence,
            before: None,
            after: Some(self.entry),
        }
    }
}

/// Ids that nobody else stores meanwhile, given back on every way out.
pub(super) struct UnderWay<'s> {
    pub(super) store: &'s Store,
    pub(super) ids: Vec<SegmentId>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut index = self.store.index();
        for id in &self.ids {
            index.under_way.remove(id);
        }
        drop(index);
        self.store.put_ended.notify_all();
    }
}

/// What became of each; those after the last one are to be done on their own.
struct Outcomes(Vec<Option<Result<PutOutcome, StoreError>>>);

impl Outcomes {
    fn set(&mut self, at: usize, outcome: Result<PutOutcome, StoreError>) {
        if let Some(slot) = self.0.get_mut(at) {
            *slot = Some(outcome);
        }
    }

    /// This one and those after it are none of the group.
    fn leave(&mut self, from: usize) {
        self.0.truncate(from);
    }

    /// This one met an error that latches the store, so none of the others is stored either.
    fn fail(&mut self, from: usize, error: &StoreError) {
        let latched = StoreError::Latched(error.to_string());
        for (at, slot) in self.0.iter_mut().enumerate() {
            if slot.is_none() {
                let error = if at == from { error } else { &latched };
                *slot = Some(Err(error.clone()));
            }
        }
    }

    fn done(self) -> Vec<Result<PutOutcome, StoreError>> {
        self.0.into_iter().map_while(|outcome| outcome).collect()
    }
}

/// Whether one of these places decides on the other: the same one, or one right after the other that
/// does not continue it.
fn contradict(one: &SegmentRef, other: &SegmentRef) -> bool {
    let breaks = |before: &SegmentRef, after: &SegmentRef| {
        before.sequence.checked_add(1) == Some(after.sequence) && after.prev != Some(before.id)
    };
    one.origin == other.origin
        && (one.sequence == other.sequence || breaks(one, other) || breaks(other, one))
}

impl Store {
    /// Stores segments as [`Store::put`] would one after the other, with the same outcome for each, in
    /// their order. Audit segments that are new are stored together, at most [`MAX_PUT_GROUP`] at a
    /// time, and share their syncs. None is told to be stored before it is durable.
    ///
    /// # Errors
    /// For each segment as [`Store::put`]. Where the disk refuses a write or a sync in the middle, the
    /// store latches and none of the segments that were stored together with it counts as stored.
    pub fn put_group(
        &self,
        group: &[&VerifiedSegment],
        charge: Charge,
    ) -> Vec<Result<PutOutcome, StoreError>> {
        let mut outcomes = Vec::with_capacity(group.len());
        let mut rest = group;
        while let Some(first) = rest.first() {
            let together = rest.get(..MAX_PUT_GROUP.min(rest.len())).unwrap_or(rest);
            let mut done = self.put_together(together, charge);
            if done.is_empty() {
                done.push(self.put(first, charge));
            }
            rest = rest.get(done.len()..).unwrap_or_default();
            outcomes.append(&mut done);
        }
        outcomes
    }

    /// Stores as many of the first of these together as can be; none where the first has to go alone.
    fn put_together(
        &self,
        group: &[&VerifiedSegment],
        charge: Charge,
    ) -> Vec<Result<PutOutcome, StoreError>> {
        let mut outcomes = Outcomes(group.iter().map(|_| None).collect());
        let (members, _under_way) = self.begin_group(group, charge, &mut outcomes);
        if members.len() < 2 {
            // Alone it is stored as always. Whatever is known of those before it stays.
            if let Some(only) = members.first() {
                outcomes.leave(only.at);
            }
            return outcomes.done();
        }
        // INV-07: the files and threads of one group at a time, from the first that is opened.
        let _turn = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = self.stage_group(members, &mut outcomes);
        if !ready.is_empty() {
            self.name_group(ready, &mut outcomes);
        }
        outcomes.done()
    }

    /// Chooses those that go together and notes that they are under way.
    fn begin_group<'g>(
        &self,
        group: &[&'g VerifiedSegment],
        charge: Charge,
        outcomes: &mut Outcomes,
    ) -> (Vec<Member<'g>>, UnderWay<'_>) {
        for segment in group {
            // Reads the place once, so that a damaged index is built again before it is asked.
            let reference = segment.reference();
            let _held = self.some(&reference.origin, reference.sequence, reference.sequence, 1);
        }
        let mut members: Vec<Member<'_>> = Vec::new();
        let mut index = self.index();
        for (at, segment) in group.iter().enumerate() {
            let reference = segment.reference();
            if segment.header().domain != self.domain {
                let domain = segment.header().domain.clone();
                outcomes.set(at, Err(StoreError::Domain(domain)));
                continue;
            }
            // What another call is about, what is not announced, and what another member decides on.
            let apart = reference.kind != Kind::Audit
                || index.under_way.contains(&reference.id)
                || members
                    .iter()
                    .any(|member| contradict(&member.reference, &reference));
            if apart {
                outcomes.leave(at);
                break;
            }
            if let Some(reason) = &index.latched {
                outcomes.set(at, Err(StoreError::Latched(reason.clone())));
            } else if self.holds(&mut index, &reference) {
                outcomes.set(at, Ok(PutOutcome::AlreadyHeld));
            } else if let Err(fork) = self.check_fork(&mut index, &reference) {
                outcomes.set(at, Err(fork));
            } else {
                members.push(Member {
                    at,
                    segment,
                    account: index.account(reference.kind, &reference.origin, charge),
                    reference,
                });
            }
        }
        let ids: Vec<SegmentId> = members.iter().map(|member| member.reference.id).collect();
        index.under_way.extend(&ids);
        drop(index);
        (members, UnderWay { store: self, ids })
    }

    /// Brings the content of all to the device. Those for which there is no room leave the group, with
    /// all that come after.
    fn stage_group(&self, members: Vec<Member<'_>>, outcomes: &mut Outcomes) -> Vec<Ready> {
        let mut staged: Vec<(Member<'_>, Staged)> = Vec::with_capacity(members.len());
        for member in members {
            let bytes = member.segment.bytes();
            let rel = segment_path(member.reference.kind, &member.reference.id);
            let written = self
                .root
                .stage(&rel, bytes.len() as u64, member.account)
                .and_then(|mut staged| staged.write(bytes).map(|()| staged))
                .map_err(StoreError::from);
            match written {
                Ok(written) => staged.push((member, written)),
                Err(error) => {
                    if self.end_group(outcomes, member.at, &error) {
                        return Vec::new();
                    }
                    break;
                }
            }
        }
        let synced = self
            .root
            .sync_staged(staged.iter_mut().map(|(_, staged)| staged));
        let mut left = false;
        let mut ready = Vec::with_capacity(staged.len());
        for ((member, staged), synced) in staged.into_iter().zip(synced) {
            match (
                synced.map_err(StoreError::from),
                ChainEntry::of(member.segment, staged.booked()),
            ) {
                (Ok(()), Some(entry)) if !left => ready.push(Ready {
                    at: member.at,
                    reference: member.reference,
                    account: member.account,
                    staged,
                    entry,
                }),
                // All are looked at: a failed sync latches, whoever left the group before it.
                (Err(error), _) if self.end_group(outcomes, member.at, &error) => {
                    return Vec::new();
                }
                _ => {
                    outcomes.leave(member.at);
                    left = true;
                }
            }
        }
        ready
    }

    /// An error of one member before any has its name. Whether it latches the store and so ends all; if
    /// it does not, that one and those after it go on alone.
    fn end_group(&self, outcomes: &mut Outcomes, at: usize, error: &StoreError) -> bool {
        let latches = matches!(error, StoreError::Root(RootError::Disk(_)));
        if latches {
            self.latch_on(error);
            outcomes.fail(at, error);
        } else {
            outcomes.leave(at);
        }
        latches
    }

    /// Announces and names all of them.
    fn name_group(&self, mut ready: Vec<Ready>, outcomes: &mut Outcomes) {
        let mut writer = self.writer();
        let first = ready.first().map_or(0, |member| member.at);
        if self
            .heal(&mut writer)
            .and_then(|()| self.check_latch())
            .is_err()
        {
            // Each is told so when it is its turn.
            outcomes.leave(first);
            return;
        }
        {
            let mut index = self.index();
            let more = ready.len();
            if index.logs.len().saturating_add(more) > MAX_AUDIT_LOGS
                || index.range_count.saturating_add(more) > MAX_CHAIN_RANGES
            {
                // INV-07: which of them would exceed it is seen one after the other.
                outcomes.leave(first);
                return;
            }
            // Another of the same place may have been under way; the second to come here is refused.
            ready.retain(
                |member| match self.check_fork(&mut index, &member.reference) {
                    Ok(()) => true,
                    Err(fork) => {
                        outcomes.set(member.at, Err(fork));
                        false
                    }
                },
            );
        }
        let changes: Vec<Change> = ready.iter().map(Ready::change).collect();
        if let Err(error) = self.announce(&mut writer, &changes) {
            self.end_group(outcomes, first, &error);
            return;
        }
        if let Err((at, error)) = self.ready_pages(&mut writer, &ready) {
            if self.end_group(outcomes, at, &error) {
                self.give_up_names(&mut writer, &ready, 0);
                return;
            }
            ready.retain(|member| member.at < at);
        }
        if ready.is_empty() {
            return;
        }
        if let Err((at, error, named)) = self.name_all(&mut ready) {
            self.latch_on(&error);
            outcomes.fail(at, &error);
            self.give_up_names(&mut writer, &ready, named);
            return;
        }
        let mut index = self.index();
        for member in &ready {
            let (origin, sequence) = (&member.reference.origin, member.reference.sequence);
            let entry = ChainEntry {
                allocated: member.staged.booked(),
                ..member.entry
            };
            index.write(&self.root, origin, sequence, &entry);
            index.add(origin, sequence, &entry);
            outcomes.set(member.at, Ok(PutOutcome::Stored));
        }
        drop(index);
        self.arm(&mut writer);
    }

    fn ready_pages(&self, writer: &mut Writer, ready: &[Ready]) -> Result<(), (usize, StoreError)> {
        let mut index = self.index();
        for member in ready {
            let (origin, sequence) = (&member.reference.origin, member.reference.sequence);
            index
                .ready_page(&self.root, origin, sequence, &mut writer.spare, false)
                .map_err(|error| (member.at, error))?;
        }
        Ok(())
    }

    /// Gives all their names and makes these durable. An error tells how many have their name.
    fn name_all(&self, ready: &mut [Ready]) -> Result<(), (usize, StoreError, usize)> {
        for (named, member) in ready.iter_mut().enumerate() {
            // A file that nobody counted may lie there: its announcement was lost to damage. Naming this
            // one replaces it and gives its bytes back.
            if let Ok(stat) = self.root.stat(&segment_path(Kind::Audit, &member.entry.id)) {
                let ledger = self.root.ledger();
                ledger.found(stat.allocated_bytes, Charge::Normal);
            }
            member
                .staged
                .name()
                .map_err(|error| (member.at, error.into(), named))?;
        }
        let dir = kind_dir(Kind::Audit);
        let first = ready.first().map_or(0, |member| member.at);
        self.root
            .sync_dir(&dir)
            .map_err(|error| (first, error.into(), ready.len()))?;
        self.root.named_in(&dir);
        Ok(())
    }

    /// Notes what a failed naming left open. The first `named` may have their names, and the ledger
    /// counts them; reopening finds out.
    fn give_up_names(&self, writer: &mut Writer, ready: &[Ready], named: usize) {
        for (at, member) in ready.iter().enumerate() {
            let (origin, sequence) = (&member.reference.origin, member.reference.sequence);
            self.index()
                .drop_page_if_empty(&self.root, origin, chain::place(sequence).0);
            if at < named {
                self.may_be_named(writer, member.account, member.staged.booked());
            }
            writer.doubtful.insert(member.entry.id);
        }
    }
}
