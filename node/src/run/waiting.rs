//! Bundles of peers and media that would be taken but for what this site asks besides.
//!
//! Kept by content: whoever adds signatures that count for nothing makes no other bundle of it (ruling 5).
//! What counts of the signatures of its copies adds up, as it would if its signers had signed one copy.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tidelock_policy::{ContentId, Package};
use tidelock_segments::SegmentId;

use super::admit::Denied;

/// Why a bundle of a peer waits for an operator, or for more signatures.
const WAITS_FOR_AN_OPERATOR: [&str; 4] = [
    "POLICY_FLIPS",
    "POLICY_REPLAY",
    "WIDER_UNSIGNED",
    "WIDENING_UNPROVEN",
];

/// Bundles that wait and are told. With its copies and signatures each has 6 KiB at most (INV-07).
const WAITING_MAX: usize = 16;
/// Copies of one bundle that are known by their segments, 32 bytes each; who makes ever new ones has the
/// oldest fetched again, and no more than its signatures is looked at.
const COPIES_MAX: usize = 64;
/// How long one that waits is not judged again: what is recorded changes, and with it what blocks.
const WAITS: Duration = Duration::from_secs(600);

/// A copy of a bundle, as a peer brought it.
pub(super) struct Offered {
    pub(super) segment: SegmentId,
    pub(super) content_id: ContentId,
    /// The signatures under it that count, by the keys that made them.
    pub(super) signatures: BTreeMap<String, Vec<u8>>,
}

/// What this site keeps out for now.
#[derive(Default)]
pub(super) struct Waiting {
    bundles: Mutex<VecDeque<WaitingBundle>>,
    /// Some may be taken by now that no session asks for any more.
    may_come: AtomicBool,
}

struct WaitingBundle {
    content_id: ContentId,
    copies: VecDeque<SegmentId>,
    signatures: BTreeMap<String, Vec<u8>>,
    name: String,
    epoch: u64,
    code: &'static str,
    message: String,
    since_unix_ms: u64,
    until: Duration,
    /// Whether it was asked for since.
    is_asked_for: bool,
}

impl WaitingBundle {
    fn add(&mut self, copy: &Offered) {
        self.signatures.extend(copy.signatures.clone());
        if self.copies.contains(&copy.segment) {
            return;
        }
        while self.copies.len() >= COPIES_MAX {
            self.copies.pop_front();
        }
        self.copies.push_back(copy.segment);
    }

    fn told(&self) -> Value {
        json!({
            "segment": self.copies.back(), "hash": self.content_id, "name": self.name, "epoch": self.epoch,
            "signers": self.signatures.keys().collect::<Vec<_>>(), "code": self.code,
            "message": self.message, "since_unix_ms": self.since_unix_ms,
        })
    }
}

/// Whether a bundle that was refused for this waits.
pub(super) fn waits(denied: &Denied) -> bool {
    WAITS_FOR_AN_OPERATOR.contains(&denied.code)
}

impl Waiting {
    fn held(&self) -> MutexGuard<'_, VecDeque<WaitingBundle>> {
        self.bundles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a bundle that waits since this time, on the clocks of the wall and of the process. Whether it is
    /// told for the first time.
    pub(super) fn note(
        &self,
        copy: &Offered,
        (name, epoch): (&str, u64),
        denied: &Denied,
        (unix_ms, now): (u64, Duration),
    ) -> bool {
        let mut held = self.held();
        let known = held
            .iter()
            .position(|one| one.content_id == copy.content_id);
        let (mut bundle, is_news) = match known.and_then(|at| held.remove(at)) {
            Some(known) => {
                let is_news = known.code != denied.code;
                (known, is_news)
            }
            None => {
                let bundle = WaitingBundle {
                    content_id: copy.content_id.clone(),
                    copies: VecDeque::new(),
                    signatures: BTreeMap::new(),
                    name: name.to_owned(),
                    epoch,
                    code: denied.code,
                    message: String::new(),
                    since_unix_ms: unix_ms,
                    until: now,
                    is_asked_for: false,
                };
                (bundle, true)
            }
        };
        bundle.add(copy);
        bundle.code = denied.code;
        bundle.message.clone_from(&denied.message);
        if now >= bundle.until {
            // Not put off by whoever goes on bringing copies.
            bundle.until = now.saturating_add(WAITS);
            bundle.is_asked_for = false;
        }
        while held.len() >= WAITING_MAX {
            held.pop_front();
        }
        held.push_back(bundle);
        is_news
    }

    /// What another copy is refused with, if nothing has changed since the bundle was judged: the copy has no
    /// signer that the others lack.
    pub(super) fn still(&self, copy: &Offered, now: Duration) -> Option<Denied> {
        let held = self.held();
        let known = held
            .iter()
            .find(|one| one.content_id == copy.content_id && now < one.until)?;
        let is_new = |signer: &String| !known.signatures.contains_key(signer);
        let has_more = copy.signatures.keys().any(is_new);
        (!has_more).then(|| Denied::local(known.code, &known.message))
    }

    /// The package of a copy with the signatures that count of all copies; none if it has them itself.
    pub(super) fn joined(&self, package: &Package, copy: &Offered) -> Option<Package> {
        let held = self.held();
        let known = held.iter().find(|one| one.content_id == copy.content_id)?;
        let lacks = |signer: &String| !copy.signatures.contains_key(signer);
        if !known.signatures.keys().any(lacks) {
            return None;
        }
        let mut all = known.signatures.clone();
        all.extend(copy.signatures.clone());
        Some(Package {
            archive: package.archive.clone(),
            signatures: all.into_values().collect(),
        })
    }

    /// Whether it is not to be fetched again yet.
    pub(super) fn holds(&self, segment: &SegmentId, now: Duration) -> bool {
        self.held()
            .iter()
            .any(|one| now < one.until && one.copies.contains(segment))
    }

    /// Those that could still come after this epoch.
    pub(super) fn retain_above(&self, epoch: u64) {
        self.held().retain(|one| one.epoch > epoch);
    }

    /// Another bundle decides: each is judged against it when it is offered.
    pub(super) fn judge_anew(&self) {
        for one in self.held().iter_mut() {
            one.until = Duration::ZERO;
            one.is_asked_for = false;
        }
    }

    /// Other rules hold: each is judged anew when it is offered.
    pub(super) fn clear(&self) {
        let mut held = self.held();
        if !held.is_empty() {
            self.may_come.store(true, Ordering::Relaxed);
        }
        held.clear();
    }

    /// One that is not noted here may be taken by now.
    pub(super) fn come_again(&self) {
        self.may_come.store(true, Ordering::Relaxed);
    }

    /// Whether one is due that no session asks for by itself: what was refused is set aside there. Said once.
    pub(super) fn is_due(&self, now: Duration) -> bool {
        let mut is_due = self.may_come.swap(false, Ordering::Relaxed);
        for one in self.held().iter_mut().filter(|one| now >= one.until) {
            is_due |= !one.is_asked_for;
            one.is_asked_for = true;
        }
        is_due
    }

    pub(super) fn told(&self) -> Value {
        self.held().iter().map(WaitingBundle::told).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: (u64, Duration) = (0, Duration::ZERO);

    fn copy(content: u8, segment: u8, signers: &[&str]) -> Offered {
        let signature = |signer: &&str| ((*signer).to_owned(), signer.as_bytes().to_vec());
        Offered {
            segment: SegmentId::from_bytes([segment; 32]),
            content_id: ContentId::of(&[content]),
            signatures: signers.iter().map(signature).collect(),
        }
    }

    fn flips() -> Denied {
        Denied::local("POLICY_FLIPS", "flips")
    }

    #[test]
    fn inv_07_bundles_that_wait_are_bounded_told_once_and_fetched_seldom() {
        let held = Waiting::default();
        let note = |content: u8, code| {
            let named = ("site", u64::from(content));
            let denied = Denied::local(code, "");
            held.note(&copy(content, content, &["alice"]), named, &denied, START)
        };
        assert!(note(1, "POLICY_FLIPS"));
        assert!(!note(1, "POLICY_FLIPS"));
        assert!(note(1, "POLICY_REPLAY"));
        let one = SegmentId::from_bytes([1; 32]);
        assert!(held.holds(&one, Duration::ZERO));
        assert!(!held.holds(&one, WAITS));
        for content in 2..100 {
            note(content, "POLICY_FLIPS");
        }
        assert_eq!(held.told().as_array().unwrap().len(), WAITING_MAX);
        // What could still come is judged anew where another bundle decides.
        let last = SegmentId::from_bytes([99; 32]);
        assert!(held.holds(&last, Duration::ZERO));
        held.retain_above(98);
        assert_eq!(held.told()[0]["epoch"], 99);
        assert!(held.holds(&last, Duration::ZERO));
        held.judge_anew();
        assert!(!held.holds(&last, Duration::ZERO));
        held.clear();
        assert_eq!(held.told(), json!([]));
    }

    /// On a live session a bundle that was kept out never came again, whatever the trust file said by then.
    #[test]
    fn what_may_be_taken_by_now_is_asked_for_once() {
        let held = Waiting::default();
        let note = |now| {
            held.note(&copy(1, 1, &["alice"]), ("site", 7), &flips(), (0, now));
        };
        let due = |now| (held.is_due(now), held.is_due(now));
        assert_eq!(due(Duration::ZERO), (false, false));
        note(Duration::ZERO);
        assert_eq!(due(WAITS - Duration::from_secs(1)), (false, false));
        assert_eq!(due(WAITS), (true, false));
        // Refused again: again after the same time.
        note(WAITS);
        assert_eq!(due(WAITS), (false, false));
        assert_eq!(due(WAITS * 2), (true, false));
        note(WAITS * 2);
        held.judge_anew();
        assert_eq!(due(WAITS * 2), (true, false));
        held.clear();
        assert_eq!(due(WAITS * 2), (true, false));
        held.clear();
        assert_eq!(due(WAITS * 2), (false, false));
        held.come_again();
        assert_eq!(due(WAITS * 2), (true, false));
    }

    /// A peer that put junk beside the signature of a bundle made sixteen of it, which pushed all others out.
    #[test]
    fn inv_07_copies_of_one_bundle_are_one_bundle() {
        let held = Waiting::default();
        held.note(&copy(1, 0, &["alice"]), ("site", 7), &flips(), START);
        held.note(&copy(2, 1, &["alice"]), ("site", 8), &flips(), START);
        for segment in 2..=255 {
            let again = copy(2, segment, &["alice"]);
            let denied = held.still(&again, Duration::ZERO).unwrap();
            let later = (1, Duration::from_secs(1));
            assert!(!held.note(&again, ("site", 8), &denied, later));
            assert!(held.holds(&again.segment, Duration::ZERO));
        }
        let told = held.told();
        assert_eq!(
            (&told[0]["epoch"], &told[1]["epoch"]),
            (&json!(7), &json!(8))
        );
        assert_eq!(told.as_array().unwrap().len(), 2);
        assert_eq!(held.held()[1].copies.len(), COPIES_MAX);
        // It is judged again when its time is over, whatever came meanwhile.
        assert!(held.still(&copy(2, 1, &["alice"]), WAITS).is_none());
    }

    #[test]
    fn signers_of_different_copies_add_up_and_each_new_one_is_judged() {
        let held = Waiting::default();
        let package = |copy: &Offered| Package {
            archive: vec![1],
            signatures: copy.signatures.values().cloned().collect(),
        };
        let (alice, bob) = (copy(1, 1, &["alice"]), copy(1, 2, &["bob"]));
        held.note(&alice, ("site", 7), &flips(), START);
        assert!(held.joined(&package(&alice), &alice).is_none());
        assert!(held.still(&bob, Duration::ZERO).is_none());
        let both = held.joined(&package(&bob), &bob).unwrap();
        assert_eq!(both.signatures, [b"alice".to_vec(), b"bob".to_vec()]);
        // Refused all the same: it is known with both.
        held.note(&bob, ("site", 7), &flips(), START);
        assert_eq!(held.told()[0]["signers"], json!(["alice", "bob"]));
        assert!(held.still(&bob, Duration::ZERO).is_some());
        // The control: another content has nothing of it.
        let other = copy(2, 3, &["carol"]);
        assert!(held.joined(&package(&other), &other).is_none());
    }
}
