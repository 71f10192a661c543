//! Slots: what is active, what stands in, what never comes back.
#![cfg(test)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use tidelock_policy::testing::{Authority, MemorySlots, NODE_VERSION, template_builder};
use tidelock_policy::{
    ActivateError, ActivationKind, AsideCause, BundleBuilder, BundleError, LoadContext, Package,
    Posture, Reverted, SlotFault, SlotStorage, Slots, Source, TrustFile, VerifiedBundle,
    WhenRestricted,
};

const CREATED: u64 = 1_769_860_800_000;
const DAY: u64 = 24 * 3600 * 1000;
const DOMAIN: &str = "site-1";

struct Node {
    authority: Authority,
    trust: TrustFile,
    context: LoadContext,
    storage: Arc<MemorySlots>,
}

impl Node {
    fn new() -> Self {
        let authority = Authority::new(DOMAIN, 1).unwrap();
        let trust = TrustFile::parse(&authority.trust_toml(1)).unwrap();
        let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
        Self {
            authority,
            trust,
            context,
            storage: MemorySlots::new(),
        }
    }

    fn bundle(&self, epoch: u64) -> VerifiedBundle {
        self.built(base(epoch))
    }

    fn built(&self, builder: BundleBuilder) -> VerifiedBundle {
        self.authority.load(builder).unwrap()
    }

    fn open(&self) -> (Slots, Vec<SlotFault>) {
        let storage = Arc::clone(&self.storage) as Arc<dyn SlotStorage>;
        Slots::open(storage, &self.trust, &self.context)
    }

    /// Opens slots that must be without fault.
    fn healthy(&self) -> Slots {
        let (slots, faults) = self.open();
        assert_eq!(faults, []);
        slots
    }

    /// A node on which the given epochs have been active.
    fn with(epochs: &[u64]) -> Self {
        let node = Self::new();
        let slots = node.healthy();
        for epoch in epochs {
            slots.activate(node.bundle(*epoch)).unwrap();
            slots.settle().unwrap();
        }
        node
    }
}

fn base(epoch: u64) -> BundleBuilder {
    template_builder("base", DOMAIN, CREATED)
        .unwrap()
        .epoch(epoch)
}

/// The same epoch with other content.
fn other(epoch: u64) -> BundleBuilder {
    base(epoch).created_unix_ms(CREATED + 1)
}

fn serving(slots: &Slots) -> Option<(u64, Source)> {
    slots
        .current()
        .map(|current| (current.bundle().epoch(), current.source()))
}

fn codes(faults: &[SlotFault]) -> Vec<(&'static str, &'static str)> {
    faults
        .iter()
        .map(|fault| (fault.slot, fault.code))
        .collect()
}

fn refusal(slots: &Slots, bundle: VerifiedBundle) -> &'static str {
    slots.activate(bundle).unwrap_err().code()
}

#[test]
fn a_new_node_has_no_policy_until_one_is_activated() {
    let node = Node::new();
    let slots = node.healthy();
    assert_eq!(serving(&slots), None);
    assert_eq!(slots.floor(), None);
    assert_eq!(slots.wanted(), None);
    let activation = slots.activate(node.bundle(4)).unwrap();
    assert_eq!(activation.kind, ActivationKind::First);
    assert_eq!((activation.epoch, activation.replaced), (4, None));
    assert_eq!(serving(&slots), Some((4, Source::Active)));
    assert_eq!(serving(&node.healthy()), Some((4, Source::Active)));
    assert_eq!(node.storage.get("lkg"), None);
}

#[test]
fn activation_keeps_the_one_before_as_last_known_good() {
    let node = Node::with(&[1]);
    let slots = node.healthy();
    let first = node.storage.get("active").unwrap();
    let activation = slots.activate(node.bundle(2)).unwrap();
    assert_eq!(activation.kind, ActivationKind::Forward);
    assert_eq!(activation.replaced.unwrap().0, 1);
    assert_eq!(node.storage.get("lkg").unwrap(), first);
    // The one that was current goes on for whoever still holds it.
    assert_eq!(serving(&node.healthy()), Some((2, Source::Active)));
}

#[test]
fn inv_16_epochs_only_move_forward_across_restarts() {
    let node = Node::with(&[2]);
    for slots in [node.healthy(), node.healthy()] {
        assert_eq!(refusal(&slots, node.bundle(1)), "BUNDLE_EPOCH");
        assert_eq!(refusal(&slots, node.built(other(2))), "BUNDLE_CONFLICT");
        assert_eq!(serving(&slots), Some((2, Source::Active)));
        // The positive control: the same content again, then a higher epoch.
        assert_eq!(
            slots.activate(node.bundle(2)).unwrap().kind,
            ActivationKind::Reinstalled
        );
    }
    node.healthy().activate(node.bundle(3)).unwrap();
    assert_eq!(refusal(&node.healthy(), node.bundle(2)), "BUNDLE_EPOCH");
    assert!(matches!(
        node.healthy().activate(node.bundle(2)),
        Err(ActivateError::Refused(BundleError::Epoch {
            floor: 3,
            offered: 2
        }))
    ));
}

/// Fallback is not rollback: while epoch 2 stands in for a damaged epoch 3, the floor is 3.
#[test]
fn inv_16_the_floor_holds_while_last_known_good_serves() {
    let node = Node::with(&[2, 3]);
    node.storage.damage("active");
    let (slots, faults) = node.open();
    assert_eq!(codes(&faults), [("active", "BUNDLE_SIGNATURE")]);
    assert_eq!(serving(&slots), Some((2, Source::LastKnownGood)));
    assert_eq!(slots.floor().unwrap().epoch, 3);
    assert_eq!(refusal(&slots, node.bundle(2)), "BUNDLE_EPOCH");
    assert_eq!(refusal(&slots, node.built(other(3))), "BUNDLE_CONFLICT");
    // What is wanted is exactly the content that was active.
    let wanted = slots.wanted().unwrap();
    let restored = node.bundle(3);
    assert_eq!(wanted.content_id, *restored.content_id());
    let lkg = node.storage.get("lkg");
    assert_eq!(
        slots.activate(restored).unwrap().kind,
        ActivationKind::Reinstalled
    );
    assert_eq!(serving(&slots), Some((3, Source::Active)));
    assert_eq!(slots.wanted(), None);
    assert_eq!(node.storage.get("lkg"), lkg);
    assert_eq!(serving(&node.healthy()), Some((3, Source::Active)));
}

/// An older bundle put into the active slot behind the node's back is validly signed. It must not
/// decide all the same.
#[test]
fn inv_16_an_older_bundle_in_the_active_slot_does_not_decide() {
    let node = Node::with(&[1]);
    let old = node.storage.get("active");
    for epoch in [2, 3] {
        let slots = node.healthy();
        slots.activate(node.bundle(epoch)).unwrap();
        slots.settle().unwrap();
    }
    node.storage.set("active", old);
    let (slots, faults) = node.open();
    assert_eq!(codes(&faults), [("active", "BUNDLE_EPOCH")]);
    assert_eq!(serving(&slots), Some((2, Source::LastKnownGood)));
    assert_eq!(slots.floor().unwrap().epoch, 3);
}

#[test]
fn inv_16_a_floor_put_back_is_raised_again() {
    let node = Node::with(&[1]);
    let old = node.storage.get("floor");
    node.healthy().activate(node.bundle(2)).unwrap();
    let newest = node.storage.get("floor");
    node.storage.set("floor", old);
    let slots = node.healthy();
    assert_eq!(slots.floor().unwrap().epoch, 2);
    assert_eq!(node.storage.get("floor"), newest, "completed on disk");
    assert_eq!(refusal(&slots, node.bundle(1)), "BUNDLE_EPOCH");
}

#[test]
fn both_damaged_means_no_policy() {
    let node = Node::with(&[1, 2]);
    node.storage.damage("active");
    node.storage.damage("lkg");
    let (slots, faults) = node.open();
    assert_eq!(
        codes(&faults),
        [("active", "BUNDLE_SIGNATURE"), ("lkg", "BUNDLE_SIGNATURE")]
    );
    assert_eq!(serving(&slots), None);
    assert_eq!(slots.wanted().unwrap().epoch, 2);
    assert_eq!(refusal(&slots, node.bundle(1)), "BUNDLE_EPOCH");
    slots.activate(node.bundle(2)).unwrap();
    assert_eq!(serving(&slots), Some((2, Source::Active)));
}

#[test]
fn a_missing_or_unreadable_active_slot_falls_back_too() {
    let node = Node::with(&[1, 2]);
    let active = node.storage.get("active");
    node.storage.set("active", None);
    let (slots, faults) = node.open();
    assert_eq!(codes(&faults), [("active", "SLOT_MISSING")]);
    assert_eq!(serving(&slots), Some((1, Source::LastKnownGood)));
    node.storage.set("active", active);
    node.storage.fail("active", true);
    let (slots, faults) = node.open();
    assert_eq!(codes(&faults), [("active", "SLOT_UNREADABLE")]);
    assert_eq!(serving(&slots), Some((1, Source::LastKnownGood)));
    node.storage.fail("active", false);
    assert_eq!(serving(&node.healthy()), Some((2, Source::Active)));
    // A cut file, an empty one, a foreign one.
    let whole = node.storage.get("active").unwrap();
    for damaged in [&whole[..whole.len() / 2], b"", b"hello"] {
        node.storage.set("active", Some(damaged.to_vec()));
        let (slots, faults) = node.open();
        assert_eq!(codes(&faults), [("active", "BUNDLE_FORMAT")]);
        assert_eq!(serving(&slots), Some((1, Source::LastKnownGood)));
    }
}

#[test]
fn last_known_good_respects_min_fallback_epoch() {
    for (min, stands_in) in [(0, true), (4, true), (5, false), (6, false)] {
        let node = Node::with(&[4]);
        node.healthy()
            .activate(node.built(base(6).min_fallback_epoch(min)))
            .unwrap();
        node.storage.damage("active");
        let (slots, faults) = node.open();
        let expected = stands_in.then_some((4, Source::LastKnownGood));
        assert_eq!(serving(&slots), expected, "{min}");
        if !stands_in {
            assert_eq!(codes(&faults)[1], ("lkg", "LKG_BELOW_FALLBACK"));
        }
    }
    // A later bundle may forbid more old epochs, never allow them again.
    let node = Node::with(&[4]);
    node.healthy()
        .activate(node.built(base(6).min_fallback_epoch(6)))
        .unwrap();
    node.healthy()
        .activate(node.built(base(7).min_fallback_epoch(0)))
        .unwrap();
    assert_eq!(node.healthy().floor().unwrap().min_fallback_epoch, 6);
}

#[test]
fn a_damaged_floor_is_rebuilt_from_a_good_active_slot() {
    let node = Node::with(&[1, 2]);
    let good = node.storage.get("floor");
    for damaged in [None, Some(b"{}".to_vec()), Some(b"".to_vec())] {
        let missing = damaged.is_none();
        node.storage.set("floor", damaged);
        let (slots, faults) = node.open();
        let code = if missing {
            "SLOT_MISSING"
        } else {
            "FLOOR_DAMAGED"
        };
        assert_eq!(codes(&faults), [("floor", code)]);
        assert_eq!(serving(&slots), Some((2, Source::Active)));
        assert_eq!(node.storage.get("floor"), good);
    }
    // One flipped digit is noticed.
    let text = String::from_utf8(good.clone().unwrap()).unwrap();
    assert!(text.contains("\"epoch\": 2"), "{text}");
    node.storage.set(
        "floor",
        Some(text.replace("\"epoch\": 2", "\"epoch\": 1").into_bytes()),
    );
    assert_eq!(codes(&node.open().1), [("floor", "FLOOR_DAMAGED")]);
}

/// Floor and active slot both lost: whether the last known good may stand in was written in what is
/// lost, so it may not.
#[test]
fn without_floor_and_active_nothing_stands_in() {
    let node = Node::with(&[1, 2]);
    node.storage.damage("active");
    node.storage.damage("floor");
    let (slots, faults) = node.open();
    assert_eq!(
        codes(&faults),
        [
            ("floor", "FLOOR_DAMAGED"),
            ("active", "BUNDLE_SIGNATURE"),
            ("lkg", "LKG_BELOW_FALLBACK")
        ]
    );
    assert_eq!(serving(&slots), None);
    // At least what the last known good proves is kept; and that it is no more, over reloads and starts.
    let (again, _) = node.open();
    for slots in [&slots, &again] {
        slots.reload(&node.trust, &node.context);
        assert_eq!(serving(slots), None);
        assert_eq!(slots.floor().unwrap().epoch, 1);
        assert!(slots.is_floor_lost());
        // INV-16: nor does it come back from the store, as the newest that it may not be.
        assert_eq!(slots.wanted(), None);
    }
    slots.activate(node.bundle(2)).unwrap();
    assert!(!slots.is_floor_lost() && !node.healthy().is_floor_lost());
    assert_eq!(serving(&node.healthy()), Some((2, Source::Active)));
}

#[test]
fn a_failed_write_leaves_the_old_bundle_deciding() {
    for slot in ["lkg", "active", "floor"] {
        let node = Node::with(&[1]);
        let slots = node.healthy();
        node.storage.fail(slot, true);
        let error = slots.activate(node.bundle(2)).unwrap_err();
        assert_eq!(error.code(), "BUNDLE_STORAGE");
        assert!(matches!(&error, ActivateError::Storage { slot: failed, .. } if *failed == slot));
        assert_eq!(serving(&slots), Some((1, Source::Active)));
        node.storage.fail(slot, false);
        // INV-16: once epoch 2 may have reached the disk, no other epoch 2 may follow it.
        if slot != "lkg" {
            assert_eq!(refusal(&slots, node.built(other(2))), "BUNDLE_CONFLICT");
        }
        // Whatever the crash left on disk opens without fault, on one bundle or the other.
        assert!(matches!(
            serving(&node.healthy()),
            Some((1 | 2, Source::Active))
        ));
        slots.activate(node.bundle(2)).unwrap();
        assert_eq!(serving(&slots), Some((2, Source::Active)));
        assert_eq!(serving(&node.healthy()), Some((2, Source::Active)));
    }
}

/// A crash after any of the three writes of an activation: the next start has a bundle without
/// fault, and never one below the floor.
#[test]
fn inv_16_a_crash_between_the_writes_is_completed() {
    let node = Node::with(&[1, 2]);
    let before = ["lkg", "active", "floor"].map(|slot| (slot, node.storage.get(slot)));
    node.healthy().activate(node.bundle(3)).unwrap();
    let after = ["lkg", "active", "floor"].map(|slot| (slot, node.storage.get(slot)));
    for written in 0..=3 {
        for (number, (old, new)) in before.iter().zip(&after).enumerate() {
            let (slot, bytes) = if number < written { new } else { old };
            node.storage.set(slot, bytes.clone());
        }
        let slots = node.healthy();
        let epoch = if written < 2 { 2 } else { 3 };
        assert_eq!(serving(&slots), Some((epoch, Source::Active)), "{written}");
        assert_eq!(slots.floor().unwrap().epoch, epoch);
        assert_eq!(refusal(&slots, node.bundle(epoch - 1)), "BUNDLE_EPOCH");
    }
}

#[test]
fn trust_that_is_withdrawn_stops_a_bundle_at_reload() {
    let node = Node::with(&[1, 2]);
    let slots = node.healthy();
    assert_eq!(slots.reload(&node.trust, &node.context), []);
    assert_eq!(serving(&slots), Some((2, Source::Active)));
    let stranger = Authority::new(DOMAIN, 1).unwrap();
    let trust = TrustFile::parse(&stranger.trust_toml(1)).unwrap();
    let faults = slots.reload(&trust, &node.context);
    assert_eq!(
        codes(&faults),
        [("active", "BUNDLE_SIGNATURE"), ("lkg", "BUNDLE_SIGNATURE")]
    );
    assert_eq!(serving(&slots), None);
    assert_eq!(slots.floor().unwrap().epoch, 2);
    assert_eq!(slots.reload(&node.trust, &node.context), []);
    assert_eq!(serving(&slots), Some((2, Source::Active)));
}

#[test]
fn posture_follows_age_class_and_source() {
    let node = Node::with(&[1, 2]);
    let current = node.healthy().current().unwrap();
    let at = |days: u64| CREATED + days * DAY;
    for (days, read, write) in [
        (0, Posture::Normal, Posture::Normal),
        (7, Posture::Stale, Posture::Stale),
        (30, Posture::Restricted, Posture::Restricted),
        (90, Posture::Restricted, Posture::Closed),
        (180, Posture::Closed, Posture::Closed),
    ] {
        assert_eq!(current.posture("fs.read", at(days)), read, "{days}");
        assert_eq!(current.posture("fs.write", at(days)), write, "{days}");
        assert_eq!(current.overall_posture(at(days)), read.max(write));
    }
    assert_eq!(current.when_restricted("fs.read"), WhenRestricted::Degrade);
    for denied in ["fs.write", "no.such.action"] {
        assert_eq!(
            current.when_restricted(denied),
            WhenRestricted::Deny,
            "{denied}"
        );
    }
    // A clock behind the bundle's making: age zero.
    assert_eq!(current.posture("fs.read", 0), Posture::Normal);

    node.storage.damage("active");
    let current = node.open().0.current().unwrap();
    assert_eq!(current.source(), Source::LastKnownGood);
    assert_eq!(current.posture("fs.read", at(0)), Posture::Restricted);
    assert_eq!(current.overall_posture(at(0)), Posture::Restricted);
    // Its own age limits hold as well.
    assert_eq!(current.posture("fs.write", at(90)), Posture::Closed);
}

/// Ruling 15: neither activation nor restart makes a bundle younger.
#[test]
fn activation_does_not_reset_the_age() {
    let node = Node::with(&[1]);
    let old = node
        .healthy()
        .current()
        .unwrap()
        .posture("fs.read", CREATED + 8 * DAY);
    assert_eq!(old, Posture::Stale);
    let slots = node.healthy();
    slots.activate(node.bundle(1)).unwrap();
    assert_eq!(
        slots
            .current()
            .unwrap()
            .posture("fs.read", CREATED + 8 * DAY),
        Posture::Stale
    );
}

/// INV-06: the slots need storage, trust and node facts, nothing else. A node that never met anybody
/// activates exactly what a node among peers activates.
#[test]
fn inv_06_activation_is_local() {
    let node = Node::with(&[1]);
    let alone = Node {
        storage: MemorySlots::new(),
        authority: node.authority,
        ..Node::new()
    };
    let trust = TrustFile::parse(&alone.authority.trust_toml(1)).unwrap();
    let storage = Arc::clone(&alone.storage) as Arc<dyn SlotStorage>;
    let (slots, faults) = Slots::open(storage, &trust, &alone.context);
    assert_eq!(faults, []);
    let bundle = alone.bundle(1);
    let id = bundle.content_id().clone();
    assert_eq!(slots.activate(bundle).unwrap().content_id, id);
    assert_eq!(slots.floor().unwrap().content_id, id);
}

#[test]
fn a_newer_node_is_needed_again_after_a_downgrade() {
    let node = Node::with(&[1]);
    let newer = LoadContext::new(DOMAIN, "0.0.9").unwrap();
    let storage = Arc::clone(&node.storage) as Arc<dyn SlotStorage>;
    let (slots, faults) = Slots::open(storage, &node.trust, &newer);
    assert_eq!(codes(&faults), [("active", "BUNDLE_NODE_VERSION")]);
    assert_eq!(serving(&slots), None);
    assert_eq!(serving(&node.healthy()), Some((1, Source::Active)));
}

const AT: u64 = CREATED + DAY;

impl Node {
    /// Goes back, as an operator or as the node itself does.
    fn back(&self, slots: &Slots, cause: AsideCause) -> Result<Reverted, ActivateError> {
        slots.set_aside_by(cause, "orders fail", AT, &|package| {
            VerifiedBundle::load(package, &self.trust, &self.context)
        })
    }
}

#[test]
fn inv_16_what_is_set_aside_stays_aside_and_the_floor_stays() {
    let node = Node::with(&[1, 2, 3]);
    let slots = node.healthy();
    assert_eq!(slots.standby().unwrap().epoch, 2);
    let reverted = node.back(&slots, AsideCause::Operator).unwrap();
    assert_eq!(reverted.aside.epoch, 3);
    assert_eq!(reverted.serves.unwrap().epoch, 2);
    let rolled_back = |slots: &Slots| {
        assert_eq!(serving(slots), Some((2, Source::LastKnownGood)));
        assert_eq!(slots.floor().unwrap().epoch, 3);
        let aside = slots.aside().unwrap();
        assert_eq!((aside.cause, aside.epoch), (AsideCause::Operator, 3));
        assert_eq!(
            (aside.reason.as_str(), aside.at_unix_ms),
            ("orders fail", AT)
        );
        // Ruling 14: restricted at best.
        let policy = slots.current().unwrap();
        assert_eq!(policy.posture("fs.read", CREATED), Posture::Restricted);
        // Nothing is looked for in the store, and what is found there is not taken.
        assert_eq!(slots.wanted(), None);
        assert_eq!(refusal(slots, node.bundle(3)), "POLICY_SET_ASIDE");
        assert_eq!(refusal(slots, node.bundle(2)), "BUNDLE_EPOCH");
        assert_eq!(refusal(slots, node.built(other(3))), "BUNDLE_CONFLICT");
        assert_eq!(serving(slots), Some((2, Source::LastKnownGood)));
        let again = node.back(slots, AsideCause::Operator).unwrap_err();
        assert_eq!(again.code(), "POLICY_NOT_ACTIVE");
    };
    rolled_back(&slots);
    assert_eq!(slots.reload(&node.trust, &node.context), []);
    rolled_back(&slots);
    rolled_back(&node.healthy());

    // The controls: an operator's word, and a higher epoch.
    let slots = node.healthy();
    slots.reinstate(node.bundle(3)).unwrap();
    for slots in [slots, node.healthy()] {
        assert_eq!(serving(&slots), Some((3, Source::Active)));
        assert_eq!(slots.aside(), None);
    }
    let slots = node.healthy();
    node.back(&slots, AsideCause::SelfCheck).unwrap();
    slots.activate(node.bundle(4)).unwrap();
    for slots in [slots, node.healthy()] {
        assert_eq!(serving(&slots), Some((4, Source::Active)));
        assert_eq!(slots.aside(), None);
        assert_eq!(slots.standby().unwrap().epoch, 2, "3 was no good");
    }
}

#[test]
fn inv_16_what_is_set_aside_stays_aside_where_floor_and_active_slot_are_lost() {
    let node = Node::with(&[1, 2]);
    let slots = node.healthy();
    let load = |package| VerifiedBundle::load(package, &node.trust, &node.context);
    slots
        .set_aside_by(AsideCause::Operator, "wrong", CREATED, &load)
        .unwrap();
    for slot in ["active", "floor"] {
        node.storage.write(slot, b"damaged").unwrap();
    }
    let (slots, _) = node.open();
    assert!(slots.was_set_aside(node.bundle(2).content_id()));
    assert!(!slots.was_set_aside(node.bundle(1).content_id()));
    assert_eq!(refusal(&slots, node.bundle(2)), "POLICY_SET_ASIDE");
    // Nor after an older one decides again.
    if slots.activate(node.bundle(1)).is_ok() {
        slots.settle().unwrap();
    }
    assert_eq!(refusal(&slots, node.bundle(2)), "POLICY_SET_ASIDE");
    // The controls: an operator's word, and a newer one.
    assert_eq!(slots.reinstate(node.bundle(2)).unwrap().epoch, 2);
    assert_eq!(slots.activate(node.bundle(3)).unwrap().epoch, 3);
}

#[test]
fn without_a_fallback_an_operator_is_refused_and_a_failed_check_denies_all() {
    for node in [
        Node::with(&[1]),
        {
            let node = Node::with(&[1, 2]);
            let slots = node.healthy();
            let bundle = node.built(base(3).min_fallback_epoch(3));
            slots.activate(bundle).unwrap();
            node
        },
        {
            let node = Node::with(&[1, 2]);
            node.storage.damage("lkg");
            node
        },
    ] {
        let (slots, _) = node.open();
        let active = serving(&slots);
        assert_eq!(active.unwrap().1, Source::Active);
        let error = node.back(&slots, AsideCause::Operator).unwrap_err();
        assert_eq!(error.code(), "POLICY_NO_FALLBACK");
        assert!(error.to_string().contains("new epoch"), "{error}");
        assert_eq!(serving(&slots), active, "nothing has changed");
        assert_eq!(serving(&node.open().0), active);

        let reverted = node.back(&slots, AsideCause::SelfCheck).unwrap();
        assert_eq!((reverted.serves, reverted.not_kept), (None, None));
        for slots in [slots, node.open().0] {
            assert_eq!(serving(&slots), None);
            assert_eq!(slots.floor().unwrap().epoch, active.unwrap().0);
        }
        let (slots, _) = node.open();
        slots.activate(node.bundle(4)).unwrap();
        assert_eq!(serving(&slots), Some((4, Source::Active)));
    }
}

#[test]
fn a_failed_check_ends_a_bundle_even_if_that_cannot_be_kept() {
    let node = Node::with(&[1, 2]);
    let slots = node.healthy();
    node.storage.fail("aside", true);
    // An operator can try again, so nothing changes for him.
    let error = node.back(&slots, AsideCause::Operator).unwrap_err();
    assert_eq!(error.code(), "BUNDLE_STORAGE");
    assert_eq!(serving(&slots), Some((2, Source::Active)));
    let reverted = node.back(&slots, AsideCause::SelfCheck).unwrap();
    assert!(reverted.not_kept.is_some());
    assert_eq!(serving(&slots), Some((1, Source::LastKnownGood)));
    // This process does not forget it, whatever the disk says.
    node.storage.fail("aside", false);
    slots.reload(&node.trust, &node.context);
    assert_eq!(serving(&slots), Some((1, Source::LastKnownGood)));
}

#[test]
fn a_bundle_is_on_trial_until_its_check_is_over() {
    let node = Node::new();
    let slots = node.healthy();
    slots.activate(node.bundle(1)).unwrap();
    assert!(slots.is_on_trial());
    assert_eq!(slots.check_reads_back(), Ok(()));
    assert!(node.healthy().is_on_trial(), "known after a restart");
    slots.settle().unwrap();
    assert!(!slots.is_on_trial() && !node.healthy().is_on_trial());
    // The same again, while it decides: nothing is tried.
    slots.activate(node.bundle(1)).unwrap();
    assert!(!slots.is_on_trial());
    for slot in ["active", "floor", "aside"] {
        let kept = node.storage.get(slot);
        node.storage.damage(slot);
        let why = slots.check_reads_back().unwrap_err();
        assert!(why.to_string().contains(slot), "{why}");
        node.storage.set(slot, kept);
    }
    assert_eq!(slots.check_reads_back(), Ok(()));
}

/// Two bundles came while no engine was free, and the second failed: the first had never been checked either.
#[test]
fn a_bundle_that_nobody_has_checked_does_not_become_the_last_known_good() {
    for is_checked in [true, false] {
        let node = Node::with(&[1]);
        let slots = node.healthy();
        slots.activate(node.bundle(2)).unwrap();
        if is_checked {
            slots.settle().unwrap();
        }
        slots.activate(node.bundle(3)).unwrap();
        let reverted = node.back(&slots, AsideCause::SelfCheck).unwrap();
        let serves = reverted.serves.unwrap().epoch;
        assert_eq!(serves, if is_checked { 2 } else { 1 });
    }
}

/// Going back set a bundle aside and let the very same one serve, from the other slot.
#[test]
fn what_is_set_aside_does_not_stand_in_for_itself_after_an_activation_that_failed() {
    for cause in [AsideCause::Operator, AsideCause::SelfCheck] {
        let node = Node::with(&[1]);
        let slots = node.healthy();
        slots.settle().unwrap();
        node.storage.fail("floor", true);
        assert_eq!(refusal(&slots, node.bundle(2)), "BUNDLE_STORAGE");
        let back = node.back(&slots, cause);
        match cause {
            AsideCause::Operator => {
                assert_eq!(back.unwrap_err().code(), "POLICY_NO_FALLBACK");
                assert_eq!(serving(&slots), Some((1, Source::Active)));
            }
            _ => {
                assert_eq!(back.unwrap().serves, None);
                assert_eq!(serving(&slots), None);
            }
        }
    }
    // The control: with a bundle behind it, there is something to go back to.
    let node = Node::with(&[1, 2]);
    let reverted = node.back(&node.healthy(), AsideCause::Operator).unwrap();
    assert_eq!(reverted.serves.unwrap().epoch, 1);
}

/// Whoever asked what is held, a session for one, waited for a bundle that was loaded for a rollback.
#[test]
fn what_is_held_is_told_while_a_bundle_loads() {
    let node = Node::with(&[1, 2]);
    let slots = node.healthy();
    let asked = AtomicUsize::new(0);
    let load = |package: Package| {
        assert_eq!(slots.floor().unwrap().epoch, 2);
        assert!(slots.aside().is_none() && slots.wanted().is_none());
        assert_eq!(slots.standby().unwrap().epoch, 1);
        assert_eq!(serving(&slots), Some((2, Source::Active)));
        asked.fetch_add(1, Ordering::SeqCst);
        VerifiedBundle::load(package, &node.trust, &node.context)
    };
    slots.read_standby_by(&load).unwrap();
    assert_eq!(slots.reload_by(&node.trust, &load), []);
    slots
        .set_aside_by(AsideCause::Operator, "", 0, &load)
        .unwrap();
    assert_eq!(asked.into_inner(), 4);
    assert_eq!(serving(&slots), Some((1, Source::LastKnownGood)));
}

#[test]
fn a_damaged_mark_lets_the_newest_bundle_decide_nothing() {
    let node = Node::with(&[1, 2]);
    node.healthy().settle().unwrap();
    node.storage.damage("aside");
    for _ in 0..2 {
        let (slots, faults) = node.open();
        assert_eq!(codes(&faults), [("aside", "ASIDE_DAMAGED")]);
        assert_eq!(serving(&slots), Some((1, Source::LastKnownGood)));
        assert_eq!(slots.aside().unwrap().cause, AsideCause::Unreadable);
        assert_eq!(refusal(&slots, node.bundle(2)), "POLICY_SET_ASIDE");
    }
    let (slots, _) = node.open();
    slots.reinstate(node.bundle(2)).unwrap();
    assert_eq!(serving(&node.healthy()), Some((2, Source::Active)));
}

/// Storage of a process that stops at a write: that one and all after it do not happen.
struct Stops {
    inner: Arc<MemorySlots>,
    left: AtomicUsize,
}

impl SlotStorage for Stops {
    fn read(&self, slot: &str) -> io::Result<Option<Vec<u8>>> {
        self.inner.read(slot)
    }

    fn write(&self, slot: &str, bytes: &[u8]) -> io::Result<()> {
        let left = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        match left {
            Ok(_) => self.inner.write(slot, bytes),
            Err(_) => Err(io::Error::other("stopped")),
        }
    }
}

/// What an act on the slots leaves if the process stops at each of its writes.
fn at_every_step(node: &Node, act: impl Fn(&Slots), check: impl Fn(usize, &Slots)) {
    let slots = ["aside", "lkg", "active", "floor"];
    let before = slots.map(|slot| (slot, node.storage.get(slot)));
    for step in 0..=8 {
        for (slot, bytes) in &before {
            node.storage.set(slot, bytes.clone());
        }
        let storage = Arc::new(Stops {
            inner: Arc::clone(&node.storage),
            left: AtomicUsize::new(step),
        });
        let (slots, faults) = Slots::open(storage, &node.trust, &node.context);
        assert_eq!(faults, []);
        act(&slots);
        check(step, &node.healthy());
    }
}

#[test]
fn inv_16_stopped_at_any_write_a_node_has_the_old_bundle_or_the_new() {
    // An activation.
    let node = Node::with(&[1, 2]);
    node.healthy().settle().unwrap();
    at_every_step(
        &node,
        |slots| {
            if slots.activate(node.bundle(3)).is_ok() {
                // It may be stopped here too.
                drop(slots.settle());
            }
        },
        |step, slots| {
            let (epoch, source) = serving(slots).unwrap();
            assert!(
                [2, 3].contains(&epoch) && source == Source::Active,
                "{step}"
            );
            assert_eq!(slots.floor().unwrap().epoch, epoch);
            assert_eq!(
                epoch == 2,
                step < 3,
                "trial, target, then the bundle: {step}"
            );
            // Between target and bundle the same one lies in both: what stood behind it is known by name.
            let lost = slots.lost_standby();
            assert_eq!(lost.is_some(), step == 2, "{step}");
            if lost.is_some() {
                assert!(slots.standby().is_none());
                for other in [2, 3] {
                    let refused = slots.restore_standby(&node.bundle(other));
                    assert_eq!(refused.unwrap_err().code(), "POLICY_NO_FALLBACK");
                }
                slots.restore_standby(&node.bundle(1)).unwrap();
                assert_eq!(node.healthy().standby().unwrap().epoch, 1);
            }
            assert_eq!(slots.lost_standby(), None);
            // Nobody has checked what was stopped before the end.
            assert_eq!(slots.is_on_trial(), epoch == 3 && step < 5, "{step}");
            if epoch == 3 {
                assert_eq!(slots.standby().unwrap().epoch, 2, "{step}");
            }
        },
    );
    // Going back.
    let node = Node::with(&[1, 2]);
    at_every_step(
        &node,
        |slots| drop(node.back(slots, AsideCause::Operator)),
        |step, slots| {
            let expected = match step {
                0 => (2, Source::Active),
                _ => (1, Source::LastKnownGood),
            };
            assert_eq!(serving(slots), Some(expected), "{step}");
            assert_eq!(slots.floor().unwrap().epoch, 2);
        },
    );
    // The next bundle after that, and the same one by an operator.
    for epoch in [2, 3] {
        let node = Node::with(&[1, 2]);
        node.back(&node.healthy(), AsideCause::Operator).unwrap();
        at_every_step(
            &node,
            |slots| drop(slots.reinstate(node.bundle(epoch))),
            |step, slots| {
                let (now, source) = serving(slots).unwrap();
                let expected = match now {
                    1 => Source::LastKnownGood,
                    _ => Source::Active,
                };
                assert!([1, epoch].contains(&now) && source == expected, "{step}");
                assert!(slots.floor().unwrap().epoch >= 2);
                assert_eq!(slots.aside().is_some(), now == 1, "{step}");
            },
        );
    }
}

/// Something that happens to the slots.
#[derive(Debug, Clone)]
enum Happens {
    /// A bundle of this epoch is activated, which allows no fallback below that one.
    Activate(u64, u64),
    Reinstate(u64),
    Back(AsideCause),
    Restart,
    Reload,
    /// This slot refuses from now on, or works again.
    Fault(&'static str, bool),
}

fn happens() -> impl Strategy<Value = Happens> {
    let cause = prop_oneof![Just(AsideCause::Operator), Just(AsideCause::SelfCheck)];
    let slot = prop::sample::select(&["active", "lkg", "floor", "aside"][..]);
    prop_oneof![
        3 => (1..8_u64, 0..8_u64).prop_map(|(epoch, least)| Happens::Activate(epoch, least.min(epoch))),
        1 => (1..8_u64).prop_map(Happens::Reinstate),
        3 => cause.prop_map(Happens::Back),
        2 => Just(Happens::Restart),
        1 => Just(Happens::Reload),
        2 => (slot, prop::bool::ANY).prop_map(|(slot, fails)| Happens::Fault(slot, fails)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn inv_16_no_sequence_lowers_the_floor_or_brings_back_what_may_not_serve(
        sequence in prop::collection::vec(happens(), 1..14)
    ) {
        let node = Node::new();
        let mut slots = node.open().0;
        let mut floor = 0;
        // What a restart finds: where nothing was activated, a floor that moved is known in memory only.
        let mut kept = 0;
        // The strictest word on fallback of all that was active.
        let mut least = 0;
        // What this process has set aside and nobody has taken back.
        let mut aside: Option<u64> = None;
        for step in sequence {
            match step {
                Happens::Activate(epoch, min_fallback) => {
                    let bundle = node.built(base(epoch).min_fallback_epoch(min_fallback));
                    if let Ok(activation) = slots.activate(bundle) {
                        prop_assert!(aside.is_none_or(|aside| activation.epoch > aside));
                        aside = None;
                        kept = kept.max(activation.epoch);
                        least = least.max(min_fallback);
                        // Its check passed, and is kept where the disk lets it.
                        let _ = slots.settle();
                    }
                }
                Happens::Reinstate(epoch) => {
                    if slots.reinstate(node.bundle(epoch)).is_ok() {
                        aside = None;
                    }
                }
                Happens::Back(cause) => {
                    if let Ok(reverted) = node.back(&slots, cause) {
                        aside = Some(reverted.aside.epoch);
                        if let Some(serves) = reverted.serves {
                            prop_assert!(serves.epoch < reverted.aside.epoch);
                        }
                        if reverted.not_kept.is_some() {
                            // A restart would not know: this sequence is of one that does not restart.
                            break;
                        }
                    }
                }
                Happens::Restart => {
                    for slot in ["active", "lkg", "floor", "aside"] {
                        node.storage.fail(slot, false);
                    }
                    slots = node.open().0;
                    floor = kept;
                }
                Happens::Reload => drop(slots.reload(&node.trust, &node.context)),
                Happens::Fault(slot, fails) => node.storage.fail(slot, fails),
            }
            let now = slots.floor().map_or(0, |known| known.epoch);
            prop_assert!(now >= floor || now == 0 && floor == 0, "{now} after {floor}");
            floor = now;
            if let Some((epoch, source)) = serving(&slots) {
                prop_assert!(epoch <= floor);
                match source {
                    Source::Active => {
                        prop_assert_eq!(epoch, slots.current().unwrap().bundle().epoch());
                        prop_assert!(aside.is_none_or(|aside| epoch > aside));
                    }
                    Source::LastKnownGood => prop_assert!(epoch >= least, "{} below {}", epoch, least),
                }
            }
        }
    }
}
