//! Segments and slices on their streams: one sender for each kind, one reader for each stream, and the
//! way of what was read into the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use quinn::{Connection, ReadError, ReadExactError, RecvStream, SendStream, VarInt};
use tidelock_segments::{Kind, SegmentId, SegmentRef, VerifiedSegment, bao, verify_segment};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    Admitted, MeshEvent,
    driver::{Input, Link},
    lock,
    parts::{admit_slice, alive},
    quotas::Wait,
};
use crate::{
    frame::{
        ByteRange, Channel, CloseCode, DataStream, FetchRefusal, Frame, FrameError, FrameHeader,
        Segment, Slice,
    },
    limits::{FRAME_HEADER_BYTES, MAX_ADMITTED_TOGETHER, MAX_IN_FLIGHT, MAX_SMALL_SEND_BYTES},
    session::{Fault, Refusal, Serve, ServeKey, TakeSlice, is_urgent},
};

/// Between two words of progress from a reader to its session.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// INV-11 on the wire: a stream of higher priority is written first, so a CRL overtakes a bulk
/// transfer that is already under way. The control stream stands above all.
pub(super) const CONTROL_PRIORITY: i32 = 100;

fn priority(kind: Kind) -> i32 {
    match kind {
        Kind::Revocation => 40,
        Kind::Policy => 30,
        Kind::Witness => 20,
        Kind::Audit => 10,
    }
}

// ---- Sending ----

/// The senders of a session, started when their kind is first asked for.
pub(super) struct Senders {
    by_kind: BTreeMap<Kind, mpsc::Sender<Serve>>,
}

impl Senders {
    pub(super) fn new() -> Self {
        Self {
            by_kind: BTreeMap::new(),
        }
    }

    /// Queues a segment for sending. The machine lets no more of them be asked for than fit.
    pub(super) fn serve(&mut self, link: &Link, connection: &Connection, serve: Serve) {
        let kind = serve.reference.kind;
        let sender = self.by_kind.entry(kind).or_insert_with(|| {
            let (sender, queue) = mpsc::channel(2 * usize::from(MAX_IN_FLIGHT) + 1);
            link.spawn(send_kind(link.clone(), connection.clone(), kind, queue));
            sender
        });
        if let Err(error) = sender.try_send(serve) {
            let key = error.into_inner().key();
            link.tell_later(Input::Unservable(key, FetchRefusal::Unreadable));
        }
    }
}

/// A segment or slice that is ready to be written, with its place in the memory for sending.
struct Prepared {
    serve: Serve,
    content: Option<Vec<u8>>,
    _room: Option<OwnedSemaphorePermit>,
}

/// Reads ahead by one segment, so that disk and network work at the same time.
async fn send_kind(
    link: Link,
    connection: Connection,
    kind: Kind,
    mut queue: mpsc::Receiver<Serve>,
) {
    let (ahead, ready) = mpsc::channel(1);
    link.spawn(write_kind(link.clone(), connection, kind, ready));
    while let Some(serve) = queue.recv().await {
        let Some(prepared) = prepare(&link, serve).await else {
            break;
        };
        if ahead.send(prepared).await.is_err() {
            break;
        }
    }
}

/// Waits for quota and memory, then reads. None: the session is over.
async fn prepare(link: &Link, serve: Serve) -> Option<Prepared> {
    let shared = &link.shared;
    let unreadable = |serve| {
        Some(Prepared {
            serve,
            content: None,
            _room: None,
        })
    };
    // INV-13: the peer's own share of this node's uplink.
    let size_bytes = match &serve.range {
        None => serve.reference.size_bytes,
        Some(range) => match bao::slice_len(serve.reference.size_bytes, range) {
            Ok(slice_bytes) => slice_bytes,
            Err(_) => return unreadable(serve),
        },
    };
    loop {
        match shared.quotas.send(&link.peer, size_bytes) {
            Ok(()) => break,
            Err(Wait::For(time)) => tokio::time::sleep(time).await,
            Err(Wait::Never) => return unreadable(serve),
        }
    }
    // INV-07: bulk segments that wait in memory to be written are bounded. INV-13: behind those of a
    // peer that reads nothing stands nothing of another, unless both are great.
    let room = if is_urgent(serve.reference.kind) {
        None
    } else {
        let kib = u32::try_from(size_bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        let memory = if size_bytes <= MAX_SMALL_SEND_BYTES {
            &link.small_sends
        } else {
            &shared.great_sends
        };
        Some(Arc::clone(memory).acquire_many_owned(kib).await.ok()?)
    };
    let (hooks, id, range) = (
        Arc::clone(&shared.hooks),
        serve.reference.id,
        serve.range.clone(),
    );
    let read = tokio::task::spawn_blocking(move || match range {
        None => hooks.read(&id),
        Some(range) => hooks.read_range(&id, &range),
    });
    match read.await {
        Ok(Some(content)) if content.len() as u64 == size_bytes => Some(Prepared {
            serve,
            content: Some(content),
            _room: room,
        }),
        _ => unreadable(serve),
    }
}

async fn write_kind(
    link: Link,
    connection: Connection,
    kind: Kind,
    mut ready: mpsc::Receiver<Prepared>,
) {
    let mut stream: Option<SendStream> = None;
    while let Some(Prepared {
        serve,
        content,
        _room,
    }) = ready.recv().await
    {
        let key: ServeKey = serve.key();
        let told = match content {
            None => Input::Unservable(key, FetchRefusal::Unreadable),
            Some(content) => {
                let written =
                    write_one(&link, &connection, kind, &mut stream, &serve, content).await;
                // The peer stopped this stream: the transfer is over, the next one has its own.
                if written.is_err()
                    && let Some(mut abandoned) = stream.take()
                {
                    let _ = abandoned.reset(VarInt::from_u32(CloseCode::Normal as u32));
                }
                Input::Served(key)
            }
        };
        if link.tell(told).await.is_err() {
            break;
        }
    }
    if let Some(mut stream) = stream {
        let _ = stream.finish();
    }
}

/// Writes one segment or slice. An error: the stream is gone.
async fn write_one(
    link: &Link,
    connection: &Connection,
    kind: Kind,
    stream: &mut Option<SendStream>,
    serve: &Serve,
    content: Vec<u8>,
) -> Result<(), ()> {
    let open = match stream {
        Some(open) => open,
        None => {
            let mut fresh = connection.open_uni().await.map_err(|_| ())?;
            let _ = fresh.set_priority(priority(kind));
            let opening = Frame::DataStream(DataStream {
                kind: kind.number(),
            })
            .encode();
            fresh
                .write_all(&opening.map_err(|_| ())?)
                .await
                .map_err(|_| ())?;
            stream.insert(fresh)
        }
    };
    let (id, size_bytes) = (*serve.reference.id.as_bytes(), content.len() as u64);
    let announced = match &serve.range {
        None => Frame::Segment(Segment { id, size_bytes }),
        Some(range) => Frame::Slice(Slice {
            id,
            range: ByteRange {
                from: range.start,
                to: range.end,
            },
            slice_bytes: size_bytes,
        }),
    }
    .encode();
    // The content as one `Bytes`: quinn cuts slices off it and copies nothing.
    let mut parts = [
        Bytes::from(announced.map_err(|_| ())?),
        Bytes::from(content),
    ];
    let mut rest = parts.as_mut_slice();
    let stall = link.shared.config.session.stall_timeout;
    while !rest.is_empty() {
        // A peer that asks and does not read must not hold this node's memory for ever.
        let written = match tokio::time::timeout(stall, open.write_chunks(rest)).await {
            Ok(written) => written.map_err(|_| ())?,
            Err(_) => {
                let reason = "peer asked for a segment and does not read it".to_owned();
                let _ = link.tell(Input::Broken(CloseCode::Stalled, reason)).await;
                return Err(());
            }
        };
        rest = rest.get_mut(written.chunks..).unwrap_or_default();
    }
    // A segment in ranges counts with its last one, wherever else the others were sent.
    let ends = serve
        .range
        .as_ref()
        .is_none_or(|range| range.end == serve.reference.size_bytes);
    link.counted(|stats| {
        stats.segments_out += u64::from(ends);
        stats.bytes_out += size_bytes;
    });
    Ok(())
}

// ---- Receiving ----

/// A segment or slice whose bytes are all here.
pub(super) enum Arrived {
    Whole(SegmentRef, Vec<u8>),
    Slice(SegmentId, Range<u64>, Vec<u8>),
}

/// Where readers hand over what they read. Urgent kinds do not queue behind bulk ones, and a CRL not
/// behind a bundle, which takes as long as its compiler (ruling 10).
#[derive(Clone)]
struct Admission {
    revocation: mpsc::Sender<Arrived>,
    policy: mpsc::Sender<Arrived>,
    bulk: mpsc::Sender<Arrived>,
}

impl Admission {
    /// Starts the workers. One segment of an urgent kind waits while one is looked at; of the others as
    /// many as are looked at together.
    fn start(link: &Link) -> Self {
        let worker = |link: &Link, together: usize| {
            let (sender, arrived) = mpsc::channel(together);
            link.spawn(admit_all(link.clone(), arrived, together));
            sender
        };
        Self {
            revocation: worker(link, 1),
            policy: worker(link, 1),
            bulk: worker(link, MAX_ADMITTED_TOGETHER),
        }
    }

    async fn hand_over(&self, arrived: Arrived) -> Result<(), ()> {
        let queue = match &arrived {
            Arrived::Whole(reference, _) => match reference.kind {
                Kind::Revocation => &self.revocation,
                Kind::Policy => &self.policy,
                Kind::Witness | Kind::Audit => &self.bulk,
            },
            Arrived::Slice(..) => &self.bulk,
        };
        queue.send(arrived).await.map_err(|_| ())
    }
}

/// Takes what has arrived meanwhile, in its order, and nothing waits for more. What is here counts as in
/// flight, so the session's bounds of that hold for it (INV-07).
async fn admit_all(link: Link, mut arrived: mpsc::Receiver<Arrived>, together: usize) {
    let mut waiting = Vec::with_capacity(together);
    while arrived.recv_many(&mut waiting, together).await > 0 {
        let mut group = Vec::with_capacity(waiting.len());
        for next in waiting.drain(..) {
            match next {
                Arrived::Whole(reference, content) => group.push((reference, content)),
                Arrived::Slice(id, range, slice) => {
                    let before = std::mem::take(&mut group);
                    if admit_wholes(&link, before).await.is_err()
                        || admit_part(&link, id, range, slice).await.is_err()
                    {
                        return;
                    }
                }
            }
        }
        if admit_wholes(&link, group).await.is_err() {
            return;
        }
    }
}

fn broken() -> Refusal {
    Refusal {
        code: "internal",
        message: "admission was cut short by a fault of this node".to_owned(),
        fault: Fault::Local,
    }
}

/// Admits segments and tells the session of each. An error: the session is over.
async fn admit_wholes(link: &Link, group: Vec<(SegmentRef, Vec<u8>)>) -> Result<(), ()> {
    if group.is_empty() {
        return Ok(());
    }
    let ids: Vec<SegmentId> = group.iter().map(|(reference, _)| reference.id).collect();
    let worker = link.clone();
    let admitted = tokio::task::spawn_blocking(move || admit(&worker, group));
    let admitted = admitted.await.unwrap_or_default();
    // One for which there is no answer was cut short.
    let answers = admitted
        .into_iter()
        .chain(std::iter::repeat_with(|| Err(broken())));
    for (id, answer) in ids.into_iter().zip(answers) {
        let told = match answer {
            Ok(()) => Input::Admitted(id),
            Err(refusal) => Input::Failed(id, refusal),
        };
        link.tell(told).await?;
    }
    Ok(())
}

/// The same for a slice.
async fn admit_part(
    link: &Link,
    id: SegmentId,
    range: Range<u64>,
    slice: Vec<u8>,
) -> Result<(), ()> {
    let (worker, from) = (link.clone(), range.start);
    let admitted = tokio::task::spawn_blocking(move || admit_slice(&worker, &id, &range, &slice));
    let admitted = admitted.await.unwrap_or_else(|_| Err(broken()));
    let stored = admitted == Ok(true);
    link.tell(Input::SliceOver(id, from, admitted.err()))
        .await?;
    if stored {
        link.tell(Input::Admitted(id)).await?;
    }
    Ok(())
}

/// A claim that outlives its session while the node looks at the segment (INV-08). Given back on every
/// way out, a panic too (INV-07).
struct Looking<'l>(&'l Link, SegmentId);

impl<'l> Looking<'l> {
    fn begin(link: &'l Link, id: SegmentId) -> Self {
        lock(&link.shared.claims).begin_admission(link.session(), &id);
        Self(link, id)
    }
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        let Self(link, id) = self;
        let is_orphan = lock(&link.shared.claims).end_admission(link.session(), id);
        if is_orphan {
            link.shared.released(None, &[*id]);
        }
    }
}

/// Checks segments, each for itself, and stores those that are sound together. The answers are in the order
/// of the segments. Runs where blocking is allowed.
fn admit(link: &Link, group: Vec<(SegmentRef, Vec<u8>)>) -> Vec<Result<(), Refusal>> {
    let shared = &link.shared;
    let _looking: Vec<Looking<'_>> = group
        .iter()
        .map(|(reference, _)| Looking::begin(link, reference.id))
        .collect();
    let (mut answers, mut sound) = (Vec::with_capacity(group.len()), Vec::new());
    for (reference, content) in group {
        let checked = alive(link).and_then(|()| check(link, &reference, content));
        answers.push(checked.map(|segment| sound.push(segment)));
    }
    let held: Vec<SegmentRef> = sound.iter().map(VerifiedSegment::reference).collect();
    let admitted = shared.hooks.admit_all(&link.peer, sound, &|| alive(link));
    let mut admitted = held.into_iter().zip(
        admitted
            .into_iter()
            .map(Some)
            .chain(std::iter::repeat(None)),
    );
    for answer in answers.iter_mut().filter(|answer| answer.is_ok()) {
        *answer = match admitted.next() {
            Some((held, Some(Ok(admitted)))) => {
                taken(link, &held, admitted);
                Ok(())
            }
            Some((_, Some(Err(refusal)))) => Err(refusal),
            Some((_, None)) | None => Err(broken()),
        };
    }
    answers
}

/// Verifies a segment's bytes, and that it is what was listed.
fn check(
    link: &Link,
    reference: &SegmentRef,
    content: Vec<u8>,
) -> Result<VerifiedSegment, Refusal> {
    // The one hash over the content is made here, in a single pass and off the network's threads.
    let segment =
        verify_segment(content, Some(reference.id), &link.shared.domain).map_err(|error| {
            Refusal {
                code: "format",
                message: error.to_string(),
                fault: Fault::Peer,
            }
        })?;
    let header = segment.header();
    if header.origin != reference.origin || header.sequence != reference.sequence {
        return Err(Refusal {
            code: "listed_otherwise",
            message: format!(
                "segment {} is {} of {}, listed as {} of {}",
                reference.id, header.sequence, header.origin, reference.sequence, reference.origin
            ),
            fault: Fault::Peer,
        });
    }
    Ok(segment)
}

/// The node has taken a segment: what follows from it.
fn taken(link: &Link, held: &SegmentRef, admitted: Admitted) {
    let shared = &link.shared;
    link.counted(|stats| {
        stats.segments_in += 1;
        stats.bytes_in += held.size_bytes;
    });
    if admitted == Admitted::Stored {
        shared.event(MeshEvent::Stored {
            peer: link.peer.clone(),
            reference: held.clone(),
        });
    }
    if held.kind == Kind::Revocation {
        // The node has taken the list over in `admit`; who is revoked by it goes now.
        shared.close_revoked();
    }
    shared.announce(held);
}

/// Accepts the peer's data streams, from the moment that it is authenticated. What takes their content
/// in starts with the first of them: many sessions never have one.
pub(super) async fn accept_streams(link: Link, connection: Connection) {
    let open = Arc::new(Mutex::new(BTreeSet::new()));
    let mut admission = None;
    while let Ok(stream) = connection.accept_uni().await {
        let admission = admission.get_or_insert_with(|| Admission::start(&link));
        let (link, admission, open) = (link.clone(), admission.clone(), Arc::clone(&open));
        let reader = link.clone();
        link.spawn(async move { read_stream(reader, stream, admission, open).await });
    }
}

/// Why a data stream ended before its time.
enum Broken {
    /// The peer gave the stream up.
    Gone,
    /// The connection or the session is over; that has its own reason.
    Lost,
    /// The peer sent what is no frame.
    Frame(FrameError),
    /// The session refused what was announced.
    Refused,
}

impl From<ReadError> for Broken {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(_) => Self::Lost,
            _ => Self::Gone,
        }
    }
}

async fn read_stream(
    link: Link,
    mut stream: RecvStream,
    admission: Admission,
    open: Arc<Mutex<BTreeSet<Kind>>>,
) {
    let kind = match read_frame(&mut stream).await {
        Ok(Some(Frame::DataStream(DataStream { kind }))) => Kind::from_number(kind).ok(),
        Err(Broken::Lost) => return,
        _ => None,
    };
    let Some(kind) = kind.filter(|kind| lock(&open).insert(*kind)) else {
        let reason = "data stream without a kind, or a second one of its kind".to_owned();
        let _ = link.tell(Input::Broken(CloseCode::Protocol, reason)).await;
        return;
    };
    let mut reading: Option<ServeKey> = None;
    let ended = loop {
        match read_segment(&link, &mut stream, kind, &admission, &mut reading).await {
            Ok(true) => {}
            Ok(false) => break None,
            Err(broken) => break Some(broken),
        }
    };
    // Before the peer is told, so that its next stream of this kind finds the place free.
    lock(&open).remove(&kind);
    let _ = stream.stop(VarInt::from_u32(CloseCode::Protocol as u32));
    match ended {
        Some(Broken::Frame(error)) => {
            let _ = link
                .tell(Input::Broken(CloseCode::Protocol, error.to_string()))
                .await;
        }
        Some(Broken::Gone) => {
            if let Some((id, from)) = reading {
                let refusal = Refusal {
                    code: "cut_short",
                    message: format!("stream ended within segment {id}"),
                    fault: Fault::Peer,
                };
                let failed = match from {
                    None => Input::Failed(id, refusal),
                    Some(from) => Input::SliceOver(id, from, Some(refusal)),
                };
                let _ = link.tell(failed).await;
            }
        }
        Some(Broken::Refused | Broken::Lost) | None => {}
    }
}

/// Reads one segment and hands it over. False: the stream ended between segments.
async fn read_segment(
    link: &Link,
    stream: &mut RecvStream,
    kind: Kind,
    admission: &Admission,
    reading: &mut Option<ServeKey>,
) -> Result<bool, Broken> {
    let Segment { id, size_bytes } = match read_frame(stream).await? {
        Some(Frame::Segment(segment)) => segment,
        Some(Frame::Slice(slice)) => {
            return read_slice(link, stream, kind, admission, reading, slice).await;
        }
        Some(_) => return Err(Broken::Refused),
        None => return Ok(false),
    };
    let id = SegmentId::from_bytes(id);
    // INV-07: memory is taken only for a segment that was asked for, of the size that was listed
    // and allowed; untouched pages of it cost nothing until bytes arrive.
    let announced = ask(link, |reply| Input::Announced {
        kind,
        id,
        size_bytes,
        reply,
    });
    let reference = announced.await?;
    *reading = Some((id, None));
    let content = read_bytes(link, stream, reference.size_bytes).await?;
    *reading = None;
    link.tell(Input::Received(id))
        .await
        .map_err(|_| Broken::Lost)?;
    let handed = admission.hand_over(Arrived::Whole(reference, content));
    handed.await.map(|()| true).map_err(|()| Broken::Lost)
}

/// Reads one slice and hands it over, or over it.
async fn read_slice(
    link: &Link,
    stream: &mut RecvStream,
    kind: Kind,
    admission: &Admission,
    reading: &mut Option<ServeKey>,
    slice: Slice,
) -> Result<bool, Broken> {
    let id = SegmentId::from_bytes(slice.id);
    let range = slice.range.from..slice.range.to;
    // INV-07: of the length that the range of a listed segment demands, and asked for.
    let announced = ask(link, |reply| Input::AnnouncedSlice {
        kind,
        id,
        range: range.clone(),
        slice_bytes: slice.slice_bytes,
        reply,
    });
    let take = announced.await?;
    *reading = Some((id, Some(range.start)));
    let content = read_bytes(link, stream, slice.slice_bytes).await?;
    *reading = None;
    link.tell(Input::SliceReceived(id, range.start))
        .await
        .map_err(|_| Broken::Lost)?;
    if take == TakeSlice::Discard {
        return Ok(true);
    }
    let handed = admission.hand_over(Arrived::Slice(id, range, content));
    handed.await.map(|()| true).map_err(|()| Broken::Lost)
}

/// What the session says to what a stream announces.
async fn ask<T, E>(
    link: &Link,
    announced: impl FnOnce(oneshot::Sender<Result<T, E>>) -> Input,
) -> Result<T, Broken> {
    let (reply, answer) = oneshot::channel();
    let told = link.tell(announced(reply)).await;
    told.map_err(|()| Broken::Lost)?;
    let answer = answer.await.map_err(|_| Broken::Lost)?;
    answer.map_err(|_| Broken::Refused)
}

/// Reads so many bytes, which the session has allowed.
async fn read_bytes(
    link: &Link,
    stream: &mut RecvStream,
    size_bytes: u64,
) -> Result<Vec<u8>, Broken> {
    let size = usize::try_from(size_bytes).map_err(|_| Broken::Refused)?;
    let mut content = Vec::with_capacity(size);
    let mut told = tokio::time::Instant::now();
    while content.len() < size {
        let chunk = stream.read_chunk(size - content.len(), true).await?;
        content.extend_from_slice(&chunk.ok_or(Broken::Gone)?.bytes);
        if told.elapsed() >= PROGRESS_INTERVAL {
            told = tokio::time::Instant::now();
            link.tell_later(Input::Progress);
        }
    }
    Ok(content)
}

/// Reads one small frame of a data stream. None: the stream ended before its first byte.
async fn read_frame(stream: &mut RecvStream) -> Result<Option<Frame>, Broken> {
    let mut header = [0; FRAME_HEADER_BYTES];
    let mut filled = 0;
    while let Some(rest) = header.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match stream.read(rest).await? {
            Some(read) => filled += read,
            None if filled == 0 => return Ok(None),
            None => return Err(Broken::Gone),
        }
    }
    let header = FrameHeader::decode(Channel::Data, header).map_err(Broken::Frame)?;
    let mut body = vec![0; header.body_bytes];
    stream
        .read_exact(&mut body)
        .await
        .map_err(|error| match error {
            ReadExactError::ReadError(error) => error.into(),
            ReadExactError::FinishedEarly(_) => Broken::Gone,
        })?;
    Frame::decode_body(header, &body)
        .map(Some)
        .map_err(Broken::Frame)
}
