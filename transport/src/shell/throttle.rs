//! The cap on what a node sends: a token bucket before its one socket, so that it holds over all
//! sessions, handshakes and acknowledgements, however short a round trip is and whatever a
//! congestion control thinks of the path.
//!
//! A session that is held back keeps the datagrams it has made and makes no others: nothing is
//! dropped and nothing queues up. Answers to strangers (Retry, refusals) have a small part of the cap
//! and are dropped past it, as by any full socket: so strangers take no more than that from the
//! sessions, and sessions that fill the cap do not shut out whoever comes.

use std::{
    cell::Cell,
    fmt,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use tidelock_quota::{MonotonicClock, Rate, TokenBuckets};
use tokio::time::{Instant, Sleep, sleep_until};

use super::{MeshError, lock, quic::MTU_MAX};
use crate::limits::MIN_SEND_BYTES_PER_SECOND;

/// From this cap on datagrams are given to the kernel many at once; below it one by one, so that a
/// burst is one datagram.
const SEGMENTED_FROM_BYTES_PER_SECOND: u32 = 8 * 1024 * 1024;

/// Part of a second that the bucket holds.
const BURST_PART: u32 = 50;

/// The least that the bucket holds: the longest datagram that quinn is told to make.
const BURST_MIN_BYTES: u32 = 6_500;

/// Part of the cap that answers to strangers may take.
const STRANGERS_PART: u32 = 16;

/// The least that the bucket of these answers holds: the longest of them is one datagram of 1,200 bytes.
const STRANGERS_BURST_MIN_BYTES: u32 = 1_280;

// What the kernel is given at once fits the bucket.
const _: () = assert!(SEGMENTED_FROM_BYTES_PER_SECOND / BURST_PART >= 65_535);
const _: () = assert!(BURST_MIN_BYTES >= MTU_MAX as u32);
// A cap that is allowed leaves them something.
const _: () = assert!(MIN_SEND_BYTES_PER_SECOND >= STRANGERS_PART);

thread_local! {
    // Whether the datagram that this thread sends next is a session's. quinn asks a session's poller and
    // sends in one go; what it answers to strangers it sends without asking.
    static OF_SESSION: Cell<bool> = const { Cell::new(false) };
}

/// A socket that sends no more than so many bytes a second.
pub(super) struct ThrottledSocket {
    socket: Arc<dyn AsyncUdpSocket>,
    bucket: TokenBuckets<(), MonotonicClock>,
    strangers: TokenBuckets<(), MonotonicClock>,
    segmented: bool,
    // When the session that was refused last may try again. The others wait with it, so that short
    // datagrams do not for ever take what a long one waits for.
    open_at: Mutex<Option<Instant>>,
}

impl fmt::Debug for ThrottledSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThrottledSocket")
            .field("socket", &self.socket)
            .field("bucket", &self.bucket)
            .finish_non_exhaustive()
    }
}

impl ThrottledSocket {
    /// `socket` with a cap in bytes of UDP payload a second.
    ///
    /// # Errors
    /// A cap of 0.
    pub(super) fn new(
        socket: Arc<dyn AsyncUdpSocket>,
        bytes_per_second: u32,
        clock: &MonotonicClock,
    ) -> Result<Self, MeshError> {
        let segmented = bytes_per_second >= SEGMENTED_FROM_BYTES_PER_SECOND;
        let buckets = |per_second: u32, least: u32| {
            let burst = (per_second / BURST_PART).max(least);
            TokenBuckets::new(Rate { per_second, burst }, 1, clock.clone())
        };
        Ok(Self {
            socket,
            bucket: buckets(bytes_per_second, BURST_MIN_BYTES)?,
            strangers: buckets(bytes_per_second / STRANGERS_PART, STRANGERS_BURST_MIN_BYTES)?,
            segmented,
            open_at: Mutex::default(),
        })
    }

    /// When sessions may send again, if they may not now.
    fn open_at(&self) -> Option<Instant> {
        lock(&self.open_at).filter(|at| *at > Instant::now())
    }

    fn charge_session(&self, bytes: usize) -> bool {
        if self.open_at().is_some() {
            return false;
        }
        // Nothing that is sent costs more than the bucket holds, or it would wait for ever.
        let burst = self.bucket.rate().burst;
        let cost = u32::try_from(bytes).map_or(burst, |cost| cost.min(burst));
        let Err(refused) = self.bucket.check(&(), cost) else {
            return true;
        };
        let wait = refused.retry_after().unwrap_or_default();
        *lock(&self.open_at) = Some(Instant::now() + wait);
        false
    }

    fn charge_stranger(&self, bytes: usize) -> bool {
        // The narrowest bucket first.
        u32::try_from(bytes).is_ok_and(|cost| {
            self.strangers.check(&(), cost).is_ok() && self.bucket.check(&(), cost).is_ok()
        })
    }
}

impl AsyncUdpSocket for ThrottledSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller {
            poller: Arc::clone(&self.socket).create_io_poller(),
            socket: self,
            sleep: None,
        })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let bytes = transmit.contents.len();
        let charged = if OF_SESSION.take() {
            self.charge_session(bytes)
        } else {
            self.charge_stranger(bytes)
        };
        if !charged {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // What the kernel refuses now is charged again when it is retried: less is sent than may be,
        // never more.
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        if self.segmented {
            self.socket.max_transmit_segments()
        } else {
            1
        }
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

/// Waits for tokens, then for the kernel.
struct Poller {
    poller: Pin<Box<dyn UdpPoller>>,
    socket: Arc<ThrottledSocket>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poller").finish_non_exhaustive()
    }
}

impl UdpPoller for Poller {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if let Some(sleep) = &mut this.sleep {
                ready!(sleep.as_mut().poll(cx));
                this.sleep = None;
            }
            if let Some(at) = this.socket.open_at() {
                this.sleep = Some(Box::pin(sleep_until(at)));
                continue;
            }
            let writable = this.poller.as_mut().poll_writable(cx);
            OF_SESSION.set(writable.is_ready());
            return writable;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        net::UdpSocket,
        sync::atomic::{AtomicBool, Ordering},
        time::Duration,
    };

    use quinn::{Runtime, TokioRuntime};

    use super::*;

    static DATA: [u8; 65_000] = [7; 65_000];

    fn bind() -> Arc<dyn AsyncUdpSocket> {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        TokioRuntime.wrap_udp_socket(socket).unwrap()
    }

    fn capped(cap: u32) -> Arc<ThrottledSocket> {
        Arc::new(ThrottledSocket::new(bind(), cap, &MonotonicClock::new()).unwrap())
    }

    fn datagram(length: usize, target: &UdpSocket) -> Transmit<'static> {
        Transmit {
            destination: target.local_addr().unwrap(),
            ecn: None,
            contents: &DATA[..length],
            segment_size: None,
            src_ip: None,
        }
    }

    /// Sends datagrams of these lengths in turn, as a session does; answers with bytes and time.
    async fn send(
        socket: Arc<dyn AsyncUdpSocket>,
        lengths: &[usize],
        datagrams: usize,
    ) -> (usize, Duration) {
        let target = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut poller = Arc::clone(&socket).create_io_poller();
        let begun = std::time::Instant::now();
        let mut bytes = 0;
        for length in lengths.iter().cycle().take(datagrams) {
            let transmit = datagram(*length, &target);
            loop {
                poll_fn(|cx| poller.as_mut().poll_writable(cx))
                    .await
                    .unwrap();
                match socket.try_send(&transmit) {
                    Ok(()) => break,
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
            bytes += length;
        }
        (bytes, begun.elapsed())
    }

    #[tokio::test]
    async fn no_more_is_sent_than_the_bucket_gives() {
        let cap = 100_000;
        let socket = capped(cap);
        assert_eq!(socket.max_transmit_segments(), 1);
        let (bytes, took) = send(socket, &[1_200, 40, 6_000], 30).await;
        let most = u128::from(BURST_MIN_BYTES) + u128::from(cap) * took.as_nanos() / 1_000_000_000;
        assert!(bytes as u128 <= most + 1, "{bytes} bytes, {most} were due");
        assert!(took >= Duration::from_millis(500), "{took:?}");
    }

    #[tokio::test]
    async fn what_is_longer_than_the_bucket_empties_it_and_passes() {
        let (bytes, took) = send(capped(100_000), &[20_000], 3).await;
        assert_eq!(bytes, 60_000);
        assert!(took >= Duration::from_millis(100), "{took:?}");
    }

    #[tokio::test]
    async fn without_a_cap_nothing_waits_for_tokens() {
        let socket = bind();
        let high = ThrottledSocket::new(Arc::clone(&socket), u32::MAX, &MonotonicClock::new());
        assert_eq!(
            high.unwrap().max_transmit_segments(),
            socket.max_transmit_segments()
        );
        assert!(ThrottledSocket::new(Arc::clone(&socket), 0, &MonotonicClock::new()).is_err());
        assert_eq!(send(socket, &[1_200], 200).await.0, 240_000);
    }

    /// The story: whoever was refused held the sessions back, and what a stranger was answered did not
    /// wait with them, so a flood of Retries took every token before a session's datagram had its due.
    #[tokio::test]
    async fn inv_13_strangers_take_their_small_part_of_the_cap_and_the_session_the_rest() {
        const SHORT: usize = 40;
        let cap = 200_000;
        let begun = std::time::Instant::now();
        let socket = capped(cap);
        let over = Arc::new(AtomicBool::new(false));
        let strangers = std::thread::spawn({
            let (socket, over) = (Arc::clone(&socket), Arc::clone(&over));
            move || {
                let target = UdpSocket::bind("127.0.0.1:0").unwrap();
                let (mut bytes, mut dropped) = (0, 0_u64);
                // A machine that is busy elsewhere may leave this thread no time before.
                while !over.load(Ordering::Relaxed) || dropped == 0 {
                    match socket.try_send(&datagram(SHORT, &target)) {
                        Ok(()) => bytes += SHORT,
                        Err(_) => dropped += 1,
                    }
                    std::thread::yield_now();
                }
                (bytes, dropped)
            }
        });
        let (bytes, _) = send(socket, &[6_000], 25).await;
        over.store(true, Ordering::Relaxed);
        let (answered, dropped) = strangers.join().unwrap();
        // Taken last: all that was counted had been sent by then.
        let took = begun.elapsed();
        let share = |part: u32| u128::from(cap / part) * took.as_nanos() / 1_000_000_000;
        let most = share(STRANGERS_PART) + u128::from(STRANGERS_BURST_MIN_BYTES);
        assert!(answered as u128 <= most + 1, "{answered} bytes of {most}");
        assert!(dropped > 0, "it was a flood");
        // The control: they are answered while the session fills the cap.
        assert!(answered > SHORT, "{answered} bytes");
        let together = share(1) + u128::from(BURST_MIN_BYTES);
        assert!(
            (bytes + answered) as u128 <= together + 1,
            "{bytes} bytes in {took:?}"
        );
    }

    #[tokio::test]
    async fn a_session_that_is_held_back_holds_the_others_back_and_a_stranger_does_not() {
        let target = UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = capped(MIN_SEND_BYTES_PER_SECOND);
        // Strangers past their part: nobody waits for them.
        while socket.try_send(&datagram(40, &target)).is_ok() {}
        assert_eq!(socket.open_at(), None);
        // Sessions past theirs: a short datagram waits with the long one, though it would fit.
        send(Arc::clone(&socket) as Arc<dyn AsyncUdpSocket>, &[5_000], 1).await;
        OF_SESSION.set(true);
        assert!(socket.try_send(&datagram(6_000, &target)).is_err());
        let open_at = socket.open_at().unwrap();
        OF_SESSION.set(true);
        assert!(socket.try_send(&datagram(1, &target)).is_err());
        assert_eq!(socket.open_at(), Some(open_at));
    }
}
