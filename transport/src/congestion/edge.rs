//! `edge`: congestion control for links that lose in bursts, are far, or are slow. Pure: every
//! time is an argument.
//!
//! It keeps a model of the path, the highest rate of delivery of the last rounds and the shortest
//! round trip of the last seconds, and lets as much be in flight as the two multiply to, a little
//! more for a short queue, and as much again as is lost on the way. A round is the time from sending a
//! packet to its acknowledgement. Loss alone says nothing: what is lost always is the floor of the
//! path, and only loss above it, or a queue that does not go away, makes it more careful.
//!
//! Because the rate is what *arrives*, it cannot send much more than the path carries, whatever the
//! path loses. quinn paces at 5/4 of window over round trip; all control is in the window.
//!
//! Start at [`Edge::on_round`].

use std::time::{Duration, Instant};

/// Rounds over which the highest rate of delivery counts.
const RATE_ROUNDS: usize = 10;

/// Rounds of one cycle: one probes, one drains, the others cruise.
const CYCLE_ROUNDS: u32 = 8;

/// Cycles of which the smallest loss is the floor.
const FLOOR_CYCLES: usize = 8;

/// Shortest time that the shortest round trip is believed; it is also believed for two cycles.
const ROUND_TRIP_AGE: Duration = Duration::from_secs(10);

/// A shorter round trip is taken for this one: what a machine needs to send, to acknowledge and to
/// wake up is more than the path. Worst case: a queue of this length on a path that is shorter.
const ROUND_TRIP_MIN: Duration = Duration::from_millis(5);

/// Packets that may always be in flight: below it no acknowledgement is ever without delay.
const WINDOW_MIN_PACKETS: u64 = 4;

/// Packets of the first window where nothing is remembered, as RFC 9002 has it. Whoever had little to
/// send in one of the last [`RATE_ROUNDS`] never gets less: its rate is what it had, not what the path
/// carries, and quinn sends no acknowledgement while it has data that the window holds back. With a
/// full transfer the other way both ends then wait for each other until a timeout.
const WINDOW_START_PACKETS: u64 = 10;

/// Largest window: what quinn still paces is below 4 GiB; no path of ours needs a quarter of it.
const WINDOW_MAX_BYTES: u64 = 1 << 30;

/// Loss that is made up for, at most; in thousandths.
const LOSS_MAX_MILLI: u64 = 150;

/// Loss above one and a half times the floor that is still taken for chance; in thousandths.
const LOSS_CHANCE_MILLI: u64 = 30;

/// In flight while probing, draining and cruising; per cent of rate times round trip.
const PROBE_PERCENT: u64 = 125;
const DRAIN_PERCENT: u64 = 80;
const CRUISE_PERCENT: u64 = 110;

/// Probing and cruising after a cycle that lost more than the floor.
const CAREFUL_PROBE_PERCENT: u64 = 110;
const CAREFUL_CRUISE_PERCENT: u64 = 100;

/// The window of the start grows to no more than this share of what arrives in a round trip; per cent.
/// The rate of a round is that of the window before, so doubling alone needs 400.
const START_PERCENT: u64 = 450;

/// Loss in one round of the start that shows a full path, in thousandths, from so many packets on: a
/// burst is fewer.
const START_LOSS_MILLI: u64 = 150;
const START_LOSS_PACKETS: u64 = 32;

/// Growth of the rate in one cycle that shows that there is much more; per cent.
const MORE_PERCENT: u64 = 125;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The window doubles with each round.
    Start,
    /// What the start has put into the queue leaves it.
    Drain,
    /// For ever after, with the number of the round in its cycle.
    Cycle(u32),
}

/// What passed and what was lost in some time.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    delivered: u64,
    lost: u64,
}

impl Tally {
    fn loss_milli(self) -> u64 {
        let all = self.delivered.saturating_add(self.lost);
        self.lost
            .saturating_mul(1_000)
            .checked_div(all)
            .unwrap_or(0)
    }
}

/// What is known of a path, for the next connection over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes a second that arrive.
    pub bytes_per_second: u64,
    /// Shortest round trip.
    pub round_trip: Duration,
}

impl Estimate {
    /// Half of what the path was seen to hold: a path may have become worse.
    fn window_bytes(self) -> u64 {
        in_flight(self.bytes_per_second, self.round_trip) / 2
    }
}

/// Bytes that are under way at a rate for a time.
fn in_flight(bytes_per_second: u64, time: Duration) -> u64 {
    let bytes = u128::from(bytes_per_second) * time.as_nanos() / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// The controller.
#[derive(Debug, Clone)]
pub struct Edge {
    packet_bytes: u64,
    window_start: u64,
    window: u64,
    phase: Phase,
    // The round of now.
    round_began: Instant,
    round_over: bool,
    round: Tally,
    round_app_limited: bool,
    round_trip_of_round: Option<Duration>,
    // Rates of the last rounds, the newest at `rates_next`.
    rates: [u64; RATE_ROUNDS],
    rates_next: usize,
    rate_of_last_cycle: u64,
    // Rounds that had enough to send. The first is one acknowledgement long and tells no rate.
    full_rounds: u32,
    // Those since the last one with too little.
    full_rounds_in_a_row: usize,
    // Shortest round trips of this and of the last period.
    round_trips: [Option<Duration>; 2],
    period_began: Instant,
    period_rounds: u32,
    // Loss.
    loss_milli: u64,
    cycle: Tally,
    floors: [Option<u64>; FLOOR_CYCLES],
    floors_next: usize,
    careful: bool,
    round_trip_of_cycle: Option<Duration>,
    crowded: Option<Duration>,
}

impl Edge {
    /// A controller of a new path, or of one of which something is remembered.
    #[must_use]
    pub fn new(now: Instant, packet_bytes: u16, remembered: Option<Estimate>) -> Self {
        let packet_bytes = u64::from(packet_bytes);
        let least = WINDOW_START_PACKETS * packet_bytes;
        let window = remembered
            .map_or(least, Estimate::window_bytes)
            .clamp(least, WINDOW_MAX_BYTES);
        Self {
            packet_bytes,
            window_start: window,
            window,
            phase: Phase::Start,
            round_began: now,
            round_over: false,
            round: Tally::default(),
            round_app_limited: false,
            round_trip_of_round: None,
            rates: [0; RATE_ROUNDS],
            rates_next: 0,
            rate_of_last_cycle: 0,
            full_rounds: 0,
            full_rounds_in_a_row: 0,
            round_trips: [None; 2],
            period_began: now,
            period_rounds: 0,
            loss_milli: 0,
            cycle: Tally::default(),
            floors: [None; FLOOR_CYCLES],
            floors_next: 0,
            careful: false,
            round_trip_of_cycle: None,
            crowded: None,
        }
    }

    /// Bytes that may be in flight.
    #[must_use]
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Bytes that were in flight at the start.
    #[must_use]
    pub fn window_start(&self) -> u64 {
        self.window_start
    }

    /// What is known of the path, once the start is over.
    #[must_use]
    pub fn estimate(&self) -> Option<Estimate> {
        match self.phase {
            Phase::Start => None,
            Phase::Drain | Phase::Cycle(_) => Some(Estimate {
                bytes_per_second: self.rate(),
                round_trip: self.round_trip()?,
            }),
        }
    }

    /// A packet of `bytes` that was sent at `sent` has arrived.
    pub fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        let took = now.saturating_duration_since(sent);
        let shortest = |known: Option<Duration>| Some(known.map_or(took, |known| known.min(took)));
        self.round_trip_of_round = shortest(self.round_trip_of_round);
        self.round_trip_of_cycle = shortest(self.round_trip_of_cycle);
        let [current, _] = &mut self.round_trips;
        *current = shortest(*current);
        for tally in [&mut self.round, &mut self.cycle] {
            tally.delivered = tally.delivered.saturating_add(bytes);
        }
        self.round_app_limited |= app_limited;
        self.round_over |= sent >= self.round_began;
        if self.phase == Phase::Start && !app_limited {
            let most = if self.full_rounds < 2 {
                WINDOW_MAX_BYTES
            } else {
                self.target(START_PERCENT).max(self.window)
            };
            self.window = self.window.saturating_add(bytes).min(most);
        }
    }

    /// All packets of one acknowledgement were told of; `in_flight` bytes are left.
    pub fn on_end_acks(&mut self, now: Instant, in_flight: u64) {
        if self.round_over {
            self.on_round(now);
        }
        if self.phase == Phase::Drain && in_flight <= self.target(100) {
            self.begin_cycle(2);
        }
        self.set_window();
    }

    /// `bytes` were lost; 0 where the path only said that it is full.
    pub fn on_loss(&mut self, bytes: u64) {
        for tally in [&mut self.round, &mut self.cycle] {
            tally.lost = tally.lost.saturating_add(bytes);
        }
        if bytes == 0 {
            self.careful = true;
        }
    }

    /// Nothing arrived for several timeouts: the path is another one, or none.
    pub fn on_blackout(&mut self, now: Instant) {
        let fresh = Self::new(
            now,
            u16::try_from(self.packet_bytes).unwrap_or(u16::MAX),
            None,
        );
        *self = Self {
            round_trips: self.round_trips,
            ..fresh
        };
    }

    /// Packets have this size from now on.
    pub fn on_packet_size(&mut self, packet_bytes: u16) {
        self.packet_bytes = u64::from(packet_bytes);
        self.set_window();
    }

    /// The highest rate of the last rounds.
    fn rate(&self) -> u64 {
        self.rates.iter().copied().max().unwrap_or(0)
    }

    /// The shortest round trip of the last seconds.
    fn round_trip(&self) -> Option<Duration> {
        self.round_trips.iter().flatten().min().copied()
    }

    /// How much longer than the shortest a round trip is when there is a queue, not only chance.
    fn has_queue(&self, round_trip: Option<Duration>) -> bool {
        let (Some(shortest), Some(round_trip)) = (self.round_trip(), round_trip) else {
            return false;
        };
        let margin = (shortest / 4).clamp(Duration::from_millis(4), Duration::from_millis(100));
        round_trip >= shortest + margin
    }

    /// A round is over: what it tells of the path, and what the next one is for.
    fn on_round(&mut self, now: Instant) {
        let took = now.saturating_duration_since(self.round_began);
        if !took.is_zero() {
            let rate = u128::from(self.round.delivered) * 1_000_000_000 / took.as_nanos();
            let rate = u64::try_from(rate).unwrap_or(u64::MAX);
            // A round that had little to send tells how much there is at least.
            if !self.round_app_limited || rate > self.rate() {
                self.rates_next = (self.rates_next + 1) % RATE_ROUNDS;
                if let Some(slot) = self.rates.get_mut(self.rates_next) {
                    *slot = rate;
                }
            }
        }
        if self.round_app_limited {
            self.full_rounds_in_a_row = 0;
        } else {
            self.full_rounds = self.full_rounds.saturating_add(1);
            self.full_rounds_in_a_row = self.full_rounds_in_a_row.saturating_add(1);
        }
        self.loss_milli = (self.loss_milli * 7 + self.round.loss_milli()).div_ceil(8);
        let queue = self.has_queue(self.round_trip_of_round);
        match self.phase {
            Phase::Start => self.check_start(queue),
            Phase::Drain => self.begin_cycle(2),
            Phase::Cycle(round) if round + 1 >= CYCLE_ROUNDS => self.end_cycle(),
            Phase::Cycle(round) => self.phase = Phase::Cycle(round + 1),
        }
        self.age_round_trip(now);
        self.round = Tally::default();
        self.round_app_limited = false;
        self.round_trip_of_round = None;
        self.round_over = false;
        self.round_began = now;
    }

    /// Whether the start has filled the path.
    fn check_start(&mut self, queue: bool) {
        let full = self.round.lost >= START_LOSS_PACKETS * self.packet_bytes
            && self.round.loss_milli() >= START_LOSS_MILLI;
        if queue || full {
            self.phase = Phase::Drain;
        }
    }

    fn begin_cycle(&mut self, round: u32) {
        self.rate_of_last_cycle = self.rate();
        self.phase = Phase::Cycle(round);
        self.cycle = Tally::default();
        self.round_trip_of_cycle = None;
    }

    fn end_cycle(&mut self) {
        let lost = self.cycle.loss_milli();
        let floor = self.floors.iter().flatten().min().copied();
        self.careful = floor.is_some_and(|floor| lost > floor + floor / 2 + LOSS_CHANCE_MILLI);
        self.floors_next = (self.floors_next + 1) % FLOOR_CYCLES;
        if let Some(slot) = self.floors.get_mut(self.floors_next) {
            *slot = Some(lost);
        }
        // This node drained its own queue in between. What is left is somebody else's.
        self.crowded = self
            .round_trip_of_cycle
            .filter(|_| self.has_queue(self.round_trip_of_cycle));
        let (rate, before) = (self.rate(), self.rate_of_last_cycle);
        self.begin_cycle(0);
        if rate.saturating_mul(100) >= before.saturating_mul(MORE_PERCENT) {
            self.phase = Phase::Start;
        }
    }

    fn age_round_trip(&mut self, now: Instant) {
        self.period_rounds += 1;
        if self.period_rounds >= 2 * CYCLE_ROUNDS
            && now.saturating_duration_since(self.period_began) >= ROUND_TRIP_AGE
        {
            let [current, _] = self.round_trips;
            self.round_trips = [None, current];
            self.period_began = now;
            self.period_rounds = 0;
        }
    }

    /// So many per cent of what the path holds, and what is lost of it besides.
    fn target(&self, percent: u64) -> u64 {
        let round_trip = self.crowded.or_else(|| self.round_trip());
        let round_trip = round_trip.unwrap_or_default().max(ROUND_TRIP_MIN);
        let held = in_flight(self.rate(), round_trip);
        let loss = self.loss_milli.min(LOSS_MAX_MILLI);
        let bytes = u128::from(held) * u128::from(percent) * 10 / u128::from(1_000 - loss);
        let bytes = u64::try_from(bytes).unwrap_or(WINDOW_MAX_BYTES);
        let least = if self.full_rounds_in_a_row < RATE_ROUNDS {
            WINDOW_START_PACKETS
        } else {
            WINDOW_MIN_PACKETS
        };
        // Two packets more: an acknowledgement stands for two.
        bytes
            .saturating_add(2 * self.packet_bytes)
            .clamp(least * self.packet_bytes, WINDOW_MAX_BYTES)
    }

    fn set_window(&mut self) {
        let (probe, cruise) = if self.careful {
            (CAREFUL_PROBE_PERCENT, CAREFUL_CRUISE_PERCENT)
        } else {
            (PROBE_PERCENT, CRUISE_PERCENT)
        };
        match self.phase {
            Phase::Start => {}
            Phase::Drain => self.window = self.target(100),
            Phase::Cycle(0) => self.window = self.target(probe),
            Phase::Cycle(1) => self.window = self.target(DRAIN_PERCENT),
            Phase::Cycle(_) => self.window = self.target(cruise),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const PACKET: u16 = 1_000;
    const ROUND_TRIP: Duration = Duration::from_millis(100);

    /// A path that carries a packet each millisecond, 100 ms there and back, with an endless queue.
    struct Path {
        edge: Edge,
        now: Instant,
        free_at: Instant,
        /// When each packet comes back, when it was sent, and whether it is lost.
        in_flight: VecDeque<(Instant, Instant, bool)>,
        sent: u64,
    }

    impl Path {
        fn new(remembered: Option<Estimate>) -> Self {
            let now = Instant::now();
            Self {
                edge: Edge::new(now, PACKET, remembered),
                now,
                free_at: now,
                in_flight: VecDeque::new(),
                sent: 0,
            }
        }

        fn in_flight_bytes(&self) -> u64 {
            self.in_flight.len() as u64 * u64::from(PACKET)
        }

        /// So many round trips of an endless transfer, of which one packet in so many is lost.
        fn run(&mut self, round_trips: u32, lost_one_in: u64) {
            let end = self.now + ROUND_TRIP * round_trips;
            while self.now < end {
                while self.in_flight_bytes() + u64::from(PACKET) <= self.edge.window() {
                    self.sent += 1;
                    let lost = self.sent.is_multiple_of(lost_one_in);
                    self.free_at = self.free_at.max(self.now) + Duration::from_millis(1);
                    self.in_flight
                        .push_back((self.free_at + ROUND_TRIP, self.now, lost));
                }
                let (at, sent, lost) = self.in_flight.pop_front().unwrap();
                self.now = at;
                if lost {
                    self.edge.on_loss(PACKET.into());
                } else {
                    self.edge.on_ack(at, sent, PACKET.into(), false);
                    self.edge.on_end_acks(at, self.in_flight_bytes());
                }
            }
        }
    }

    const NEVER: u64 = u64::MAX;

    #[test]
    fn the_start_doubles_until_a_queue_forms() {
        let mut path = Path::new(None);
        assert_eq!(path.edge.window(), 10_000);
        assert_eq!(path.edge.estimate(), None);
        path.run(3, NEVER);
        let window = path.edge.window();
        assert!((40_000..=160_000).contains(&window), "{window}");
        path.run(40, NEVER);
        // 100,000 bytes are what the path holds.
        let window = path.edge.window();
        assert!((78_000..=130_000).contains(&window), "{window}");
        let known = path.edge.estimate().unwrap();
        assert!(
            (950_000..=1_010_000).contains(&known.bytes_per_second),
            "{known:?}"
        );
        assert!(known.round_trip < ROUND_TRIP + ROUND_TRIP / 20, "{known:?}");
    }

    #[test]
    fn steady_loss_does_not_shrink_the_window() {
        let settled = |lost_one_in| {
            let mut path = Path::new(None);
            path.run(60, lost_one_in);
            (0..16)
                .map(|_| {
                    path.run(1, lost_one_in);
                    path.edge.window()
                })
                .max()
                .unwrap()
        };
        let (clean, lossy) = (settled(NEVER), settled(20));
        assert!(lossy * 10 >= clean * 9, "{lossy} of {clean}");
        // And what is lost is not made up for without end.
        assert!(lossy * 10 <= clean * 14, "{lossy} of {clean}");
    }

    #[test]
    fn what_is_remembered_sets_the_start_within_bounds() {
        let start = |bytes_per_second| {
            let remembered = Estimate {
                bytes_per_second,
                round_trip: ROUND_TRIP,
            };
            Path::new(Some(remembered)).edge.window()
        };
        assert_eq!(start(2_000_000), 100_000, "half of what the path held");
        assert_eq!(start(1), 10_000);
        assert_eq!(start(u64::MAX), WINDOW_MAX_BYTES);
    }

    /// A node that fetched in bulk had little to send itself, so its window fell to four packets; its
    /// requests filled it, quinn held its acknowledgements back with them, and both ends stood still
    /// until a timeout.
    #[test]
    fn who_has_little_to_send_keeps_the_first_window() {
        // One packet a round trip, which grows: somebody else's queue.
        let settled = |app_limited| {
            let mut path = Path::new(None);
            let mut now = path.now;
            for round in 0..50 {
                let sent = now;
                now += ROUND_TRIP * if round < 5 { 1 } else { 2 };
                path.edge.on_ack(now, sent, PACKET.into(), app_limited);
                path.edge.on_end_acks(now, 0);
            }
            path.edge.window() / u64::from(PACKET)
        };
        assert_eq!(settled(true), 10);
        assert!(settled(false) < 10, "the control");
    }

    #[test]
    fn after_a_blackout_it_starts_again() {
        let mut path = Path::new(None);
        path.run(40, NEVER);
        assert!(path.edge.window() > 40_000, "the control");
        path.edge.on_blackout(path.now);
        assert_eq!(path.edge.window(), 10_000);
        assert_eq!(path.edge.estimate(), None);
    }

    #[test]
    fn whatever_it_is_told_the_window_stays_within_its_bounds() {
        let mut path = Path::new(None);
        let now = path.now;
        // Acknowledged before it was sent, nothing delivered, everything lost, a jump of a day.
        path.edge.on_ack(now, now + ROUND_TRIP, 1, false);
        path.edge.on_end_acks(now, u64::MAX);
        path.edge.on_loss(u64::MAX);
        let later = now + Duration::from_secs(86_400);
        path.edge.on_ack(later, now, u64::from(u32::MAX), true);
        path.edge.on_end_acks(later, 0);
        path.edge.on_loss(0);
        path.edge.on_packet_size(u16::MAX);
        for _ in 0..50 {
            path.edge.on_ack(later, later, 1 << 40, false);
            path.edge.on_end_acks(later, 0);
            let window = path.edge.window();
            assert!((4 * 1_000..=WINDOW_MAX_BYTES).contains(&window), "{window}");
        }
    }
}
