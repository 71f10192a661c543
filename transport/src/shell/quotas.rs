//! What one peer may cost, per class (INV-13). Each class has its own bucket, so that no class and
//! no peer takes from another; a refused request costs nothing.

use std::{collections::BTreeMap, net::IpAddr, sync::Mutex, time::Duration};

use tidelock_quota::{DailyVolume, MonotonicClock, Rate, Refused, TokenBuckets};
use tidelock_segments::{Kind, NodeId, SegmentRef};

use super::{MeshError, lock};
use crate::limits::{MAX_BULK_SEGMENT_BYTES, MAX_PEERS, MAX_SESSIONS, MAX_URGENT_SEGMENT_BYTES};

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
    /// Handshakes of one validated address, before TLS.
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

/// Waits at one bucket, and until when the last one lasts.
#[derive(Debug, Clone, Copy, Default)]
struct Waits {
    count: u64,
    until: Duration,
}

pub(super) struct Quotas {
    clock: MonotonicClock,
    waits: Mutex<BTreeMap<NodeId, BTreeMap<&'static str, Waits>>>,
    frames: TokenBuckets<NodeId, MonotonicClock>,
    urgent_in: TokenBuckets<NodeId, MonotonicClock>,
    bulk_in: TokenBuckets<NodeId, MonotonicClock>,
    out: TokenBuckets<NodeId, MonotonicClock>,
    handshakes: TokenBuckets<IpAddr, MonotonicClock>,
    daily: Mutex<BTreeMap<NodeId, DailyVolume>>,
    daily_in_bytes: u64,
}

fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

impl Quotas {
    pub(super) fn new(config: &QuotaConfig, clock: &MonotonicClock) -> Result<Self, MeshError> {
        let refuse = |detail| Err(MeshError::Config { detail });
        if config.urgent_in_kib.burst < kib(MAX_URGENT_SEGMENT_BYTES) {
            return refuse("burst of the urgent quota is below the biggest urgent segment");
        }
        if config.bulk_in_kib.burst < kib(MAX_BULK_SEGMENT_BYTES)
            || config.out_kib.burst < kib(MAX_BULK_SEGMENT_BYTES)
        {
            return refuse("burst of a byte quota is below the biggest segment");
        }
        let peers = |rate| TokenBuckets::new(rate, PEER_KEYS, clock.clone());
        Ok(Self {
            clock: clock.clone(),
            waits: Mutex::default(),
            frames: peers(config.frames)?,
            urgent_in: peers(config.urgent_in_kib)?,
            bulk_in: peers(config.bulk_in_kib)?,
            out: peers(config.out_kib)?,
            handshakes: TokenBuckets::new(
                config.handshakes_per_address,
                ADDRESS_KEYS,
                clock.clone(),
            )?,
            daily: Mutex::new(BTreeMap::new()),
            daily_in_bytes: config.daily_in_bytes,
        })
    }

    /// One control frame of a peer.
    pub(super) fn frame(&self, peer: &NodeId) -> Result<(), Wait> {
        self.noted(
            peer,
            "frames",
            self.frames.check(peer, 1).map_err(Wait::from),
        )
    }

    /// One handshake of an address.
    pub(super) fn handshake(&self, address: IpAddr) -> bool {
        self.handshakes.check(&address, 1).is_ok()
    }

    /// A segment that is about to be asked for.
    pub(super) fn take_in(
        &self,
        peer: &NodeId,
        reference: &SegmentRef,
        now: Duration,
    ) -> Result<(), Wait> {
        let cost = kib(reference.size_bytes);
        if reference.kind <= Kind::Policy {
            // Ruling 10: no daily volume stands before a revocation.
            let taken = self.urgent_in.check(peer, cost).map_err(Wait::from);
            return self.noted(peer, "urgent_in", taken);
        }
        let mut daily = lock(&self.daily);
        if !daily.contains_key(peer) && daily.len() >= PEER_KEYS {
            // INV-07: whoever has most left loses least by being forgotten.
            let fullest = daily.iter().max_by_key(|(_, volume)| volume.left(now));
            if let Some(fullest) = fullest.map(|(peer, _)| peer.clone()) {
                daily.remove(&fullest);
            }
        }
        let volume = daily
            .entry(peer.clone())
            .or_insert_with(|| DailyVolume::new(self.daily_in_bytes));
        if reference.size_bytes > self.daily_in_bytes {
            return Err(Wait::Never);
        }
        // Looked at first and charged last, so that a refusal by either charges neither.
        if volume.left(now) < reference.size_bytes {
            let spent = volume.take(reference.size_bytes, now).err();
            let resets_in = spent.map_or(Duration::from_secs(60), |spent| spent.resets_in);
            return self.noted(peer, "daily_in", Err(Wait::For(resets_in)));
        }
        let taken = self.bulk_in.check(peer, cost).map_err(Wait::from);
        self.noted(peer, "bulk_in", taken)?;
        // Cannot refuse: there was enough a moment ago, under the same lock.
        let _ = volume.take(reference.size_bytes, now);
        Ok(())
    }

    /// A segment that is about to be sent.
    pub(super) fn send(&self, peer: &NodeId, size_bytes: u64) -> Result<(), Wait> {
        let sent = self.out.check(peer, kib(size_bytes)).map_err(Wait::from);
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
            wait.until = self.clock.elapsed().saturating_add(*time);
        }
        outcome
    }

    /// What a peer owes to each bucket that it ever waited for.
    pub(super) fn debts(&self, peer: &NodeId) -> Vec<QuotaDebt> {
        let now = self.clock.elapsed();
        let waits = lock(&self.waits);
        waits
            .get(peer)
            .into_iter()
            .flatten()
            .map(|(bucket, wait)| QuotaDebt {
                bucket,
                waits: wait.count,
                debt_ms: super::millis(wait.until.saturating_sub(now)),
            })
            .collect()
    }

    /// Drops what is at rest.
    pub(super) fn retain_recent(&self) {
        self.frames.retain_recent();
        self.urgent_in.retain_recent();
        self.bulk_in.retain_recent();
        self.out.retain_recent();
        self.handshakes.retain_recent();
    }
}

#[cfg(test)]
mod tests {
    use tidelock_segments::{Origin, SegmentId};

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
