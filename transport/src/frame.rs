//! Frames: `length u32 LE | type u8 | body`, the body in `bincode` 2 standard encoding.
//!
//! This is a codec and nothing more: it knows shapes and limits, never order or meaning (that is
//! [`crate::session`]). The layout is written down byte by byte in `docs/src/protocol.md`, with
//! vectors in `tests/vectors/frames/`.
//!
//! Strict on purpose: a length above the type's maximum is refused before a byte of the body is
//! held, decoding counts memory before it allocates, and a body that does not encode back to the
//! same bytes is refused, so one frame has one encoding. Start at [`FrameDecoder`].

use bincode::{Decode, Encode};
use tidelock_segments::bao::GROUP_BYTES;

use crate::limits::{
    FRAME_HEADER_BYTES, MAX_DECODED_FRAME_BYTES, MAX_ENDORSEMENT_BYTES, MAX_FRAME_BODY_BYTES,
    MAX_HEADS_PER_FRAME, MAX_HELLO_ACK_BYTES, MAX_HELLO_BYTES, MAX_LIST_REFS_BYTES,
    MAX_LISTS_PER_FRAME, MAX_NAME_BYTES, MAX_NEWEST_REFS, MAX_ORIGIN_BYTES, MAX_RANGE_BYTES,
    MAX_RANGES, MAX_REASON_BYTES, MAX_RECEIPT_BYTES, MAX_RECEIPTS_PER_FRAME,
    MAX_REFS_OF_ONE_NUMBER, MAX_REFS_PER_FRAME,
};

/// A segment id as it stands on the wire.
pub type WireId = [u8; 32];

/// First bytes of a keyed hash over a full head (ruling 6).
pub type HeadTag = [u8; 12];

/// The two kinds of stream; a frame is valid on exactly one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// The one bidirectional stream.
    Control,
    /// A unidirectional stream that carries segments of one kind.
    Data,
}

macro_rules! frame_types {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $channel:ident, $max:expr;)*) => {
        /// What a frame is. The numbers are the wire's.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum FrameType {
            $($(#[$doc])* $name = $code,)*
        }

        impl FrameType {
            /// All types, in order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The type with this number on this channel.
            #[must_use]
            pub fn from_wire(channel: Channel, code: u8) -> Option<Self> {
                match code {
                    $($code if channel == Channel::$channel => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The channel on which frames of this type are valid.
            #[must_use]
            pub fn channel(self) -> Channel {
                match self {
                    $(Self::$name => Channel::$channel,)*
                }
            }

            /// Longest body of this type.
            #[must_use]
            pub const fn max_body_bytes(self) -> usize {
                match self {
                    $(Self::$name => $max,)*
                }
            }
        }

        $(const _: () = assert!(FrameType::$name.max_body_bytes() <= MAX_FRAME_BODY_BYTES);)*
    };
}

frame_types! {
    /// Who speaks, with which limits, holding what.
    Hello = 1, Control, MAX_HELLO_BYTES;
    /// The other side's Hello was accepted.
    HelloAck = 2, Control, MAX_HELLO_ACK_BYTES;
    /// Where the sender stands in some origins' logs.
    Heads = 3, Control, MAX_FRAME_BODY_BYTES;
    /// Asks for the full head of one origin.
    GetHead = 4, Control, 8;
    /// A full head.
    FullHead = 5, Control, 1024;
    /// Asks for references.
    ListRefs = 6, Control, MAX_LIST_REFS_BYTES;
    /// References.
    Refs = 7, Control, MAX_FRAME_BODY_BYTES;
    /// Asks for one segment, or for a range of it.
    Fetch = 8, Control, 56;
    /// A segment or range that was asked for will not come.
    FetchRefused = 9, Control, 48;
    /// Asks for custody receipts.
    ReceiptWant = 10, Control, MAX_FRAME_BODY_BYTES;
    /// A custody receipt, or the word that there is none.
    Receipt = 11, Control, MAX_FRAME_BODY_BYTES;
    /// The end, with a code.
    Bye = 12, Control, 16 + MAX_REASON_BYTES;
    /// Asks for all heads once more.
    AskHeads = 13, Control, 0;
    /// First frame of a data stream: the kind that it carries.
    DataStream = 32, Data, 1;
    /// Announces one segment, whose bytes follow raw.
    Segment = 33, Data, 48;
    /// Announces a range of one segment, whose slice follows raw.
    Slice = 34, Data, 64;
}

/// What a node takes, as it announces it: nothing is sent only to be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct WireLimits {
    /// One bit a kind, `1 << kind number`.
    pub kinds: u8,
    /// Biggest segment that the node takes.
    pub max_segment_bytes: u64,
    /// Bytes of other nodes' audit that it still takes.
    pub custody_free_bytes: u64,
    /// Fetches that it answers at once.
    pub max_in_flight: u16,
}

/// First frame in each direction.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// Version of the protocol; first, so that every version can read it.
    pub version: u16,
    /// Trust domain.
    pub domain: String,
    /// Node id; must be the one of the certificate.
    pub node_id: String,
    /// What the node takes.
    pub limits: WireLimits,
    /// 0 normal, 1 stale, 2 restricted, 3 closed.
    pub posture: u8,
    /// Encoded endorsement of the node's log key.
    pub endorsement: Option<Vec<u8>>,
    /// Keyed digest of all heads; equal means nothing to exchange.
    pub state_digest: [u8; 32],
}

/// The other's Hello was accepted; this is what it is granted in this session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct HelloAck {
    /// Control frames that the sender reads in a second.
    pub frames_per_second: u32,
    /// Bytes of witness and audit that it takes in a second.
    pub in_bytes_per_second: u64,
    /// Bytes of witness and audit that it still takes in the running day.
    pub in_bytes_left_today: u64,
    /// Bytes that it sends in a second.
    pub out_bytes_per_second: u64,
}

/// An origin in a session: named once, a number afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum OriginRef {
    /// A number that the sender gave before.
    Known(u32),
    /// The next number, and its name.
    New(u32, String),
}

/// One origin's head in short form.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HeadEntry {
    /// The origin.
    pub origin: OriginRef,
    /// Sequence numbers held, inclusive, ascending.
    pub ranges: Vec<(u64, u64)>,
    /// Keyed hash of the full head.
    pub tag: HeadTag,
    /// Of revocation and policy: what is held with the highest number, so that news of it need not be
    /// asked for. Ascending by id; empty if there is more of it than fits.
    pub newest: Vec<RefEntry>,
}

/// Heads, all of them or the changed ones.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Heads {
    /// In order of urgency, then origin.
    pub entries: Vec<HeadEntry>,
    /// Whether the next frame of heads belongs to the same round.
    pub more: bool,
}

/// Asks for a full head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct GetHead {
    /// The answering side's number of the origin.
    pub origin: u32,
}

/// A full head: evidence, unlike its short form.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FullHead {
    /// The sending side's number of the origin.
    pub origin: u32,
    /// The head; none when nothing is held any more.
    pub head: Option<HeadBody>,
}

/// What a full head says.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HeadBody {
    /// Sequence numbers held.
    pub ranges: Vec<(u64, u64)>,
    /// Id of the segment with the highest number.
    pub last_id: WireId,
}

/// One list that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ListAsked {
    /// The answering side's number of the origin.
    pub origin: u32,
    /// First sequence number.
    pub from: u64,
    /// Last sequence number.
    pub to: u64,
    /// References wanted at most.
    pub max: u16,
}

/// Asks for references, of one origin or of many at once.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ListRefs {
    /// At least one; together at most what one frame of answers holds.
    pub lists: Vec<ListAsked>,
}

impl ListRefs {
    /// References that the answer to one list may hold: a page keeps those of one number together.
    #[must_use]
    pub fn answer_refs(max: u16) -> usize {
        usize::from(max) + MAX_REFS_OF_ONE_NUMBER
    }
}

/// One segment in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct RefEntry {
    /// Its id.
    pub id: WireId,
    /// Its place in the origin's log.
    pub sequence: u64,
    /// Its size.
    pub size_bytes: u64,
    /// Id of the one before it.
    pub prev: Option<WireId>,
}

/// References of one origin, ascending.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RefList {
    /// The sending side's number of the origin.
    pub origin: u32,
    /// The references.
    pub refs: Vec<RefEntry>,
    /// Whether the asked range holds no more.
    pub done: bool,
}

/// The answer to one [`ListRefs`], list for list in its order.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Refs {
    /// The lists.
    pub lists: Vec<RefList>,
}

/// A range of a segment's bytes: whole groups of 16 KiB, except that the last one of a segment may be
/// shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ByteRange {
    /// First byte.
    pub from: u64,
    /// The byte after the last.
    pub to: u64,
}

impl ByteRange {
    fn is_valid(self) -> bool {
        self.from < self.to
            && self.from.is_multiple_of(GROUP_BYTES)
            && self.to - self.from <= MAX_RANGE_BYTES
    }
}

/// Asks for one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Fetch {
    /// Its id.
    pub id: WireId,
    /// Which of its bytes; none for all of them in one piece.
    pub range: Option<ByteRange>,
}

/// A segment will not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct FetchRefused {
    /// Its id.
    pub id: WireId,
    /// Where the range began that was asked for; none for a whole segment.
    pub from: Option<u64>,
    /// A [`FetchRefusal`].
    pub code: u16,
}

/// Why a segment will not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum FetchRefusal {
    /// It is not held, or not any more.
    NotHeld = 1,
    /// It could not be read.
    Unreadable = 2,
    /// It is bigger than the asking side said it takes.
    TooLarge = 3,
}

impl FetchRefusal {
    /// The refusal with this number.
    #[must_use]
    pub fn from_wire(code: u16) -> Option<Self> {
        match code {
            1 => Some(Self::NotHeld),
            2 => Some(Self::Unreadable),
            3 => Some(Self::TooLarge),
            _ => None,
        }
    }

    /// Its name in records and in `peers`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotHeld => "not_held",
            Self::Unreadable => "unreadable",
            Self::TooLarge => "too_large",
        }
    }
}

/// Asks for custody receipts.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ReceiptWant {
    /// Segments.
    pub ids: Vec<WireId>,
}

/// A custody receipt.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Receipt {
    /// The segment.
    pub id: WireId,
    /// The encoded receipt; none when the segment is not held.
    pub receipt: Option<Vec<u8>>,
}

/// The end.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Bye {
    /// A [`CloseCode`].
    pub code: u32,
    /// For a human.
    pub reason: String,
}

/// Opens a data stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct DataStream {
    /// Number of the kind that it carries.
    pub kind: u8,
}

/// Announces the raw bytes of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Segment {
    /// Its id.
    pub id: WireId,
    /// Number of bytes that follow.
    pub size_bytes: u64,
}

/// Announces the raw bytes of a slice: a range of a segment with the hashes that prove it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Slice {
    /// The segment's id.
    pub id: WireId,
    /// Which of its bytes.
    pub range: ByteRange,
    /// Number of bytes that follow.
    pub slice_bytes: u64,
}

macro_rules! close_codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        /// Why a session ended: the code of a QUIC close and of a Bye, and a stable word in records.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum CloseCode {
            $($(#[$doc])* $name = $code,)*
        }

        impl CloseCode {
            /// All codes, in order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The code with this number.
            #[must_use]
            pub fn from_wire(code: u64) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Its name in records and in `peers`.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

close_codes! {
    /// The node stops or the link is given up on purpose.
    Normal = 0, "normal";
    /// A frame was malformed, unknown or out of place.
    Protocol = 1, "protocol";
    /// The versions differ.
    Version = 2, "version";
    /// The domains differ.
    Domain = 3, "domain";
    /// The Hello names another node than the certificate, or another one was dialled.
    NodeId = 4, "node_id";
    /// A certificate of the chain is revoked.
    Revoked = 5, "revoked";
    /// A certificate of the chain is outside its validity.
    Expired = 6, "expired";
    /// Whether the chain is revoked cannot be told: no CRL, or an expired one.
    RevocationUnknown = 7, "revocation_unknown";
    /// Another session with the same peer is kept.
    Duplicate = 8, "duplicate";
    /// The peer misbehaved a moment ago.
    CoolingDown = 9, "cooling_down";
    /// Too many bad transfers.
    Faults = 10, "faults";
    /// The peer owed an answer and sent nothing.
    Stalled = 11, "stalled";
    /// The Hello round trip took too long.
    HelloTimeout = 12, "hello_timeout";
    /// This node's transport is closed by a fault of its own.
    Disabled = 13, "disabled";
    /// The peer went past a limit.
    Limit = 14, "limit";
    /// The node met itself.
    OwnNode = 15, "own_node";
    /// No room for another session.
    Busy = 16, "busy";
    /// A fault inside this node.
    Internal = 17, "internal";
    /// The chain does not lead to a trusted CA any more.
    Untrusted = 18, "untrusted";
}

/// Every frame of version 3.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is documented at its body")]
pub enum Frame {
    Hello(Box<Hello>),
    HelloAck(HelloAck),
    Heads(Heads),
    GetHead(GetHead),
    FullHead(FullHead),
    ListRefs(ListRefs),
    Refs(Refs),
    Fetch(Fetch),
    FetchRefused(FetchRefused),
    ReceiptWant(ReceiptWant),
    Receipt(Receipt),
    Bye(Bye),
    AskHeads,
    DataStream(DataStream),
    Segment(Segment),
    Slice(Slice),
}

/// Why bytes are not a frame. Always the peer's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A type that this version does not know, or one of the other kind of stream.
    #[error("frame type {code} is unknown on a {channel:?} stream")]
    UnknownType {
        /// The number.
        code: u8,
        /// The stream.
        channel: Channel,
    },
    /// The length lies above the type's maximum.
    #[error("{frame:?} frame of {length} bytes, at most {max} are allowed")]
    TooLong {
        /// The type.
        frame: FrameType,
        /// The announced length.
        length: u64,
        /// The maximum.
        max: usize,
    },
    /// The body is not what its type prescribes.
    #[error("{frame:?} frame is malformed: {detail}")]
    Malformed {
        /// The type.
        frame: FrameType,
        /// What is wrong.
        detail: &'static str,
    },
}

/// Type and body length of a frame, checked against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// The type.
    pub frame: FrameType,
    /// Bytes of the body.
    pub body_bytes: usize,
}

impl FrameHeader {
    /// Reads the bytes before a body.
    ///
    /// # Errors
    /// Unknown type, or a length above its maximum: nothing was allocated.
    pub fn decode(channel: Channel, bytes: [u8; FRAME_HEADER_BYTES]) -> Result<Self, FrameError> {
        let [a, b, c, d, code] = bytes;
        let length = u32::from_le_bytes([a, b, c, d]);
        let frame =
            FrameType::from_wire(channel, code).ok_or(FrameError::UnknownType { code, channel })?;
        let max = frame.max_body_bytes();
        match usize::try_from(length) {
            Ok(body_bytes) if body_bytes <= max => Ok(Self { frame, body_bytes }),
            _ => Err(FrameError::TooLong {
                frame,
                length: length.into(),
                max,
            }),
        }
    }
}

/// Standard configuration: little endian, variable-length integers. The limit is memory, not
/// bytes on the wire: those are checked by the header.
fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_DECODED_FRAME_BYTES>()
}

fn body<T: Decode<()> + Encode>(frame: FrameType, bytes: &[u8]) -> Result<T, FrameError> {
    let malformed = |detail| FrameError::Malformed { frame, detail };
    let (value, used) = bincode::decode_from_slice::<T, _>(bytes, config())
        .map_err(|_| malformed("body does not decode"))?;
    if used != bytes.len() {
        return Err(malformed("bytes after the body"));
    }
    // One frame, one encoding: integers may be written longer than needed, and are refused then.
    let canonical =
        bincode::encode_to_vec(&value, config()).is_ok_and(|again| again.as_slice() == bytes);
    if !canonical {
        return Err(malformed("body is not in its shortest encoding"));
    }
    Ok(value)
}

impl Frame {
    /// The frame's type.
    #[must_use]
    pub fn frame_type(&self) -> FrameType {
        match self {
            Self::Hello(_) => FrameType::Hello,
            Self::HelloAck(_) => FrameType::HelloAck,
            Self::Heads(_) => FrameType::Heads,
            Self::GetHead(_) => FrameType::GetHead,
            Self::FullHead(_) => FrameType::FullHead,
            Self::ListRefs(_) => FrameType::ListRefs,
            Self::Refs(_) => FrameType::Refs,
            Self::Fetch(_) => FrameType::Fetch,
            Self::FetchRefused(_) => FrameType::FetchRefused,
            Self::ReceiptWant(_) => FrameType::ReceiptWant,
            Self::Receipt(_) => FrameType::Receipt,
            Self::Bye(_) => FrameType::Bye,
            Self::AskHeads => FrameType::AskHeads,
            Self::DataStream(_) => FrameType::DataStream,
            Self::Segment(_) => FrameType::Segment,
            Self::Slice(_) => FrameType::Slice,
        }
    }

    /// The frame's bytes, header included.
    ///
    /// # Errors
    /// The frame breaks a limit that the other side would refuse.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let frame = self.frame_type();
        self.check()?;
        let encoded = match self {
            Self::Hello(body) => bincode::encode_to_vec(body.as_ref(), config()),
            Self::HelloAck(body) => bincode::encode_to_vec(body, config()),
            Self::AskHeads => Ok(Vec::new()),
            Self::Heads(body) => bincode::encode_to_vec(body, config()),
            Self::GetHead(body) => bincode::encode_to_vec(body, config()),
            Self::FullHead(body) => bincode::encode_to_vec(body, config()),
            Self::ListRefs(body) => bincode::encode_to_vec(body, config()),
            Self::Refs(body) => bincode::encode_to_vec(body, config()),
            Self::Fetch(body) => bincode::encode_to_vec(body, config()),
            Self::FetchRefused(body) => bincode::encode_to_vec(body, config()),
            Self::ReceiptWant(body) => bincode::encode_to_vec(body, config()),
            Self::Receipt(body) => bincode::encode_to_vec(body, config()),
            Self::Bye(body) => bincode::encode_to_vec(body, config()),
            Self::DataStream(body) => bincode::encode_to_vec(body, config()),
            Self::Segment(body) => bincode::encode_to_vec(body, config()),
            Self::Slice(body) => bincode::encode_to_vec(body, config()),
        };
        let body = encoded.map_err(|_| FrameError::Malformed {
            frame,
            detail: "body does not encode",
        })?;
        let max = frame.max_body_bytes();
        let length = u32::try_from(body.len())
            .ok()
            .filter(|_| body.len() <= max)
            .ok_or(FrameError::TooLong {
                frame,
                length: body.len() as u64,
                max,
            })?;
        let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES + body.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.push(frame as u8);
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// Reads one body.
    ///
    /// # Errors
    /// The body is not what its type prescribes.
    pub fn decode_body(header: FrameHeader, bytes: &[u8]) -> Result<Self, FrameError> {
        let frame = header.frame;
        if bytes.len() != header.body_bytes {
            return Err(FrameError::Malformed {
                frame,
                detail: "length differs from the header's",
            });
        }
        let decoded = match frame {
            FrameType::Hello => Self::Hello(Box::new(body(frame, bytes)?)),
            FrameType::HelloAck => Self::HelloAck(body(frame, bytes)?),
            FrameType::Heads => Self::Heads(body(frame, bytes)?),
            FrameType::GetHead => Self::GetHead(body(frame, bytes)?),
            FrameType::FullHead => Self::FullHead(body(frame, bytes)?),
            FrameType::ListRefs => Self::ListRefs(body(frame, bytes)?),
            FrameType::Refs => Self::Refs(body(frame, bytes)?),
            FrameType::Fetch => Self::Fetch(body(frame, bytes)?),
            FrameType::FetchRefused => Self::FetchRefused(body(frame, bytes)?),
            FrameType::ReceiptWant => Self::ReceiptWant(body(frame, bytes)?),
            FrameType::Receipt => Self::Receipt(body(frame, bytes)?),
            FrameType::Bye => Self::Bye(body(frame, bytes)?),
            FrameType::AskHeads => Self::AskHeads,
            FrameType::DataStream => Self::DataStream(body(frame, bytes)?),
            FrameType::Segment => Self::Segment(body(frame, bytes)?),
            FrameType::Slice => Self::Slice(body(frame, bytes)?),
        };
        decoded.check()?;
        Ok(decoded)
    }

    /// Limits of single fields, for both directions.
    fn check(&self) -> Result<(), FrameError> {
        let frame = self.frame_type();
        let require = |holds: bool, detail| {
            holds
                .then_some(())
                .ok_or(FrameError::Malformed { frame, detail })
        };
        match self {
            Self::Hello(hello) => {
                require(hello.domain.len() <= MAX_NAME_BYTES, "domain is too long")?;
                require(hello.node_id.len() <= MAX_NAME_BYTES, "node id is too long")?;
                require(hello.posture <= 3, "posture is unknown")?;
                let endorsement = hello.endorsement.as_ref().map_or(0, Vec::len);
                require(
                    endorsement <= MAX_ENDORSEMENT_BYTES,
                    "endorsement is too long",
                )
            }
            Self::Heads(heads) => {
                require(heads.entries.len() <= MAX_HEADS_PER_FRAME, "too many heads")?;
                for entry in &heads.entries {
                    if let OriginRef::New(_, name) = &entry.origin {
                        require(name.len() <= MAX_ORIGIN_BYTES, "origin is too long")?;
                    }
                    require(
                        entry.newest.len() <= MAX_NEWEST_REFS,
                        "too many newest references",
                    )?;
                    require(
                        ranges_are_valid(&entry.ranges),
                        "ranges are not ascending and apart",
                    )?;
                }
                Ok(())
            }
            Self::FullHead(head) => require(
                head.head
                    .as_ref()
                    .is_none_or(|head| ranges_are_valid(&head.ranges)),
                "ranges are not ascending and apart",
            ),
            Self::ListRefs(asked) => {
                let mut answer = 0;
                for list in &asked.lists {
                    require(list.from <= list.to, "range ends before it begins")?;
                    require(list.max > 0, "number of references is out of bounds")?;
                    answer += ListRefs::answer_refs(list.max);
                }
                require(
                    answer > 0 && answer <= MAX_REFS_PER_FRAME,
                    "number of references is out of bounds",
                )
            }
            Self::Refs(refs) => {
                let held: usize = refs.lists.iter().map(|list| list.refs.len()).sum();
                require(held <= MAX_REFS_PER_FRAME, "too many references")?;
                require(
                    !refs.lists.is_empty() && refs.lists.len() <= MAX_LISTS_PER_FRAME,
                    "number of lists is out of bounds",
                )
            }
            Self::Fetch(fetch) => require(
                fetch.range.is_none_or(ByteRange::is_valid),
                "range is empty, too long or not of whole groups",
            ),
            Self::FetchRefused(refused) => require(
                FetchRefusal::from_wire(refused.code).is_some(),
                "refusal code is unknown",
            ),
            Self::Slice(slice) => require(
                slice.range.is_valid(),
                "range is empty, too long or not of whole groups",
            ),
            Self::ReceiptWant(want) => require(
                !want.ids.is_empty() && want.ids.len() <= MAX_RECEIPTS_PER_FRAME,
                "number of receipts is out of bounds",
            ),
            Self::Receipt(receipt) => require(
                receipt.receipt.as_ref().map_or(0, Vec::len) <= MAX_RECEIPT_BYTES,
                "receipt is too long",
            ),
            Self::Bye(bye) => require(bye.reason.len() <= MAX_REASON_BYTES, "reason is too long"),
            Self::HelloAck(_)
            | Self::AskHeads
            | Self::GetHead(_)
            | Self::DataStream(_)
            | Self::Segment(_) => Ok(()),
        }
    }
}

/// Non-empty, bounded, each range ordered, and a hole between any two.
fn ranges_are_valid(ranges: &[(u64, u64)]) -> bool {
    !ranges.is_empty()
        && ranges.len() <= MAX_RANGES
        && ranges.iter().all(|(from, to)| from <= to)
        && ranges.windows(2).all(|pair| match pair {
            [(_, before), (after, _)] => before
                .checked_add(1)
                .is_some_and(|adjacent| adjacent < *after),
            _ => false,
        })
}

/// Cuts a reason so that it fits a Bye, at a character's edge.
#[must_use]
pub fn bounded_reason(reason: &str) -> String {
    let end = (0..=MAX_REASON_BYTES.min(reason.len()))
        .rev()
        .find(|end| reason.is_char_boundary(*end))
        .unwrap_or(0);
    reason.get(..end).unwrap_or_default().to_owned()
}

/// Turns bytes as they arrive into frames. Holds at most one frame and what was last pushed.
#[derive(Debug)]
pub struct FrameDecoder {
    channel: Channel,
    held: Vec<u8>,
    taken: usize,
    failed: Option<FrameError>,
}

impl FrameDecoder {
    /// A decoder for one stream.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self {
            channel,
            held: Vec::new(),
            taken: 0,
            failed: None,
        }
    }

    /// Adds bytes; call [`next_frame`](Self::next_frame) until it has none before adding more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.held.drain(..self.taken);
        self.taken = 0;
        if self.failed.is_none() {
            self.held.extend_from_slice(bytes);
        }
    }

    /// Bytes that are held.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held.len() - self.taken
    }

    /// The next whole frame.
    ///
    /// # Errors
    /// The stream is broken for good: every later call gives the same error.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let decoded = self.try_next();
        if let Err(error) = &decoded {
            self.failed = Some(error.clone());
            self.held = Vec::new();
            self.taken = 0;
        }
        decoded
    }

    fn try_next(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = self.held.get(self.taken..).unwrap_or_default();
        let Some((header, rest)) = rest.split_first_chunk::<FRAME_HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = FrameHeader::decode(self.channel, *header)?;
        let Some(body) = rest.get(..header.body_bytes) else {
            return Ok(None);
        };
        let frame = Frame::decode_body(header, body)?;
        self.taken += FRAME_HEADER_BYTES + header.body_bytes;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests;
