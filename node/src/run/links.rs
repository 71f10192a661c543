//! What the kernel tells of this machine's links, so that a node that slept through an outage dials
//! when a link comes up, and not when its wait ends.
//!
//! A netlink socket (rtnetlink(7)) in the groups for links and addresses. It only listens, and what it
//! hears only ever causes dials to whom the config names, at the dialler's pace (ruling 26), and the end
//! of sessions that get no answer. A word too many costs a few packets for each session; without the
//! socket the node goes on as before.

use std::{
    collections::BTreeSet,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
        netlink::SocketAddrNetlink,
        recvfrom, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use serde_json::json;

use super::node::Node;

/// After a link-up was passed on. What comes meanwhile waits in the socket and counts as one.
const REST: Duration = Duration::from_millis(100);
/// The same link-up is passed on again, each so long after the rest from the one before: sessions that are
/// ended at first are dialled anew, neighbours must be found, bridges begin to forward, and an address may
/// come later than the carrier. All of them outlast the time of a handshake, so that a dial that was
/// under way does not end in a long wait.
const AGAIN: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(150),
    Duration::from_millis(400),
    Duration::from_millis(900),
    Duration::from_millis(1_900),
    Duration::from_millis(2_900),
];
/// While so many of them are to come, further news change nothing: links that flap, or come and go by the
/// dozen, cost no more than one.
const YOUNG: usize = 3;
/// Links that are remembered as up; a further one counts as news each time that it is told (INV-07).
const LINKS_MAX: usize = 1_024;
/// Longest datagram that is read whole; of a longer one it is assumed that it tells of a link-up.
const DATAGRAM_BYTES_MAX: usize = 16 * 1024;
/// Datagrams that are read without a pause. The rest of a flood counts as one word.
const DATAGRAMS_MAX: usize = 64;

// linux/rtnetlink.h: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR.
const GROUPS: u32 = 0x1 | 0x10 | 0x100;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
// linux/if.h
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
/// It can carry traffic (RFC 2863): it has a carrier, and whatever must be agreed on it is.
const IFF_RUNNING: u32 = 0x40;
/// linux/rtnetlink.h: RT_SCOPE_HOST, of loopback addresses.
const SCOPE_HOST: u8 = 254;

/// struct nlmsghdr, linux/netlink.h. Lengths count it, and messages begin at multiples of 4.
const HEADER_BYTES: usize = 16;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*field))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*field))
}

/// The links that were up by the kernel's last word.
#[derive(Debug, Default)]
struct Links(BTreeSet<u32>);

impl Links {
    /// Whether a datagram of the kernel tells of a link or an address that came up. What does not parse
    /// tells of nothing.
    fn observe(&mut self, mut datagram: &[u8]) -> bool {
        let mut news = false;
        while let Some((kind, body, rest)) = message(datagram) {
            news |= self.observe_one(kind, body).unwrap_or(false);
            datagram = rest;
        }
        news
    }

    /// None: it ends too early.
    fn observe_one(&mut self, kind: u16, body: &[u8]) -> Option<bool> {
        match kind {
            // struct ifinfomsg: family, type, index, flags, change.
            RTM_NEWLINK | RTM_DELLINK => {
                let (index, flags) = (u32_at(body, 4)?, u32_at(body, 8)?);
                let carries = IFF_UP | IFF_RUNNING;
                let is_up = kind == RTM_NEWLINK && flags & carries == carries;
                if !is_up {
                    self.0.remove(&index);
                    return Some(false);
                }
                let was_up = self.0.contains(&index);
                if !was_up && self.0.len() < LINKS_MAX {
                    self.0.insert(index);
                }
                Some(!was_up && flags & IFF_LOOPBACK == 0)
            }
            // struct ifaddrmsg: family, prefix length, flags, scope, index.
            RTM_NEWADDR => Some(*body.get(3)? != SCOPE_HOST && body.len() >= 8),
            _ => Some(false),
        }
    }

    /// What was told is lost: any link may have come up.
    fn lost(&mut self) -> bool {
        self.0.clear();
        true
    }
}

/// The first message of a datagram: its type, its body, and what comes after it.
fn message(datagram: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32_at(datagram, 0)?).ok()?;
    let kind = u16_at(datagram, 4)?;
    let body = datagram.get(HEADER_BYTES..length)?;
    let rest = datagram
        .get(length.next_multiple_of(4)..)
        .unwrap_or_default();
    Some((kind, body, rest))
}

/// The socket, and what was heard on it.
struct Watch {
    socket: OwnedFd,
    links: Links,
    buffer: Vec<u8>,
}

impl Watch {
    fn open() -> io::Result<Self> {
        // NETLINK_ROUTE is protocol 0.
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Self {
            socket,
            links: Links::default(),
            buffer: vec![0; DATAGRAM_BYTES_MAX],
        })
    }

    /// Waits until the kernel tells of something, and reads all that there is; whether a link came up. None
    /// where nothing was told in time.
    fn heard(&mut self, limit: Option<Duration>) -> io::Result<Option<bool>> {
        // Zero would be no limit.
        let limit = limit.map(|limit| limit.max(Duration::from_millis(1)));
        set_socket_timeout(&self.socket, Timeout::Recv, limit)?;
        let mut news = match self.read(RecvFlags::empty()) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            read => read?,
        };
        for _ in 0..DATAGRAMS_MAX {
            match self.read(RecvFlags::DONTWAIT) {
                Ok(more) => news |= more,
                Err(Errno::WOULDBLOCK) => return Ok(Some(news)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(self.links.lost()))
    }

    fn read(&mut self, how: RecvFlags) -> Result<bool, Errno> {
        let buffer = self.buffer.as_mut_slice();
        let (length, from) = match recvfrom(&self.socket, buffer, how | RecvFlags::TRUNC) {
            Ok((_, length, from)) => (length, from),
            // The kernel had more to tell than the socket holds.
            Err(Errno::NOBUFS) => return Ok(self.links.lost()),
            Err(Errno::INTR) => return Ok(false),
            Err(error) => return Err(error),
        };
        let from = from.and_then(|from| SocketAddrNetlink::try_from(from).ok());
        // Other processes can send to this socket; only the kernel is 0.
        if from.is_none_or(|from| from.pid() != 0) {
            return Ok(false);
        }
        Ok(match self.buffer.get(..length) {
            Some(datagram) => self.links.observe(datagram),
            None => self.links.lost(),
        })
    }
}

/// Passes link-ups on to the mesh, on a thread that waits in the kernel and ends with the process, or when
/// the node is gone by the next word.
pub(super) fn watch(node: &Arc<Node>) {
    let watching = Arc::downgrade(node);
    let watched = Watch::open().and_then(|watch| {
        std::thread::Builder::new()
            .name("links".to_owned())
            .spawn(move || pass_on(watch, &watching))
    });
    if let Err(why) = watched {
        node.links_not_watched(&why);
    }
}

fn pass_on(mut watch: Watch, node: &Weak<Node>) {
    let mut again: &[Duration] = &[];
    let mut rested = Instant::now();
    loop {
        let due = again.first().map(|wait| rested + *wait);
        let limit = due.map(|due| due.saturating_duration_since(Instant::now()));
        let heard = watch.heard(limit);
        let Some(node) = node.upgrade() else { return };
        again = match heard {
            Ok(Some(true)) if again.len() < YOUNG => &AGAIN,
            Ok(Some(_)) => continue,
            Ok(None) => again.get(1..).unwrap_or_default(),
            Err(why) => return node.links_not_watched(&why),
        };
        node.link_up();
        drop(node);
        std::thread::sleep(REST);
        rested = Instant::now();
    }
}

impl Node {
    fn link_up(&self) {
        tracing::debug!("a link or an address of this machine came up");
        if let Some(mesh) = self.mesh.get() {
            mesh.link_up();
        }
    }

    /// Told once: the watch does not come back before the next start.
    fn links_not_watched(&self, why: &io::Error) {
        tracing::warn!(%why, "this machine's links are not watched: after an outage peers are dialled within mesh.redial_cap_ms");
        self.journal.note(
            self.clock.unix_ms(),
            "links_not_watched",
            json!({"why": why.to_string()}),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn link(kind: u16, index: u32, flags: u32) -> Vec<u8> {
        let fields = [0, index, flags, 0];
        let body: Vec<u8> = fields
            .iter()
            .flat_map(|field: &u32| field.to_ne_bytes())
            .collect();
        framed(kind, &body)
    }

    fn address(scope: u8) -> Vec<u8> {
        framed(RTM_NEWADDR, &[2, 24, 0, scope, 7, 0, 0, 0])
    }

    const UP: u32 = IFF_UP | IFF_RUNNING;

    #[test]
    fn a_link_is_news_when_it_gets_its_carrier_and_not_while_it_has_it() {
        let mut links = Links::default();
        assert!(!links.observe(&link(RTM_NEWLINK, 7, IFF_UP)), "no carrier");
        assert!(links.observe(&link(RTM_NEWLINK, 7, UP)), "the control");
        assert!(!links.observe(&link(RTM_NEWLINK, 7, UP)), "told again");
        assert!(links.observe(&link(RTM_NEWLINK, 8, UP)), "another");
        assert!(!links.observe(&link(RTM_NEWLINK, 7, IFF_UP)));
        assert!(links.observe(&link(RTM_NEWLINK, 7, UP)), "after an outage");
        assert!(!links.observe(&link(RTM_DELLINK, 7, UP)));
        assert!(
            links.observe(&link(RTM_NEWLINK, 7, UP)),
            "a new one of that number"
        );
        assert!(!links.observe(&link(RTM_NEWLINK, 1, UP | IFF_LOOPBACK)));
        assert!(links.observe(&address(0)));
        assert!(!links.observe(&address(SCOPE_HOST)));
        let both = [link(RTM_NEWLINK, 7, IFF_UP), link(RTM_NEWLINK, 7, UP)].concat();
        assert!(links.observe(&both), "down and up in one datagram");
    }

    #[test]
    fn inv_07_links_are_remembered_up_to_a_bound() {
        let mut links = Links::default();
        for index in 0..5_000 {
            assert!(links.observe(&link(RTM_NEWLINK, index, UP)));
        }
        assert_eq!(links.0.len(), LINKS_MAX);
        assert!(
            links.observe(&link(RTM_NEWLINK, 4_999, UP)),
            "not remembered: news again"
        );
        assert!(!links.observe(&link(RTM_NEWLINK, 0, UP)));
    }

    #[test]
    fn what_is_cut_off_or_lies_about_its_length_tells_of_nothing() {
        let whole = link(RTM_NEWLINK, 7, UP);
        for length in 0..whole.len() {
            // A message that claims to be as short as what is there, and one that claims to be whole.
            let mut short = whole[..length].to_vec();
            assert!(!Links::default().observe(&short), "{length}");
            if let Some(claimed) = short.first_chunk_mut() {
                *claimed = u32::try_from(length).unwrap().to_ne_bytes();
            }
            if length < HEADER_BYTES + 12 {
                assert!(!Links::default().observe(&short), "{length}");
            }
        }
        for claimed in [0, 1, 15, 33, u32::MAX] {
            let mut lying = whole.clone();
            lying[..4].copy_from_slice(&claimed.to_ne_bytes());
            assert!(!Links::default().observe(&lying), "{claimed}");
        }
        assert!(Links::default().observe(&whole), "the control");
    }
}
