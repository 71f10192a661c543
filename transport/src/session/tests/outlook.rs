//! What a session says of single segments and of its lag, against a world where both are known.

use super::*;
use crate::session::Standing;

fn lag(world: &World, node: usize, peer: usize) -> Lag {
    let view = StoreView {
        store: &world.nodes[node].store,
        peer: &world.nodes[peer].id,
    };
    let (a, b) = (node.min(peer), node.max(peer));
    world.machine(a, b, node).lag(&view)
}

fn there(world: &World, node: usize, peer: usize, held: &SegmentRef) -> Standing {
    let (a, b) = (node.min(peer), node.max(peer));
    world.machine(a, b, node).standing_there(held)
}

#[test]
fn a_segment_that_is_not_there_has_its_reason_and_counts_as_lag() {
    let mut world = World::new(&["a", "b"]);
    let small = world.store(0).make(&audit_origin("a"), 0, "", 100);
    world.connect(0, 1);
    assert_eq!(there(&world, 0, 1, &small), Standing::NotEstablished);
    world.run_for(Duration::from_secs(5));
    assert_eq!(
        there(&world, 0, 1, &small),
        Standing::HeldThere,
        "the control"
    );
    assert_eq!(lag(&world, 0, 1), Lag::default());

    // No room there: it was offered, and stays a lag of this many bytes.
    world.store(1).no_room_above = Some(500);
    let big = world.seal(0, &audit_origin("a"), 1, 900);
    assert_eq!(there(&world, 0, 1, &big), Standing::NotOffered);
    world.run_for(Duration::from_secs(5));
    assert_eq!(there(&world, 0, 1, &big), Standing::Offered);
    let behind = lag(&world, 0, 1);
    assert_eq!((behind.to_peer_segments, behind.to_peer_bytes), (1, 900));
    assert_eq!(
        world.machine(0, 1, 1).standing_here(&big.id),
        Standing::NotListed,
        "what is not wanted is not remembered"
    );
    // A later one of the same log is taken: the big one is a hole now.
    let later = world.seal(0, &audit_origin("a"), 2, 100);
    world.run_for(Duration::from_secs(5));
    assert_eq!(there(&world, 0, 1, &later), Standing::HeldThere);
    assert_eq!(there(&world, 0, 1, &big), Standing::Hole);
    assert_eq!(lag(&world, 0, 1).to_peer_segments, 1);

    // Of a policy only the newest counts; the peer's own log is none of its wants.
    world.seal(1, &policy_origin(), 9, 50);
    world.run_for(Duration::from_secs(5));
    world.store(1).no_room_above = Some(10);
    let older = world.seal(0, &policy_origin(), 3, 60);
    let own = world.store(0).make(&audit_origin("b"), 0, "restored", 70);
    world.stored(0, &own);
    world.run_for(Duration::from_secs(5));
    assert_eq!(there(&world, 0, 1, &older), Standing::Superseded);
    assert_eq!(there(&world, 0, 1, &own), Standing::OwnLog);
    assert_eq!(lag(&world, 0, 1).to_peer_segments, 1, "neither is a lag");
    let huge = SegmentRef {
        size_bytes: 5_000_000,
        sequence: 77,
        ..big
    };
    assert_eq!(there(&world, 0, 1, &huge), Standing::TooLarge);
}

#[test]
fn a_segment_on_its_way_here_has_a_stage_and_its_bytes_are_lag() {
    let mut world = World::new(&["a", "b"]);
    let ids: Vec<SegmentId> = (0..40)
        .map(|n| world.store(0).make(&audit_origin("a"), n, "", 20_000).id)
        .collect();
    world.connect(0, 1);
    // Long enough for the lists, far too short for 40 x 20 ms of bytes.
    world.run_for(Duration::from_millis(120));
    let stages: BTreeSet<String> = ids
        .iter()
        .map(|id| format!("{:?}", world.machine(0, 1, 1).standing_here(id)))
        .collect();
    assert!(stages.contains("Queued { held_until: None }"), "{stages:?}");
    assert!(stages.contains("Requested"), "{stages:?}");
    let behind = lag(&world, 1, 0);
    assert!((1..=40).contains(&behind.from_peer_segments), "{behind:?}");
    assert!(behind.from_peer_bytes >= 20_000, "{behind:?}");
    world.run_for(Duration::from_secs(60));
    assert_eq!(lag(&world, 1, 0), Lag::default(), "the control");
    assert_eq!(lag(&world, 0, 1), Lag::default());
}

#[test]
fn a_segment_that_was_asked_for_is_being_sent() {
    let mut bench = Bench::established();
    let held = bench
        .store
        .borrow_mut()
        .make(&audit_origin("a"), 0, "", 100);
    assert_ne!(bench.machine.standing_there(&held), Standing::Serving);
    bench.give(Frame::Fetch(Fetch {
        range: None,
        id: *held.id.as_bytes(),
    }));
    assert_eq!(bench.machine.standing_there(&held), Standing::Serving);
    bench.machine.handle_served(&(held.id, None));
    assert_ne!(bench.machine.standing_there(&held), Standing::Serving);
}

#[test]
fn a_segment_in_ranges_stands_where_its_furthest_range_is() {
    let mut bench = Bench::listed_big();
    let id = SegmentId::from_bytes(reference_entry(1).id);
    let (one, two) = (0..RANGE_BYTES, RANGE_BYTES..2 * RANGE_BYTES);
    let length = |range| bao::slice_len(BIG as u64, range).unwrap();
    let here = |bench: &Bench| bench.machine.standing_here(&id);
    let queued = |held_until| Standing::Queued { held_until };
    assert_eq!(here(&bench), queued(None));
    bench.machine.hold_until(Kind::Audit, 9 * MS);
    assert_eq!(here(&bench), queued(Some(9 * MS)), "a quota is spent");
    bench.machine.defer(&id);
    assert_eq!(here(&bench), Standing::Deferred, "others have all of it");
    bench.timeout(10 * MS);
    {
        let view = StoreView {
            store: &bench.store,
            peer: &bench.peer,
        };
        bench.machine.handle_released(&id, 10 * MS, &view);
    }
    assert_eq!(bench.machine.fetch_range(&id, &one, 10 * MS), Asked::First);
    assert_eq!(here(&bench), Standing::Requested);
    assert_eq!(bench.machine.fetch_range(&id, &two, 10 * MS), Asked::More);
    // Everything else is asked of another peer meanwhile: that hides nothing.
    bench.machine.defer(&id);
    assert_eq!(here(&bench), Standing::Requested);
    let take = bench
        .machine
        .handle_slice(Kind::Audit, &id, &one, length(&one), 10 * MS);
    assert_eq!(take, Ok(TakeSlice::Write));
    assert_eq!(here(&bench), Standing::Receiving);
    bench.machine.handle_slice_received(&id, one.start);
    assert_eq!(here(&bench), Standing::Admitting);
    bench.machine.handle_slice_over(&id, one.start, 10 * MS);
    assert_eq!(here(&bench), Standing::Requested, "the other one");
    // Given up: what is still on its way is read over, and counts for nothing.
    let refusal = Refusal {
        code: "slice",
        message: "it does not fit".into(),
        fault: Fault::Peer,
    };
    bench.machine.handle_failed(&id, refusal, 10 * MS);
    assert_eq!(here(&bench), Standing::SetAside);

    // The other side: one range that is being sent is enough.
    let held = bench
        .store
        .borrow_mut()
        .make(&audit_origin("a"), 0, "", BIG);
    let last = 3 * RANGE_BYTES;
    bench.give(Frame::Fetch(Fetch {
        range: Some(ByteRange {
            from: last,
            to: BIG as u64,
        }),
        id: *held.id.as_bytes(),
    }));
    assert_eq!(bench.machine.standing_there(&held), Standing::Serving);
    bench.machine.handle_served(&(held.id, Some(last)));
    assert_ne!(bench.machine.standing_there(&held), Standing::Serving);
}
