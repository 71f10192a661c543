//! Random schedules over a small mesh, each reproduced by its seed: whatever happens to links, clocks,
//! disks and papers, the invariants hold at every step, and after the last fault everybody has everything.
//!
//! `TIDELOCK_SCHEDULES` sets how many, `TIDELOCK_SCHEDULE_SEED` plays one again; `just soak-sessions`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

const SCHEDULES: u64 = 200;
const OPS: usize = 70;

/// Nodes are named by any number, taken modulo their count, so that a schedule of which operations are
/// left out is a schedule still.
#[derive(Debug, Clone, Copy)]
enum Op {
    /// Time passes, and whatever arrives is delivered.
    Deliver {
        ms: u32,
    },
    Connect {
        a: usize,
        b: usize,
    },
    Cut {
        a: usize,
        b: usize,
    },
    /// Nodes whose bits differ do not reach each other, until the next one.
    Partition {
        sides: u8,
    },
    Heal,
    /// The node is gone with all that is not durable, and stays away.
    Crash {
        node: usize,
        lost: u64,
    },
    /// It is there again; one that was not away begins its sessions anew.
    Restart {
        node: usize,
    },
    /// A message on its way is lost.
    Drop {
        pick: u64,
    },
    Duplicate {
        pick: u64,
    },
    /// A message overtakes what was sent before it.
    Reorder {
        pick: u64,
    },
    Delay {
        a: usize,
        b: usize,
        ms: u32,
    },
    ClockJump {
        node: usize,
        ahead_ms: i64,
    },
    DiskFull {
        node: usize,
    },
    DiskFree {
        node: usize,
    },
    /// A segment is not what it was; the store gives it up.
    Rot {
        node: usize,
        pick: u64,
    },
    SealAudit {
        node: usize,
        size: usize,
    },
    SealPolicy {
        node: usize,
    },
    /// The CA's next list arrives at a node. With a conflict it has the number of the last one.
    List {
        node: usize,
        is_conflict: bool,
    },
    /// A list that revokes a further node.
    Revoke {
        node: usize,
        victim: usize,
    },
    /// A segment comes in by another door.
    Import {
        from: usize,
        to: usize,
        pick: u64,
    },
    /// From now on this node alone spoils what it sends.
    Lie {
        node: usize,
    },
    Honest,
}

fn schedule(seed: u64) -> Vec<Op> {
    let mut seeded = Random::new(seed);
    (0..OPS)
        .map(|_| {
            let (a, b, pick) = (seeded.below(8), seeded.below(8), seeded.any());
            let ms = 1 + u32::try_from(seeded.below(400)).unwrap();
            match seeded.below(100) {
                0..34 => Op::Deliver { ms },
                34..47 => Op::Connect { a, b },
                47..50 => Op::Rot { node: b, pick },
                50..53 => Op::Cut { a, b },
                53 => Op::Partition {
                    sides: pick.to_le_bytes()[0],
                },
                54..56 => Op::Heal,
                56..58 => Op::Crash {
                    node: a,
                    lost: pick,
                },
                58..61 => Op::Restart { node: a },
                61 => Op::Drop { pick },
                62 => Op::Duplicate { pick },
                63 => Op::Reorder { pick },
                64..67 => Op::Delay { a, b, ms },
                67..69 => Op::ClockJump {
                    node: a,
                    ahead_ms: [-3_600_000, -40, 900, 31_000, 7_200_000][seeded.below(5)],
                },
                69..71 => Op::DiskFull { node: a },
                71..74 => Op::DiskFree { node: a },
                74..87 => Op::SealAudit {
                    node: a,
                    size: [90, 90, 4_000, 20_000, 600_000][seeded.below(5)],
                },
                87..90 => Op::SealPolicy { node: a },
                90..93 => Op::List {
                    node: a,
                    is_conflict: seeded.below(2) == 0,
                },
                93 if seeded.below(4) == 0 => Op::Revoke { node: a, victim: b },
                93..97 => Op::Import {
                    from: a,
                    to: b,
                    pick,
                },
                97 => Op::Lie { node: a },
                _ => Op::Honest,
            }
        })
        .collect()
}

/// A message on its way: its link, the side that it goes to, its arrival and number.
type OnWire = ((usize, usize), usize, (Duration, u64));

/// A world under a schedule.
struct Course {
    world: World,
    sides: u8,
    away: BTreeSet<usize>,
    sealed: Vec<u64>,
    epoch: u64,
    list: u64,
    made: u64,
    revoked: BTreeSet<usize>,
    /// What each node has stored at any time: receipts may name nothing else.
    stored: Vec<BTreeSet<SegmentId>>,
}

impl Course {
    fn new(seed: u64, is_traced: bool) -> Self {
        let size = 3 + usize::try_from(seed % 3).unwrap();
        let names: Vec<String> = (0..size).map(|at| format!("n{at}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut world = World::new(&names);
        world.is_traced = is_traced;
        // Far from zero, so that clocks can step back.
        world.now = Duration::from_secs(100_000);
        let mut seeded = Random::new(seed);
        let mut sealed = Vec::new();
        for (node, name) in names.iter().enumerate() {
            let mut store = world.store(node);
            store.own_from = Some(0);
            let own = seeded.below(30) as u64;
            for sequence in 0..own {
                store.make(&audit_origin(name), sequence, "", 90);
            }
            sealed.push(own);
        }
        Self {
            world,
            sides: 0,
            away: BTreeSet::new(),
            sealed,
            epoch: 0,
            list: 0,
            made: 0,
            revoked: BTreeSet::new(),
            stored: vec![BTreeSet::new(); size],
        }
    }

    fn size(&self) -> usize {
        self.world.nodes.len()
    }

    fn connect(&mut self, a: usize, b: usize) {
        let (a, b) = (a.min(b), a.max(b));
        let parted = (self.sides >> a ^ self.sides >> b) & 1 == 1;
        let away = self.away.contains(&a) || self.away.contains(&b);
        let refused = self.world.refuses(a, b) || self.world.refuses(b, a);
        if a != b && !parted && !away && !refused {
            self.world.connect(a, b);
        }
    }

    fn make(&mut self, node: usize, origin: &Origin, sequence: u64, size: usize) {
        self.made += 1;
        let salt = self.made.to_string();
        let made = self.world.store(node).make(origin, sequence, &salt, size);
        self.world.stored(node, &made);
    }

    fn pick(&self, pick: u64) -> Option<OnWire> {
        let all: Vec<_> = self
            .world
            .links
            .iter()
            .flat_map(|(link, of)| {
                let wires = of.wires.iter().enumerate();
                wires.flat_map(move |(to, wire)| wire.keys().map(move |key| (*link, to, *key)))
            })
            .collect();
        let at = usize::try_from(pick).unwrap().checked_rem(all.len())?;
        all.get(at).copied()
    }

    fn apply(&mut self, op: Op) {
        let size = self.size();
        let of = |node: usize| node % size;
        match op {
            Op::Deliver { ms } => self.world.run_for(MS * ms),
            Op::Connect { a, b } => self.connect(of(a), of(b)),
            Op::Cut { a, b } => self.world.cut(of(a).min(of(b)), of(a).max(of(b))),
            Op::Partition { sides } => {
                self.sides = sides;
                for (a, b) in self.world.links.keys().copied().collect::<Vec<_>>() {
                    if (sides >> a ^ sides >> b) & 1 == 1 {
                        self.world.cut(a, b);
                    }
                }
            }
            Op::Heal => self.sides = 0,
            Op::Crash { node, lost } => {
                self.world.restart(of(node));
                self.away.insert(of(node));
                let mut lost = Random::new(lost);
                for (_, have) in self.world.store(of(node)).partials.values_mut() {
                    have.iter_mut().for_each(|have| *have &= lost.below(2) == 0);
                }
            }
            Op::Restart { node } => {
                if !self.away.remove(&of(node)) {
                    self.world.restart(of(node));
                }
            }
            Op::Drop { pick } | Op::Duplicate { pick } | Op::Reorder { pick } => {
                let Some((link, to, key)) = self.pick(pick) else {
                    return;
                };
                let link = self.world.links.get_mut(&link).unwrap();
                link.is_impaired = true;
                let message = link.wires[to].remove(&key).unwrap();
                self.world.sent += 1;
                match op {
                    Op::Drop { .. } => {}
                    Op::Reorder { .. } => {
                        link.wires[to].insert((Duration::ZERO, self.world.sent), message);
                    }
                    _ => {
                        link.wires[to].insert(key, message.clone());
                        link.wires[to].insert((key.0, self.world.sent), message);
                    }
                }
            }
            Op::Delay { a, b, ms } => {
                let link = (of(a).min(of(b)), of(a).max(of(b)));
                if let Some(link) = self.world.links.get_mut(&link) {
                    link.delay = MS * ms;
                }
            }
            Op::ClockJump { node, ahead_ms } => {
                self.world.nodes[of(node)].clock_ahead_ms += ahead_ms;
            }
            Op::DiskFull { node } => self.world.store(of(node)).is_full = true,
            Op::DiskFree { node } => {
                self.world.store(of(node)).is_full = false;
                self.world.refresh(of(node));
            }
            Op::Rot { node, pick } => {
                let mut store = self.world.store(of(node));
                let held: Vec<SegmentId> = store
                    .by_id
                    .values()
                    .filter(|(held, _)| held.kind != Kind::Revocation)
                    .map(|(held, _)| held.id)
                    .collect();
                if let Some(at) = usize::try_from(pick).unwrap().checked_rem(held.len()) {
                    store.by_id.remove(&held[at]);
                    store.puts.remove(&held[at]);
                    drop(store);
                    self.world.refresh(of(node));
                }
            }
            Op::SealAudit { node, size } => {
                let node = of(node);
                let origin = audit_origin(self.world.nodes[node].id.as_str());
                self.make(node, &origin, self.sealed[node], size);
                self.sealed[node] += 1;
            }
            Op::SealPolicy { node } => {
                self.epoch += 1;
                self.make(of(node), &policy_origin(), self.epoch, 700);
            }
            Op::List { node, is_conflict } => self.issue(of(node), is_conflict),
            Op::Revoke { node, victim } => {
                let (node, victim) = (of(node), of(victim));
                if node != victim && !self.revoked.contains(&node) && self.revoked.len() + 2 < size
                {
                    self.revoked.insert(victim);
                    self.issue(node, false);
                }
            }
            Op::Import { from, to, pick } => {
                let (from, to) = (of(from), of(to));
                let held: Vec<_> = self.world.store(from).by_id.values().cloned().collect();
                let Some(at) = usize::try_from(pick).unwrap().checked_rem(held.len()) else {
                    return;
                };
                let (reference, content) = &held[at];
                let full = self.world.store(to).is_full && !is_urgent(reference.kind);
                if !full && self.world.store(to).put(reference, content) {
                    self.world.stored(to, reference);
                }
            }
            Op::Lie { node } => self.world.liar = Some(of(node)),
            Op::Honest => self.world.liar = None,
        }
    }

    /// A list of the CA that names all who are revoked.
    fn issue(&mut self, node: usize, is_conflict: bool) {
        self.list += u64::from(!is_conflict || self.list == 0);
        self.made += 1;
        let salt = self.made.to_string();
        let list = self
            .world
            .store(node)
            .make(&crl_origin(), self.list, &salt, 400);
        self.world.revokes.insert(list.id, self.revoked.clone());
        self.world.stored(node, &list);
    }

    /// What holds at every moment.
    fn check(&mut self) {
        let world = &self.world;
        for (at, node) in world.nodes.iter().enumerate() {
            let store = node.store.borrow();
            // INV-08
            assert!(store.puts.values().all(|puts| *puts == 1), "written twice");
            self.stored[at].extend(store.by_id.keys());
        }
        for link in world.links.values() {
            for side in &link.sides {
                let machine = &side.machine;
                // INV-07
                assert!(machine.out.len() <= MAX_FRAMES_QUEUED);
                assert!(machine.events.len() <= MAX_EVENTS_QUEUED);
                assert!(machine.queue.len() <= MAX_LISTED_AHEAD);
                assert!(machine.set_aside.len() <= MAX_SET_ASIDE);
                assert!(machine.in_flight <= 8 && machine.serving.len() <= 16);
                assert!(machine.lists_asked.len() <= MAX_LISTS_OUTSTANDING);
                let flying = |known: &&Known| known.stage.is_in_flight();
                let flying = machine.known.values().filter(flying).count();
                let is_open = machine.closed().is_none();
                if is_open {
                    assert_eq!(flying + machine.parts.len(), usize::from(machine.in_flight));
                }
                // INV-12
                assert!(machine.faults < MAX_FAULTS || !is_open);
                // INV-09
                let peer = link.sides.iter().find(|other| other.node != side.node);
                assert!(!world.refuses(side.node, peer.unwrap().node), "revoked");
            }
        }
        // INV-12: nothing is asked for twice in a session, but what a comparison of everything allows.
        for ((node, session, id), asked) in &world.asked {
            let refreshed = world.refreshed.get(&(*node, *session));
            assert!(
                *asked <= 1 + refreshed.copied().unwrap_or(0),
                "{id} was asked for {asked} times"
            );
        }
    }

    /// Connects what is apart, and no more than that: what one session leaves undone is not to be done by
    /// another.
    fn join(&mut self) {
        let mut group: Vec<usize> = (0..self.size()).collect();
        let mut unite = |a: usize, b: usize| {
            let (a, b) = (group[a], group[b]);
            group
                .iter_mut()
                .filter(|of| **of == b)
                .for_each(|of| *of = a);
            a != b
        };
        for (a, b) in self.world.links.keys() {
            unite(*a, *b);
        }
        // By whom first is as good as random.
        let (size, turn) = (self.size(), self.world.fetches.len());
        let good: Vec<usize> = (0..size)
            .map(|at| (at + turn) % size)
            .filter(|at| !self.revoked.contains(at))
            .collect();
        for (at, a) in good.iter().enumerate() {
            for b in &good[..at] {
                if unite(*a, *b) {
                    self.connect(*a, *b);
                }
            }
        }
    }

    /// The faults end; sessions that none of them struck go on as they are.
    fn settle(&mut self) {
        self.apply(Op::Honest);
        self.apply(Op::Heal);
        self.away.clear();
        for node in 0..self.size() {
            if self.world.store(node).is_full {
                self.apply(Op::DiskFree { node });
            }
        }
        for ((a, b), link) in &mut self.world.links {
            link.delay = Duration::ZERO;
            link.is_impaired |= self.revoked.contains(a) || self.revoked.contains(b);
        }
        for second in 0..90 {
            let struck: Vec<_> = self
                .world
                .links
                .iter()
                .filter(|(_, link)| second % 40 == 0 && link.is_impaired)
                .map(|(key, _)| *key)
                .collect();
            for (a, b) in struck {
                self.world.cut(a, b);
            }
            self.join();
            self.world.run_for(Duration::from_secs(1));
            for node in 0..self.size() {
                let now = self.world.clock(node);
                let overdue = self.world.nodes[node].claims.borrow().overdue(now);
                let overdue: Vec<SegmentId> = overdue.into_iter().collect();
                self.world.released(node, &overdue);
            }
            if second % 15 == 0 {
                self.check();
            }
        }
    }

    /// What holds at the end.
    fn check_end(&self) {
        assert_converged(&self.world);
        let world = &self.world;
        for (at, node) in world.nodes.iter().enumerate() {
            // Custody is claimed by nobody who did not store.
            for (id, from) in &node.store.borrow().receipts {
                for custodian in from {
                    let of = world.nodes.iter().position(|n| n.id.as_str() == custodian);
                    assert!(
                        self.stored[of.unwrap()].contains(id),
                        "a receipt for nothing"
                    );
                }
                assert!(
                    self.stored[at].contains(id),
                    "a receipt for another's audit"
                );
            }
        }
        for node in &self.world.nodes {
            assert!(node.claims.borrow().is_empty(), "a claim was left behind");
        }
        for link in self.world.links.values() {
            assert!(link.wires.iter().all(BTreeMap::is_empty), "it never rests");
            for side in &link.sides {
                let machine = &side.machine;
                assert!(machine.is_established());
                assert_eq!(machine.backlog(), 0);
                assert_eq!((machine.in_flight, machine.bulk_bytes), (0, 0));
                assert_eq!((machine.owed, machine.parts.len()), (0, 0));
                assert!(machine.out.is_empty() && machine.serving.is_empty());
            }
        }
    }
}

fn run(seed: u64, ops: &[Op], is_traced: bool) -> World {
    let mut course = Course::new(seed, is_traced);
    for op in ops {
        course.apply(*op);
        course.check();
    }
    course.settle();
    course.check_end();
    course.world
}

fn fails(seed: u64, ops: &[Op]) -> bool {
    catch_unwind(AssertUnwindSafe(|| run(seed, ops, false))).is_err()
}

/// Leaves out whatever the fault does not need.
fn shrunk(seed: u64, mut ops: Vec<Op>) -> Vec<Op> {
    let mut piece = ops.len() / 2;
    while piece > 0 {
        let mut at = 0;
        while at < ops.len() {
            let mut fewer = ops.clone();
            fewer.drain(at..(at + piece).min(ops.len()));
            if fails(seed, &fewer) {
                ops = fewer;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    ops
}

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number")),
    )
}

/// What happened in many schedules, for people and for the control.
#[derive(Debug, Default)]
struct Seen {
    transfers: usize,
    not_taken: usize,
    spoilt: usize,
    not_sent: usize,
    revoked: usize,
    /// Sessions that ended by themselves, by how.
    ended: BTreeMap<&'static str, u32>,
}

impl Seen {
    fn add(&mut self, world: &World) {
        self.transfers += world.fetches.len() + world.slices.len();
        self.revoked += world.revokes.values().flatten().count();
        for (_, event) in &world.events {
            match event {
                SessionEvent::TransferFailed { refusal, .. } if refusal.fault == Fault::Peer => {
                    self.spoilt += 1;
                }
                SessionEvent::TransferFailed { .. } => self.not_taken += 1,
                SessionEvent::FetchRefused { .. } => self.not_sent += 1,
                _ => {}
            }
        }
        for (code, count) in &world.ended {
            *self.ended.entry(code).or_default() += count;
        }
    }
}

#[test]
fn whatever_happens_the_mesh_converges_after_the_last_fault() {
    let seeds = match number("TIDELOCK_SCHEDULE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("TIDELOCK_SCHEDULES").unwrap_or(SCHEDULES),
    };
    let count = seeds.end - seeds.start;
    let mut seen = Seen::default();
    for seed in seeds {
        let ops = schedule(seed);
        if seed > 0 && seed % 1_000 == 0 {
            println!("{seed} schedules so far");
        }
        match catch_unwind(AssertUnwindSafe(|| run(seed, &ops, false))) {
            Ok(world) => seen.add(&world),
            Err(_) => {
                let few = shrunk(seed, ops);
                println!(
                    "TIDELOCK_SCHEDULE_SEED={seed} plays it again; the fault needs no more than:"
                );
                few.iter().for_each(|op| println!("    {op:?}"));
                run(seed, &few, false);
                panic!("it is not there every time");
            }
        }
    }
    println!("{count} schedules: {seen:?}");
    if count >= SCHEDULES {
        let ended = |code: CloseCode| seen.ended.get(code.as_str()).copied().unwrap_or(0);
        assert!(seen.transfers as u64 >= 10 * count, "the control");
        assert!(seen.not_taken > 0 && seen.spoilt > 0 && seen.not_sent > 0 && seen.revoked > 0);
        for code in [CloseCode::Protocol, CloseCode::Faults, CloseCode::Stalled] {
            assert!(ended(code) > 0, "{code:?}");
        }
    }
}

#[test]
fn inv_11_the_same_schedule_takes_the_same_course() {
    for seed in 0..6 {
        let ops = schedule(seed);
        let (first, second) = (run(seed, &ops, true), run(seed, &ops, true));
        assert!(first.trace.len() > 30, "the control");
        assert!(first.trace == second.trace && first.fetches == second.fetches);
    }
}
