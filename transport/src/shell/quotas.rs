//! What one peer may cost, per class (INV-13). Each class has its own bucket, so that no class and
//! no peer takes from another; a refused request costs nothing.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tidelock_quota::{
    AddressBlock, Clock, DailyVolume, MonotonicClock, Rate, Refused, TokenBuckets,
};
use tidelock_segments::{NodeId, SegmentRef};

use super::{MeshError, lock, millis};
use crate::{
    limits::{MAX_BULK_SEGMENT_BYTES, MAX_PEERS, MAX_SESSIONS, MAX_URGENT_SEGMENT_BYTES},
    session::{AnnouncedQuota, is_urgent},
};

/// Keys of the per-peer buckets.
const PEER_KEYS: usize = MAX_PEERS + MAX_SESSIONS;

/// Keys of the per-address buckets; past it the fullest bucket is forgotten first.
const ADDRESS_KEYS: usize = 8_192;

/// Quotas of each peer. Volumes are in KiB, begun ones counted whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaConfig {
    /// Control frames that are read from a peer. Past it reading pauses; the session stays up.
    pub frames: Rate,
    /// Revocation and policy taken from a peer: a quota of its own (ruling 10).
    pub urgent_in_kib: Rate,
    /// Witness and audit taken from a peer.
    pub bulk_in_kib: Rate,
    /// Anything sent to a peer.
    pub out_kib: Rate,
    /// Bytes of witness and audit taken from a peer in a day.
    pub daily_in_bytes: u64,
    /// Handshakes of one validated address, IPv6 by its /64, before TLS.
    pub handshakes_per_address: Rate,
}

impl Default for QuotaConfig {
    fn default() -> Self {
        Self {
            frames: Rate {
                per_second: 50_000,
                burst: 100_000,
            },
            urgent_in_kib: Rate {
                per_second: 32 * 1024,
                burst: 64 * 1024,
            },
            bulk_in_kib: Rate {
                per_second: 2 * 1024 * 1024,
                burst: 2 * 1024 * 1024,
            },
            out_kib: Rate {
                per_second: 2 * 1024 * 1024,
                burst: 2 * 1024 * 1024,
            },
            daily_in_bytes: u64::MAX,
            handshakes_per_address: Rate {
                per_second: 10,
                burst: 40,
            },
        }
    }
}

impl QuotaConfig {
    /// What a peer may cost for which nothing else is set.
    #[must_use]
    pub fn common(&self) -> PeerQuota {
        PeerQuota {
            frames: self.frames,
            bulk_in_kib: self.bulk_in_kib,
            out_kib: self.out_kib,
            daily_in_bytes: self.daily_in_bytes,
        }
    }
}

/// What one peer may cost. Revocation and policy have a quota that nobody changes (ruling 10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerQuota {
    /// Control frames that are read from it.
    pub frames: Rate,
    /// Witness and audit taken from it, in KiB.
    pub bulk_in_kib: Rate,
    /// Anything sent to it, in KiB.
    pub out_kib: Rate,
    /// Bytes of witness and audit taken from it in a day.
    pub daily_in_bytes: u64,
}

impl PeerQuota {
    fn check(&self) -> Result<(), MeshError> {
        let biggest = kib(MAX_BULK_SEGMENT_BYTES);
        if self.bulk_in_kib.burst < biggest || self.out_kib.burst < biggest {
            return Err(MeshError::Config {
                detail: "burst of a byte quota is below the biggest segment",
            });
        }
        Ok(())
    }
}

/// What one peer owes to its quotas: what has to be kept over a restart, so that a restart grants
/// nothing (INV-13).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerDebt {
    /// Milliseconds until the bucket of frames is full.
    pub frames_ms: u64,
    /// Milliseconds until the bucket of revocation and policy is full.
    pub urgent_in_ms: u64,
    /// Milliseconds until the bucket of witness and audit is full.
    pub bulk_in_ms: u64,
    /// Milliseconds until the bucket of what is sent is full.
    pub out_ms: u64,
    /// Bytes of witness and audit taken in the running day.
    pub day_used_bytes: u64,
    /// Milliseconds that the day has run.
    pub day_age_ms: u64,
}

impl PeerDebt {
    /// Every bucket empty and the day's volume used: for a peer of which it is not known any more.
    pub const SPENT: Self = Self {
        frames_ms: u64::MAX,
        urgent_in_ms: u64::MAX,
        bulk_in_ms: u64::MAX,
        out_ms: u64::MAX,
        day_used_bytes: u64::MAX,
        day_age_ms: 0,
    };

    /// What is left of it after this time.
    #[must_use]
    pub fn after(self, time: Duration) -> Self {
        let paid = millis(time);
        Self {
            frames_ms: self.frames_ms.saturating_sub(paid),
            urgent_in_ms: self.urgent_in_ms.saturating_sub(paid),
            bulk_in_ms: self.bulk_in_ms.saturating_sub(paid),
            out_ms: self.out_ms.saturating_sub(paid),
            day_used_bytes: self.day_used_bytes,
            day_age_ms: self.day_age_ms.saturating_add(paid),
        }
    }
}

/// Why a segment is not asked for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wait {
    /// The bucket has it after this time.
    For(Duration),
    /// It is bigger than the bucket.
    Never,
}

impl From<Refused> for Wait {
    fn from(refused: Refused) -> Self {
        refused.retry_after().map_or(Self::Never, Self::For)
    }
}

/// What one peer owes to one of its buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct QuotaDebt {
    /// The bucket: `frames`, `urgent_in`, `bulk_in`, `daily_in` or `out`.
    pub bucket: &'static str,
    /// Requests that had to wait for it since the start.
    pub waits: u64,
    /// Milliseconds until the last of them is paid; 0 when nothing is owed.
    pub debt_ms: u64,
}

fn ceil_millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// Waits at one bucket, and until when the last one lasts.
#[derive(Debug, Clone, Copy, Default)]
struct Waits {
    count: u64,
    until: Duration,
}

/// A clock that tells the time since it was made.
pub(super) trait Ticks: Clock<Instant = Duration> + Clone {}

impl<C: Clock<Instant = Duration> + Clone> Ticks for C {}

/// The buckets of one peer, or of all peers that have none of their own.
struct Buckets<C: Ticks> {
    quota: PeerQuota,
    frames: TokenBuckets<NodeId, C>,
    bulk_in: TokenBuckets<NodeId, C>,
    out: TokenBuckets<NodeId, C>,
}

impl<C: Ticks> Buckets<C> {
    fn new(quota: PeerQuota, keys: usize, clock: &C) -> Result<Self, MeshError> {
        quota.check()?;
        Ok(Self {
            quota,
            frames: TokenBuckets::new(quota.frames, keys, clock.clone())?,
            bulk_in: TokenBuckets::new(quota.bulk_in_kib, keys, clock.clone())?,
            out: TokenBuckets::new(quota.out_kib, keys, clock.clone())?,
        })
    }

    fn retain_recent(&self) {
        self.frames.retain_recent();
        self.bulk_in.retain_recent();
        self.out.retain_recent();
    }
}

type Own<C> = BTreeMap<NodeId, Arc<Buckets<C>>>;

pub(super) struct Quotas<C: Ticks = MonotonicClock> {
    clock: C,
    waits: Mutex<BTreeMap<NodeId, BTreeMap<&'static str, Waits>>>,
    urgent_in: TokenBuckets<NodeId, C>,
    handshakes: TokenBuckets<AddressBlock, C>,
    common: Arc<Buckets<C>>,
    /// Of peers for which an operator has set a quota.
    own: Mutex<Own<C>>,
    daily: Mutex<BTreeMap<NodeId, DailyVolume>>,
}

/// A day that goes on; none where nothing was used. It goes on without a bound too, so that one which is
/// set later counts what was used before.
fn resumed(quota: &PeerQuota, used: u64, age: Duration, now: Duration) -> Option<DailyVolume> {
    (used > 0).then(|| DailyVolume::resumed(quota.daily_in_bytes, used, age, now))
}

fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

impl<C: Ticks> Quotas<C> {
    pub(super) fn new(config: &QuotaConfig, clock: &C) -> Result<Self, MeshError> {
        if config.urgent_in_kib.burst < kib(MAX_URGENT_SEGMENT_BYTES) {
            return Err(MeshError::Config {
                detail: "burst of the urgent quota is below the biggest urgent segment",
            });
        }
        Ok(Self {
            clock: clock.clone(),
            waits: Mutex::default(),
            urgent_in: TokenBuckets::new(config.urgent_in_kib, PEER_KEYS, clock.clone())?,
            handshakes: TokenBuckets::new(
                config.handshakes_per_address,
                ADDRESS_KEYS,
                clock.clone(),
            )?,
            common: Arc::new(Buckets::new(config.common(), PEER_KEYS, clock)?),
            own: Mutex::default(),
            daily: Mutex::default(),
        })
    }

    fn of(&self, peer: &NodeId) -> Arc<Buckets<C>> {
        Arc::clone(lock(&self.own).get(peer).unwrap_or(&self.common))
    }

    /// What a peer may cost.
    pub(super) fn quota(&self, peer: &NodeId) -> PeerQuota {
        self.of(peer).quota
    }

    /// Gives a peer a quota of its own, or the common one again. What it owes goes along: a change
    /// forgives nothing.
    pub(super) fn set(&self, peer: &NodeId, quota: Option<PeerQuota>) -> Result<(), MeshError> {
        let now = self.clock.now();
        let fresh = match quota {
            Some(quota) => Some(Arc::new(Buckets::new(quota, 1, &self.clock)?)),
            None => None,
        };
        let mut own = lock(&self.own);
        if fresh.is_some() && !own.contains_key(peer) && own.len() >= MAX_PEERS {
            return Err(MeshError::Config {
                detail: "no more peers may have a quota of their own",
            });
        }
        let old = Arc::clone(own.get(peer).unwrap_or(&self.common));
        let new = match fresh {
            Some(fresh) => {
                own.insert(peer.clone(), Arc::clone(&fresh));
                fresh
            }
            None => {
                own.remove(peer);
                Arc::clone(&self.common)
            }
        };
        new.frames.restore(peer, old.frames.debt(peer));
        new.bulk_in.restore(peer, old.bulk_in.debt(peer));
        new.out.restore(peer, old.out.debt(peer));
        drop(own);
        let mut daily = lock(&self.daily);
        let used = daily.remove(peer).and_then(|volume| volume.used(now));
        if let Some(volume) = used.and_then(|(used, age)| resumed(&new.quota, used, age, now)) {
            daily.insert(peer.clone(), volume);
        }
        drop(daily);
        for wait in lock(&self.waits)
            .get_mut(peer)
            .into_iter()
            .flat_map(BTreeMap::values_mut)
        {
            wait.until = now;
        }
        Ok(())
    }

    /// What every peer owes that owes anything.
    pub(super) fn owed(&self) -> BTreeMap<NodeId, PeerDebt> {
        let now = self.clock.now();
        let mut all: BTreeMap<NodeId, PeerDebt> = BTreeMap::new();
        let own: Vec<Arc<Buckets<C>>> = lock(&self.own).values().cloned().collect();
        for buckets in own.iter().chain([&self.common]) {
            for (peer, debt) in buckets.frames.debts() {
                let owed = &mut all.entry(peer).or_default().frames_ms;
                *owed = (*owed).max(ceil_millis(debt));
            }
            for (peer, debt) in buckets.bulk_in.debts() {
                let owed = &mut all.entry(peer).or_default().bulk_in_ms;
                *owed = (*owed).max(ceil_millis(debt));
            }
            for (peer, debt) in buckets.out.debts() {
                let owed = &mut all.entry(peer).or_default().out_ms;
                *owed = (*owed).max(ceil_millis(debt));
            }
        }
        for (peer, debt) in self.urgent_in.debts() {
            all.entry(peer).or_default().urgent_in_ms = ceil_millis(debt);
        }
        for (peer, volume) in &*lock(&self.daily) {
            if let Some((used, age)) = volume.used(now) {
                let debt = all.entry(peer.clone()).or_default();
                (debt.day_used_bytes, debt.day_age_ms) = (used, millis(age));
            }
        }
        all
    }

    /// Takes up what a peer owed when this node stopped, after its own quota was set.
    pub(super) fn owes(&self, peer: &NodeId, debt: &PeerDebt) {
        let now = self.clock.now();
        let buckets = self.of(peer);
        buckets
            .frames
            .restore(peer, Duration::from_millis(debt.frames_ms));
        buckets
            .bulk_in
            .restore(peer, Duration::from_millis(debt.bulk_in_ms));
        buckets
            .out
            .restore(peer, Duration::from_millis(debt.out_ms));
        self.urgent_in
            .restore(peer, Duration::from_millis(debt.urgent_in_ms));
        let age = Duration::from_millis(debt.day_age_ms);
        if let Some(volume) = resumed(&buckets.quota, debt.day_used_bytes, age, now) {
            self.with_room(now).insert(peer.clone(), volume);
        }
    }

    /// What the peer is told of its quotas in Hello.
    pub(super) fn announced(&self, peer: &NodeId) -> AnnouncedQuota {
        let now = self.clock.now();
        let quota = self.quota(peer);
        let bytes = |rate: Rate| u64::from(rate.per_second).saturating_mul(1024);
        let left = lock(&self.daily).get(peer).map(|volume| volume.left(now));
        AnnouncedQuota {
            frames_per_second: quota.frames.per_second,
            in_bytes_per_second: bytes(quota.bulk_in_kib),
            in_bytes_left_today: left.unwrap_or(quota.daily_in_bytes),
            out_bytes_per_second: bytes(quota.out_kib),
        }
    }

    /// The volumes of the day, with room for one more.
    fn with_room(&self, now: Duration) -> MutexGuard<'_, BTreeMap<NodeId, DailyVolume>> {
        let mut daily = lock(&self.daily);
        if daily.len() >= PEER_KEYS {
            // INV-07: whoever has used least loses least by being forgotten.
            let least = daily
                .iter()
                .min_by_key(|(_, volume)| volume.used(now).map_or(0, |(used, _)| used));
            if let Some(least) = least.map(|(peer, _)| peer.clone()) {
                daily.remove(&least);
            }
        }
        daily
    }

    /// One control frame of a peer.
    pub(super) fn frame(&self, peer: &NodeId) -> Result<(), Wait> {
        self.noted(
            peer,
            "frames",
            self.of(peer).frames.check(peer, 1).map_err(Wait::from),
        )
    }

    /// One handshake of an address.
    pub(super) fn handshake(&self, from: AddressBlock) -> bool {
        self.handshakes.check(&from, 1).is_ok()
    }

    /// A segment that is about to be asked for.
    pub(super) fn take_in(
        &self,
        peer: &NodeId,
        reference: &SegmentRef,
        now: Duration,
    ) -> Result<(), Wait> {
        let cost = kib(reference.size_bytes);
        if is_urgent(reference.kind) {
            // Ruling 10: no daily volume stands before a revocation.
            let taken = self.urgent_in.check(peer, cost).map_err(Wait::from);
            return self.noted(peer, "urgent_in", taken);
        }
        let buckets = self.of(peer);
        if reference.size_bytes > buckets.quota.daily_in_bytes {
            return Err(Wait::Never);
        }
        let mut daily = match lock(&self.daily) {
            daily if daily.contains_key(peer) => daily,
            daily => {
                drop(daily);
                self.with_room(now)
            }
        };
        let volume = daily
            .entry(peer.clone())
            .or_insert_with(|| DailyVolume::new(buckets.quota.daily_in_bytes));
        // Looked at first and charged last, so that a refusal by either charges neither.
        if volume.left(now) < reference.size_bytes {
            let spent = volume.take(reference.size_bytes, now).err();
            let resets_in = spent.map_or(Duration::from_secs(60), |spent| spent.resets_in);
            return self.noted(peer, "daily_in", Err(Wait::For(resets_in)));
        }
        let taken = buckets.bulk_in.check(peer, cost).map_err(Wait::from);
        self.noted(peer, "bulk_in", taken)?;
        // Cannot refuse: there was enough a moment ago, under the same lock.
        let _ = volume.take(reference.size_bytes, now);
        Ok(())
    }

    /// A segment that is about to be sent.
    pub(super) fn send(&self, peer: &NodeId, size_bytes: u64) -> Result<(), Wait> {
        let sent = self
            .of(peer)
            .out
            .check(peer, kib(size_bytes))
            .map_err(Wait::from);
        self.noted(peer, "out", sent)
    }

    /// Remembers who had to wait for which bucket, and how long.
    fn noted(
        &self,
        peer: &NodeId,
        bucket: &'static str,
        outcome: Result<(), Wait>,
    ) -> Result<(), Wait> {
        if let Err(Wait::For(time)) = &outcome {
            let mut waits = lock(&self.waits);
            // INV-07: whose debt is paid longest goes first; only a figure for the operator does.
            if !waits.contains_key(peer)
                && waits.len() >= PEER_KEYS
                && let Some(oldest) = waits
                    .iter()
                    .min_by_key(|(_, buckets)| buckets.values().map(|wait| wait.until).max())
                    .map(|(peer, _)| peer.clone())
            {
                waits.remove(&oldest);
            }
            let wait = waits
                .entry(peer.clone())
                .or_default()
                .entry(bucket)
                .or_default();
            wait.count = wait.count.saturating_add(1);
            wait.until = self.clock.now().saturating_add(*time);
        }
        outcome
    }

    /// What a peer owes to each bucket that it ever waited for.
    pub(super) fn debts(&self, peer: &NodeId) -> Vec<QuotaDebt> {
        let now = self.clock.now();
        let waits = lock(&self.waits);
        waits
            .get(peer)
            .into_iter()
            .flatten()
            .map(|(bucket, wait)| QuotaDebt {
                bucket,
                waits: wait.count,
                debt_ms: millis(wait.until.saturating_sub(now)),
            })
            .collect()
    }

    /// Drops what is at rest.
    pub(super) fn retain_recent(&self) {
        self.common.retain_recent();
        self.urgent_in.retain_recent();
        self.handshakes.retain_recent();
    }
}

#[cfg(test)]
mod tests {
    use tidelock_quota::ManualClock;
    use tidelock_segments::{Kind, Origin, SegmentId};

    use super::*;

    fn segment(kind: Kind, size_bytes: u64) -> SegmentRef {
        let origin = if kind == Kind::Policy {
            Origin::policy("base").unwrap()
        } else {
            Origin::parse("audit/x/0123456789abcdef/0").unwrap()
        };
        SegmentRef {
            id: SegmentId::of(b"x"),
            kind,
            origin,
            sequence: 0,
            size_bytes,
            prev: None,
        }
    }

    #[test]
    fn inv_13_a_spent_peer_costs_no_other_peer_and_no_other_class() {
        let config = QuotaConfig {
            bulk_in_kib: Rate {
                per_second: 1,
                burst: 32 * 1024,
            },
            daily_in_bytes: 40 * 1024 * 1024,
            ..QuotaConfig::default()
        };
        let quotas = Quotas::new(&config, &MonotonicClock::new()).unwrap();
        let (a, b) = (NodeId::new("a").unwrap(), NodeId::new("b").unwrap());
        let big = segment(Kind::Audit, 32 * 1024 * 1024);
        assert_eq!(
            quotas.take_in(&a, &big, Duration::ZERO),
            Ok(()),
            "the control"
        );
        assert!(matches!(
            quotas.take_in(&a, &big, Duration::ZERO),
            Err(Wait::For(_))
        ));
        let policy = segment(Kind::Policy, 1_000_000);
        assert_eq!(quotas.take_in(&a, &policy, Duration::ZERO), Ok(()));
        assert_eq!(quotas.take_in(&b, &big, Duration::ZERO), Ok(()));
        assert_eq!(quotas.send(&a, 1), Ok(()));
        assert_eq!(quotas.frame(&a), Ok(()));
        let debts = quotas.debts(&a);
        assert_eq!(debts.len(), 1, "{debts:?}");
        assert_eq!((debts[0].bucket, debts[0].waits), ("daily_in", 1));
        assert!(debts[0].debt_ms > 0);
        assert_eq!(quotas.debts(&b), [], "nobody else owes anything");
        let huge = segment(Kind::Audit, 50 * 1024 * 1024);
        assert_eq!(quotas.take_in(&a, &huge, Duration::ZERO), Err(Wait::Never));
    }

    #[test]
    fn a_refusal_by_the_bucket_does_not_charge_the_day() {
        let config = QuotaConfig {
            bulk_in_kib: Rate {
                per_second: 1,
                burst: 32 * 1024,
            },
            daily_in_bytes: 33 * 1024 * 1024,
            ..QuotaConfig::default()
        };
        let quotas = Quotas::new(&config, &MonotonicClock::new()).unwrap();
        let peer = NodeId::new("a").unwrap();
        let big = segment(Kind::Audit, 32 * 1024 * 1024);
        assert_eq!(quotas.take_in(&peer, &big, Duration::ZERO), Ok(()));
        let left = lock(&quotas.daily)[&peer].left(Duration::ZERO);
        assert_eq!(left, 1024 * 1024);
        let small = segment(Kind::Audit, 512 * 1024);
        assert!(quotas.take_in(&peer, &small, Duration::ZERO).is_err());
        assert_eq!(lock(&quotas.daily)[&peer].left(Duration::ZERO), left);
    }

    fn peer_quota(kib_per_second: u32, daily_in_bytes: u64) -> PeerQuota {
        let bytes = Rate {
            per_second: kib_per_second,
            burst: 64 * 1024,
        };
        PeerQuota {
            frames: Rate {
                per_second: 100,
                burst: 200,
            },
            bulk_in_kib: bytes,
            out_kib: bytes,
            daily_in_bytes,
        }
    }

    fn virtual_quotas(config: &QuotaConfig) -> (Quotas<ManualClock>, ManualClock) {
        let clock = ManualClock::new();
        (Quotas::new(config, &clock).unwrap(), clock)
    }

    /// Bytes granted to each of the peers in this time, each asking for segments of this size whenever
    /// its wait is over; who is greedy asks every millisecond.
    fn granted(
        quotas: &Quotas<ManualClock>,
        clock: &ManualClock,
        peers: &[NodeId],
        greedy: &NodeId,
        time: Duration,
    ) -> Vec<u64> {
        let wanted = segment(Kind::Audit, 64 * 1024);
        let mut due = vec![Duration::ZERO; peers.len()];
        let mut bytes = vec![0; peers.len()];
        let end = clock.elapsed() + time;
        while clock.elapsed() < end {
            let now = clock.elapsed();
            for (at, peer) in peers.iter().enumerate() {
                while due[at] <= now {
                    match quotas.take_in(peer, &wanted, now) {
                        Ok(()) => bytes[at] += wanted.size_bytes,
                        Err(Wait::For(wait)) if peer != greedy => due[at] = now + wait,
                        Err(_) => break,
                    }
                }
            }
            clock.advance(Duration::from_millis(1));
        }
        bytes
    }

    #[test]
    fn inv_13_one_abuser_of_ten_gets_its_limit_and_the_others_their_share() {
        let (quotas, clock) = virtual_quotas(&QuotaConfig::default());
        let peers: Vec<NodeId> = (0..10)
            .map(|n| NodeId::new(&format!("n{n}")).unwrap())
            .collect();
        for peer in &peers {
            quotas
                .set(peer, Some(peer_quota(10 * 1024, u64::MAX)))
                .unwrap();
        }
        let abuser = &peers[3];
        let fair = granted(
            &quotas,
            &clock,
            &peers,
            &NodeId::new("nobody").unwrap(),
            Duration::from_secs(20),
        );
        // The bursts are spent: from here on the rate alone counts.
        let ten_seconds = granted(&quotas, &clock, &peers, abuser, Duration::from_secs(10));
        let limit = 10 * 1024 * 1024 * 10;
        for (at, bytes) in ten_seconds.iter().enumerate() {
            assert!(
                bytes.abs_diff(limit) * 100 <= limit * 3,
                "n{at} got {bytes} of {limit}"
            );
        }
        assert!(fair.iter().all(|bytes| *bytes >= 2 * limit), "the control");
    }

    #[test]
    fn inv_13_a_quota_is_changed_live_and_the_change_forgives_nothing() {
        let (quotas, clock) = virtual_quotas(&QuotaConfig::default());
        let (a, b) = (NodeId::new("a").unwrap(), NodeId::new("b").unwrap());
        let mib = |n: u64| segment(Kind::Audit, n << 20);
        let now = || clock.elapsed();
        assert_eq!(quotas.quota(&a), QuotaConfig::default().common());
        quotas.set(&a, Some(peer_quota(1024, 100 << 20))).unwrap();
        assert_eq!(quotas.quota(&b), QuotaConfig::default().common());
        assert_eq!(quotas.announced(&a).in_bytes_per_second, 1 << 20);
        // A bucket of 64 MiB, and 100 MiB a day.
        assert_eq!(quotas.take_in(&a, &mib(32), now()), Ok(()));
        assert_eq!(quotas.take_in(&a, &mib(32), now()), Ok(()));
        assert!(quotas.take_in(&a, &mib(1), now()).is_err());
        assert_eq!(quotas.take_in(&b, &mib(32), now()), Ok(()), "the control");
        assert_eq!(quotas.announced(&a).in_bytes_left_today, 36 << 20);

        // Ten times the rate: what was owed is owed still, at most one empty bucket of it.
        quotas
            .set(&a, Some(peer_quota(10 * 1024, 120 << 20)))
            .unwrap();
        let debts = quotas.debts(&a);
        assert!(
            debts.iter().all(|debt| debt.debt_ms == 0 && debt.waits > 0),
            "what waited asks again, and was counted: {debts:?}"
        );
        assert!(quotas.take_in(&a, &mib(1), now()).is_err());
        clock.advance(Duration::from_millis(6_400));
        assert_eq!(quotas.take_in(&a, &mib(32), now()), Ok(()));
        assert_eq!(quotas.announced(&a).in_bytes_left_today, 24 << 20);
        // And a smaller day than what was used leaves nothing.
        quotas.set(&a, Some(peer_quota(1024, 50 << 20))).unwrap();
        assert_eq!(quotas.announced(&a).in_bytes_left_today, 0);
        let waits = quotas.take_in(&a, &mib(1), now());
        assert!(matches!(waits, Err(Wait::For(time)) if time > Duration::from_secs(80_000)));
        // What was used above it is not given back with a greater one.
        quotas.set(&a, Some(peer_quota(1024, 100 << 20))).unwrap();
        assert_eq!(quotas.announced(&a).in_bytes_left_today, 4 << 20);
        // The common quota again, which has no day; the bucket's debt came along.
        quotas.set(&a, None).unwrap();
        assert_eq!(quotas.quota(&a), QuotaConfig::default().common());
        clock.advance(Duration::from_secs(60));
        assert_eq!(quotas.take_in(&a, &mib(32), now()), Ok(()));

        let before = quotas.quota(&a);
        let tiny = PeerQuota {
            out_kib: Rate {
                per_second: 1,
                burst: 1,
            },
            ..before
        };
        assert!(quotas.set(&a, Some(tiny)).is_err());
        assert_eq!(quotas.quota(&a), before);
    }

    #[test]
    fn inv_13_debts_outlive_a_restart_and_unknown_ones_count_as_spent() {
        let config = QuotaConfig {
            daily_in_bytes: 100 << 20,
            ..QuotaConfig::default()
        };
        let own = peer_quota(1024, 70 << 20);
        let (a, b) = (NodeId::new("a").unwrap(), NodeId::new("b").unwrap());
        let mib = |n: u64| segment(Kind::Audit, n << 20);
        let (before, clock) = virtual_quotas(&config);
        before.set(&a, Some(own)).unwrap();
        for _ in 0..2 {
            before.take_in(&a, &mib(32), clock.elapsed()).unwrap();
        }
        before.send(&a, 10 << 20).unwrap();
        before.take_in(&b, &mib(32), clock.elapsed()).unwrap();
        clock.advance(Duration::from_secs(4));
        let owed = before.owed();
        let debt = owed[&a];
        assert_eq!(debt.bulk_in_ms, 60_000);
        assert_eq!(debt.out_ms, 6_000);
        assert_eq!((debt.day_used_bytes, debt.day_age_ms), (64 << 20, 4_000));
        assert_eq!(owed[&b].bulk_in_ms, 0);
        assert_eq!(owed[&b].day_used_bytes, 32 << 20);

        // Thirty seconds later it runs again.
        let (after, clock) = virtual_quotas(&config);
        after.set(&a, Some(own)).unwrap();
        after.owes(&a, &debt.after(Duration::from_secs(30)));
        assert_eq!(after.owed()[&a].bulk_in_ms, 30_000);
        assert!(after.take_in(&a, &mib(32), clock.elapsed()).is_err());
        clock.advance(Duration::from_secs(1));
        assert_eq!(after.take_in(&a, &mib(6), clock.elapsed()), Ok(()));
        assert!(
            after.take_in(&a, &mib(1), clock.elapsed()).is_err(),
            "the day is used"
        );
        assert_eq!(
            after.take_in(&b, &mib(32), clock.elapsed()),
            Ok(()),
            "the control"
        );

        let (lost, clock) = virtual_quotas(&config);
        lost.owes(&a, &PeerDebt::SPENT);
        assert!(lost.take_in(&a, &mib(1), clock.elapsed()).is_err());
        assert!(lost.send(&a, 1).is_err() && lost.frame(&a).is_err());
        let crl = segment(Kind::Policy, 1024);
        assert!(lost.take_in(&a, &crl, clock.elapsed()).is_err());
        clock.advance(Duration::from_secs(3));
        assert_eq!(lost.take_in(&a, &crl, clock.elapsed()), Ok(()));
        assert_eq!(lost.frame(&a), Ok(()));
        assert_eq!(lost.announced(&a).in_bytes_left_today, 0);
        let (unbounded, _) = virtual_quotas(&QuotaConfig::default());
        unbounded.owes(&a, &PeerDebt::SPENT);
        assert_eq!(unbounded.announced(&a).in_bytes_left_today, u64::MAX);
        // A day of which it is not known how much was used was forgotten where nothing bounded it, and
        // the next bound began with a whole one.
        assert_eq!(unbounded.owed()[&a].day_used_bytes, u64::MAX);
        let day = |bytes| Some(peer_quota(1024, bytes));
        unbounded.set(&a, day(100 << 20)).unwrap();
        assert_eq!(unbounded.announced(&a).in_bytes_left_today, 0);
        unbounded.set(&a, None).unwrap();
        assert_eq!(unbounded.announced(&a).in_bytes_left_today, u64::MAX);
        unbounded.set(&a, day(100 << 20)).unwrap();
        assert_eq!(unbounded.announced(&a).in_bytes_left_today, 0);
        unbounded.set(&b, day(100 << 20)).unwrap();
        assert_eq!(
            unbounded.announced(&b).in_bytes_left_today,
            100 << 20,
            "the control"
        );
        clock.advance(Duration::from_secs(24 * 60 * 60));
        assert_eq!(lost.take_in(&a, &mib(32), clock.elapsed()), Ok(()));
    }

    #[test]
    fn a_burst_below_the_biggest_segment_is_refused() {
        let small = Rate {
            per_second: 1,
            burst: 1,
        };
        let clock = MonotonicClock::new();
        let good = QuotaConfig::default();
        assert!(Quotas::new(&good, &clock).is_ok(), "the control");
        for config in [
            QuotaConfig {
                urgent_in_kib: small,
                ..good
            },
            QuotaConfig {
                bulk_in_kib: small,
                ..good
            },
            QuotaConfig {
                out_kib: small,
                ..good
            },
            QuotaConfig {
                frames: Rate {
                    per_second: 0,
                    burst: 1,
                },
                ..good
            },
        ] {
            assert!(Quotas::new(&config, &clock).is_err(), "{config:?}");
        }
    }
}
