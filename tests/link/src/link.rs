//! One direction of a link: pure, time is an argument.

use std::time::Duration;

use crate::Random;

/// One million: what a probability of 1 is here.
const ONE_PPM: u32 = 1_000_000;

/// Nanoseconds of a second.
const SECOND_NS: u128 = 1_000_000_000;

/// Loss in bursts after Gilbert and Elliott: a good and a bad state, a step from one to the other at
/// each datagram, and a probability of loss in each. All in parts per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Loss {
    /// From the good state to the bad one.
    pub to_bad_ppm: u32,
    /// From the bad state to the good one.
    pub to_good_ppm: u32,
    /// Lost while the state is good.
    pub lost_good_ppm: u32,
    /// Lost while the state is bad.
    pub lost_bad_ppm: u32,
}

impl Loss {
    /// Nothing is lost.
    pub const NONE: Self = Self {
        to_bad_ppm: 0,
        to_good_ppm: ONE_PPM,
        lost_good_ppm: 0,
        lost_bad_ppm: 0,
    };

    /// Each datagram by itself.
    #[must_use]
    pub const fn random(lost_ppm: u32) -> Self {
        Self {
            lost_good_ppm: lost_ppm,
            ..Self::NONE
        }
    }

    /// Bursts of `burst` datagrams on average, everything in them lost, so rare that `lost_ppm` are
    /// lost of all. A `burst` of 0 is one of 1; `lost_ppm` of a million or more is refused by
    /// [`Link::new`].
    #[must_use]
    pub fn bursts(lost_ppm: u32, burst: u32) -> Self {
        let to_good_ppm = ONE_PPM / burst.max(1);
        // Share of the bad state: to_bad / (to_bad + to_good).
        let to_bad = u64::from(to_good_ppm) * u64::from(lost_ppm)
            / u64::from(ONE_PPM.saturating_sub(lost_ppm).max(1));
        Self {
            to_bad_ppm: u32::try_from(to_bad).unwrap_or(u32::MAX),
            to_good_ppm,
            lost_good_ppm: 0,
            lost_bad_ppm: ONE_PPM,
        }
    }
}

/// A time in which the link carries nothing: what is offered from `start` until before `end` is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outage {
    /// Since the link was made.
    pub start: Duration,
    /// Since the link was made.
    pub end: Duration,
}

/// What one direction of a link is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkConfig {
    /// Bytes of datagrams (UDP payload) a second; none: no limit, and no queue forms.
    pub rate_bytes_per_second: Option<u64>,
    /// From the end of sending to arrival.
    pub delay: Duration,
    /// Added to the delay, evenly spread from 0 to this. Nobody overtakes: a datagram waits for the one
    /// before it.
    pub jitter: Duration,
    /// Bytes that may wait for the rate, the datagram being sent included.
    pub queue_bytes: u64,
    /// Longest datagram that is carried.
    pub mtu_bytes: usize,
    /// Loss on the way: what is lost has used its share of the rate.
    pub loss: Loss,
    /// Outages, ascending.
    pub outages: Vec<Outage>,
}

impl Default for LinkConfig {
    /// Nothing bad about it.
    fn default() -> Self {
        Self {
            rate_bytes_per_second: None,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            queue_bytes: 1 << 20,
            mtu_bytes: 65_535,
            loss: Loss::NONE,
            outages: Vec::new(),
        }
    }
}

/// Why there is no such link.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkConfigError {
    /// A rate of 0.
    #[error("a link of 0 bytes a second carries nothing; use an outage")]
    Rate,
    /// A queue that not even one datagram fits in.
    #[error("a queue of {queue_bytes} bytes holds no datagram of {mtu_bytes} bytes")]
    Queue {
        /// What was given.
        queue_bytes: u64,
        /// What was given.
        mtu_bytes: usize,
    },
    /// A probability above 1.
    #[error("a probability of loss is above 1000000 parts per million")]
    Loss,
    /// Outages that end before they begin, or overlap, or are out of order.
    #[error("outages must be ascending, each ending after its start and before the next")]
    Outages,
}

/// What has passed, and what has not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams offered.
    pub packets_in: u64,
    /// Bytes of them.
    pub bytes_in: u64,
    /// Datagrams that arrive.
    pub packets_out: u64,
    /// Bytes of them.
    pub bytes_out: u64,
    /// Lost on the way.
    pub lost_packets: u64,
    /// Bytes of them.
    pub lost_bytes: u64,
    /// Dropped because the queue was full.
    pub queue_dropped_packets: u64,
    /// Bytes of them.
    pub queue_dropped_bytes: u64,
    /// Gone in an outage.
    pub outage_packets: u64,
    /// Longer than the link carries.
    pub oversized_packets: u64,
}

/// What becomes of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is there at this time since the link was made.
    Arrives(Duration),
    /// Lost on the way.
    Lost,
    /// The queue was full.
    QueueFull,
    /// The link is down.
    Down,
    /// It is longer than the link carries.
    Oversized,
}

/// One direction of a link.
#[derive(Debug, Clone)]
pub struct Link {
    config: LinkConfig,
    random: Random,
    bad: bool,
    // Nanoseconds since the link was made.
    busy_until_ns: u128,
    last_arrival: Duration,
    counters: Counters,
}

impl Link {
    /// A link, idle, in its good state.
    ///
    /// # Errors
    /// [`LinkConfigError`] where there is no such link.
    pub fn new(config: LinkConfig, seed: u64) -> Result<Self, LinkConfigError> {
        if config.rate_bytes_per_second == Some(0) {
            return Err(LinkConfigError::Rate);
        }
        if config.rate_bytes_per_second.is_some()
            && config.queue_bytes < u64::try_from(config.mtu_bytes).unwrap_or(u64::MAX)
        {
            return Err(LinkConfigError::Queue {
                queue_bytes: config.queue_bytes,
                mtu_bytes: config.mtu_bytes,
            });
        }
        let loss = config.loss;
        if [
            loss.to_bad_ppm,
            loss.to_good_ppm,
            loss.lost_good_ppm,
            loss.lost_bad_ppm,
        ]
        .iter()
        .any(|ppm| *ppm > ONE_PPM)
        {
            return Err(LinkConfigError::Loss);
        }
        let mut last = Duration::ZERO;
        for outage in &config.outages {
            if outage.start < last || outage.end <= outage.start {
                return Err(LinkConfigError::Outages);
            }
            last = outage.end;
        }
        Ok(Self {
            config,
            random: Random::new(seed),
            bad: false,
            busy_until_ns: 0,
            last_arrival: Duration::ZERO,
            counters: Counters::default(),
        })
    }

    /// What passed so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Offers a datagram of `bytes` at `now`, a time since the link was made that never goes back
    /// (one that does counts as the time before).
    pub fn offer(&mut self, now: Duration, bytes: usize) -> Fate {
        let length = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.counters.packets_in += 1;
        self.counters.bytes_in += length;
        // Drawn for each datagram, whatever becomes of it: the decisions of one seed depend on the
        // number of a datagram only, not on how fast a sender was.
        let lost = self.step_loss();
        let jitter_ns = self
            .random
            .up_to(u64::try_from(self.config.jitter.as_nanos()).unwrap_or(u64::MAX));
        if bytes > self.config.mtu_bytes {
            self.counters.oversized_packets += 1;
            return Fate::Oversized;
        }
        if self.is_down(now) {
            self.counters.outage_packets += 1;
            return Fate::Down;
        }
        let Some(sent) = self.queue(now, length) else {
            self.counters.queue_dropped_packets += 1;
            self.counters.queue_dropped_bytes += length;
            return Fate::QueueFull;
        };
        if lost {
            self.counters.lost_packets += 1;
            self.counters.lost_bytes += length;
            return Fate::Lost;
        }
        self.counters.packets_out += 1;
        self.counters.bytes_out += length;
        let arrival = sent + self.config.delay + Duration::from_nanos(jitter_ns);
        self.last_arrival = self.last_arrival.max(arrival);
        Fate::Arrives(self.last_arrival)
    }

    fn is_down(&self, now: Duration) -> bool {
        self.config
            .outages
            .iter()
            .any(|outage| (outage.start..outage.end).contains(&now))
    }

    /// When the last bit of it has been sent; none where the queue has no room.
    fn queue(&mut self, now: Duration, length: u64) -> Option<Duration> {
        let Some(rate) = self.config.rate_bytes_per_second else {
            return Some(now);
        };
        let now_ns = now.as_nanos();
        let waiting = self.busy_until_ns.saturating_sub(now_ns) * u128::from(rate) / SECOND_NS;
        if waiting + u128::from(length) > u128::from(self.config.queue_bytes) {
            return None;
        }
        let takes_ns = (u128::from(length) * SECOND_NS).div_ceil(u128::from(rate));
        self.busy_until_ns = self.busy_until_ns.max(now_ns) + takes_ns;
        let ns = u64::try_from(self.busy_until_ns).unwrap_or(u64::MAX);
        Some(Duration::from_nanos(ns))
    }

    fn step_loss(&mut self) -> bool {
        let loss = self.config.loss;
        let leave = if self.bad {
            loss.to_good_ppm
        } else {
            loss.to_bad_ppm
        };
        if self.happens(leave) {
            self.bad = !self.bad;
        }
        self.happens(if self.bad {
            loss.lost_bad_ppm
        } else {
            loss.lost_good_ppm
        })
    }

    fn happens(&mut self, ppm: u32) -> bool {
        self.random.up_to(u64::from(ONE_PPM) - 1) < u64::from(ppm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: usize = 1_200;

    fn link(config: LinkConfig, seed: u64) -> Link {
        Link::new(config, seed).unwrap()
    }

    /// Offers `packets` with this gap between them.
    fn offer_all(link: &mut Link, packets: u64, gap: Duration) -> Vec<Fate> {
        (0..packets)
            .map(|n| link.offer(gap * u32::try_from(n).unwrap(), PACKET))
            .collect()
    }

    #[test]
    fn the_rate_is_kept_within_two_percent() {
        for rate in [100_000_u64, 375_000, 12_500_000] {
            let mut link = link(
                LinkConfig {
                    rate_bytes_per_second: Some(rate),
                    delay: Duration::from_millis(50),
                    queue_bytes: 20_000,
                    mtu_bytes: 1_500,
                    ..LinkConfig::default()
                },
                1,
            );
            // Twice of what it carries, for as long as 5,000 datagrams take.
            let gap = Duration::from_nanos(u64::try_from(PACKET).unwrap() * 500_000_000 / rate);
            let fates = offer_all(&mut link, 10_000, gap);
            let arrivals: Vec<Duration> = fates
                .iter()
                .filter_map(|fate| match fate {
                    Fate::Arrives(at) => Some(*at),
                    _ => None,
                })
                .collect();
            let first = arrivals[0];
            let took = *arrivals.last().unwrap() - first;
            let bytes = (arrivals.len() as u128 - 1) * PACKET as u128;
            let measured = bytes * 1_000_000_000 / took.as_nanos();
            assert!(
                measured.abs_diff(u128::from(rate)) * 50 <= u128::from(rate),
                "{measured} of {rate}"
            );
            assert!(arrivals.is_sorted(), "a queue keeps the order");
        }
    }

    #[test]
    fn what_is_sent_below_the_rate_waits_for_nothing() {
        let mut link = link(
            LinkConfig {
                rate_bytes_per_second: Some(1_200_000),
                delay: Duration::from_millis(30),
                ..LinkConfig::default()
            },
            1,
        );
        // 1 ms to send, 30 ms to travel.
        for at in [0, 10, 20, 1_000] {
            let at = Duration::from_millis(at);
            let due = at + Duration::from_millis(31);
            assert_eq!(link.offer(at, PACKET), Fate::Arrives(due));
        }
    }

    #[test]
    fn the_queue_holds_what_it_may_hold() {
        let config = LinkConfig {
            rate_bytes_per_second: Some(120_000),
            queue_bytes: 12_000,
            mtu_bytes: 1_500,
            ..LinkConfig::default()
        };
        let mut link = link(config, 1);
        let fates = offer_all(&mut link, 30, Duration::ZERO);
        let full = fates.iter().filter(|f| **f == Fate::QueueFull).count();
        assert_eq!(full, 20, "ten of 1,200 bytes fit");
        let counters = link.counters();
        assert_eq!(counters.queue_dropped_packets, 20);
        assert_eq!(counters.queue_dropped_bytes, 24_000);
        assert_eq!(counters.bytes_out, 12_000);
        // 10 ms later one has left, and one more fits.
        let later = Duration::from_millis(10);
        assert!(matches!(link.offer(later, PACKET), Fate::Arrives(_)));
        assert_eq!(link.offer(later, PACKET), Fate::QueueFull);
    }

    #[test]
    fn loss_has_its_rate_and_its_bursts() {
        for (lost_ppm, burst) in [(1_000_u32, 4_u32), (20_000, 4), (80_000, 8), (80_000, 1)] {
            let mut link = link(
                LinkConfig {
                    loss: Loss::bursts(lost_ppm, burst),
                    ..LinkConfig::default()
                },
                7,
            );
            let total = 2_000_000_u64;
            let (mut lost, mut bursts, mut before) = (0_u64, 0_u64, false);
            for _ in 0..total {
                let gone = link.offer(Duration::ZERO, PACKET) == Fate::Lost;
                lost += u64::from(gone);
                bursts += u64::from(gone && !before);
                before = gone;
            }
            let rate_ppm = lost * 1_000_000 / total;
            let wanted = u64::from(lost_ppm);
            assert!(
                rate_ppm.abs_diff(wanted) * 10 <= wanted,
                "{rate_ppm} ppm of {wanted}"
            );
            let thousandths = lost * 1_000 / bursts;
            // Bursts of one: the bad state is left at the next datagram and may be entered again.
            let wanted = u64::from(burst) * 1_000;
            assert!(
                thousandths.abs_diff(wanted) * 10 <= wanted,
                "a burst of {thousandths}/1000, not {wanted}"
            );
            assert_eq!(link.counters().lost_packets, lost);
            assert_eq!(link.counters().packets_out, total - lost);
        }
    }

    #[test]
    fn random_loss_has_its_rate() {
        let mut link = link(
            LinkConfig {
                loss: Loss::random(50_000),
                ..LinkConfig::default()
            },
            3,
        );
        offer_all(&mut link, 200_000, Duration::ZERO);
        let lost = link.counters().lost_packets;
        assert!(lost.abs_diff(10_000) < 500, "{lost}");
    }

    #[test]
    fn an_outage_carries_nothing_and_ends() {
        let second = Duration::from_secs(1);
        let mut link = link(
            LinkConfig {
                outages: vec![
                    Outage {
                        start: second,
                        end: second * 2,
                    },
                    Outage {
                        start: second * 5,
                        end: second * 6,
                    },
                ],
                ..LinkConfig::default()
            },
            1,
        );
        let up: Vec<bool> = (0..14)
            .map(|half| link.offer(second / 2 * half, PACKET) != Fate::Down)
            .collect();
        let down: Vec<usize> = (0..14).filter(|half| !up[*half]).collect();
        assert_eq!(down, [2, 3, 10, 11]);
        assert_eq!(link.counters().outage_packets, 4);
    }

    #[test]
    fn jitter_spreads_and_nobody_overtakes() {
        let config = LinkConfig {
            delay: Duration::from_millis(20),
            jitter: Duration::from_millis(10),
            ..LinkConfig::default()
        };
        let mut link = link(config.clone(), 5);
        let mut arrivals = Vec::new();
        let mut late = 0;
        for n in 0..1_000_u64 {
            let at = Duration::from_millis(n);
            if let Fate::Arrives(due) = link.offer(at, PACKET) {
                let took = due - at;
                assert!(took >= config.delay && took <= config.delay + config.jitter);
                late += u32::from(took > config.delay + config.jitter / 2);
                arrivals.push(due);
            }
        }
        assert_eq!(arrivals.len(), 1_000);
        assert!(arrivals.is_sorted());
        assert!(late > 100, "{late} of 1,000: it is spread");
    }

    #[test]
    fn a_seed_repeats_its_run_and_another_does_not() {
        let config = LinkConfig {
            rate_bytes_per_second: Some(1_000_000),
            jitter: Duration::from_millis(3),
            loss: Loss::bursts(50_000, 4),
            ..LinkConfig::default()
        };
        let run = |seed| {
            let mut link = link(config.clone(), seed);
            offer_all(&mut link, 5_000, Duration::from_micros(1_300))
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn which_datagram_is_lost_does_not_depend_on_the_pace() {
        let config = LinkConfig {
            loss: Loss::bursts(50_000, 4),
            ..LinkConfig::default()
        };
        let lost = |gap| {
            let mut link = link(config.clone(), 1);
            offer_all(&mut link, 5_000, gap)
                .iter()
                .map(|fate| *fate == Fate::Lost)
                .collect::<Vec<_>>()
        };
        assert_eq!(lost(Duration::ZERO), lost(Duration::from_secs(1)));
    }

    #[test]
    fn links_that_cannot_be_are_refused() {
        let good = LinkConfig::default();
        assert!(Link::new(good.clone(), 1).is_ok(), "the control");
        let outage = |start, end| Outage {
            start: Duration::from_secs(start),
            end: Duration::from_secs(end),
        };
        let bad = [
            LinkConfig {
                rate_bytes_per_second: Some(0),
                ..good.clone()
            },
            LinkConfig {
                rate_bytes_per_second: Some(1),
                queue_bytes: 100,
                ..good.clone()
            },
            LinkConfig {
                loss: Loss::random(1_000_001),
                ..good.clone()
            },
            LinkConfig {
                outages: vec![outage(2, 2)],
                ..good.clone()
            },
            LinkConfig {
                outages: vec![outage(2, 4), outage(3, 5)],
                ..good.clone()
            },
        ];
        for config in bad {
            assert!(Link::new(config.clone(), 1).is_err(), "{config:?}");
        }
        let mut small = link(
            LinkConfig {
                mtu_bytes: 1_000,
                ..good
            },
            1,
        );
        assert_eq!(small.offer(Duration::ZERO, PACKET), Fate::Oversized);
        assert_eq!(small.counters().oversized_packets, 1);
    }
}
