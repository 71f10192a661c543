//! Two sockets at the ends of a link, for a tokio runtime whose time stands still until everybody
//! waits: the whole shell runs over it, and how busy the machine is makes no difference.

use std::{
    collections::VecDeque,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use tidelock_link::{Counters, Fate, Link};
use tokio::time::{Instant, Sleep, sleep_until};

/// One direction.
#[derive(Debug)]
struct Lane {
    link: Link,
    begun: Instant,
    // In the order of arrival: the link lets nobody overtake.
    waiting: VecDeque<(Instant, Vec<u8>)>,
    reader: Option<Waker>,
}

/// An end of the wire.
#[derive(Debug)]
pub(crate) struct End {
    address: SocketAddr,
    other: SocketAddr,
    out: Arc<Mutex<Lane>>,
    inward: Arc<Mutex<Lane>>,
    sleep: Mutex<Option<Pin<Box<Sleep>>>>,
}

/// A wire between two addresses, with a link for each direction.
pub(crate) fn wire(addresses: [SocketAddr; 2], links: [Link; 2]) -> [Arc<End>; 2] {
    let begun = Instant::now();
    let [there, back] = links.map(|link| {
        Arc::new(Mutex::new(Lane {
            link,
            begun,
            waiting: VecDeque::new(),
            reader: None,
        }))
    });
    let end = |address, other, out: &Arc<Mutex<Lane>>, inward: &Arc<Mutex<Lane>>| {
        Arc::new(End {
            address,
            other,
            out: Arc::clone(out),
            inward: Arc::clone(inward),
            sleep: Mutex::default(),
        })
    };
    let [one, two] = addresses;
    [end(one, two, &there, &back), end(two, one, &back, &there)]
}

impl End {
    /// What this end has sent.
    pub(crate) fn counters(&self) -> Counters {
        self.out.lock().unwrap().link.counters()
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for End {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        assert_eq!(transmit.destination, self.other);
        let mut lane = self.out.lock().unwrap();
        let sent = lane.begun.elapsed();
        if let Fate::Arrives(at) = lane.link.offer(sent, transmit.contents.len()) {
            let at = lane.begun + at;
            lane.waiting.push_back((at, transmit.contents.to_vec()));
            if let Some(reader) = lane.reader.take() {
                reader.wake();
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut lane = self.inward.lock().unwrap();
        lane.reader = Some(cx.waker().clone());
        let Some((at, _)) = lane.waiting.front() else {
            return Poll::Pending;
        };
        if *at > Instant::now() {
            let mut sleep = self.sleep.lock().unwrap();
            let sleep = sleep.insert(Box::pin(sleep_until(*at)));
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        let (_, datagram) = lane.waiting.pop_front().unwrap();
        bufs[0][..datagram.len()].copy_from_slice(&datagram);
        meta[0] = RecvMeta {
            addr: self.other,
            len: datagram.len(),
            stride: datagram.len(),
            ecn: None,
            dst_ip: None,
        };
        Poll::Ready(Ok(1))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}
