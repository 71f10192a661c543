//! The cap on what a node sends: a token bucket before its one socket, so that it holds over all
//! sessions, handshakes and acknowledgements, however short a round trip is and whatever a
//! congestion control thinks of the path.
//!
//! A session that is held back keeps the datagrams it has made and makes no others: nothing is
//! dropped and nothing queues up. Answers to strangers (Retry, refusals) are dropped, as by any full
//! socket.

use std::{
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

/// From this cap on datagrams are given to the kernel many at once; below it one by one, so that a
/// burst is one datagram.
const SEGMENTED_FROM_BYTES_PER_SECOND: u32 = 8 * 1024 * 1024;

/// Part of a second that the bucket holds.
const BURST_PART: u32 = 50;

/// The least that the bucket holds: the longest datagram that quinn is told to make.
const BURST_MIN_BYTES: u32 = 6_500;

// What the kernel is given at once fits the bucket.
const _: () = assert!(SEGMENTED_FROM_BYTES_PER_SECOND / BURST_PART >= 65_535);
const _: () = assert!(BURST_MIN_BYTES >= MTU_MAX as u32);

/// A socket that sends no more than so many bytes a second.
pub(super) struct ThrottledSocket {
    socket: Arc<dyn AsyncUdpSocket>,
    bucket: TokenBuckets<(), MonotonicClock>,
    segmented: bool,
    // When the one who was refused last may try again. Others wait with it, so that short datagrams
    // do not for ever take what a long one waits for.
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
        let rate = Rate {
            per_second: bytes_per_second,
            burst: (bytes_per_second / BURST_PART).max(BURST_MIN_BYTES),
        };
        Ok(Self {
            socket,
            bucket: TokenBuckets::new(rate, 1, clock.clone())?,
            segmented,
            open_at: Mutex::default(),
        })
    }

    fn open_at(&self) -> Option<Instant> {
        *lock(&self.open_at)
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
        // Nothing that is sent costs more than the bucket holds, or it would wait for ever.
        let burst = self.bucket.rate().burst;
        let cost = u32::try_from(transmit.contents.len()).map_or(burst, |cost| cost.min(burst));
        if let Err(refused) = self.bucket.check(&(), cost) {
            let wait = refused.retry_after().unwrap_or_default();
            *lock(&self.open_at) = Some(Instant::now() + wait);
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
            match this.socket.open_at() {
                Some(at) if at > Instant::now() => {
                    this.sleep = Some(Box::pin(sleep_until(at)));
                }
                _ => return this.poller.as_mut().poll_writable(cx),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, net::UdpSocket, time::Duration};

    use quinn::{Runtime, TokioRuntime};

    use super::*;

    /// Sends datagrams of these lengths in turn for as long as the bucket lets it wait; answers with
    /// bytes and time.
    async fn send(cap: Option<u32>, lengths: &[usize], datagrams: usize) -> (usize, Duration) {
        let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let target = bind();
        let mut socket = TokioRuntime.wrap_udp_socket(bind()).unwrap();
        if let Some(cap) = cap {
            socket = Arc::new(ThrottledSocket::new(socket, cap, &MonotonicClock::new()).unwrap());
            assert_eq!(socket.max_transmit_segments(), 1);
        }
        let mut poller = Arc::clone(&socket).create_io_poller();
        let contents = vec![7; 65_000];
        let begun = std::time::Instant::now();
        let mut bytes = 0;
        for length in lengths.iter().cycle().take(datagrams) {
            let transmit = Transmit {
                destination: target.local_addr().unwrap(),
                ecn: None,
                contents: &contents[..*length],
                segment_size: None,
                src_ip: None,
            };
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
        let (bytes, took) = send(Some(cap), &[1_200, 40, 6_000], 30).await;
        let most = u128::from(BURST_MIN_BYTES) + u128::from(cap) * took.as_nanos() / 1_000_000_000;
        assert!(bytes as u128 <= most + 1, "{bytes} bytes, {most} were due");
        assert!(took >= Duration::from_millis(500), "{took:?}");
    }

    #[tokio::test]
    async fn what_is_longer_than_the_bucket_empties_it_and_passes() {
        let (bytes, took) = send(Some(100_000), &[20_000], 3).await;
        assert_eq!(bytes, 60_000);
        assert!(took >= Duration::from_millis(100), "{took:?}");
    }

    #[tokio::test]
    async fn without_a_cap_nothing_waits_for_tokens() {
        let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = TokioRuntime.wrap_udp_socket(bind()).unwrap();
        let high = ThrottledSocket::new(Arc::clone(&socket), u32::MAX, &MonotonicClock::new());
        assert_eq!(
            high.unwrap().max_transmit_segments(),
            socket.max_transmit_segments()
        );
        assert!(ThrottledSocket::new(socket, 0, &MonotonicClock::new()).is_err());
        assert_eq!(send(None, &[1_200], 200).await.0, 240_000);
    }
}
