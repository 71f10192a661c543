//! Whom to dial, and when: a pure scheduler over the configured peers.
//!
//! INV-12 in two layers. A *round* of dials to one peer backs off with a [`BoundedRetry`] whose
//! count only goes up. Across rounds a [`RetryBudget`] bounds the rate: once round or budget is
//! spent the peer is dialled once per cap interval, for ever; nothing is parked. Only an
//! authenticated Hello or an operator refills the budget, and a new round begins only after a
//! session that lasted. Jitter is handed in, peers are served in the order of their ids (INV-11).
//!
//! There is no state from which a peer is never dialled again: a dial whose outcome is lost counts as
//! failed after [`DIAL_LIMIT`], and a clock that steps back shortens every wait to one cap interval.
//!
//! It opens nothing and knows no clock. Start at [`Dialer::poll_dial`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use tidelock_quota::{BoundedRetry, RetryBudget, RetryBudgetConfig, RetryConfig, RetryConfigError};
use tidelock_segments::NodeId;

use crate::limits::{DIAL_LIMIT, MAX_ADDRESSES, MAX_PEERS};

/// Pace of the dials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DialConfig {
    /// Width of the first back-off; it doubles with each failure.
    pub base: Duration,
    /// Longest back-off, and the interval of the slow pace.
    pub cap: Duration,
    /// Failures of one round.
    pub attempts_max: u32,
    /// Dials of a full budget.
    pub budget_dials: u32,
    /// Shortest time between two immediate dials that link-up events grant.
    pub link_up_interval: Duration,
    /// Time that a misbehaving peer is left alone, in both directions.
    pub cool_down: Duration,
    /// Whether a peer may be listed without an address, because a beacon finds it.
    pub discovery: bool,
}

impl Default for DialConfig {
    fn default() -> Self {
        Self {
            base: Duration::from_millis(500),
            cap: Duration::from_secs(60),
            attempts_max: 12,
            budget_dials: 64,
            link_up_interval: Duration::from_secs(5),
            cool_down: Duration::from_secs(60),
            discovery: false,
        }
    }
}

/// A peer of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its id; the one that its certificate must name.
    pub node_id: NodeId,
    /// Where it listens; tried in turn. None only with [`DialConfig::discovery`].
    pub addresses: Vec<SocketAddr>,
}

/// Why the peers or their pace were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DialConfigError {
    /// The pace makes no sense.
    #[error("redial settings: {0}")]
    Retry(#[from] RetryConfigError),
    /// A node in its own list of peers.
    #[error("peer {0} is this node itself: take it out of the list")]
    OwnNode(NodeId),
    /// The same peer twice.
    #[error("peer {0} is listed twice: give its addresses in one entry")]
    Twice(NodeId),
    /// No address, or too many.
    #[error("peer {peer} has {addresses} addresses: give 1 to {MAX_ADDRESSES}")]
    Addresses {
        /// The peer.
        peer: NodeId,
        /// What was given.
        addresses: usize,
    },
    /// Too many peers.
    #[error("{0} peers are more than {MAX_PEERS}: meet the others through a hub")]
    TooMany(usize),
}

/// Between two looks at an address that a beacon told of and nobody wanted dialled.
const HINT_WAIT: Duration = Duration::from_secs(1);

/// One dial to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dial {
    /// The peer.
    pub peer: NodeId,
    /// Where.
    pub address: SocketAddr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting { until: Duration },
    Dialing { since: Duration },
    Connected { since: Duration },
}

#[derive(Debug)]
struct Peer {
    addresses: Vec<SocketAddr>,
    /// Where it was met last outside of these addresses.
    learned: Option<SocketAddr>,
    next_address: usize,
    retry: BoundedRetry,
    budget: RetryBudget,
    state: State,
    dials: u64,
}

impl Peer {
    fn address(&self) -> Option<SocketAddr> {
        let all = self.addresses.len() + usize::from(self.learned.is_some());
        let at = self.next_address.checked_rem(all)?;
        self.addresses.get(at).copied().or(self.learned)
    }

    fn is_at(&self, address: SocketAddr) -> bool {
        self.learned == Some(address) || self.addresses.contains(&address)
    }

    fn has_address(&self) -> bool {
        self.learned.is_some() || !self.addresses.is_empty()
    }
}

/// Where the dials to one peer stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DialStatus {
    /// Dials since the start.
    pub dials: u64,
    /// When the next one is due, if the peer is neither connected nor being dialled.
    pub next_dial: Option<Duration>,
    /// Dials left at the fast pace.
    pub budget_left: u32,
    /// Until when the peer is left alone.
    pub cooling_until: Option<Duration>,
}

/// The scheduler.
#[derive(Debug)]
pub struct Dialer {
    config: DialConfig,
    peers: BTreeMap<NodeId, Peer>,
    cooling: BTreeMap<NodeId, Duration>,
    enabled: bool,
}

fn retry_config(config: &DialConfig) -> RetryConfig {
    RetryConfig {
        base: config.base,
        cap: config.cap,
        attempts_max: config.attempts_max,
    }
}

impl Dialer {
    /// A scheduler that begins now. Of two nodes that list each other, the one with the smaller id
    /// dials at once and the other a base delay later, so that mostly one connection is made.
    ///
    /// # Errors
    /// The first setting that makes no sense.
    pub fn new(
        local: &NodeId,
        config: DialConfig,
        peers: Vec<PeerConfig>,
        now: Duration,
    ) -> Result<Self, DialConfigError> {
        // Also when there is no peer yet, so that a bad setting shows at once.
        BoundedRetry::new(retry_config(&config))?;
        if peers.len() > MAX_PEERS {
            return Err(DialConfigError::TooMany(peers.len()));
        }
        let mut map = BTreeMap::new();
        for peer in peers {
            if peer.node_id == *local {
                return Err(DialConfigError::OwnNode(peer.node_id));
            }
            let addresses: BTreeSet<_> = peer.addresses.iter().collect();
            let bare = addresses.is_empty() && !config.discovery;
            if bare || peer.addresses.len() > MAX_ADDRESSES {
                let addresses = peer.addresses.len();
                return Err(DialConfigError::Addresses {
                    peer: peer.node_id,
                    addresses,
                });
            }
            let delay = if *local < peer.node_id {
                Duration::ZERO
            } else {
                config.base
            };
            let entry = Peer {
                addresses: peer.addresses,
                learned: None,
                next_address: 0,
                retry: BoundedRetry::new(retry_config(&config))?,
                budget: RetryBudget::new(RetryBudgetConfig {
                    dials: config.budget_dials,
                    cap: config.cap,
                    link_up_interval: config.link_up_interval,
                })?,
                state: State::Waiting { until: now + delay },
                dials: 0,
            };
            if map.insert(peer.node_id.clone(), entry).is_some() {
                return Err(DialConfigError::Twice(peer.node_id));
            }
        }
        Ok(Self {
            config,
            peers: map,
            cooling: BTreeMap::new(),
            enabled: true,
        })
    }

    /// Sessions shorter than this do not begin a new round: a peer that accepts and hangs up is
    /// backed off like one that does not answer.
    fn lasting(&self) -> Duration {
        (self.config.base * 16).min(self.config.cap)
    }

    /// The next dial that is due, charged to the peer's budget.
    pub fn poll_dial(&mut self, now: Duration) -> Option<Dial> {
        if !self.enabled {
            return None;
        }
        self.shorten(now);
        for (id, peer) in &mut self.peers {
            let State::Waiting { until } = peer.state else {
                continue;
            };
            let rested = self.cooling.get(id).is_none_or(|cooled| *cooled <= now);
            if until > now || !rested {
                continue;
            }
            let Some(address) = peer.address() else {
                continue;
            };
            // INV-12: the budget has the last word on the rate.
            if let Err(spent) = peer.budget.try_dial(now) {
                peer.state = State::Waiting {
                    until: now + spent.retry_after,
                };
                continue;
            }
            peer.next_address = peer.next_address.wrapping_add(1);
            peer.state = State::Dialing { since: now };
            peer.dials += 1;
            return Some(Dial {
                peer: id.clone(),
                address,
            });
        }
        None
    }

    /// No wait is longer than its interval: of a clock that stepped back, or of a dial whose outcome
    /// was lost, nothing is left but one interval.
    fn shorten(&mut self, now: Duration) {
        for peer in self.peers.values_mut() {
            peer.budget.observe(now);
            match &mut peer.state {
                State::Waiting { until } => *until = (*until).min(now + self.config.cap),
                State::Dialing { since } => {
                    *since = (*since).min(now);
                    if now - *since >= DIAL_LIMIT {
                        peer.state = State::Waiting { until: now };
                    }
                }
                State::Connected { .. } => {}
            }
        }
        for until in self.cooling.values_mut() {
            *until = (*until).min(now + self.config.cool_down);
        }
    }

    /// When a dial may be due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        if !self.enabled {
            return None;
        }
        self.peers
            .iter()
            .filter(|(_, peer)| peer.has_address())
            .filter_map(|(id, peer)| match peer.state {
                State::Dialing { since } => Some(since + DIAL_LIMIT),
                State::Waiting { until } => Some(
                    self.cooling
                        .get(id)
                        .map_or(until, |cooled| until.max(*cooled)),
                ),
                State::Connected { .. } => None,
            })
            .min()
    }

    /// A dial did not lead to an established session.
    pub fn on_failed(&mut self, peer: &NodeId, now: Duration, jitter: u64) {
        if let Some(entry) = self.peers.get_mut(peer)
            && matches!(entry.state, State::Dialing { .. })
        {
            Self::back_off(entry, &self.config, now, jitter);
        }
    }

    fn back_off(peer: &mut Peer, config: &DialConfig, now: Duration, jitter: u64) {
        // INV-12: when the round is over only the slow pace is left.
        let delay = peer.retry.next_delay(jitter).unwrap_or(config.cap);
        peer.state = State::Waiting { until: now + delay };
    }

    /// A session with this peer is established, whoever dialled.
    pub fn on_established(&mut self, peer: &NodeId, now: Duration) {
        if let Some(entry) = self.peers.get_mut(peer) {
            entry.budget.on_authenticated_hello();
            if !matches!(entry.state, State::Connected { .. }) {
                entry.state = State::Connected { since: now };
            }
        }
    }

    /// This peer was authenticated at an address that this node had dialled: it is tried there too
    /// from now on. The newest one outside of the configuration is kept.
    pub fn learn(&mut self, peer: &NodeId, address: SocketAddr) {
        if let Some(entry) = self.peers.get_mut(peer)
            && !entry.addresses.contains(&address)
        {
            entry.learned = Some(address);
        }
    }

    /// A beacon told of somebody at this address: whether it may be dialled now, charged to the budget of
    /// a missing peer; of the one that is known to be there, else of the one with most left. So whatever
    /// beacons say, all dials together stay within the budgets of those who are missing.
    ///
    /// # Errors
    /// The time after which it may be asked again: nobody is missing, whoever is known to be there is
    /// connected, being dialled or left alone, or the budgets are spent.
    pub fn try_hinted(&mut self, address: SocketAddr, now: Duration) -> Result<(), Duration> {
        if !self.enabled {
            return Err(HINT_WAIT);
        }
        self.shorten(now);
        let cooling = &self.cooling;
        let (mut known, mut richest) = (None, None::<&mut Peer>);
        let mut is_elses = false;
        for (id, peer) in &mut self.peers {
            let is_there = peer.is_at(address);
            match peer.state {
                State::Dialing { .. } if is_there => return Err(HINT_WAIT),
                State::Waiting { .. } if cooling.get(id).is_none_or(|until| *until <= now) => {}
                _ => {
                    is_elses |= is_there;
                    continue;
                }
            }
            if is_there {
                known = Some(peer);
            } else if richest
                .as_ref()
                .is_none_or(|other| other.budget.left() < peer.budget.left())
            {
                richest = Some(peer);
            }
        }
        // Nobody else pays for a dial to a peer that is not wanted now.
        let payer = known.or(richest.filter(|_| !is_elses)).ok_or(HINT_WAIT)?;
        // INV-12
        payer
            .budget
            .try_hinted(now)
            .map_err(|spent| spent.retry_after)
    }

    /// Whether this peer stands in the configuration and is not connected.
    #[must_use]
    pub fn is_missing(&self, peer: &NodeId) -> bool {
        self.peers
            .get(peer)
            .is_some_and(|entry| !matches!(entry.state, State::Connected { .. }))
    }

    /// The last session with this peer ended.
    pub fn on_closed(&mut self, peer: &NodeId, now: Duration, jitter: u64) {
        let lasting = self.lasting();
        if let Some(entry) = self.peers.get_mut(peer)
            && let State::Connected { since } = entry.state
        {
            if now.saturating_sub(since) >= lasting
                && let Ok(fresh) = BoundedRetry::new(retry_config(&self.config))
            {
                entry.retry = fresh;
            }
            Self::back_off(entry, &self.config, now, jitter);
        }
    }

    /// A link of this node came up: one immediate dial to whoever is not connected, rate-limited.
    pub fn on_link_up(&mut self, now: Duration) {
        for peer in self.peers.values_mut() {
            if let State::Waiting { until } = &mut peer.state
                && *until > now
                && peer.budget.on_link_up(now)
            {
                *until = now;
            }
        }
    }

    /// An operator, or a new certificate of this node, wants everybody tried again at once.
    pub fn on_operator(&mut self, now: Duration) {
        self.cooling.clear();
        for peer in self.peers.values_mut() {
            peer.budget.on_operator();
            if let Ok(fresh) = BoundedRetry::new(retry_config(&self.config)) {
                peer.retry = fresh;
            }
            if let State::Waiting { until } = &mut peer.state {
                *until = now;
            }
        }
    }

    /// Opens or closes the whole transport (ruling 12). Opening it dials at once.
    pub fn set_enabled(&mut self, enabled: bool, now: Duration) {
        if enabled && !self.enabled {
            for peer in self.peers.values_mut() {
                if let State::Waiting { until } = &mut peer.state {
                    *until = (*until).min(now);
                }
            }
        }
        self.enabled = enabled;
    }

    /// This peer misbehaved: it is left alone for a while, whether it is in the list or not.
    pub fn cool_down(&mut self, peer: &NodeId, now: Duration) {
        self.cooling.retain(|_, until| *until > now);
        // INV-07: the oldest goes first.
        if self.cooling.len() >= MAX_PEERS
            && let Some(first) = self
                .cooling
                .iter()
                .min_by_key(|(_, until)| **until)
                .map(|(id, _)| id.clone())
        {
            self.cooling.remove(&first);
        }
        self.cooling
            .insert(peer.clone(), now + self.config.cool_down);
    }

    /// Until when the peer is left alone.
    #[must_use]
    pub fn cooling_until(&self, peer: &NodeId, now: Duration) -> Option<Duration> {
        self.cooling.get(peer).copied().filter(|until| *until > now)
    }

    /// Where the dials to a configured peer stand.
    #[must_use]
    pub fn status(&self, peer: &NodeId, now: Duration) -> Option<DialStatus> {
        let entry = self.peers.get(peer)?;
        Some(DialStatus {
            dials: entry.dials,
            next_dial: match entry.state {
                State::Waiting { until } => Some(until),
                _ => None,
            },
            budget_left: entry.budget.left(),
            cooling_until: self.cooling_until(peer, now),
        })
    }

    /// The configured peers, in order.
    pub fn peers(&self) -> impl Iterator<Item = &NodeId> {
        self.peers.keys()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const CONFIG: DialConfig = DialConfig {
        base: Duration::from_millis(100),
        cap: Duration::from_secs(10),
        attempts_max: 5,
        budget_dials: 20,
        link_up_interval: Duration::from_secs(3),
        cool_down: Duration::from_secs(30),
        discovery: false,
    };

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn peer(name: &str) -> PeerConfig {
        PeerConfig {
            node_id: node(name),
            addresses: vec![
                "127.0.0.1:1".parse().unwrap(),
                "127.0.0.2:2".parse().unwrap(),
            ],
        }
    }

    fn dialer(local: &str, peers: &[&str]) -> Dialer {
        let peers = peers.iter().map(|name| peer(name)).collect();
        Dialer::new(&node(local), CONFIG, peers, Duration::ZERO).unwrap()
    }

    /// Runs until `end`, failing every dial at once, and gives the times of the dials.
    fn fail_until(dialer: &mut Dialer, from: Duration, end: Duration) -> Vec<Duration> {
        let mut now = from;
        let mut dials = Vec::new();
        while now <= end {
            while let Some(dial) = dialer.poll_dial(now) {
                dials.push(now);
                dialer.on_failed(&dial.peer, now, u64::MAX / 3);
            }
            match dialer.poll_timeout() {
                Some(next) => now = next.max(now + Duration::from_nanos(1)),
                None => break,
            }
        }
        dials
    }

    #[test]
    fn nonsense_is_refused() {
        let make = |peers: Vec<PeerConfig>| {
            Dialer::new(&node("a"), CONFIG, peers, Duration::ZERO).map(|_| ())
        };
        assert_eq!(make(vec![peer("b")]), Ok(()), "the control");
        assert_eq!(
            make(vec![peer("a")]),
            Err(DialConfigError::OwnNode(node("a")))
        );
        assert_eq!(
            make(vec![peer("b"), peer("b")]),
            Err(DialConfigError::Twice(node("b")))
        );
        let bare = PeerConfig {
            node_id: node("b"),
            addresses: Vec::new(),
        };
        assert_eq!(
            make(vec![bare]),
            Err(DialConfigError::Addresses {
                peer: node("b"),
                addresses: 0
            })
        );
        let config = DialConfig {
            base: Duration::ZERO,
            ..CONFIG
        };
        assert_eq!(
            Dialer::new(&node("a"), config, Vec::new(), Duration::ZERO).map(|_| ()),
            Err(DialConfigError::Retry(RetryConfigError::ZeroBase))
        );
    }

    #[test]
    fn inv_11_peers_are_dialled_in_order_and_the_smaller_id_goes_first() {
        let mut middle = dialer("m", &["z", "a", "q", "b"]);
        let first: Vec<_> = std::iter::from_fn(|| middle.poll_dial(Duration::ZERO))
            .map(|dial| dial.peer)
            .collect();
        assert_eq!(first, [node("q"), node("z")]);
        let later: Vec<_> = std::iter::from_fn(|| middle.poll_dial(CONFIG.base))
            .map(|dial| dial.peer)
            .collect();
        assert_eq!(later, [node("a"), node("b")]);
    }

    #[test]
    fn addresses_are_tried_in_turn() {
        let mut dialer = dialer("a", &["b"]);
        let mut seen = Vec::new();
        let mut now = Duration::ZERO;
        while seen.len() < 4 {
            if let Some(dial) = dialer.poll_dial(now) {
                seen.push(dial.address.port());
                dialer.on_failed(&dial.peer, now, 0);
            }
            now += MS;
        }
        assert_eq!(seen, [1, 2, 1, 2]);
    }

    #[test]
    fn inv_12_a_dark_peer_is_dialled_once_per_cap_for_ever() {
        let mut dialer = dialer("a", &["b"]);
        let day = Duration::from_secs(24 * 3600);
        let dials = fail_until(&mut dialer, Duration::ZERO, day);
        let slow = day.as_secs() / CONFIG.cap.as_secs();
        let count = dials.len() as u64;
        assert!(
            count <= slow + u64::from(CONFIG.budget_dials),
            "{count} dials are too many"
        );
        assert!(count >= slow, "{count} dials: the peer was parked");
        // The last hour is at the slow pace exactly.
        let tail: Vec<_> = dials
            .iter()
            .filter(|at| **at > day - Duration::from_secs(3600))
            .collect();
        assert!(
            tail.windows(2)
                .all(|pair| *pair[1] - *pair[0] >= CONFIG.cap)
        );
    }

    #[test]
    fn inv_12_flapping_sessions_do_not_begin_new_rounds() {
        // A peer that accepts and hangs up at once: the round's count goes on counting.
        let mut dialer = dialer("a", &["b"]);
        let mut now = Duration::ZERO;
        let mut dials = 0u64;
        let hour = Duration::from_secs(3600);
        while now < hour {
            if let Some(dial) = dialer.poll_dial(now) {
                dials += 1;
                dialer.on_established(&dial.peer, now);
                dialer.on_closed(&dial.peer, now, u64::MAX);
            }
            now = dialer.poll_timeout().unwrap().max(now + MS);
        }
        assert!(
            dials <= hour.as_secs() / CONFIG.cap.as_secs() + 10,
            "{dials} dials"
        );
        // The control: a session that lasted begins a new round, at the fast pace.
        let dial = loop {
            if let Some(dial) = dialer.poll_dial(now) {
                break dial;
            }
            now = dialer.poll_timeout().unwrap().max(now + MS);
        };
        dialer.on_established(&dial.peer, now);
        now += hour;
        dialer.on_closed(&dial.peer, now, u64::MAX);
        assert!(dialer.poll_timeout().unwrap() <= now + CONFIG.base);
    }

    #[test]
    fn inv_12_only_hello_operator_or_link_bring_the_fast_pace_back() {
        let mut dialer = dialer("a", &["b"]);
        let dark = Duration::from_secs(3600);
        fail_until(&mut dialer, Duration::ZERO, dark);
        let waiting = dialer.poll_timeout().unwrap();
        assert!(
            dialer.poll_dial(waiting - MS).is_none(),
            "the control: it waits"
        );
        // A link-up grants one dial, and one only within its interval.
        let now = waiting - 2 * MS;
        dialer.on_link_up(now);
        let dial = dialer.poll_dial(now).unwrap();
        dialer.on_failed(&dial.peer, now, 0);
        dialer.on_link_up(now + MS);
        assert_eq!(dialer.poll_dial(now + MS), None);
        assert!(dialer.status(&node("b"), now).unwrap().budget_left == 0);
        // An operator refills.
        dialer.on_operator(now + MS);
        assert!(dialer.poll_dial(now + MS).is_some());
        assert!(dialer.status(&node("b"), now).unwrap().budget_left > 0);
    }

    #[test]
    fn a_misbehaving_peer_is_left_alone_for_a_while() {
        let mut dialer = dialer("a", &["b", "c"]);
        dialer.cool_down(&node("b"), Duration::ZERO);
        dialer.cool_down(&node("stranger"), Duration::ZERO);
        assert!(dialer.cooling_until(&node("stranger"), MS).is_some());
        assert_eq!(
            dialer.poll_dial(Duration::ZERO).unwrap().peer,
            node("c"),
            "a bystander"
        );
        assert_eq!(dialer.poll_dial(CONFIG.cool_down - MS), None);
        assert_eq!(dialer.poll_timeout(), Some(CONFIG.cool_down));
        assert_eq!(dialer.poll_dial(CONFIG.cool_down).unwrap().peer, node("b"));
        for at in 0..5_000 {
            dialer.cool_down(&node(&format!("n{at}")), CONFIG.cool_down);
        }
        assert!(dialer.cooling.len() <= MAX_PEERS);
    }

    #[test]
    fn a_closed_transport_dials_nobody_and_an_opened_one_at_once() {
        let mut dialer = dialer("a", &["b"]);
        dialer.set_enabled(false, Duration::ZERO);
        assert_eq!(
            (dialer.poll_dial(CONFIG.cap), dialer.poll_timeout()),
            (None, None)
        );
        dialer.set_enabled(true, CONFIG.cap);
        assert!(dialer.poll_dial(CONFIG.cap).is_some());
    }

    #[test]
    fn a_peer_without_an_address_is_dialled_where_it_was_met() {
        let bare = PeerConfig {
            node_id: node("b"),
            addresses: Vec::new(),
        };
        let config = DialConfig {
            discovery: true,
            ..CONFIG
        };
        let mut dialer =
            Dialer::new(&node("a"), config, vec![bare, peer("c")], Duration::ZERO).unwrap();
        let day = Duration::from_secs(24 * 3600);
        assert_eq!(dialer.poll_dial(Duration::ZERO).unwrap().peer, node("c"));
        dialer.on_established(&node("c"), Duration::ZERO);
        assert_eq!((dialer.poll_dial(day), dialer.poll_timeout()), (None, None));
        assert!(dialer.is_missing(&node("b")) && !dialer.is_missing(&node("c")));
        let met = "10.0.0.9:7".parse().unwrap();
        dialer.learn(&node("b"), met);
        let dial = dialer.poll_dial(day).unwrap();
        assert_eq!((dial.peer, dial.address), (node("b"), met));
        // Of a peer with addresses the learned one is tried after its own.
        dialer.learn(&node("c"), met);
        dialer.on_closed(&node("c"), day, 0);
        let ports: Vec<u16> = std::iter::from_fn(|| {
            let dial = dialer.poll_dial(day)?;
            dialer.on_failed(&dial.peer, day, 0);
            Some(dial.address.port())
        })
        .take(3)
        .collect();
        assert_eq!(ports, [2, 7, 1]);
    }

    #[test]
    fn inv_12_hinted_dials_share_the_budgets_of_the_missing() {
        let mut dialer = dialer("a", &["b", "c"]);
        let there = "10.0.0.9:7".parse().unwrap();
        let left = |dialer: &Dialer, id| dialer.status(&node(id), MS).unwrap().budget_left;
        // Of a peer that is known there it is this peer's, else the richest one's, by turns.
        dialer.learn(&node("c"), there);
        assert_eq!(dialer.try_hinted(there, MS), Ok(()));
        let full = CONFIG.budget_dials;
        assert_eq!((left(&dialer, "b"), left(&dialer, "c")), (full, full - 1));
        let elsewhere = "10.0.0.8:7".parse().unwrap();
        for _ in 0..3 {
            assert_eq!(dialer.try_hinted(elsewhere, MS), Ok(()));
        }
        assert_eq!(
            (left(&dialer, "b"), left(&dialer, "c")),
            (full - 2, full - 2)
        );
        // A flood of good beacons from ever new addresses, for an hour: the budgets, and one more a
        // link-up interval; and the peers' own dials keep their pace.
        let hour = Duration::from_secs(3600);
        let (mut hinted, mut own, mut now) = (0, 0, MS);
        while now < hour {
            for port in 1..20 {
                let address = SocketAddr::from(([10, 9, 9, 9], port));
                hinted += u64::from(dialer.try_hinted(address, now).is_ok());
            }
            while let Some(dial) = dialer.poll_dial(now) {
                own += 1;
                dialer.on_failed(&dial.peer, now, u64::MAX);
            }
            now += Duration::from_millis(500);
        }
        let grants = 3600 / CONFIG.link_up_interval.as_secs() + 1;
        assert!(hinted <= u64::from(2 * full) + 2 * grants, "{hinted}");
        let slow = 2 * 3600 / CONFIG.cap.as_secs();
        assert!(
            own + 4 >= slow,
            "{own} dials of their own, {slow} at the slow pace"
        );
        // Nobody is missing, or the transport is closed: none at all.
        let mut met = dialer;
        met.on_established(&node("b"), now);
        met.on_established(&node("c"), now);
        assert_eq!(met.try_hinted(there, now), Err(HINT_WAIT));
        met.on_closed(&node("c"), now, u64::MAX);
        assert_eq!(met.try_hinted(there, now), Ok(()), "the control");
        met.set_enabled(false, now);
        assert_eq!(met.try_hinted(there, now), Err(HINT_WAIT));
    }

    /// The story: a beacon from where a peer is that nobody wants dialled was charged to another one
    /// that is missing. Here `b` always is, and could pay.
    #[test]
    fn inv_12_a_beacon_of_a_peer_that_is_not_wanted_is_charged_to_nobody() {
        let full = CONFIG.budget_dials;
        let [there, elsewhere] = ["10.0.0.9:7", "10.0.0.8:7"].map(|a| a.parse().unwrap());
        type Doing = fn(&mut Dialer);
        let unwanted: [(&str, Doing); 3] = [
            ("connected", |d| d.on_established(&node("c"), MS)),
            ("left alone", |d| d.cool_down(&node("c"), MS)),
            ("being dialled", |d| {
                d.cool_down(&node("b"), Duration::ZERO);
                assert_eq!(d.poll_dial(MS).unwrap().peer, node("c"));
                d.cooling.clear();
            }),
        ];
        for (what, doing) in unwanted {
            let mut dialer = dialer("a", &["b", "c"]);
            let left = |dialer: &Dialer| dialer.status(&node("b"), MS).unwrap().budget_left;
            dialer.learn(&node("c"), there);
            assert_eq!(dialer.try_hinted(there, MS), Ok(()), "the control");
            doing(&mut dialer);
            assert_eq!(dialer.try_hinted(there, MS), Err(HINT_WAIT), "{what}");
            assert_eq!(left(&dialer), full, "{what}");
            // The control: where nobody is known to be, b pays; and so it does where it is known too.
            assert_eq!(dialer.try_hinted(elsewhere, MS), Ok(()), "{what}");
            assert_eq!(left(&dialer), full - 1, "{what}");
            if what != "being dialled" {
                dialer.learn(&node("b"), there);
                assert_eq!(dialer.try_hinted(there, MS), Ok(()), "{what}");
                assert_eq!(left(&dialer), full - 2, "{what}");
            }
        }
    }

    /// What happens to a node whose link is a cellular one, in virtual time.
    #[derive(Debug, Clone, Copy)]
    enum Event {
        /// The link is up or down from now on.
        Link(bool),
        /// Time passes, in ms.
        Pass(u64),
        /// The peer comes in by itself, and stays for so long, in ms.
        Inbound(u64),
        Operator,
        Misbehaved,
        /// The transport is closed, for so long.
        Closed(u64),
        /// The clock is set back, by so much.
        StepBack(u64),
        /// The next dial's outcome is lost.
        Lost,
        /// The peer was met at another address.
        Moved(u16),
        /// Beacons of so many addresses were heard at once.
        Hinted(u8),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let ms = 1_u64..600_000;
        let one = prop_oneof![
            4 => any::<bool>().prop_map(Event::Link),
            8 => ms.clone().prop_map(Event::Pass),
            2 => (1_u64..120_000).prop_map(Event::Inbound),
            1 => Just(Event::Operator),
            1 => Just(Event::Misbehaved),
            1 => (1_u64..120_000).prop_map(Event::Closed),
            1 => ms.prop_map(Event::StepBack),
            1 => Just(Event::Lost),
            1 => any::<u16>().prop_map(Event::Moved),
            2 => any::<u8>().prop_map(Event::Hinted),
        ];
        proptest::collection::vec(one, 150..250)
    }

    /// One peer and its network, in virtual time.
    struct World {
        dialer: Dialer,
        /// What the dialler's clock reads; it may step back.
        now: Duration,
        /// Virtual time that has really passed.
        passed: Duration,
        link: bool,
        lose: bool,
        jitter: u64,
        session_until: Option<Duration>,
        /// Since when a dial could have happened: neither connected nor being dialled, not cooling
        /// down, transport open, clock steady.
        idle_since: Option<Duration>,
        longest_idle: Duration,
        dials: Vec<Duration>,
    }

    impl World {
        fn new() -> Self {
            Self {
                dialer: dialer("a", &["b"]),
                now: Duration::ZERO,
                passed: Duration::ZERO,
                link: true,
                lose: false,
                jitter: 1,
                session_until: None,
                idle_since: None,
                longest_idle: Duration::ZERO,
                dials: Vec::new(),
            }
        }

        fn jitter(&mut self) -> u64 {
            self.jitter = self
                .jitter
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            self.jitter
        }

        fn entry(&self) -> &Peer {
            &self.dialer.peers[&node("b")]
        }

        /// Notes how long the peer was free to be dialled and was not.
        fn watch(&mut self) {
            let waiting = matches!(self.entry().state, State::Waiting { .. });
            let cooling = self.dialer.cooling_until(&node("b"), self.now).is_some();
            if !waiting || cooling || !self.dialer.enabled {
                self.idle_since = None;
                return;
            }
            let since = *self.idle_since.get_or_insert(self.passed);
            self.longest_idle = self.longest_idle.max(self.passed - since);
        }

        fn dial(&mut self) {
            while let Some(dial) = self.dialer.poll_dial(self.now) {
                self.watch();
                self.dials.push(self.passed);
                let (now, jitter) = (self.now, self.jitter());
                if std::mem::take(&mut self.lose) {
                    continue;
                }
                if self.link && jitter % 3 == 0 {
                    self.dialer.on_established(&dial.peer, now);
                    self.session_until = Some(now + Duration::from_millis(jitter % 90_000));
                } else {
                    self.dialer.on_failed(&dial.peer, now, jitter);
                }
            }
            self.watch();
        }

        fn close(&mut self) {
            if self.session_until.take().is_some() {
                let (now, jitter) = (self.now, self.jitter());
                self.dialer.on_closed(&node("b"), now, jitter);
            }
        }

        /// Lets time pass, from one moment at which something happens to the next.
        fn pass(&mut self, time: Duration) {
            let end = self.now + time;
            loop {
                if self
                    .session_until
                    .is_some_and(|until| until <= self.now || !self.link)
                {
                    self.close();
                }
                self.dial();
                let next = [self.dialer.poll_timeout(), self.session_until];
                let next = next.into_iter().flatten().min().unwrap_or(end);
                // A refused dial moves its time; that is bounded by what the budget says.
                let next = next.clamp(self.now + MS, end.max(self.now + MS)).min(end);
                if next <= self.now {
                    break;
                }
                self.passed += next - self.now;
                self.now = next;
                self.watch();
            }
        }

        fn play(&mut self, event: Event) {
            let peer = node("b");
            match event {
                Event::Link(up) => {
                    if up && !self.link {
                        let waits = matches!(self.entry().state, State::Waiting { until } if until > self.now);
                        let cooling = self.dialer.cooling_until(&peer, self.now).is_some();
                        let left = self.entry().budget.left();
                        let before = self.dials.len();
                        self.link = true;
                        let granted = self.dialer.status(&peer, self.now).unwrap().next_dial;
                        self.dialer.on_link_up(self.now);
                        let after = self.dialer.status(&peer, self.now).unwrap().next_dial;
                        self.dial();
                        if granted != after && waits && !cooling && self.dialer.enabled {
                            // A link-up grants one dial at once, and no budget beside it.
                            assert!(self.dials.len() > before);
                            assert!(
                                self.entry().budget.left() == CONFIG.budget_dials
                                    || self.entry().budget.left() <= left
                            );
                        }
                    }
                    self.link = up;
                    self.pass(MS);
                }
                Event::Pass(ms) => self.pass(MS * u32::try_from(ms).unwrap()),
                Event::Inbound(ms) => {
                    if self.link {
                        self.dialer.on_established(&peer, self.now);
                        self.session_until = Some(self.now + Duration::from_millis(ms));
                    }
                    self.pass(MS);
                }
                Event::Operator => self.dialer.on_operator(self.now),
                Event::Misbehaved => {
                    self.close();
                    self.dialer.cool_down(&peer, self.now);
                    self.watch();
                }
                Event::Closed(ms) => {
                    self.dialer.set_enabled(false, self.now);
                    self.close();
                    self.watch();
                    self.pass(Duration::from_millis(ms));
                    self.dialer.set_enabled(true, self.now);
                }
                Event::StepBack(ms) => {
                    self.now = self.now.saturating_sub(Duration::from_millis(ms));
                    self.session_until = self.session_until.map(|_| self.now);
                    // The wait that was under way begins again, once.
                    self.idle_since = None;
                    self.dial();
                }
                Event::Lost => self.lose = true,
                Event::Moved(port) => {
                    let address = SocketAddr::from(([10, 0, 0, 1], port));
                    self.dialer.learn(&peer, address);
                }
                Event::Hinted(addresses) => {
                    for last in 0..addresses {
                        let address = SocketAddr::from(([10, 0, 0, last], 7411));
                        // Granted or not: the peer's own dials must keep their pace.
                        let _ = self.dialer.try_hinted(address, self.now);
                    }
                }
            }
        }
    }

    proptest! {
        // One case is some nine hours of virtual time.
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The story: NATS leaf nodes were seen to stop dialling for more than eight hours after a
        /// cellular link had flapped. Here no sequence of flaps, refusals, lost outcomes, clock steps
        /// and spent budgets leads to more than one cap interval without a dial.
        #[test]
        fn inv_12_there_is_no_state_from_which_a_node_never_dials_again(
            events in events(),
            seed in any::<u64>(),
        ) {
            let mut world = World::new();
            world.jitter = seed | 1;
            for event in events {
                world.play(event);
            }
            // Whatever it has come to: dark for eight hours, the pace is kept to the end.
            world.link = false;
            world.pass(Duration::from_secs(8 * 3600));
            prop_assert!(world.passed > Duration::from_secs(8 * 3600));
            prop_assert!(
                world.longest_idle <= CONFIG.cap + MS,
                "{:?} without a dial", world.longest_idle
            );
            let last = world.dials.last().copied().unwrap_or_default();
            prop_assert!(world.passed - last <= CONFIG.cap + CONFIG.cool_down + DIAL_LIMIT);
            // And it is no storm: the rate of the budget bounds it.
            let dark = world.passed - Duration::from_secs(7 * 3600);
            let late = world.dials.iter().filter(|at| **at > dark).count() as u64;
            prop_assert!(late <= 7 * 3600 / CONFIG.cap.as_secs() + 1, "{late} dials in seven hours");
            // When the link is back, one dial at once.
            let before = world.dials.len();
            world.pass(CONFIG.link_up_interval);
            world.play(Event::Link(true));
            prop_assert!(world.dials.len() > before, "link-up after a dark night");
        }
    }

    #[test]
    fn a_lost_outcome_and_a_clock_that_steps_back_cost_one_interval() {
        let mut dialer = dialer("a", &["b"]);
        assert!(dialer.poll_dial(Duration::ZERO).is_some());
        assert_eq!(dialer.poll_timeout(), Some(DIAL_LIMIT));
        assert_eq!(dialer.poll_dial(DIAL_LIMIT - MS), None, "the control");
        assert!(dialer.poll_dial(DIAL_LIMIT).is_some());
        // Years ahead the peer is dark; then the clock is put back to the beginning.
        let late = Duration::from_secs(10 * 365 * 86_400);
        dialer.on_failed(&node("b"), late, u64::MAX);
        dialer.cool_down(&node("b"), late);
        let early = Duration::from_secs(5);
        assert_eq!(dialer.poll_dial(early), None);
        let due = dialer.poll_timeout().unwrap();
        assert!(due <= early + CONFIG.cap.max(CONFIG.cool_down), "{due:?}");
        assert!(dialer.poll_dial(due).is_some());
    }
}
