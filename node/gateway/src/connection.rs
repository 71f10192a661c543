//! One client's connection as the gateway watches it, and the bounded set of all of them.
//!
//! hyper speaks the protocol; this module says how long it may take and how many may be open. A
//! connection that has not presented valid credentials is a *stranger*: strangers have a small
//! allowance of their own, and when it is used up the oldest stranger makes room for the newest.
//! So a flood of connections costs only other strangers, and a caller that authenticates at once
//! gets in.
//!
//! No connection has a timer. Each notes what it is doing and since when; one sweep for all of
//! them closes what has taken too long.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::rt::{Read, ReadBufCursor, Write};
use rustls::pki_types::CertificateDer;
use tokio::sync::Notify;

use crate::auth::Who;
use crate::refusals::Source;

/// Why the gateway closed a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CloseCause {
    /// The head of a request took too long.
    SlowHead,
    /// No valid credentials within the time for that.
    Stranger,
    /// No request for too long.
    Idle,
    /// The client does not read its responses.
    SlowReader,
    /// A newer stranger needed the room.
    Evicted,
}

/// How long a connection may take for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub(crate) head: Duration,
    pub(crate) stranger: Duration,
    pub(crate) idle: Duration,
    pub(crate) write: Duration,
}

/// One open connection.
#[derive(Debug)]
pub(crate) struct Connection {
    id: u64,
    source: Source,
    // What the client presented in its handshake, at a door that speaks TLS.
    certificates: OnceLock<Vec<CertificateDer<'static>>>,
    opened: Instant,
    // Who has made it known; the connection counts to this one's share.
    known_by: OnceLock<Who>,
    // Set once a request came as HTTP/2: bytes between requests are then pings and window
    // updates, not the beginning of a slow head.
    multiplexed: AtomicBool,
    // Whether bytes of a head are awaited since `since_ms`; else nothing is, since then.
    reading_head: AtomicBool,
    requests: AtomicUsize,
    since_ms: AtomicU64,
    // When a write began to wait, plus one; zero when none waits.
    write_waits_ms: AtomicU64,
    close: Notify,
    finish: Notify,
}

impl Connection {
    fn new(id: u64, source: Source) -> Self {
        Self {
            id,
            source,
            certificates: OnceLock::new(),
            opened: Instant::now(),
            known_by: OnceLock::new(),
            multiplexed: AtomicBool::new(false),
            reading_head: AtomicBool::new(true),
            requests: AtomicUsize::new(0),
            since_ms: AtomicU64::new(0),
            write_waits_ms: AtomicU64::new(0),
            close: Notify::new(),
            finish: Notify::new(),
        }
    }

    pub(crate) fn source(&self) -> Source {
        self.source
    }

    /// Notes the chain of a handshake that ended well, leaf first.
    pub(crate) fn certified(&self, chain: Vec<CertificateDer<'static>>) {
        // There is one handshake a connection.
        let _ = self.certificates.set(chain);
    }

    /// The chain of the handshake; empty at other doors.
    pub(crate) fn certificates(&self) -> &[CertificateDer<'static>] {
        self.certificates.get().map_or(&[], Vec::as_slice)
    }

    /// Resolves when the gateway wants this connection gone.
    pub(crate) async fn told_to_close(&self) {
        self.close.notified().await;
    }

    /// Lets what is under way on this connection end, and nothing further begin.
    pub(crate) fn finish(&self) {
        self.finish.notify_one();
    }

    /// Resolves when [`Connection::finish`] was called.
    pub(crate) async fn told_to_finish(&self) {
        self.finish.notified().await;
    }

    /// Notes that a request's head has arrived. The connection is busy until the guard drops.
    pub(crate) fn begin_request(self: &Arc<Self>, multiplexed: bool) -> Busy {
        self.requests.fetch_add(1, Ordering::AcqRel);
        self.reading_head.store(false, Ordering::Release);
        if multiplexed {
            self.multiplexed.store(true, Ordering::Release);
        }
        Busy(Arc::clone(self))
    }

    fn age_ms(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn bytes_arrived(&self) {
        if self.requests.load(Ordering::Acquire) == 0
            && !self.multiplexed.load(Ordering::Acquire)
            && !self.reading_head.load(Ordering::Acquire)
        {
            self.since_ms.store(self.age_ms(), Ordering::Release);
            self.reading_head.store(true, Ordering::Release);
        }
    }

    fn write_waits(&self, waits: bool) {
        let waited = self.write_waits_ms.load(Ordering::Acquire);
        if !waits && waited != 0 {
            self.write_waits_ms.store(0, Ordering::Release);
        } else if waits && waited == 0 {
            self.write_waits_ms
                .store(self.age_ms().saturating_add(1), Ordering::Release);
        }
    }

    fn overdue(&self, patience: &Patience) -> Option<CloseCause> {
        let age = self.age_ms();
        let over = |since_ms: u64, limit: Duration| {
            u128::from(age.saturating_sub(since_ms)) > limit.as_millis()
        };
        let write_waits = self.write_waits_ms.load(Ordering::Acquire);
        if write_waits != 0 && over(write_waits, patience.write) {
            return Some(CloseCause::SlowReader);
        }
        // A request in progress has its own deadlines.
        if self.requests.load(Ordering::Acquire) > 0 {
            return None;
        }
        if self.known_by.get().is_none() && over(0, patience.stranger) {
            return Some(CloseCause::Stranger);
        }
        let since = self.since_ms.load(Ordering::Acquire);
        if self.reading_head.load(Ordering::Acquire) {
            over(since, patience.head).then_some(CloseCause::SlowHead)
        } else {
            over(since, patience.idle).then_some(CloseCause::Idle)
        }
    }
}

/// A request in progress on a connection.
pub(crate) struct Busy(Arc<Connection>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.since_ms.store(self.0.age_ms(), Ordering::Release);
        self.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What became of a connection that has presented valid credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It has a place among the known ones.
    Taken,
    /// All of them are taken, or it was evicted a moment ago.
    None,
    /// Its caller has its whole share of them.
    NoneOfThisCaller,
}

/// All open connections of one door.
#[derive(Debug)]
pub(crate) struct Registry {
    known_max: usize,
    known_of_one_max: usize,
    strangers_max: usize,
    strangers_of_one_max: usize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next_id: u64,
    known: BTreeMap<u64, Arc<Connection>>,
    // How many of the known ones each caller has; those without any are not in it.
    held: BTreeMap<Who, usize>,
    strangers: BTreeMap<u64, Arc<Connection>>,
}

impl Registry {
    pub(crate) fn new(known_max: usize, strangers_max: usize) -> Self {
        Self {
            known_max,
            // INV-13: no caller keeps the others out.
            known_of_one_max: known_max.div_ceil(2),
            strangers_max,
            strangers_of_one_max: strangers_max,
            open: Mutex::default(),
        }
    }

    /// The same, for a door that other machines reach: no address has more than a quarter of the
    /// places of strangers.
    pub(crate) fn shared(self) -> Self {
        Self {
            strangers_of_one_max: self.strangers_max.div_ceil(4),
            ..self
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new connection in, as a stranger. The second value says whether an older stranger
    /// had to go for it.
    // INV-07: neither map outgrows its limit.
    pub(crate) fn admit(&self, source: Source) -> (Arc<Connection>, bool) {
        let mut open = self.lock();
        let mut evicted = false;
        if self.strangers_of_one_max < self.strangers_max {
            let strangers = open.strangers.values();
            let of_one: Vec<u64> = strangers
                .filter(|stranger| stranger.source == source)
                .map(|stranger| stranger.id)
                .collect();
            if of_one.len() >= self.strangers_of_one_max
                && let Some(oldest) = of_one.first()
                && let Some(oldest) = open.strangers.remove(oldest)
            {
                oldest.close.notify_one();
                evicted = true;
            }
        }
        while open.strangers.len() >= self.strangers_max {
            let Some((_, oldest)) = open.strangers.pop_first() else {
                break;
            };
            oldest.close.notify_one();
            evicted = true;
        }
        let id = open.next_id;
        open.next_id = id.wrapping_add(1);
        let connection = Arc::new(Connection::new(id, source));
        open.strangers.insert(id, Arc::clone(&connection));
        (connection, evicted)
    }

    /// Notes that a connection has presented valid credentials of this caller.
    pub(crate) fn make_known(&self, connection: &Connection, caller: &Who) -> Place {
        if connection.known_by.get().is_some() {
            return Place::Taken;
        }
        let mut open = self.lock();
        if open.known.contains_key(&connection.id) {
            return Place::Taken;
        }
        // The share first: who is over it learns that, whoever else is there.
        if open
            .held
            .get(caller)
            .is_some_and(|held| *held >= self.known_of_one_max)
        {
            return Place::NoneOfThisCaller;
        }
        if open.known.len() >= self.known_max {
            return Place::None;
        }
        let Some(stranger) = open.strangers.remove(&connection.id) else {
            return Place::None;
        };
        // Under the lock, so it is set once.
        let _ = connection.known_by.set(caller.clone());
        *open.held.entry(caller.clone()).or_default() += 1;
        open.known.insert(connection.id, stranger);
        Place::Taken
    }

    pub(crate) fn forget(&self, connection: &Connection) {
        let mut open = self.lock();
        if open.known.remove(&connection.id).is_some() {
            release(&mut open.held, connection);
        }
        open.strangers.remove(&connection.id);
    }

    /// Tells every connection that has taken too long to close, and reports each.
    pub(crate) fn sweep(&self, patience: &Patience, mut closed: impl FnMut(CloseCause)) {
        let mut open = self.lock();
        let Open {
            known,
            held,
            strangers,
            ..
        } = &mut *open;
        let mut stays = |connection: &Connection| match connection.overdue(patience) {
            None => true,
            Some(cause) => {
                connection.close.notify_one();
                closed(cause);
                false
            }
        };
        known.retain(|_, connection| {
            let stays = stays(connection);
            if !stays {
                release(held, connection);
            }
            stays
        });
        strangers.retain(|_, connection| stays(connection));
    }

    /// How many are open: known ones, strangers.
    pub(crate) fn count(&self) -> (usize, usize) {
        let open = self.lock();
        (open.known.len(), open.strangers.len())
    }
}

/// Gives a known connection's place back to its caller's share.
fn release(held: &mut BTreeMap<Who, usize>, connection: &Connection) {
    let Some(caller) = connection.known_by.get() else {
        return;
    };
    if let Some(count) = held.get_mut(caller) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            held.remove(caller);
        }
    }
}

/// The byte stream of a connection, which tells the connection when bytes come or cannot go.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    io: T,
    connection: Arc<Connection>,
}

impl<T> Watched<T> {
    pub(crate) fn new(io: T, connection: Arc<Connection>) -> Self {
        Self { io, connection }
    }
}

impl<T: Read + Unpin> Read for Watched<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_read(cx, buf);
        if polled.is_ready() {
            this.connection.bytes_arrived();
        }
        polled
    }
}

impl<T: Write + Unpin> Write for Watched<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_write(cx, buf);
        this.connection.write_waits(polled.is_pending());
        polled
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_write_vectored(cx, bufs);
        this.connection.write_waits(polled.is_pending());
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: Patience = Patience {
        head: Duration::ZERO,
        stranger: Duration::MAX,
        idle: Duration::MAX,
        write: Duration::MAX,
    };

    fn who(id: &str) -> Who {
        ("Agent".to_owned(), id.to_owned())
    }

    fn told(connection: &Connection) -> bool {
        let mut told = Box::pin(connection.told_to_close());
        let waker = std::task::Waker::noop();
        told.as_mut()
            .poll(&mut Context::from_waker(waker))
            .is_ready()
    }

    #[test]
    fn inv_07_strangers_make_room_for_strangers_only() {
        let registry = Registry::new(2, 3);
        let (caller, _) = registry.admit(Source::Unix(1));
        assert_eq!(registry.make_known(&caller, &who("a")), Place::Taken);

        let (first, evicted) = registry.admit(Source::Unix(2));
        assert!(!evicted);
        for _ in 0..100 {
            registry.admit(Source::Unix(2));
        }
        assert_eq!(registry.count(), (1, 3));
        assert!(told(&first), "the oldest stranger went");
        assert!(!told(&caller), "the caller stayed");
        let gone = registry.make_known(&first, &who("b"));
        assert_eq!(gone, Place::None, "what was evicted is gone");

        // A caller that authenticates gets in during the flood, up to the limit.
        let (late, _) = registry.admit(Source::Unix(1));
        for _ in 0..2 {
            assert_eq!(registry.make_known(&late, &who("b")), Place::Taken);
        }
        let (over, _) = registry.admit(Source::Unix(1));
        assert_eq!(registry.make_known(&over, &who("c")), Place::None);
        registry.forget(&late);
        assert_eq!(registry.make_known(&over, &who("c")), Place::Taken);
        assert_eq!(registry.count().0, 2);
    }

    #[test]
    fn inv_13_no_caller_has_more_than_half_of_the_known_connections() {
        let registry = Registry::new(5, 8);
        let known = |caller: &str| {
            let (connection, _) = registry.admit(Source::Unix(1));
            let place = registry.make_known(&connection, &who(caller));
            (connection, place)
        };
        let (first, _) = known("greedy");
        let (second, _) = known("greedy");
        assert_eq!(known("greedy").1, Place::Taken);
        assert_eq!(known("greedy").1, Place::NoneOfThisCaller);
        // The control: another has room, until all is taken.
        assert_eq!(known("modest").1, Place::Taken);
        assert_eq!(known("modest").1, Place::Taken);
        assert_eq!(known("modest").1, Place::None);
        // What ends is given back, however it ends.
        registry.forget(&first);
        registry.forget(&first);
        assert_eq!(known("greedy").1, Place::Taken);
        assert_eq!(known("greedy").1, Place::NoneOfThisCaller);
        drop(second.begin_request(false));
        std::thread::sleep(Duration::from_millis(3));
        let idle = Patience {
            head: Duration::MAX,
            idle: Duration::ZERO,
            ..ZERO
        };
        registry.sweep(&idle, |_| {});
        assert_eq!(known("greedy").1, Place::Taken);
        assert_eq!(known("greedy").1, Place::NoneOfThisCaller);
    }

    #[test]
    fn inv_07_no_address_takes_the_places_of_strangers_from_the_others() {
        let registry = Registry::new(1, 8).shared();
        let (other, _) = registry.admit(Source::Unix(1));
        let (first, evicted) = registry.admit(Source::Unix(2));
        assert!(!evicted);
        for _ in 0..100 {
            registry.admit(Source::Unix(2));
        }
        assert_eq!(registry.count(), (0, 3), "two of the one, one of the other");
        assert!(told(&first) && !told(&other));
        for uid in 3..9 {
            registry.admit(Source::Unix(uid));
        }
        assert_eq!(registry.count(), (0, 8));
        assert!(told(&other), "among many the oldest goes");
    }

    #[test]
    fn a_sweep_closes_what_takes_too_long_and_nothing_else() {
        let registry = Registry::new(4, 4);
        let (slow, _) = registry.admit(Source::Unix(1));
        let (busy, _) = registry.admit(Source::Unix(1));
        let (idle, _) = registry.admit(Source::Unix(1));
        let request = busy.begin_request(false);
        drop(idle.begin_request(false));
        std::thread::sleep(Duration::from_millis(3));

        let mut causes = Vec::new();
        registry.sweep(&ZERO, |cause| causes.push(cause));
        assert_eq!(causes, [CloseCause::SlowHead]);
        assert_eq!(
            (told(&slow), told(&busy), told(&idle)),
            (true, false, false)
        );

        drop(request);
        // The first byte of the next head starts its clock; an HTTP/2 ping does not.
        busy.bytes_arrived();
        drop(idle.begin_request(true));
        idle.bytes_arrived();
        std::thread::sleep(Duration::from_millis(3));
        causes.clear();
        registry.sweep(&ZERO, |cause| causes.push(cause));
        assert_eq!(causes, [CloseCause::SlowHead]);
        assert_eq!((told(&busy), told(&idle)), (true, false));

        causes.clear();
        registry.sweep(
            &Patience {
                idle: Duration::ZERO,
                ..ZERO
            },
            |cause| causes.push(cause),
        );
        assert_eq!(causes, [CloseCause::Idle]);
        assert_eq!(registry.count(), (0, 0));
    }

    #[test]
    fn a_client_that_does_not_read_is_closed_even_while_busy() {
        let registry = Registry::new(1, 1);
        let (stuck, _) = registry.admit(Source::Unix(1));
        let _request = stuck.begin_request(false);
        let patience = Patience {
            write: Duration::ZERO,
            ..ZERO
        };
        stuck.write_waits(true);
        stuck.write_waits(false);
        std::thread::sleep(Duration::from_millis(5));
        registry.sweep(&patience, |_| panic!("it had been read in time"));

        stuck.write_waits(true);
        std::thread::sleep(Duration::from_millis(5));
        let mut causes = Vec::new();
        registry.sweep(&patience, |cause| causes.push(cause));
        assert_eq!(causes, [CloseCause::SlowReader]);
    }
}
