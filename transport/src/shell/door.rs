//! Whoever knocks, until the end of the handshake. What cannot be taken at once waits in line as the
//! packet that it is: its address is validated, nothing of TLS has been computed for it. A place that
//! comes free goes to whoever waits and has fewest handshakes going from its address, so a flood from
//! one address stands behind everybody else (INV-13).

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use quinn::Incoming;
use tidelock_quota::AddressBlock;
use tokio::sync::mpsc;

use super::{Shared, driver};
use crate::limits::{MAX_CALLS_WAITING, MAX_HANDSHAKES, MAX_HANDSHAKES_ADDRESS};

/// Part of the time for a handshake that a call may wait, in tenths: whoever called has the rest of its
/// own time for the handshake itself.
const WAIT_TENTHS: u32 = 6;

/// A call that waits for a place.
struct Call<T> {
    from: AddressBlock,
    /// When it is sent away.
    due: Duration,
    call: T,
}

/// Calls in the order in which they came, and the handshakes that are going on.
struct Line<T> {
    patience: Duration,
    waiting: VecDeque<Call<T>>,
    going: BTreeMap<AddressBlock, usize>,
}

impl<T> Line<T> {
    fn new(patience: Duration) -> Self {
        Self {
            patience,
            waiting: VecDeque::new(),
            going: BTreeMap::new(),
        }
    }

    fn going(&self, from: AddressBlock) -> usize {
        self.going.get(&from).copied().unwrap_or_default()
    }

    /// Takes a call in. What has no room any more comes back: the last call of the address that has
    /// most, which may be the one that came.
    fn push(&mut self, from: AddressBlock, now: Duration, call: T) -> Option<T> {
        let due = now + self.patience;
        self.waiting.push_back(Call { from, due, call });
        // INV-07
        if self.waiting.len() <= MAX_CALLS_WAITING {
            return None;
        }
        // INV-13: whoever fills the line makes room in it. Of equals the last to come.
        let mut most = (0, 0);
        let mut counts = BTreeMap::new();
        for (at, call) in self.waiting.iter().enumerate() {
            let count = counts
                .entry(call.from)
                .or_insert_with(|| self.going(call.from));
            *count += 1;
            most = most.max((*count, at));
        }
        self.waiting.remove(most.1).map(|call| call.call)
    }

    /// The next call that has a place, if one is free for it.
    fn next(&mut self) -> Option<(AddressBlock, T)> {
        // INV-07
        if self.going.values().sum::<usize>() >= MAX_HANDSHAKES {
            return None;
        }
        let (at, going) = self
            .waiting
            .iter()
            .enumerate()
            .map(|(at, call)| (at, self.going(call.from)))
            .min_by_key(|(at, going)| (*going, *at))?;
        // INV-13
        if going >= MAX_HANDSHAKES_ADDRESS {
            return None;
        }
        let Call { from, call, .. } = self.waiting.remove(at)?;
        *self.going.entry(from).or_default() += 1;
        Some((from, call))
    }

    /// A handshake of this address is over.
    fn over(&mut self, from: AddressBlock) {
        if let Some(going) = self.going.get_mut(&from) {
            *going = going.saturating_sub(1);
            if *going == 0 {
                self.going.remove(&from);
            }
        }
    }

    /// The next call that has waited too long.
    fn late(&mut self, now: Duration) -> Option<T> {
        self.waiting
            .pop_front_if(|call| call.due <= now)
            .map(|call| call.call)
    }

    /// When the next call will have waited too long.
    fn due(&self) -> Option<Duration> {
        self.waiting.front().map(|call| call.due)
    }
}

/// A place for a handshake, given back when it is dropped.
struct Place {
    from: AddressBlock,
    over: mpsc::Sender<AddressBlock>,
}

impl Drop for Place {
    fn drop(&mut self) {
        // There is room for as many as there are places. An error: the mesh stops.
        let _ = self.over.try_send(self.from);
    }
}

pub(super) async fn accept_all(shared: Arc<Shared>) {
    let patience = shared.config.quic.handshake_timeout * WAIT_TENTHS / 10;
    let mut line = Line::new(patience);
    let (over, mut places) = mpsc::channel(MAX_HANDSHAKES);
    let mut stopping = shared.stopping.subscribe();
    loop {
        while let Some((from, incoming)) = line.next() {
            let over = over.clone();
            begin(&shared, incoming, Place { from, over });
        }
        let due = line.due().map(|due| shared.instant(due));
        tokio::select! {
            incoming = shared.endpoint.accept() => {
                let Some(incoming) = incoming else { break };
                let Some(incoming) = answered(&shared, incoming) else { continue };
                let from = AddressBlock::of(incoming.remote_address().ip());
                if let Some(incoming) = line.push(from, shared.now(), incoming) {
                    shared.refused(|counts| counts.busy += 1);
                    incoming.refuse();
                }
            }
            Some(from) = places.recv() => line.over(from),
            () = driver::sleep_until(due), if due.is_some() => {
                while let Some(incoming) = line.late(shared.now()) {
                    shared.refused(|counts| counts.busy += 1);
                    incoming.refuse();
                }
            }
            // What waits is refused with the line.
            _ = stopping.wait_for(|stopping| *stopping) => break,
        }
    }
}

/// What costs next to nothing, for whoever knocks. Who remains may wait for a place.
fn answered(shared: &Shared, incoming: Incoming) -> Option<Incoming> {
    if shared.closed_because().is_some() {
        shared.refused(|counts| counts.closed += 1);
        incoming.refuse();
        return None;
    }
    if !incoming.remote_address_validated() {
        // Nothing is kept for an address that has not shown that it receives.
        if incoming.may_retry() {
            let _ = incoming.retry();
        } else {
            incoming.refuse();
        }
        return None;
    }
    let from = AddressBlock::of(incoming.remote_address().ip());
    if !shared.quotas.handshake(from) {
        shared.refused(|counts| counts.address_quota += 1);
        incoming.ignore();
        return None;
    }
    Some(incoming)
}

/// Begins a handshake; what it leads to has a task of its own.
fn begin(shared: &Arc<Shared>, incoming: Incoming, place: Place) {
    if shared.closed_because().is_some() {
        // It was closed while the call waited.
        shared.refused(|counts| counts.closed += 1);
        incoming.refuse();
        return;
    }
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let timeout = shared.config.quic.handshake_timeout;
        let accepted = match shared.server_config(&incoming) {
            Some(config) => incoming.accept_with(config),
            None => incoming.accept(),
        };
        let connected = match accepted {
            Ok(connecting) => tokio::time::timeout(timeout, connecting).await.ok(),
            Err(_) => None,
        };
        drop(place);
        match connected {
            Some(Ok(connection)) => {
                // The session outlives the handshake, and needs none of its memory.
                tokio::spawn(driver::run(shared, connection, false));
            }
            // Which certificate was refused, and why, the verifier's observer has told.
            Some(Err(_)) | None => shared.refused(|counts| counts.handshake += 1),
        }
    });
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(3);

    fn address(number: usize) -> AddressBlock {
        let number = u32::try_from(0x7f00_0000 + number).unwrap();
        AddressBlock::of(Ipv4Addr::from(number).into())
    }

    fn line() -> Line<usize> {
        Line::new(PATIENCE)
    }

    /// Begins whatever may begin, and says from where it came.
    fn begun(line: &mut Line<usize>) -> Vec<AddressBlock> {
        std::iter::from_fn(|| line.next())
            .map(|(from, _)| from)
            .collect()
    }

    #[test]
    fn more_calls_than_places_are_taken_in_their_order_and_none_is_sent_away() {
        let mut line = line();
        let calls = MAX_HANDSHAKES + MAX_CALLS_WAITING;
        let mut taken = Vec::new();
        for call in 0..calls {
            assert_eq!(line.push(address(call), Duration::ZERO, call), None);
            taken.extend(begun(&mut line));
        }
        assert_eq!(taken.len(), MAX_HANDSHAKES, "the control");
        for call in 0..calls {
            line.over(address(call));
            taken.extend(begun(&mut line));
        }
        assert_eq!(taken, (0..calls).map(address).collect::<Vec<_>>());
        assert!(line.going.is_empty() && line.waiting.is_empty());
    }

    #[test]
    fn inv_07_a_full_line_takes_no_more_and_a_call_waits_for_its_time_only() {
        let mut line = line();
        for call in 0..MAX_HANDSHAKES + MAX_CALLS_WAITING {
            assert_eq!(line.push(address(call), Duration::ZERO, call), None);
            begun(&mut line);
        }
        assert_eq!(
            line.push(address(9_999), Duration::ZERO, 9_999),
            Some(9_999)
        );
        assert_eq!(line.waiting.len(), MAX_CALLS_WAITING);
        assert_eq!(line.due(), Some(PATIENCE));
        assert_eq!(line.late(PATIENCE - Duration::from_nanos(1)), None);
        // The control: one that has a place in time is not sent away.
        line.over(address(0));
        assert_eq!(begun(&mut line), [address(MAX_HANDSHAKES)]);
        let late: Vec<_> = std::iter::from_fn(|| line.late(PATIENCE)).collect();
        assert_eq!(late.len(), MAX_CALLS_WAITING - 1);
        assert_eq!(line.due(), None);
    }

    #[test]
    fn inv_13_a_flood_from_one_address_takes_neither_the_places_nor_the_line_from_others() {
        let flood = address(1);
        let mut line = line();
        for call in 0..2 * MAX_CALLS_WAITING {
            line.push(flood, Duration::ZERO, call);
            begun(&mut line);
        }
        // The control: it has its part of the places, and fills the line.
        assert_eq!(line.going(flood), MAX_HANDSHAKES_ADDRESS);
        assert_eq!(line.waiting.len(), MAX_CALLS_WAITING);
        let places = MAX_HANDSHAKES - MAX_HANDSHAKES_ADDRESS;
        let honest: Vec<AddressBlock> = (2..2 + places + MAX_CALLS_WAITING).map(address).collect();
        let mut taken = Vec::new();
        for (from, call) in honest.iter().zip(10_000..) {
            let sent_away = line.push(*from, Duration::ZERO, call);
            assert!(sent_away.is_none_or(|sent_away| sent_away < 10_000));
            taken.extend(begun(&mut line));
        }
        assert_eq!(taken, honest[..places], "at once");
        for from in &honest {
            line.over(*from);
            taken.extend(begun(&mut line));
        }
        assert_eq!(taken, honest, "all of them, and nobody else");
        assert_eq!(line.going(flood), MAX_HANDSHAKES_ADDRESS);
    }

    #[test]
    fn inv_13_of_many_addresses_that_stall_none_has_a_second_place_before_another_has_its_first() {
        let stalling = 2 * MAX_HANDSHAKES / MAX_HANDSHAKES_ADDRESS;
        let mut line = line();
        for call in 0..MAX_CALLS_WAITING {
            line.push(address(call % stalling), Duration::ZERO, call);
            begun(&mut line);
        }
        assert_eq!(line.going.values().sum::<usize>(), MAX_HANDSHAKES);
        // Last in line, and the first place that comes free is his.
        let honest = address(9_999);
        assert_eq!(line.push(honest, Duration::ZERO, 9_999), None);
        assert!(begun(&mut line).is_empty());
        line.over(address(0));
        assert_eq!(begun(&mut line), [honest]);
        // The control: the next one is theirs again.
        line.over(address(0));
        assert_eq!(begun(&mut line), [address(0)]);
    }
}
