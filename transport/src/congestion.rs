//! Congestion control: which one a connection has, and ours as quinn wants it.
//!
//! [`edge`] is the pure part; this file carries quinn's calls to it and keeps what was learnt of a
//! path for the next connection over it ([`PathMemory`]).
//!
//! The controller of a connection is chosen before its handshake and stays. Whoever dials knows the
//! peer. Whoever is called knows the address only, validated by a Retry: where it is one of a
//! configured peer, that peer's choice is used, else the node's. A controller grants nothing, so an
//! address is enough for it.

use std::{
    any::Any,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use quinn_proto::{
    RttEstimator, TransportConfig,
    congestion::{Bbr, BbrConfig, Controller, ControllerFactory, Cubic, CubicConfig},
};

pub mod edge;

use edge::{Edge, Estimate};

/// Age at which what was learnt of a path is forgotten.
pub const PATH_MEMORY_AGE: Duration = Duration::from_secs(3_600);

/// Which congestion control a connection has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Congestion {
    /// quinn's CUBIC (RFC 9438): takes every loss for a full path.
    #[default]
    Cubic,
    /// quinn's BBR, the first version of it; experimental there.
    Bbr,
    /// Ours, see [`edge`].
    Edge,
}

impl Congestion {
    /// All of them, by the word in a configuration.
    pub const ALL: [Self; 3] = [Self::Cubic, Self::Bbr, Self::Edge];

    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
            Self::Edge => "edge",
        }
    }

    /// The one with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }

    /// The one that a connection really has, as quinn's `Connection::congestion_state` gives it.
    #[must_use]
    pub fn of(controller: Box<dyn Controller>) -> Option<Self> {
        let any = controller.into_any();
        if any.is::<EdgeControl>() {
            Some(Self::Edge)
        } else if any.is::<Cubic>() {
            Some(Self::Cubic)
        } else if any.is::<Bbr>() {
            Some(Self::Bbr)
        } else {
            None
        }
    }

    /// Sets it in quinn's settings. With a `memory` the start of `edge` is half of what the path was
    /// last seen to hold.
    pub fn apply(self, transport: &mut TransportConfig, memory: Option<&PathMemory>) {
        transport.congestion_controller_factory(Arc::new(Factory {
            control: self,
            memory: memory.cloned(),
        }));
    }
}

/// What was learnt of the path to one peer: at most one estimate.
#[derive(Debug, Clone, Default)]
pub struct PathMemory(Arc<Mutex<Option<(Instant, Estimate)>>>);

impl PathMemory {
    /// What is known of the path, unless it is older than [`PATH_MEMORY_AGE`].
    #[must_use]
    pub fn recall(&self, now: Instant) -> Option<Estimate> {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .filter(|(at, _)| now.saturating_duration_since(*at) < PATH_MEMORY_AGE)
            .map(|(_, estimate)| estimate)
    }

    fn keep(&self, now: Instant, estimate: Estimate) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, estimate));
    }
}

/// Makes the controllers of one configuration.
struct Factory {
    control: Congestion,
    memory: Option<PathMemory>,
}

impl ControllerFactory for Factory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        match self.control {
            Congestion::Cubic => Arc::new(CubicConfig::default()).build(now, current_mtu),
            Congestion::Bbr => Arc::new(BbrConfig::default()).build(now, current_mtu),
            Congestion::Edge => {
                let remembered = self.memory.as_ref().and_then(|memory| memory.recall(now));
                Box::new(EdgeControl {
                    edge: Edge::new(now, current_mtu, remembered),
                    memory: self.memory.clone(),
                    kept: None,
                })
            }
        }
    }
}

/// [`Edge`] behind quinn's trait.
#[derive(Debug, Clone)]
struct EdgeControl {
    edge: Edge,
    memory: Option<PathMemory>,
    kept: Option<Estimate>,
}

impl Controller for EdgeControl {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.edge.on_ack(now, sent, bytes, app_limited);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        _app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.edge.on_end_acks(now, in_flight);
        if let Some(memory) = &self.memory
            && let Some(estimate) = self.edge.estimate()
            && self.kept != Some(estimate)
        {
            memory.keep(now, estimate);
            self.kept = Some(estimate);
        }
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.edge.on_loss(lost_bytes);
        if is_persistent_congestion {
            self.edge.on_blackout(now);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.edge.on_packet_size(new_mtu);
    }

    fn window(&self) -> u64 {
        self.edge.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.edge.window_start()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_name() {
        for control in Congestion::ALL {
            assert_eq!(Congestion::from_name(control.name()), Some(control));
        }
        for other in ["", "Edge", "reno"] {
            assert_eq!(Congestion::from_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_path_is_remembered_for_its_time_and_starts_edge_only() {
        let now = Instant::now();
        let memory = PathMemory::default();
        assert_eq!(memory.recall(now), None);
        let estimate = Estimate {
            bytes_per_second: 1_000_000,
            round_trip: Duration::from_millis(200),
        };
        memory.keep(now, estimate);
        let just_before = now + PATH_MEMORY_AGE - Duration::from_secs(1);
        assert_eq!(memory.recall(just_before), Some(estimate));
        assert_eq!(memory.recall(now + PATH_MEMORY_AGE), None);

        let build = |control| {
            Arc::new(Factory {
                control,
                memory: Some(memory.clone()),
            })
            .build(now, 1_200)
        };
        let start = |control| build(control).window();
        assert_eq!(start(Congestion::Edge), 100_000, "half of what it held");
        assert!(start(Congestion::Cubic) < 20_000);
        assert!(start(Congestion::Bbr) < 1_000_000);
        for control in Congestion::ALL {
            assert_eq!(Congestion::of(build(control)), Some(control));
        }
    }
}
