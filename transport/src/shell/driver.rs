//! One task a session: it carries frames, bytes and time to the machine and what the machine wants
//! back out. The machine itself runs where blocking is allowed whenever it may look at the node, so
//! that a slow disk never holds a network thread.

use std::{
    future::Future,
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};
use tidelock_segments::{Head, Kind, NodeId, Origin, SegmentId, SegmentRef};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};

use super::{
    MeshEvent, MeshHooks, PeerStats, Shared, close_code,
    data::{CONTROL_PRIORITY, Senders, accept_streams},
    lock,
    outlook::Question,
    parts::{Attached, Opened, finish},
    quotas::Wait,
};
use crate::{
    frame::{Channel, CloseCode, FetchRefusal, Frame, FrameDecoder},
    limits::{MAX_FRAME_BODY_BYTES, MAX_MAILBOX, MAX_QUESTIONS, MAX_SMALL_SENDS_KIB},
    registry::{Busy, Entry, SessionId, Verdict},
    session::{
        Asked, Fault, LocalHello, PeerHello, Refusal, Serve, ServeKey, SessionClose, SessionEvent,
        SessionMachine, TakeSlice, View, is_ranged,
    },
    verifier::{PeerRole, VerifiedPeer},
};

/// Inputs that wait for the session's task. Frames are at most 64 KiB, all else is small.
const INPUTS: usize = 64;

/// Inputs taken in one step.
const BATCH: usize = 64;

/// Encoded frames that wait for the stream.
const WRITES: usize = 16;

/// Wait for a claim of receive memory that was refused for want of room.
const ROOM_RETRY: Duration = Duration::from_millis(20);

/// Time that a peer gets to hang up after a Bye.
const BYE_WAIT: Duration = Duration::from_millis(250);

/// TLS exporter label of the key for head tags (RFC 8446, 7.5).
const EXPORTER: &[u8] = b"EXPORTER-tidelock-1 heads";

/// What reaches a session.
pub(super) enum Input {
    Frame(Frame),
    /// A data stream announces a slice; the answer says what to do with it.
    AnnouncedSlice {
        kind: Kind,
        id: SegmentId,
        range: Range<u64>,
        slice_bytes: u64,
        reply: oneshot::Sender<Result<TakeSlice, Refusal>>,
    },
    /// All bytes of the slice that begins here have arrived.
    SliceReceived(SegmentId, u64),
    /// The slice that begins here was written, or refused for this reason.
    SliceOver(SegmentId, u64, Option<Refusal>),
    /// A data stream announces a segment; the answer says whether it is taken.
    Announced {
        kind: Kind,
        id: SegmentId,
        size_bytes: u64,
        reply: oneshot::Sender<Result<SegmentRef, Refusal>>,
    },
    Progress,
    Received(SegmentId),
    Admitted(SegmentId),
    Failed(SegmentId, Refusal),
    Served(ServeKey),
    Unservable(ServeKey, FetchRefusal),
    /// A stream is broken beyond repair.
    Broken(CloseCode, String),
}

/// What the rest of the node leaves for a session.
#[derive(Default)]
struct Mail {
    stored: Vec<SegmentRef>,
    released: Vec<SegmentId>,
    refresh: bool,
    /// The lag is to be looked at again, if anything has changed.
    sample: bool,
    questions: Vec<Question>,
}

/// A bounded letter box: past the bound the session compares everything instead.
#[derive(Default)]
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    arrived: Notify,
}

impl Mailbox {
    fn put(&self, change: impl FnOnce(&mut Mail)) {
        let mut mail = lock(&self.mail);
        change(&mut mail);
        // INV-07
        if mail.stored.len() + mail.released.len() > MAX_MAILBOX {
            *mail = Mail {
                refresh: true,
                sample: mail.sample,
                questions: std::mem::take(&mut mail.questions),
                ..Mail::default()
            };
        }
        drop(mail);
        self.arrived.notify_one();
    }

    pub(super) fn stored(&self, reference: &SegmentRef) {
        self.put(|mail| mail.stored.push(reference.clone()));
    }

    pub(super) fn released(&self, ids: &[SegmentId]) {
        self.put(|mail| mail.released.extend_from_slice(ids));
    }

    pub(super) fn refresh(&self) {
        self.put(|mail| mail.refresh = true);
    }

    pub(super) fn sample(&self) {
        self.put(|mail| mail.sample = true);
    }

    /// Leaves a question. Where too many wait it is dropped, which its asker sees.
    pub(super) fn ask(&self, question: Question) {
        self.put(|mail| {
            if mail.questions.len() < MAX_QUESTIONS {
                mail.questions.push(question);
            }
        });
    }

    fn take(&self) -> Mail {
        std::mem::take(&mut *lock(&self.mail))
    }
}

/// What closes a session from outside of its task.
pub(super) struct SessionHandle {
    pub(super) connection: Connection,
    pub(super) address: SocketAddr,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) since: Duration,
    alive: Arc<AtomicBool>,
    verdict: Arc<Mutex<Option<SessionClose>>>,
}

impl SessionHandle {
    /// Whether nobody has closed it from this side.
    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// Closes the session at once. The first reason stays.
    pub(super) fn close(&self, code: CloseCode, reason: &str) {
        lock(&self.verdict).get_or_insert_with(|| SessionClose {
            code,
            reason: reason.to_owned(),
            by_peer: false,
        });
        // INV-09: from here on nothing of it is stored, even what has arrived already.
        self.alive.store(false, Ordering::Release);
        self.connection
            .close(VarInt::from_u32(code as u32), reason.as_bytes());
    }
}

/// What the tasks of one session share.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) shared: Arc<Shared>,
    pub(super) peer: NodeId,
    session: SessionId,
    // In boxes: a queue of tokio has room for 32 from the start.
    inputs: mpsc::Sender<Box<Input>>,
    /// Memory for what waits to be written and is not great, in KiB.
    pub(super) small_sends: Arc<Semaphore>,
    alive: Arc<AtomicBool>,
    over: watch::Receiver<bool>,
}

impl Link {
    /// Starts a task that ends with the session at the latest.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut over = self.over.clone();
        // What is captured and then moved has its room in the task twice.
        let task = Box::pin(task);
        tokio::spawn(async move {
            tokio::select! {
                () = task => {}
                // An error means that the session's task is gone, which is the same.
                _ = over.wait_for(|over| *over) => {}
            }
        });
    }

    /// Tells the session, waiting for its turn. An error: the session is over.
    pub(super) async fn tell(&self, input: Input) -> Result<(), ()> {
        self.inputs.send(Box::new(input)).await.map_err(|_| ())
    }

    /// Tells the session if it has time.
    pub(super) fn tell_later(&self, input: Input) {
        let _ = self.inputs.try_send(Box::new(input));
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    pub(super) fn session(&self) -> SessionId {
        self.session
    }

    pub(super) fn counted(&self, change: impl FnOnce(&mut PeerStats)) {
        self.shared.counted(&self.peer, change);
    }
}

/// The node as the machine sees it, for one peer.
struct HooksView<'a> {
    hooks: &'a dyn MeshHooks,
    peer: &'a NodeId,
}

impl View for HooksView<'_> {
    fn heads(&self) -> Vec<Head> {
        self.hooks.heads()
    }

    fn head(&self, origin: &Origin) -> Option<Head> {
        self.hooks.head(origin)
    }

    fn refs(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        self.hooks.refs(origin, from, to, max)
    }

    fn reference(&self, id: &SegmentId) -> Option<SegmentRef> {
        self.hooks.reference(id)
    }

    fn wants_origin(&self, origin: &Origin) -> bool {
        self.hooks.wants_origin(origin)
    }

    fn settled_below(&self, origin: &Origin) -> u64 {
        self.hooks.settled_below(origin)
    }

    fn open_numbers(&self, origin: &Origin) -> Vec<u64> {
        self.hooks.open_numbers(origin)
    }

    fn wants(&self, reference: &SegmentRef) -> bool {
        self.hooks.wants(reference)
    }

    fn receipt_wants(&self) -> Vec<SegmentId> {
        self.hooks.receipt_wants(self.peer)
    }

    fn receipt_for(&self, id: &SegmentId) -> Option<Vec<u8>> {
        self.hooks.receipt_for(id)
    }

    fn take_receipt(&self, receipt: &[u8]) -> Result<(), Refusal> {
        self.hooks.take_receipt(self.peer, receipt)
    }
}

/// How a session ended, whoever ended it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) code: Option<CloseCode>,
    pub(super) reason: String,
    pub(super) by_peer: bool,
    pub(super) established: bool,
    /// Whether the registry knew of the session, and so the dialler knows of its end.
    pub(super) registered: bool,
}

impl Ended {
    fn by_us(code: CloseCode, reason: impl Into<String>) -> Self {
        Self {
            code: Some(code),
            reason: reason.into(),
            by_peer: false,
            established: false,
            registered: false,
        }
    }

    /// What a failed or closed connection says of its end.
    pub(super) fn from_connection(error: &ConnectionError) -> Self {
        let (code, reason, by_peer) = match error {
            ConnectionError::ApplicationClosed(close) => (
                CloseCode::from_wire(close.error_code.into_inner()),
                String::from_utf8_lossy(&close.reason).into_owned(),
                true,
            ),
            ConnectionError::ConnectionClosed(close) => (None, close.to_string(), true),
            other => (None, other.to_string(), false),
        };
        Self {
            code,
            reason,
            by_peer,
            established: false,
            registered: false,
        }
    }
}

/// Machine and link, moved to where blocking is allowed and back. In a box: a kibibyte that would stand
/// in the task of each session as often as it is moved.
struct Core {
    machine: SessionMachine,
    link: Link,
    /// Whether the sides may be further apart, or nearer, than when the lag was looked at last.
    lag_stale: bool,
}

/// What a step brought forth beside frames.
#[derive(Default)]
struct Stepped {
    serves: Vec<Serve>,
    events: Vec<SessionEvent>,
    /// A range is wanted, and asking for it may block: the step goes on where that is allowed.
    must_block: bool,
}

impl Core {
    fn now(&self) -> Duration {
        self.link.shared.now()
    }

    /// Takes everything in, then asks for what is wanted now.
    fn step(&mut self, inputs: Vec<Input>, mail: Mail, may_block: bool) -> Stepped {
        let shared = Arc::clone(&self.link.shared);
        let peer = self.link.peer.clone();
        let view = HooksView {
            hooks: shared.hooks.as_ref(),
            peer: &peer,
        };
        let now = self.now();
        self.lag_stale |= mail.refresh || !mail.stored.is_empty() || !inputs.is_empty();
        for input in inputs {
            self.take(input, now, &view);
        }
        if mail.refresh {
            self.machine.refresh(now, &view);
        }
        for reference in &mail.stored {
            self.machine.handle_stored(reference, now, &view);
        }
        for id in &mail.released {
            self.machine.handle_released(id, now, &view);
        }
        if self.machine.poll_timeout().is_some_and(|due| due <= now) {
            self.machine.handle_timeout(now, &view);
        }
        if mail.refresh || !mail.stored.is_empty() || !mail.released.is_empty() {
            // What came on another way needs no ranges any more.
            let mut held = lock(&shared.claims).leased_by(self.link.session);
            held.extend(shared.assemblies.of(self.link.session));
            for id in held {
                if !self.machine.is_wanted(&id) {
                    self.let_go(&id);
                }
            }
        }
        let must_block = !self.ask(now, may_block);
        for question in mail.questions {
            question.answer(&self.machine, now);
        }
        if mail.sample && self.lag_stale && self.machine.is_established() {
            let lag = self.machine.lag(&view);
            self.lag_stale = false;
            shared.lag_sampled(&peer, lag);
        }
        let mut stepped = Stepped {
            must_block,
            ..Stepped::default()
        };
        stepped
            .serves
            .extend(std::iter::from_fn(|| self.machine.poll_serve()));
        while let Some(event) = self.machine.poll_event() {
            if let SessionEvent::TransferFailed { reference, .. }
            | SessionEvent::FetchRefused { reference, .. } = &event
            {
                self.let_go(&reference.id);
            }
            stepped.events.push(event);
        }
        stepped
    }

    fn take(&mut self, input: Input, now: Duration, view: &HooksView<'_>) {
        match input {
            Input::Frame(frame) => self.machine.handle_frame(frame, now, view),
            Input::Announced {
                kind,
                id,
                size_bytes,
                reply,
            } => {
                // A reader that is gone has no use for the answer.
                let _ = reply.send(self.machine.handle_segment(kind, &id, size_bytes, now));
            }
            Input::AnnouncedSlice {
                kind,
                id,
                range,
                slice_bytes,
                reply,
            } => {
                let taken = self
                    .machine
                    .handle_slice(kind, &id, &range, slice_bytes, now);
                let _ = reply.send(taken);
            }
            Input::SliceReceived(id, from) => self.machine.handle_slice_received(&id, from),
            Input::SliceOver(id, from, refusal) => {
                let shared = &self.link.shared;
                lock(&shared.claims).release_range(self.link.session, &id, from);
                self.machine.handle_slice_over(&id, from, now);
                if let Some(refusal) = refusal {
                    // Its event gives the segment back.
                    self.machine.handle_failed(&id, refusal, now);
                }
            }
            Input::Progress => self.machine.handle_progress(now),
            Input::Received(id) => self.machine.handle_received(&id),
            Input::Admitted(id) => {
                self.machine.handle_admitted(&id, now);
                self.let_go(&id);
            }
            Input::Failed(id, refusal) => self.machine.handle_failed(&id, refusal, now),
            Input::Served(id) => self.machine.handle_served(&id),
            Input::Unservable(id, code) => self.machine.handle_unservable(&id, code),
            Input::Broken(code, reason) => self.machine.close(code, &reason),
        }
    }

    /// Gives up what the session holds of a segment.
    fn let_go(&self, id: &SegmentId) {
        let Link {
            shared, session, ..
        } = &self.link;
        shared.release(*session, id);
        shared.leave_assembly(*session, id);
    }

    /// Asks for the next range of a big segment. May block.
    fn ask_range(&mut self, wanted: &SegmentRef, now: Duration) {
        let Link {
            shared,
            session,
            peer,
            ..
        } = self.link.clone();
        let id = &wanted.id;
        let opened = match shared.assemblies.attach(session, wanted, now) {
            Attached::Open(assembly) => Opened::Open(assembly),
            Attached::New => shared.open_assembly(session, wanted),
            Attached::InsteadOf(before) => {
                before.rest();
                drop(before);
                shared.open_assembly(session, wanted)
            }
            Attached::Busy(Busy::Elsewhere) => return self.machine.defer(id),
            Attached::Busy(Busy::NoRoom) => Opened::Busy,
        };
        let assembly = match opened {
            Opened::Open(assembly) => assembly,
            Opened::Held => return self.machine.handle_admitted(id, now),
            Opened::Busy => return self.machine.hold_until(wanted.kind, now + ROOM_RETRY),
            Opened::Refused(refusal) => return self.machine.handle_failed(id, refusal, now),
        };
        let missing = assembly.missing();
        if missing.is_empty() {
            // All of it came at an earlier contact, or its last range is being looked at.
            return match finish(&self.link, id, &assembly) {
                Ok(true) => {
                    self.machine.handle_admitted(id, now);
                    self.let_go(id);
                }
                Ok(false) => self.machine.defer(id),
                Err(refusal) => self.machine.handle_failed(id, refusal, now),
            };
        }
        let leased = lock(&shared.claims).lease(session, wanted, &missing, now);
        let range = match leased {
            Ok(range) => range,
            Err(Busy::Elsewhere) => return self.machine.defer(id),
            Err(Busy::NoRoom) => return self.machine.hold_until(wanted.kind, now + ROOM_RETRY),
        };
        // INV-13: the quota counts what is asked for.
        let part = SegmentRef {
            size_bytes: range.end - range.start,
            ..wanted.clone()
        };
        // INV-13: what cannot be asked for yet must not cost, however often it is tried.
        let wait = if self.machine.may_fetch_range(id, &range) {
            match shared.quotas.take_in(&peer, &part, now) {
                Ok(()) => match self.machine.fetch_range(id, &range, now) {
                    Asked::First => {
                        return shared.event(MeshEvent::Requested {
                            peer,
                            reference: wanted.clone(),
                        });
                    }
                    Asked::More => return,
                    Asked::NotNow => ROOM_RETRY,
                },
                Err(Wait::For(time)) => time.max(Duration::from_millis(1)),
                // Its event releases the claim.
                Err(Wait::Never) => return self.machine.handle_failed(id, too_big(), now),
            }
        } else {
            ROOM_RETRY
        };
        lock(&shared.claims).release_range(session, id, range.start);
        // Who found everything leased a moment ago would wait for this session's quota otherwise.
        shared.released(Some(session), &[*id]);
        self.machine.hold_until(wanted.kind, now + wait);
    }

    /// Turns wants into fetches as far as claims and quotas allow. False: the next one may block.
    fn ask(&mut self, now: Duration, may_block: bool) -> bool {
        let Link {
            shared,
            session,
            peer,
            ..
        } = self.link.clone();
        while let Some(wanted) = self.machine.poll_want(now).cloned() {
            if is_ranged(&wanted, &shared.local) {
                if !may_block {
                    return false;
                }
                self.ask_range(&wanted, now);
                continue;
            }
            let claimed = lock(&shared.claims).claim(session, &wanted, now);
            match claimed {
                Ok(()) => {}
                Err(Busy::Elsewhere) => {
                    self.machine.defer(&wanted.id);
                    continue;
                }
                Err(Busy::NoRoom) => {
                    self.machine.hold_until(wanted.kind, now + ROOM_RETRY);
                    continue;
                }
            }
            match shared.quotas.take_in(&peer, &wanted, now) {
                Ok(()) => {
                    self.machine.fetch(&wanted.id, now);
                    shared.event(MeshEvent::Requested {
                        peer: peer.clone(),
                        reference: wanted,
                    });
                }
                Err(Wait::For(time)) => {
                    // INV-13: the session stays up and waits for its quota.
                    shared.release(session, &wanted.id);
                    self.machine
                        .hold_until(wanted.kind, now + time.max(Duration::from_millis(1)));
                }
                Err(Wait::Never) => {
                    // Its event releases the claim.
                    self.machine.handle_failed(&wanted.id, too_big(), now);
                }
            }
        }
        true
    }
}

fn too_big() -> Refusal {
    Refusal {
        code: "quota",
        message: "segment is bigger than this peer's quota".to_owned(),
        fault: Fault::Local,
    }
}

/// Whether the machine may look at the node for it. Until the Hello round trip is over it has no reason to.
fn needs_view(input: &Input) -> bool {
    match input {
        Input::Frame(Frame::Hello(_) | Frame::Bye(_)) => false,
        Input::Frame(_) => true,
        _ => false,
    }
}

/// Runs a session from the end of the handshake to the end of the connection.
pub(super) async fn run(shared: Arc<Shared>, connection: Connection, outbound: bool) -> Ended {
    let address = connection.remote_address();
    let refuse = |peer: Option<&NodeId>, code: CloseCode, word: &'static str, reason: String| {
        connection.close(VarInt::from_u32(code as u32), reason.as_bytes());
        shared.event(MeshEvent::PeerRefused {
            peer: peer.cloned(),
            address,
            code: word,
            reason: reason.clone(),
        });
        Ended::by_us(code, reason)
    };
    let role = if outbound {
        PeerRole::Server
    } else {
        PeerRole::Client
    };
    let papers = match shared.tls.verified_peer(connection.peer_identity(), role) {
        Ok(papers) => papers,
        Err(refusal) => {
            return refuse(
                None,
                close_code(&refusal),
                refusal.code(),
                refusal.to_string(),
            );
        }
    };
    let peer = papers.node_id().clone();
    if peer == shared.local {
        let reason = "this node met itself, or another one with its id".to_owned();
        return refuse(Some(&peer), CloseCode::OwnNode, "own_node", reason);
    }
    if lock(&shared.dialer)
        .cooling_until(&peer, shared.now())
        .is_some()
    {
        let reason = "peer misbehaved a moment ago and is left alone for a while".to_owned();
        return refuse(Some(&peer), CloseCode::CoolingDown, "cooling_down", reason);
    }
    let handle = SessionHandle {
        connection: connection.clone(),
        address,
        mailbox: Arc::default(),
        since: shared.now(),
        alive: Arc::new(AtomicBool::new(true)),
        verdict: Arc::default(),
    };
    let (alive, verdict) = (Arc::clone(&handle.alive), Arc::clone(&handle.verdict));
    let mailbox = Arc::clone(&handle.mailbox);
    let entry = Entry {
        peer: peer.clone(),
        outbound,
        papers: papers.clone(),
        established: false,
        handle,
    };
    let inserted = lock(&shared.registry).insert(entry);
    let Ok(session) = inserted else {
        let reason = "no room for another session".to_owned();
        return refuse(Some(&peer), CloseCode::Busy, "busy", reason);
    };
    // Asked again after the registry knows of it: a CRL or a closed gate that came in between found
    // nothing to close.
    shared.recheck(session, &papers);
    // The registry has them; this task stays as long as the session.
    drop(papers);
    let (end, over) = watch::channel(false);
    let (inputs, received) = mpsc::channel(INPUTS);
    let link = Link {
        shared: Arc::clone(&shared),
        peer: peer.clone(),
        session,
        inputs,
        small_sends: Arc::new(Semaphore::new(MAX_SMALL_SENDS_KIB)),
        alive,
        over,
    };
    let mut ended = drive(&link, &connection, outbound, address, &mailbox, received).await;
    ended.registered = true;
    link.alive.store(false, Ordering::Release);
    if let Some(close) = lock(&verdict).take() {
        ended = Ended {
            by_peer: false,
            code: Some(close.code),
            reason: close.reason,
            ..ended
        };
    }
    if let Some(code) = ended.code
        && !ended.by_peer
    {
        connection.close(VarInt::from_u32(code as u32), ended.reason.as_bytes());
    } else {
        connection.close(VarInt::from_u32(CloseCode::Normal as u32), b"");
    }
    // The tasks last: their streams end with them, and the peer must hear the close before that.
    let _ = end.send(true);
    shared.session_over(session, &peer, address, outbound, &ended);
    ended
}

/// The life of a session.
async fn drive(
    link: &Link,
    connection: &Connection,
    outbound: bool,
    address: SocketAddr,
    mailbox: &Mailbox,
    mut inputs: mpsc::Receiver<Box<Input>>,
) -> Ended {
    let shared = &link.shared;
    let control = async {
        if outbound {
            connection.open_bi().await
        } else {
            connection.accept_bi().await
        }
    };
    let hello_timeout = shared.config.session.hello_timeout;
    let (sender, receiver) = match tokio::time::timeout(hello_timeout, control).await {
        Ok(Ok(streams)) => streams,
        Ok(Err(error)) => return Ended::from_connection(&error),
        Err(_) => return Ended::by_us(CloseCode::HelloTimeout, "no control stream in time"),
    };
    let _ = sender.set_priority(CONTROL_PRIORITY);
    let mut key = [0; 32];
    if connection
        .export_keying_material(&mut key, EXPORTER, &[])
        .is_err()
    {
        return Ended::by_us(CloseCode::Internal, "TLS gives no exporter key");
    }
    let Some(mut core) = new_core(link.clone(), key).await else {
        return Ended::by_us(CloseCode::Internal, "a fault inside this node");
    };
    let (writer, written) = mpsc::channel::<Bytes>(WRITES);
    link.spawn(write_control(link.clone(), sender, written));
    link.spawn(read_control(link.clone(), receiver));

    let mut senders = Senders::new();
    let mut hello = None;
    let mut established = false;
    let mut writer_gone = false;
    let mut stopping = shared.stopping.subscribe();
    loop {
        while core.machine.has_frames() {
            let Ok(place) = writer.try_reserve() else {
                break;
            };
            match core.machine.poll_frame().map(|frame| frame.encode()) {
                Some(Ok(bytes)) => place.send(Bytes::from(bytes)),
                Some(Err(error)) => core.machine.close(CloseCode::Internal, &error.to_string()),
                None => {}
            }
        }
        if let Some(close) = core.machine.closed() {
            let close = close.clone();
            if close.code == CloseCode::Normal && !close.by_peer {
                // The Bye is on its way; whoever reads it hangs up.
                let _ = tokio::time::timeout(BYE_WAIT, connection.closed()).await;
            }
            let SessionClose {
                code,
                reason,
                by_peer,
            } = close;
            return Ended {
                by_peer,
                established,
                ..Ended::by_us(code, reason)
            };
        }
        let due = core.machine.poll_timeout().map(|due| shared.instant(due));
        let mut batch = Vec::new();
        tokio::select! {
            error = connection.closed() => {
                return Ended { established, ..Ended::from_connection(&error) };
            }
            // The channel cannot close: this task holds a sender in `link`.
            _ = inputs.recv_many(&mut batch, BATCH) => {}
            () = mailbox.arrived.notified() => {}
            place = writer.reserve(), if core.machine.has_frames() && !writer_gone => {
                // Why it is gone comes by itself: from the writer, or as the connection's end.
                writer_gone = place.is_err();
                continue;
            }
            () = sleep_until(due), if due.is_some() => {}
            _ = stopping.wait_for(|stopping| *stopping) => {
                core.machine.close(CloseCode::Normal, "the node stops");
                continue;
            }
        }
        let batch = batch.into_iter().map(|input| *input).collect();
        let mail = mailbox.take();
        let (next, stepped) = match step(core, batch, mail).await {
            Ok(done) => done,
            Err(reason) => {
                return Ended {
                    established,
                    ..Ended::by_us(CloseCode::Internal, reason)
                };
            }
        };
        core = next;
        for serve in stepped.serves {
            senders.serve(link, connection, serve);
        }
        for event in stepped.events {
            match event {
                SessionEvent::Hello(said) => hello = Some(said),
                SessionEvent::Established => {
                    established = true;
                    if let Err(reason) = on_established(link, connection, address, outbound, &hello)
                    {
                        core.machine.close(CloseCode::Duplicate, &reason);
                    }
                }
                other => report(link, other),
            }
        }
    }
}

pub(super) async fn sleep_until(due: Option<tokio::time::Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due).await;
    }
}

async fn new_core(link: Link, key: [u8; 32]) -> Option<Box<Core>> {
    let made = tokio::task::spawn_blocking(move || {
        let shared = Arc::clone(&link.shared);
        let facts = shared.hooks.hello_local();
        let local = LocalHello {
            domain: shared.domain.clone(),
            node_id: shared.local.clone(),
            limits: facts.limits,
            quota: shared.quotas.announced(&link.peer),
            posture: facts.posture,
            endorsement: facts.endorsement,
        };
        let peer = link.peer.clone();
        let view = HooksView {
            hooks: shared.hooks.as_ref(),
            peer: &peer,
        };
        let config = shared.config.session;
        let machine = SessionMachine::new(config, local, peer.clone(), key, shared.now(), &view);
        Box::new(Core {
            machine,
            link,
            lag_stale: true,
        })
    });
    made.await.ok()
}

/// Runs a step, elsewhere if it may look at the node.
async fn step(
    mut core: Box<Core>,
    batch: Vec<Input>,
    mail: Mail,
) -> Result<(Box<Core>, Stepped), &'static str> {
    let quiet = mail.stored.is_empty()
        && mail.released.is_empty()
        && !mail.refresh
        && !(mail.sample && core.lag_stale)
        && !batch.iter().any(needs_view)
        && core
            .machine
            .poll_timeout()
            .is_none_or(|due| due > core.now());
    let mut before = Stepped::default();
    let (mut batch, mut mail) = (batch, mail);
    if quiet {
        before = core.step(std::mem::take(&mut batch), std::mem::take(&mut mail), false);
        if !before.must_block {
            return Ok((core, before));
        }
    }
    let done = tokio::task::spawn_blocking(move || {
        let mut stepped = core.step(batch, mail, true);
        stepped.serves.splice(0..0, before.serves);
        stepped.events.splice(0..0, before.events);
        (core, stepped)
    });
    done.await.map_err(|_| "a fault inside this node")
}

/// The peer counts as authenticated from here on (INV-09). An error: another session stays.
fn on_established(
    link: &Link,
    connection: &Connection,
    address: SocketAddr,
    outbound: bool,
    hello: &Option<PeerHello>,
) -> Result<(), String> {
    let shared = &link.shared;
    let verdict = lock(&shared.registry).establish(link.session, &shared.local);
    match verdict {
        Verdict::Close { .. } => return Err("another connection with this peer is kept".to_owned()),
        Verdict::Keep { close } => {
            for other in close {
                shared.close(other, CloseCode::Duplicate, "another connection is kept");
            }
        }
    }
    {
        let mut dialer = lock(&shared.dialer);
        dialer.on_established(&link.peer, shared.now());
        // Only now: before the Hello round trip whoever answers has judged nothing.
        if outbound {
            dialer.learn(&link.peer, address);
        }
    }
    if let Some(hello) = hello {
        shared.hooks.authenticated(hello);
    }
    link.spawn(accept_streams(link.clone(), connection.clone()));
    link.counted(|stats| {
        stats.sessions += 1;
        stats.hello.clone_from(hello);
    });
    if let Some(hello) = hello.clone() {
        shared.event(MeshEvent::SessionUp {
            peer: link.peer.clone(),
            address,
            outbound,
            hello,
        });
    }
    Ok(())
}

fn report(link: &Link, event: SessionEvent) {
    let peer = link.peer.clone();
    let event = match event {
        SessionEvent::ForkSuspected {
            origin,
            sequence,
            ours,
            theirs,
        } => MeshEvent::ForkSuspected {
            peer,
            origin,
            sequence,
            ours,
            theirs,
        },
        SessionEvent::TransferFailed { reference, refusal } => {
            link.counted(|stats| {
                stats.refused_in += 1;
                stats.faults += u64::from(refusal.fault == Fault::Peer);
            });
            MeshEvent::TransferFailed {
                peer,
                reference,
                refusal,
            }
        }
        SessionEvent::FetchRefused { reference, code } => {
            let refusal = Refusal {
                code: code.as_str(),
                message: "peer does not send a segment that it listed".to_owned(),
                fault: Fault::Local,
            };
            MeshEvent::TransferFailed {
                peer,
                reference,
                refusal,
            }
        }
        SessionEvent::ReceiptTaken { id } => MeshEvent::ReceiptTaken { peer, id },
        SessionEvent::ReceiptRefused { id, refusal } => {
            MeshEvent::ReceiptRefused { peer, id, refusal }
        }
        SessionEvent::Hello(_) | SessionEvent::Established => return,
    };
    link.shared.event(event);
}

async fn write_control(link: Link, mut stream: SendStream, mut queue: mpsc::Receiver<Bytes>) {
    let stall = link.shared.config.session.stall_timeout;
    let mut batch = Vec::new();
    loop {
        if queue.recv_many(&mut batch, WRITES).await == 0 {
            // A stream that is dropped is finished, and a finished control stream is an error for
            // the peer. The connection's close is to be the first that it hears.
            return std::future::pending().await;
        }
        let written = tokio::time::timeout(stall, stream.write_all_chunks(&mut batch)).await;
        let failed = match written {
            Ok(Ok(())) => None,
            // The connection's end has its own reason, which is the better one.
            Ok(Err(WriteError::ConnectionLost(_))) => return,
            Ok(Err(error)) => Some((CloseCode::Protocol, error.to_string())),
            Err(_) => Some((
                CloseCode::Stalled,
                "peer does not read its control stream".to_owned(),
            )),
        };
        if let Some((code, reason)) = failed {
            let _ = link.tell(Input::Broken(code, reason)).await;
            return;
        }
        batch.clear();
    }
}

async fn read_control(link: Link, mut stream: RecvStream) {
    let mut decoder = FrameDecoder::new(Channel::Control);
    loop {
        let broken = loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    // INV-13: past its quota a peer is read later, and the session stays up.
                    while let Err(Wait::For(time)) = link.shared.quotas.frame(&link.peer) {
                        tokio::time::sleep(time).await;
                    }
                    if link.tell(Input::Frame(frame)).await.is_err() {
                        return;
                    }
                }
                Ok(None) => break None,
                Err(error) => break Some(error.to_string()),
            }
        };
        if decoder.held_bytes() == 0 {
            // It keeps the room of the longest frame, and a session may be quiet for days.
            decoder = FrameDecoder::new(Channel::Control);
        }
        let broken = match broken {
            Some(reason) => Some(reason),
            None => match stream.read_chunk(MAX_FRAME_BODY_BYTES, true).await {
                Ok(Some(chunk)) => {
                    decoder.push(&chunk.bytes);
                    None
                }
                Ok(None) => Some("peer ended the control stream".to_owned()),
                Err(ReadError::ConnectionLost(_)) => return,
                Err(error) => Some(error.to_string()),
            },
        };
        if let Some(reason) = broken {
            let _ = link.tell(Input::Broken(CloseCode::Protocol, reason)).await;
            return;
        }
    }
}

/// For the recheck of a session that has just been registered.
impl Shared {
    fn recheck(&self, session: SessionId, papers: &VerifiedPeer) {
        if let Some(reason) = self.closed_because() {
            self.close(session, CloseCode::Disabled, &reason);
        } else if let Err((code, _, reason)) = self.judge(papers) {
            self.close(session, code, &reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tidelock_segments::DomainId;

    use super::*;
    use crate::session::{AnnouncedQuota, KindSet, PeerLimits, PeerPosture, SessionConfig};

    /// A node that has nothing, and counts how often it is looked at.
    #[derive(Default)]
    struct Looked(Cell<u32>);

    impl Looked {
        fn nothing<T: Default>(&self) -> T {
            self.0.set(self.0.get() + 1);
            T::default()
        }
    }

    impl View for Looked {
        fn heads(&self) -> Vec<Head> {
            self.nothing()
        }
        fn refs(&self, _: &Origin, _: u64, _: u64, _: usize) -> Vec<SegmentRef> {
            self.nothing()
        }
        fn reference(&self, _: &SegmentId) -> Option<SegmentRef> {
            self.nothing()
        }
        fn wants_origin(&self, _: &Origin) -> bool {
            self.nothing()
        }
        fn wants(&self, _: &SegmentRef) -> bool {
            self.nothing()
        }
        fn receipt_wants(&self) -> Vec<SegmentId> {
            self.nothing()
        }
        fn receipt_for(&self, _: &SegmentId) -> Option<Vec<u8>> {
            self.nothing()
        }
        fn take_receipt(&self, _: &[u8]) -> Result<(), Refusal> {
            self.nothing::<()>();
            Ok(())
        }
    }

    #[test]
    fn a_hello_is_taken_without_a_look_at_the_node_and_so_on_a_network_thread() {
        let (now, view) = (Duration::ZERO, Looked::default());
        let machine = |name: &str, peer: &str| {
            let local = LocalHello {
                domain: DomainId::new("site").unwrap(),
                node_id: NodeId::new(name).unwrap(),
                limits: PeerLimits {
                    kinds: KindSet::ALL,
                    max_segment_bytes: 1,
                    custody_free_bytes: 1,
                    max_in_flight: 1,
                },
                quota: AnnouncedQuota::default(),
                posture: PeerPosture::Normal,
                endorsement: None,
            };
            let peer = NodeId::new(peer).unwrap();
            SessionMachine::new(SessionConfig::default(), local, peer, [0; 32], now, &view)
        };
        let (mut here, mut there) = (machine("a", "b"), machine("b", "a"));
        let hello = there.poll_frame().unwrap();
        assert!(!needs_view(&Input::Frame(hello.clone())));
        view.0.set(0);
        here.handle_frame(hello.clone(), now, &view);
        assert_eq!(view.0.get(), 0);
        // A second one, which ends the session.
        let mut again = machine("a", "b");
        view.0.set(0);
        for _ in 0..2 {
            again.handle_frame(hello.clone(), now, &view);
        }
        assert!(again.closed().is_some());
        assert_eq!(view.0.get(), 0);
        // The control: with the acknowledgement the comparison begins.
        here.refresh(now, &view);
        there.handle_frame(here.poll_frame().unwrap(), now, &view);
        let granted = there.poll_frame().unwrap();
        assert!(needs_view(&Input::Frame(granted.clone())));
        view.0.set(0);
        here.handle_frame(granted, now, &view);
        assert!(here.is_established());
        assert!(view.0.get() > 0);
    }
}
