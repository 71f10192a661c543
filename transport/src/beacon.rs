//! Discovery on the local network: what a beacon says, and what hearing one may cost. Pure: time and
//! randomness are handed in, and the sockets are in the shell.
//!
//! A beacon is 50 bytes: a random nonce, a UDP port, and HMAC-SHA-256 over both, the sender's IPv4
//! address and the slot of time, under a key that the nodes of a domain share. It names nobody. Whoever
//! holds the key learns that somebody with the key can be dialled at that port of the sender's address;
//! whoever does not learns that somebody sends 50 bytes of which 48 look random. A beacon never gives
//! trust: all that it can cause is a dial, through the ordinary handshake, while a peer of the
//! configuration is missing.
//!
//! The order of checks, each before what costs more: length, bucket of the source, bucket of all
//! sources, HMAC, nonce; only then is anything kept. The layout and the reasons are in
//! `docs/src/beacon-privacy.md`, the vectors in `tests/vectors/beacon`. Start at [`Beacons::hear`].

use std::{
    collections::{BTreeMap, VecDeque},
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
    time::Duration,
};

use aws_lc_rs::{constant_time, hmac};
use tidelock_quota::{Clock, Rate, RateError, TokenBuckets};

use crate::limits::{
    BEACON_SLOT, MAX_BEACON_BURST, MAX_BEACON_BURST_SOURCE, MAX_BEACON_CANDIDATES,
    MAX_BEACON_INTERVAL, MAX_BEACON_NONCES, MAX_BEACON_READ_BURST, MAX_BEACON_READS_PER_SECOND,
    MAX_BEACON_SOURCES, MAX_BEACONS_PER_SECOND, MAX_BEACONS_PER_SECOND_SOURCE, MIN_BEACON_INTERVAL,
};

/// Bytes of the key.
pub const BEACON_KEY_BYTES: usize = 32;

/// Bytes of a nonce.
pub const BEACON_NONCE_BYTES: usize = 16;

const PORT_BYTES: usize = 2;
const TAG_BYTES: usize = 32;

/// Bytes of every beacon; anything of another length is none.
pub const BEACON_BYTES: usize = BEACON_NONCE_BYTES + PORT_BYTES + TAG_BYTES;

/// What the HMAC covers first, so that the key serves for nothing else. The version is in here, and
/// not in clear.
const CONTEXT: &[u8] = b"tidelock beacon 1\0";

/// Random bytes that make a beacon unlike every other.
pub type BeaconNonce = [u8; BEACON_NONCE_BYTES];

/// The key that the nodes of a domain share for their beacons. It opens nothing.
pub struct BeaconKey(hmac::Key);

impl std::fmt::Debug for BeaconKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BeaconKey(..)")
    }
}

/// Equal keys make equal tags.
impl PartialEq for BeaconKey {
    fn eq(&self, other: &Self) -> bool {
        let tag = |key: &Self| key.tag(0, Ipv4Addr::UNSPECIFIED, &BeaconNonce::default(), 0);
        constant_time::verify_slices_are_equal(tag(self).as_ref(), tag(other).as_ref()).is_ok()
    }
}

impl Eq for BeaconKey {}

/// The slot of time that a moment of the wall clock lies in.
fn slot_of(unix_ms: u64) -> u64 {
    unix_ms / 1_000 / BEACON_SLOT.as_secs()
}

impl BeaconKey {
    /// Takes the key's bytes.
    #[must_use]
    pub fn new(bytes: &[u8; BEACON_KEY_BYTES]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, bytes))
    }

    fn tag(&self, slot: u64, source: Ipv4Addr, nonce: &BeaconNonce, port: u16) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(CONTEXT);
        context.update(&slot.to_be_bytes());
        context.update(&source.octets());
        context.update(nonce);
        context.update(&port.to_be_bytes());
        context.sign()
    }

    /// The beacon of a node that sends from `source` and listens on `port`, at this moment of its clock.
    #[must_use]
    pub fn beacon(
        &self,
        unix_ms: u64,
        source: Ipv4Addr,
        nonce: &BeaconNonce,
        port: u16,
    ) -> [u8; BEACON_BYTES] {
        let tag = self.tag(slot_of(unix_ms), source, nonce, port);
        let mut packet = [0; BEACON_BYTES];
        let port = port.to_be_bytes();
        let parts = nonce.iter().chain(&port).chain(tag.as_ref());
        for (to, from) in packet.iter_mut().zip(parts) {
            *to = *from;
        }
        packet
    }

    /// What a packet from `source` says, if it is a beacon of this address under this key, of this slot
    /// of time, the one before or the one after.
    #[must_use]
    pub fn open(
        &self,
        packet: &[u8],
        source: Ipv4Addr,
        unix_ms: u64,
    ) -> Option<(BeaconNonce, u16)> {
        let packet: &[u8; BEACON_BYTES] = packet.try_into().ok()?;
        let (nonce, rest) = packet.split_first_chunk::<BEACON_NONCE_BYTES>()?;
        let (port, tag) = rest.split_first_chunk::<PORT_BYTES>()?;
        let port = u16::from_be_bytes(*port);
        let now = slot_of(unix_ms);
        let slots = [Some(now), now.checked_sub(1), now.checked_add(1)];
        slots
            .into_iter()
            .flatten()
            .any(|slot| {
                let ours = self.tag(slot, source, nonce, port);
                constant_time::verify_slices_are_equal(ours.as_ref(), tag).is_ok()
            })
            .then_some((*nonce, port))
    }
}

/// Why a packet was not followed. Counted, and never answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BeaconRefusal {
    /// Not the length of a beacon.
    #[error("not the length of a beacon")]
    Length,
    /// More than one source, or all together, may send. Its HMAC was not looked at.
    #[error("more beacons than are looked at")]
    Flood,
    /// Another key, another time, another address than it was made for, or no beacon at all.
    #[error("no beacon of this address under this key at this time")]
    Tag,
    /// A beacon of this node itself.
    #[error("this node's own beacon")]
    Own,
    /// A beacon that was heard before.
    #[error("a beacon that was heard before")]
    Replayed,
    /// A port or an address that nobody can be dialled at.
    #[error("nobody can be dialled there")]
    Address,
    /// As many candidates as are kept.
    #[error("as many candidates as are kept")]
    Full,
}

impl BeaconRefusal {
    /// Its stable word.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Flood => "flood",
            Self::Tag => "tag",
            Self::Own => "own",
            Self::Replayed => "replayed",
            Self::Address => "address",
            Self::Full => "full",
        }
    }
}

/// How beacons are sent and followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BeaconPace {
    /// Mean time between two beacons of this node, and the time between the first two dials to one
    /// candidate; it doubles with each further one.
    pub interval: Duration,
    /// Longest time between two dials to one candidate that goes on being heard.
    pub cap: Duration,
}

/// Why the beacons could not be set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BeaconConfigError {
    /// The interval is too short or too long.
    #[error(
        "beacon interval {0:?} is not between {MIN_BEACON_INTERVAL:?} and {MAX_BEACON_INTERVAL:?}"
    )]
    Interval(Duration),
    /// The longest wait is shorter than the interval, or too long.
    #[error(
        "longest wait {0:?} between dials is not between the interval and {MAX_BEACON_INTERVAL:?}"
    )]
    Cap(Duration),
    /// A quota makes no sense.
    #[error(transparent)]
    Rate(#[from] RateError),
}

/// An address at which somebody with the key was heard.
#[derive(Debug)]
struct Candidate {
    heard: Duration,
    due: Duration,
    /// INV-12: the wait after the next dial. It only grows, for as long as the candidate is kept.
    wait: Duration,
}

/// The beacons of one node: when to send its own, and whom to dial for those of others.
pub struct Beacons<C: Clock> {
    key: Arc<BeaconKey>,
    pace: BeaconPace,
    reads: TokenBuckets<(), C>,
    sources: TokenBuckets<Ipv4Addr, C>,
    all: TokenBuckets<(), C>,
    candidates: BTreeMap<SocketAddrV4, Candidate>,
    /// Beacons seen, and whether they are this node's own; oldest first beside them.
    nonces: BTreeMap<BeaconNonce, bool>,
    nonces_by_age: VecDeque<BeaconNonce>,
    next: Duration,
}

impl<C: Clock> std::fmt::Debug for Beacons<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Beacons")
            .field("pace", &self.pace)
            .field("candidates", &self.candidates.len())
            .finish_non_exhaustive()
    }
}

impl<C: Clock + Clone> Beacons<C> {
    /// Nobody heard yet; the first beacon is due at once. `clock` is that of the buckets.
    ///
    /// # Errors
    /// A pace that makes no sense.
    pub fn new(
        key: Arc<BeaconKey>,
        pace: BeaconPace,
        clock: C,
        now: Duration,
    ) -> Result<Self, BeaconConfigError> {
        if !(MIN_BEACON_INTERVAL..=MAX_BEACON_INTERVAL).contains(&pace.interval) {
            return Err(BeaconConfigError::Interval(pace.interval));
        }
        if !(pace.interval..=MAX_BEACON_INTERVAL).contains(&pace.cap) {
            return Err(BeaconConfigError::Cap(pace.cap));
        }
        let rate = |per_second, burst| Rate { per_second, burst };
        let of_reads = rate(MAX_BEACON_READS_PER_SECOND, MAX_BEACON_READ_BURST);
        let of_source = rate(MAX_BEACONS_PER_SECOND_SOURCE, MAX_BEACON_BURST_SOURCE);
        let of_all = rate(MAX_BEACONS_PER_SECOND, MAX_BEACON_BURST);
        Ok(Self {
            key,
            pace,
            reads: TokenBuckets::new(of_reads, 1, clock.clone())?,
            sources: TokenBuckets::new(of_source, MAX_BEACON_SOURCES, clock.clone())?,
            all: TokenBuckets::new(of_all, 1, clock)?,
            candidates: BTreeMap::new(),
            nonces: BTreeMap::new(),
            nonces_by_age: VecDeque::new(),
            next: now,
        })
    }
}

impl<C: Clock> Beacons<C> {
    /// When the next beacon of this node is due.
    #[must_use]
    pub fn next_beacon(&self, now: Duration) -> Duration {
        // Of a clock that stepped back nothing is left but one interval.
        self.next.min(now + self.pace.interval * 5 / 4)
    }

    /// The beacon to send now from this address. `jitter` is a uniform 64-bit number: nodes that began
    /// together do not go on together.
    pub fn send(
        &mut self,
        source: SocketAddrV4,
        nonce: BeaconNonce,
        jitter: u64,
        now: Duration,
        unix_ms: u64,
    ) -> [u8; BEACON_BYTES] {
        let half = self.pace.interval / 2;
        let spread = (half.as_nanos() * u128::from(jitter)) >> 64;
        let spread = Duration::from_nanos(u64::try_from(spread).unwrap_or(u64::MAX));
        // Three quarters of the interval to five quarters.
        self.next = now + half + half / 2 + spread;
        self.remember(nonce, true);
        self.key
            .beacon(unix_ms, *source.ip(), &nonce, source.port())
    }

    /// Charges the reading of one packet. What is not read waits in the kernel and is dropped there.
    ///
    /// # Errors
    /// The time after which the next one may be read.
    pub fn try_read(&self) -> Result<(), Duration> {
        // INV-13: a flood costs a bounded share of a core.
        self.reads
            .check(&(), 1)
            .map_err(|refused| refused.retry_after().unwrap_or(MIN_BEACON_INTERVAL))
    }

    /// A packet came to the group: the address that may be dialled for it.
    ///
    /// # Errors
    /// Why it is not followed.
    pub fn hear(
        &mut self,
        packet: &[u8],
        from: Ipv4Addr,
        now: Duration,
        unix_ms: u64,
    ) -> Result<SocketAddrV4, BeaconRefusal> {
        if packet.len() != BEACON_BYTES {
            return Err(BeaconRefusal::Length);
        }
        // INV-13: the narrowest bucket first, and both before any cryptography.
        if self.sources.check(&from, 1).is_err() || self.all.check(&(), 1).is_err() {
            return Err(BeaconRefusal::Flood);
        }
        let opened = self.key.open(packet, from, unix_ms);
        let (nonce, port) = opened.ok_or(BeaconRefusal::Tag)?;
        match self.nonces.get(&nonce) {
            Some(true) => return Err(BeaconRefusal::Own),
            Some(false) => return Err(BeaconRefusal::Replayed),
            None => self.remember(nonce, false),
        }
        if port == 0 || from.is_unspecified() || from.is_multicast() || from.is_broadcast() {
            return Err(BeaconRefusal::Address);
        }
        let address = SocketAddrV4::new(from, port);
        self.expire(now);
        if let Some(candidate) = self.candidates.get_mut(&address) {
            candidate.heard = now;
            return Ok(address);
        }
        // INV-07: who is there stays; to give way to whoever comes would let one holder of the key drive
        // the others out.
        if self.candidates.len() >= MAX_BEACON_CANDIDATES {
            return Err(BeaconRefusal::Full);
        }
        let candidate = Candidate {
            heard: now,
            due: now,
            wait: self.pace.interval,
        };
        self.candidates.insert(address, candidate);
        Ok(address)
    }

    fn remember(&mut self, nonce: BeaconNonce, own: bool) {
        // INV-07
        if self.nonces_by_age.len() >= MAX_BEACON_NONCES
            && let Some(oldest) = self.nonces_by_age.pop_front()
        {
            self.nonces.remove(&oldest);
        }
        if self.nonces.insert(nonce, own).is_none() {
            self.nonces_by_age.push_back(nonce);
        }
    }

    /// Whoever was silent for three intervals is forgotten, but never before its next dial could be:
    /// to be heard again must not bring a dial sooner.
    fn expire(&mut self, now: Duration) {
        let silence = self.pace.interval * 3;
        self.candidates.retain(|_, candidate| {
            candidate.heard = candidate.heard.min(now);
            candidate.due = candidate.due.min(now + self.pace.cap);
            now - candidate.heard < silence || candidate.due > now
        });
    }

    /// The next candidate to dial. `may_dial` says whether a dial there could bring anything and charges
    /// it to the common budget, or says how long to wait before asking again.
    pub fn poll_dial(
        &mut self,
        now: Duration,
        mut may_dial: impl FnMut(SocketAddrV4) -> Result<(), Duration>,
    ) -> Option<SocketAddrV4> {
        self.expire(now);
        for (address, candidate) in &mut self.candidates {
            if candidate.due > now {
                continue;
            }
            match may_dial(*address) {
                Ok(()) => {
                    candidate.due = now + candidate.wait;
                    candidate.wait = (candidate.wait * 2).min(self.pace.cap);
                    return Some(*address);
                }
                Err(wait) => candidate.due = now + wait.min(self.pace.cap),
            }
        }
        None
    }

    /// When a dial may be due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.candidates.values().map(|c| c.due).min()
    }

    /// Addresses that are followed.
    #[must_use]
    pub fn candidates(&self) -> usize {
        self.candidates.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use tidelock_quota::ManualClock;

    use super::*;

    const KEY: [u8; BEACON_KEY_BYTES] = [7; BEACON_KEY_BYTES];
    const NOW_UNIX_MS: u64 = 1_906_502_400_000;
    const SLOT_MS: u64 = BEACON_SLOT.as_secs() * 1_000;
    const PACE: BeaconPace = BeaconPace {
        interval: Duration::from_secs(10),
        cap: Duration::from_secs(60),
    };
    const SECOND: Duration = Duration::from_secs(1);
    const THERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    struct Lan {
        clock: ManualClock,
        beacons: Beacons<ManualClock>,
        now: Duration,
        /// How far this node's wall clock is off, ms.
        skew_ms: i64,
        dials: Vec<(Duration, SocketAddrV4)>,
    }

    impl Lan {
        fn new() -> Self {
            let clock = ManualClock::new();
            let key = Arc::new(BeaconKey::new(&KEY));
            let beacons = Beacons::new(key, PACE, clock.clone(), Duration::ZERO).unwrap();
            Self {
                clock,
                beacons,
                now: Duration::ZERO,
                skew_ms: 0,
                dials: Vec::new(),
            }
        }

        fn unix_ms(&self) -> u64 {
            let passed = u64::try_from(self.now.as_millis()).unwrap();
            (NOW_UNIX_MS + passed)
                .checked_add_signed(self.skew_ms)
                .unwrap()
        }

        fn pass(&mut self, time: Duration) {
            self.clock.advance(time);
            self.now += time;
        }

        fn hear(&mut self, packet: &[u8], from: Ipv4Addr) -> Result<SocketAddrV4, BeaconRefusal> {
            let unix_ms = self.unix_ms();
            let heard = self.beacons.hear(packet, from, self.now, unix_ms);
            self.dial();
            heard
        }

        fn dial(&mut self) {
            while let Some(address) = self.beacons.poll_dial(self.now, |_| Ok(())) {
                self.dials.push((self.now, address));
            }
        }
    }

    fn nonce(n: u64) -> BeaconNonce {
        u128::from(n).to_be_bytes()
    }

    fn beacon(n: u64, from: Ipv4Addr, unix_ms: u64) -> [u8; BEACON_BYTES] {
        BeaconKey::new(&KEY).beacon(unix_ms, from, &nonce(n), 7411)
    }

    fn at(from: Ipv4Addr) -> SocketAddrV4 {
        SocketAddrV4::new(from, 7411)
    }

    /// The n-th of sixteen million addresses.
    fn address(net: u8, n: u32) -> Ipv4Addr {
        let [_, b, c, d] = n.to_be_bytes();
        Ipv4Addr::new(net, b, c, d)
    }

    #[test]
    fn nonsense_is_refused() {
        let make = |interval, cap| {
            let pace = BeaconPace { interval, cap };
            let key = Arc::new(BeaconKey::new(&KEY));
            Beacons::new(key, pace, ManualClock::new(), SECOND).map(|_| ())
        };
        assert_eq!(make(PACE.interval, PACE.cap), Ok(()), "the control");
        let day = Duration::from_secs(86_400);
        for bad in [Duration::ZERO, SECOND / 10, day] {
            assert_eq!(make(bad, PACE.cap), Err(BeaconConfigError::Interval(bad)));
        }
        for bad in [SECOND, day] {
            assert_eq!(make(PACE.interval, bad), Err(BeaconConfigError::Cap(bad)));
        }
    }

    #[test]
    fn a_beacon_opens_under_its_key_from_its_address_and_near_its_time_only() {
        let key = BeaconKey::new(&KEY);
        let packet = beacon(1, THERE, NOW_UNIX_MS);
        let opened = Some((nonce(1), 7411));
        assert_eq!(key.open(&packet, THERE, NOW_UNIX_MS), opened);
        assert_eq!(key.open(&packet, THERE, NOW_UNIX_MS + SLOT_MS), opened);
        assert_eq!(key.open(&packet, THERE, NOW_UNIX_MS - SLOT_MS), opened);
        assert_eq!(key.open(&packet, THERE, NOW_UNIX_MS + 2 * SLOT_MS), None);
        assert_eq!(key.open(&packet, THERE, NOW_UNIX_MS - 2 * SLOT_MS), None);
        assert_eq!(key.open(&packet, THERE, 0), None);
        assert_eq!(key.open(&packet, THERE, u64::MAX), None);
        assert_eq!(key.open(&packet, address(10, 3), NOW_UNIX_MS), None);
        let other = BeaconKey::new(&[8; BEACON_KEY_BYTES]);
        assert_eq!(other.open(&packet, THERE, NOW_UNIX_MS), None);
        for byte in 0..BEACON_BYTES {
            let mut flipped = packet;
            flipped[byte] ^= 1;
            assert_eq!(key.open(&flipped, THERE, NOW_UNIX_MS), None, "byte {byte}");
        }
        assert_eq!(key.open(&packet[1..], THERE, NOW_UNIX_MS), None);
    }

    #[test]
    fn two_beacons_have_nothing_in_common_but_the_port() {
        let one = beacon(0x1234_5678_9abc_def0, THERE, NOW_UNIX_MS);
        let two = beacon(0x0fed_cba9_8765_4321, THERE, NOW_UNIX_MS);
        let port = BEACON_NONCE_BYTES..BEACON_NONCE_BYTES + PORT_BYTES;
        assert_eq!(one[port.clone()], two[port.clone()]);
        assert_ne!(one[port.end..], two[port.end..]);
        let same_nonce = beacon(0x1234_5678_9abc_def0, THERE, NOW_UNIX_MS + SLOT_MS);
        assert_ne!(one[port.end..], same_nonce[port.end..], "the tag rotates");
    }

    #[test]
    fn the_key_is_in_no_text() {
        let lan = Lan::new();
        let text = format!("{:?} {:?}", BeaconKey::new(&KEY), lan.beacons);
        assert!(text.contains("BeaconKey(..)"), "the control: {text}");
        assert!(!text.contains("7, 7") && !text.contains("0707"), "{text}");
    }

    #[test]
    fn whoever_goes_on_being_heard_is_dialled_ever_more_rarely() {
        let mut lan = Lan::new();
        for n in 0..400 {
            let packet = beacon(n, THERE, lan.unix_ms());
            assert_eq!(lan.hear(&packet, THERE), Ok(at(THERE)));
            lan.pass(SECOND);
        }
        let times: Vec<u64> = lan.dials.iter().map(|(at, _)| at.as_secs()).collect();
        assert_eq!(times, [0, 10, 30, 70, 130, 190, 250, 310, 370]);
        // Silent: forgotten after its next dial was due and three intervals, and dialled at once when it
        // is back.
        lan.pass(Duration::from_secs(60));
        assert_eq!(lan.beacons.poll_dial(lan.now, |_| Ok(())), None);
        let left = (lan.beacons.candidates(), lan.beacons.poll_timeout());
        assert_eq!(left, (0, None));
        let packet = beacon(1_000, THERE, lan.unix_ms());
        lan.hear(&packet, THERE).unwrap();
        assert_eq!(lan.dials.len(), times.len() + 1);
    }

    #[test]
    fn whoever_may_not_be_dialled_is_asked_about_later() {
        let mut lan = Lan::new();
        let packet = beacon(1, THERE, NOW_UNIX_MS);
        lan.beacons
            .hear(&packet, THERE, lan.now, NOW_UNIX_MS)
            .unwrap();
        let asked = lan.beacons.poll_dial(lan.now, |_| Err(SECOND));
        assert_eq!(
            (asked, lan.beacons.poll_timeout()),
            (None, Some(lan.now + SECOND))
        );
        let early = lan.beacons.poll_dial(lan.now, |_| Ok(()));
        assert_eq!(early, None);
        lan.pass(SECOND);
        let dialled = lan.beacons.poll_dial(lan.now, |_| Ok(()));
        assert_eq!(dialled, Some(at(THERE)), "the control");
    }

    #[test]
    fn a_recording_is_refused_here_and_elsewhere_and_causes_no_dial() {
        let mut lan = Lan::new();
        let packet = beacon(1, THERE, NOW_UNIX_MS);
        assert!(lan.hear(&packet, THERE).is_ok(), "the control");
        for n in 0..1_000 {
            // Where it was made, with a forged source, and from the recorder's own addresses.
            let heard = lan.hear(&packet, THERE);
            assert_eq!(heard, Err(BeaconRefusal::Replayed));
            let heard = lan.hear(&packet, address(11, n));
            assert_eq!(heard, Err(BeaconRefusal::Tag));
            lan.pass(SECOND / 4);
        }
        // Its candidate is forgotten as if it had been silent, although its tag would still hold.
        assert_eq!((lan.beacons.candidates(), lan.dials.len()), (0, 2));
        // A node that has not heard the first one, because it was off or jammed, takes the recording for
        // it, and dials where it was made and nowhere else, until its time has passed.
        let mut late = Lan::new();
        late.pass(BEACON_SLOT);
        assert_eq!(late.hear(&packet, THERE), Ok(at(THERE)));
        late.pass(BEACON_SLOT);
        assert_eq!(late.hear(&packet, THERE), Err(BeaconRefusal::Tag));
    }

    #[test]
    fn clocks_may_differ_by_a_slot_at_any_moment_and_not_by_two() {
        for (skew_ms, is_heard) in [
            (0, true),
            (299_000, true),
            (-299_000, true),
            (600_000, false),
            (-600_000, false),
        ] {
            let mut lan = Lan::new();
            lan.skew_ms = skew_ms;
            // Two hours, over 24 edges of slots.
            for n in 0..2 * 3_600 / 7 {
                let sent = NOW_UNIX_MS + u64::try_from(lan.now.as_millis()).unwrap();
                let heard = lan.hear(&beacon(n, THERE, sent), THERE);
                assert_eq!(heard.is_ok(), is_heard, "{skew_ms} ms at {:?}", lan.now);
                lan.pass(SECOND * 7);
            }
            assert_eq!(lan.dials.is_empty(), !is_heard);
        }
    }

    #[test]
    fn inv_13_a_flood_is_dropped_before_its_tags_are_looked_at_and_others_are_heard() {
        let mut lan = Lan::new();
        let junk = [0xa5; BEACON_BYTES];
        let mut looked_at = 0;
        for _ in 0..10_000 {
            match lan.hear(&junk, address(10, 66)) {
                Err(BeaconRefusal::Tag) => looked_at += 1,
                other => assert_eq!(other, Err(BeaconRefusal::Flood)),
            }
        }
        assert!(looked_at <= MAX_BEACON_BURST_SOURCE, "{looked_at}");
        // The control: a neighbour of the flooder is heard all the same.
        let packet = beacon(1, THERE, NOW_UNIX_MS);
        assert!(lan.hear(&packet, THERE).is_ok());
        // From ever new addresses it is the bucket of all that bounds it.
        let mut looked_at = 0;
        for n in 0..10_000 {
            looked_at += u32::from(lan.hear(&junk, address(11, n)) == Err(BeaconRefusal::Tag));
        }
        assert!(looked_at <= MAX_BEACON_BURST, "{looked_at}");
        assert!(lan.beacons.sources.len() <= MAX_BEACON_SOURCES);
        lan.pass(SECOND);
        let neighbour = address(10, 3);
        let packet = beacon(2, neighbour, lan.unix_ms());
        assert!(lan.hear(&packet, neighbour).is_ok(), "a second later");
        let short = lan.hear(&junk[1..], address(10, 4));
        assert_eq!(short, Err(BeaconRefusal::Length));
        assert_eq!(lan.dials.len(), 2);
        // And what is not read costs nothing at all.
        let read = (0..100_000).filter(|_| lan.beacons.try_read().is_ok());
        assert_eq!(read.count(), MAX_BEACON_READ_BURST as usize);
        let wait = lan.beacons.try_read().unwrap_err();
        lan.pass(wait);
        assert_eq!(lan.beacons.try_read(), Ok(()), "after {wait:?}");
    }

    #[test]
    fn inv_07_candidates_and_nonces_are_bounded_and_the_first_ones_stay() {
        let mut lan = Lan::new();
        let mut full = 0;
        for n in 0..3 * u32::try_from(MAX_BEACON_NONCES).unwrap() {
            let from = address(10, n % 3_000);
            let packet = beacon(n.into(), from, lan.unix_ms());
            match lan.hear(&packet, from) {
                Ok(_) => {}
                Err(BeaconRefusal::Full) => full += 1,
                other => panic!("{other:?}"),
            }
            assert!(lan.beacons.candidates() <= MAX_BEACON_CANDIDATES);
            lan.pass(SECOND / 50);
        }
        assert!(full > 0);
        assert_eq!(lan.beacons.nonces.len(), MAX_BEACON_NONCES);
        assert_eq!(lan.beacons.nonces_by_age.len(), MAX_BEACON_NONCES);
    }

    #[test]
    fn own_beacons_and_impossible_addresses_are_not_followed() {
        let mut lan = Lan::new();
        let (now, unix_ms) = (lan.now, lan.unix_ms());
        let own = lan.beacons.send(at(THERE), nonce(9), 0, now, unix_ms);
        assert_eq!(lan.hear(&own, THERE), Err(BeaconRefusal::Own));
        let zero = BeaconKey::new(&KEY).beacon(NOW_UNIX_MS, THERE, &nonce(1), 0);
        assert_eq!(lan.hear(&zero, THERE), Err(BeaconRefusal::Address));
        for (n, bad) in [(2, [239, 1, 1, 1]), (3, [0; 4]), (4, [255; 4])] {
            let packet = beacon(n, bad.into(), NOW_UNIX_MS);
            assert_eq!(lan.hear(&packet, bad.into()), Err(BeaconRefusal::Address));
        }
        assert!(lan.dials.is_empty());
    }

    #[test]
    fn own_beacons_come_at_the_interval_with_jitter() {
        let mut lan = Lan::new();
        assert_eq!(lan.beacons.next_beacon(SECOND), Duration::ZERO);
        for (jitter, seconds) in [(0, 7.5), (u64::MAX / 2, 10.0), (u64::MAX, 12.5)] {
            lan.beacons
                .send(at(THERE), nonce(jitter), jitter, SECOND, NOW_UNIX_MS);
            let next = (lan.beacons.next_beacon(SECOND) - SECOND).as_secs_f64();
            assert!((next - seconds).abs() < 0.001, "{next}");
        }
    }

    #[test]
    fn a_clock_that_steps_back_silences_nobody() {
        let mut lan = Lan::new();
        let late = Duration::from_secs(1_000_000);
        let packet = beacon(1, THERE, NOW_UNIX_MS);
        lan.beacons.hear(&packet, THERE, late, NOW_UNIX_MS).unwrap();
        assert!(lan.beacons.poll_dial(late, |_| Ok(())).is_some());
        let early = SECOND;
        assert_eq!(lan.beacons.poll_dial(early, |_| Ok(())), None);
        let due = lan.beacons.poll_timeout().unwrap();
        assert!(due <= early + PACE.cap);
        let packet = beacon(2, THERE, NOW_UNIX_MS);
        lan.beacons.hear(&packet, THERE, due, NOW_UNIX_MS).unwrap();
        assert!(lan.beacons.poll_dial(due, |_| Ok(())).is_some());
    }

    /// What happens on a network, in virtual time.
    #[derive(Debug, Clone)]
    enum Event {
        Pass(u16),
        /// A good beacon of one of many addresses.
        Good(u8),
        /// A beacon of a moment ago again, from an address that may be another one.
        Replay(u8, Option<u8>),
        Junk(u8, Vec<u8>),
        /// Bits of a good beacon turned over.
        Flipped(u8, usize, u8),
        /// The wall clock is put elsewhere, by so many seconds.
        Clock(i16),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let one = prop_oneof![
            4 => (0_u16..20_000).prop_map(Event::Pass),
            6 => any::<u8>().prop_map(Event::Good),
            3 => (any::<u8>(), any::<Option<u8>>()).prop_map(|(n, from)| Event::Replay(n, from)),
            2 => (any::<u8>(), proptest::collection::vec(any::<u8>(), 0..80))
                .prop_map(|(from, bytes)| Event::Junk(from, bytes)),
            2 => (any::<u8>(), 0..BEACON_BYTES, 1_u8..)
                .prop_map(|(from, at, bits)| Event::Flipped(from, at, bits)),
            1 => any::<i16>().prop_map(Event::Clock),
        ];
        proptest::collection::vec(one, 50..150)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn inv_12_whatever_is_heard_dials_are_few_and_go_to_holders_of_the_key(events in events()) {
            let mut lan = Lan::new();
            let mut sent = Vec::new();
            let mut spoke = BTreeSet::new();
            let mut opened = BTreeSet::new();
            for (n, event) in (0..).zip(events) {
                let here = |from: u8| address(10, u32::from(from));
                match event {
                    Event::Pass(ms) => lan.pass(Duration::from_millis(ms.into())),
                    Event::Good(from) => {
                        let packet = beacon(n, here(from), lan.unix_ms());
                        spoke.insert(at(here(from)));
                        sent.push((packet, here(from)));
                        if lan.hear(&packet, here(from)).is_ok() {
                            opened.insert(packet);
                        }
                    }
                    Event::Replay(back, from) => {
                        let Some((packet, made)) = sent.iter().rev().nth(back.into()).copied() else {
                            continue;
                        };
                        let from = from.map_or(made, here);
                        let heard = lan.hear(&packet, from);
                        prop_assert!(heard.is_err() || (from == made && !opened.contains(&packet)));
                    }
                    Event::Junk(from, bytes) => {
                        prop_assert!(lan.hear(&bytes, here(from)).is_err());
                    }
                    Event::Flipped(from, at, bits) => {
                        let mut packet = beacon(n, here(from), lan.unix_ms());
                        packet[at] ^= bits;
                        prop_assert!(lan.hear(&packet, here(from)).is_err());
                    }
                    Event::Clock(seconds) => lan.skew_ms = i64::from(seconds) * 1_000,
                }
                lan.dial();
                prop_assert!(lan.beacons.candidates() <= MAX_BEACON_CANDIDATES);
            }
            prop_assert!(lan.dials.iter().all(|(_, there)| spoke.contains(there)));
            for there in spoke {
                let times: Vec<Duration> = lan.dials.iter().filter(|d| d.1 == there).map(|d| d.0).collect();
                for pair in times.windows(2) {
                    prop_assert!(pair[1] - pair[0] >= PACE.interval, "{times:?}");
                }
            }
        }
    }

    #[test]
    fn the_vectors_of_the_documented_layout_hold() {
        let text = include_str!("../../tests/vectors/beacon/beacons.json");
        let vectors: serde_json::Value = serde_json::from_str(text).unwrap();
        let hex = |value: &serde_json::Value| -> Vec<u8> {
            let text = value.as_str().unwrap();
            (0..text.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
                .collect()
        };
        let source = |vector: &serde_json::Value| -> Ipv4Addr {
            vector["source"].as_str().unwrap().parse().unwrap()
        };
        let good = vectors["good"].as_array().unwrap();
        assert!(good.len() >= 3);
        for vector in good {
            let key = BeaconKey::new(&hex(&vector["key"]).try_into().unwrap());
            let nonce: BeaconNonce = hex(&vector["nonce"]).try_into().unwrap();
            let unix_ms = vector["unix_ms"].as_u64().unwrap();
            let port = u16::try_from(vector["port"].as_u64().unwrap()).unwrap();
            let packet = hex(&vector["packet"]);
            let source = source(vector);
            assert_eq!(key.beacon(unix_ms, source, &nonce, port).to_vec(), packet);
            assert_eq!(key.open(&packet, source, unix_ms), Some((nonce, port)));
        }
        let bad = vectors["bad"].as_array().unwrap();
        assert!(bad.len() >= 3);
        for vector in bad {
            let key = BeaconKey::new(&hex(&vector["key"]).try_into().unwrap());
            let unix_ms = vector["unix_ms"].as_u64().unwrap();
            let opened = key.open(&hex(&vector["packet"]), source(vector), unix_ms);
            assert_eq!(opened, None, "{vector}");
        }
    }
}
