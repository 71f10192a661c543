//! Every bound of this crate in one place, each with its worst case.
//!
//! "A session" below is one connection to one peer. Bounds that a peer announces in its Hello only
//! ever lower what is written here.

use std::time::Duration;

use tidelock_segments::limits as segments;

/// Version of the wire protocol. A change of any byte of a frame bumps it.
pub const PROTOCOL_VERSION: u16 = 3;

/// Bytes before the body of every frame: length and type.
pub const FRAME_HEADER_BYTES: usize = 5;

/// Longest body of any frame. A decoder holds at most one, so 64 KiB a stream.
pub const MAX_FRAME_BODY_BYTES: usize = 64 * 1024;

/// Memory that decoding one frame may claim. Bigger than the body because a decoded entry is wider
/// than its encoding; `bincode` counts against it before it allocates.
pub const MAX_DECODED_FRAME_BYTES: usize = 256 * 1024;

/// Longest Hello: the endorsement with its certificate chain dominates.
pub const MAX_HELLO_BYTES: usize = 32 * 1024;

/// Body of a HelloAck: four numbers.
pub const MAX_HELLO_ACK_BYTES: usize = 5 + 3 * 9;

/// Longest endorsement that a Hello may carry.
pub const MAX_ENDORSEMENT_BYTES: usize = segments::MAX_ENDORSEMENT_BYTES;

/// Longest custody receipt, endorsement and certificate chain included.
pub const MAX_RECEIPT_BYTES: usize = segments::MAX_RECEIPT_BYTES;

/// Longest name of a domain or node in a Hello.
pub const MAX_NAME_BYTES: usize = segments::MAX_NAME_BYTES;

/// Longest name of an origin in a head.
pub const MAX_ORIGIN_BYTES: usize = segments::MAX_ORIGIN_BYTES;

/// Longest reason in a Bye or in a QUIC close; one packet holds it.
pub const MAX_REASON_BYTES: usize = 256;

/// Ranges of sequence numbers in one head; 512 bytes. The store keeps the highest ones; what lies
/// below is offered once the holes between them are filled.
pub const MAX_RANGES: usize = segments::MAX_HEAD_RANGES;

/// References that a head carries of its highest number, of revocation and policy only. Where there are
/// more (a CA that numbered three lists alike), they are asked for as all others.
pub const MAX_NEWEST_REFS: usize = 2;

/// Heads in one frame.
pub const MAX_HEADS_PER_FRAME: usize = 64;

/// Segment references in one frame.
pub const MAX_REFS_PER_FRAME: usize = 512;

/// Segments of one origin with the same sequence number that a page keeps together, beyond its size.
pub const MAX_REFS_OF_ONE_NUMBER: usize = 8;

/// Lists in one frame: each may hold a reference and what is kept together with it, and the answer to
/// all of them is one frame of at most [`MAX_REFS_PER_FRAME`].
pub const MAX_LISTS_PER_FRAME: usize = MAX_REFS_PER_FRAME / (1 + MAX_REFS_OF_ONE_NUMBER);

/// Body of a frame that asks for lists: a length, and four numbers a list.
pub const MAX_LIST_REFS_BYTES: usize = 3 + MAX_LISTS_PER_FRAME * (5 + 9 + 9 + 3);

/// Segment ids in one request for receipts. Worst case of the answers that wait to be written:
/// 32 x 32 KiB = 1 MiB a session.
pub const MAX_RECEIPTS_PER_FRAME: usize = 32;

/// Origins that one peer may name in a session. Worst case 8,192 x (255 bytes of name + 3 x 512
/// bytes of ranges), about 15 MiB; a site of 200 nodes with 20 log incarnations each uses half.
pub const MAX_ORIGINS: usize = 8_192;

/// References that are listed ahead of the fetches, over all origins of a session; about 200 bytes
/// each, so 3 MiB. What is listed beyond it is forgotten again, last in turn first.
pub const MAX_LISTED_AHEAD: usize = 16_384;

/// Frames that ask for lists before the first answer. A first contact with a thousand logs that all
/// differ is 32 of them, and so one round trip. What they list counts against [`MAX_LISTED_AHEAD`].
pub const MAX_LISTS_OUTSTANDING: usize = 32;

/// References that they may ask for: 300 KiB of answers, behind which the head of a CRL may have to stand.
pub const MAX_REFS_OUTSTANDING: usize = 4_096;

/// Full heads that may be asked for before the first answer.
pub const MAX_HEADS_OUTSTANDING: usize = 8;

/// Fetches in flight in one session, and the number that is announced in Hello.
pub const MAX_IN_FLIGHT: u16 = 32;

/// Of these, the ones that only revocation and policy may use, so that a full pipe of audit never
/// stands before a CRL (ruling 10).
pub const URGENT_IN_FLIGHT: u16 = 4;

/// Of those, the ones that only revocation may use: a bundle is in flight until it is compiled, and a
/// peer with many of them must not stand before a CRL either.
pub const REVOCATION_IN_FLIGHT: u16 = 2;

/// Segments of a bulk kind that are looked at and stored together, so that they share syncs. As many
/// more may wait meanwhile; all of them are in flight, and bounded by [`MAX_IN_FLIGHT`] and
/// [`MAX_BULK_BYTES_IN_FLIGHT`].
pub const MAX_ADMITTED_TOGETHER: usize = segments::MAX_PUT_GROUP;

/// Bytes of bulk segments (witness, audit) that one session may have in flight; a single bigger
/// segment goes alone.
pub const MAX_BULK_BYTES_IN_FLIGHT: u64 = 64 * 1024 * 1024;

/// Bytes of bulk segments in flight over all sessions: what receive buffers cost at most, beside
/// the urgent ones. One session may take a quarter of it, so that a stalled peer starves nobody.
pub const MAX_BULK_BYTES_NODE: u64 = 4 * MAX_BULK_BYTES_IN_FLIGHT;

/// Biggest segment of an urgent kind: a CRL of about 400,000 entries. Worst case over a session:
/// three of each urgent kind in memory (one that is read, one that waits, one that is looked at), 96 MiB; only from a peer that has
/// authenticated and only for ids that this node asked for.
pub const MAX_URGENT_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// Biggest segment of a bulk kind.
pub const MAX_BULK_SEGMENT_BYTES: u64 = segments::MAX_SEGMENT_BYTES;

/// Bulk segments up to this size go in one piece and are verified whole; bigger ones are asked for in
/// ranges, each verified before it is written, so that a cut transfer goes on where it broke off.
pub const MAX_WHOLE_BYTES: u64 = 256 * 1024;

/// Longest range that one Fetch may ask for: what a slice of the store may carry.
pub const MAX_RANGE_BYTES: u64 = segments::MAX_SLICE_BYTES;

/// Bytes of the ranges that this node asks for, counted from the start of the segment. The slice of
/// one is at most 1.5 KiB longer, and so much is held in memory for each range in flight.
pub const RANGE_BYTES: u64 = 256 * 1024;

/// A bulk segment or slice up to this size waits in its own session's memory to be written, and so
/// behind no other peer's: all that a node asks for of other nodes' audit.
pub const MAX_SMALL_SEND_BYTES: u64 = RANGE_BYTES + 2 * 1_024;

/// Bytes of them in one session, in KiB: one that is written, one that is ready and one that is read,
/// with room for a fourth. 256 MiB with [`MAX_SESSIONS`] that all read nothing.
pub const MAX_SMALL_SENDS_KIB: usize = 1_024;

/// Bytes of the bigger ones over all sessions, in KiB: the segments of a node that fetches its own log.
pub const MAX_GREAT_SENDS_KIB: usize = 128 * 1_024;

/// Ranges that a session asks for before it knows how long one takes, and the fewest that it ever has
/// on their way. The most are [`MAX_IN_FLIGHT`] less [`URGENT_IN_FLIGHT`]: 7 MiB.
pub const RANGES_AT_FIRST: usize = 4;

/// See [`RANGES_AT_FIRST`].
pub const RANGES_AT_LEAST: usize = 2;

/// Wait for a range that is no queue: reading and scheduling at both ends.
pub const RANGE_SLACK: Duration = Duration::from_millis(2);

/// Ranges of one segment that one session may have in flight: 2 MiB, so that the others that hold the
/// segment find work too.
pub const MAX_LEASES_PER_SEGMENT: usize = 8;

/// Time after which a range that has not come may be asked of another peer as well. It equals the
/// time in which a silent peer is let go; this one holds for a peer that sends a byte now and then.
pub const LEASE_TIMEOUT: Duration = STALL_TIMEOUT;

/// Pace below which a segment that was asked for in one piece is overdue: so long after
/// [`LEASE_TIMEOUT`] as its bytes take at it. 4 s for the biggest foreign bulk segment that goes whole,
/// 4 min 16 s for the biggest CRL, 8 min 32 s for the biggest segment of the own log that comes back;
/// below every link of the ladder that the transport is measured on.
pub const LEASE_PACE_BYTES_PER_S: u64 = 64 * 1024;

/// Segments that one session may be receiving in ranges: a quarter of the partials that the store
/// keeps, so that a peer that sends nothing leaves the others room (INV-13).
pub const MAX_PARTIALS_PER_SESSION: usize = segments::MAX_PARTIALS / 4;

/// Bytes of the segments that one session may be receiving in ranges, unless it is a single one: a
/// quarter of what the store keeps of partials.
pub const MAX_PARTIAL_BYTES_PER_SESSION: u64 = segments::MAX_PARTIAL_BYTES / 4;

/// What one partial counts for, beside another's bytes, where the room for partials is shared out.
pub const PARTIAL_SHARE_BYTES: u64 = segments::MAX_PARTIAL_BYTES / segments::MAX_PARTIALS as u64;

/// Segments set aside in a session (refused, failed): 33 bytes each. One more ends the session.
pub const MAX_SET_ASIDE: usize = 1_024;

/// Bad transfers that end a session (INV-12: the count only goes up).
pub const MAX_FAULTS: u32 = 3;

/// Frames that may wait to be written. A peer that keeps to [`MAX_LISTS_OUTSTANDING`],
/// [`MAX_HEADS_OUTSTANDING`], [`MAX_IN_FLIGHT`] and one receipt request at a time never causes more; one that does not is
/// disconnected. Worst case 200 x 64 KiB = 12.5 MiB a session.
pub const MAX_FRAMES_QUEUED: usize = 200;

/// Frames of heads that are made before the earlier ones were written.
pub const MAX_HEADS_FRAMES_QUEUED: usize = 4;

/// Events that a session may hold before the shell has taken them; the shell takes them after each
/// step. The oldest go first.
pub const MAX_EVENTS_QUEUED: usize = 1_024;

/// Sessions at once, handshakes included.
pub const MAX_SESSIONS: usize = 256;

/// Handshakes from outside at once. Each holds TLS state of about 30 KiB: 2 MiB.
pub const MAX_HANDSHAKES: usize = 64;

/// Of these, the ones from one address (INV-13): strangers that stall their handshakes need four addresses
/// to keep anybody waiting at all. With four or more, every place comes free within the time for a
/// handshake and goes, of those that wait then, to an address that has none before one that has any. A
/// call waits for 6/10 of that time, so a caller that dials again at once is kept out for one such time,
/// longer only where strangers stall with more than [`MAX_HANDSHAKES`] addresses.
pub const MAX_HANDSHAKES_ADDRESS: usize = MAX_HANDSHAKES / 4;

/// Calls that wait for a place, each for 6/10 of the time for a handshake: a first packet and its keys,
/// about 3 KiB, and what [`MAX_INCOMING_BUFFER_BYTES`] allows. Less than 2 MiB. When there are more, the
/// address that has most of them loses its last one.
pub const MAX_CALLS_WAITING: usize = 256;

/// Calls that quinn may hold: those that wait, and as many that nobody has looked at yet.
pub const MAX_INCOMING: usize = 2 * MAX_CALLS_WAITING;

/// Bytes of early packets that quinn may buffer for them, over all of them. Each may have as much as a
/// waiting one can without taking from another: 4 KiB, a first flight with a post-quantum key share twice.
pub const MAX_INCOMING_BUFFER_BYTES: u64 = 1024 * 1024;

/// Lowest cap on what a node sends. A handshake with a post-quantum key share is about 6 KiB each
/// way: below this one it takes longer than it may.
pub const MIN_SEND_BYTES_PER_SECOND: u32 = 4_096;

/// Peers in the configuration.
pub const MAX_PEERS: usize = 1_024;

/// Time after which a dial without an outcome counts as failed, so that no lost outcome parks a peer.
/// Above the longest handshake and Hello that can be configured; a dial that ends later is still heard.
pub const DIAL_LIMIT: Duration = Duration::from_secs(120);

/// Addresses of one peer.
pub const MAX_ADDRESSES: usize = 8;

/// Time that a beacon's tag stands for. A tag is taken in its own slot, the one before and the one
/// after: clocks may differ by one slot, and a recording is of no use after two.
pub const BEACON_SLOT: Duration = Duration::from_secs(300);

/// Shortest mean time between two beacons of a node.
pub const MIN_BEACON_INTERVAL: Duration = Duration::from_secs(1);

/// Longest.
pub const MAX_BEACON_INTERVAL: Duration = Duration::from_secs(3_600);

/// Packets of the group that are read in a second, a few microseconds each: what a flood may cost. What
/// is above it waits in the kernel's buffer of 256 KiB and is dropped there.
pub const MAX_BEACON_READS_PER_SECOND: u32 = 4_096;

/// Packets of the group that are read at once.
pub const MAX_BEACON_READ_BURST: u32 = 1_024;

/// Packets of the group whose tag is looked at in a second, three HMACs each: a few milliseconds of CPU.
/// A site of 200 nodes sends 20 at the default interval.
pub const MAX_BEACONS_PER_SECOND: u32 = 1_024;

/// Packets of the group whose tag is looked at at once.
pub const MAX_BEACON_BURST: u32 = 1_024;

/// Packets of one source address that are looked at in a second; a host may run several nodes.
pub const MAX_BEACONS_PER_SECOND_SOURCE: u32 = 4;

/// Packets of one source address that are looked at at once.
pub const MAX_BEACON_BURST_SOURCE: u32 = 16;

/// Source addresses whose packets are counted; about 220 bytes each. The fullest bucket goes first.
pub const MAX_BEACON_SOURCES: usize = 1_024;

/// Addresses that are followed at once, about 120 bytes each: everybody of a site of 200.
pub const MAX_BEACON_CANDIDATES: usize = 256;

/// Dials to candidates at once, beside those of the scheduler: 240 KiB of TLS state.
pub const MAX_BEACON_DIALS: usize = 8;

/// Beacons that are known again, about 60 bytes each: 250 KiB. Only beacons with a good tag are; the
/// oldest goes first, which lets a recording of it count as heard at the address that it was made for.
pub const MAX_BEACON_NONCES: usize = 4_096;

/// Stored segments that wait for a session to look at them; beyond it the session compares
/// everything instead.
pub const MAX_MAILBOX: usize = 1_024;

/// References that are looked at to say how many bytes a peer is behind, once a second and session.
/// About 200 bytes each, for the time of the look: 200 KiB.
pub const MAX_LAG_LOOKS: usize = 1_024;

/// Questions about single segments that wait for a session; an operator's, so one is usual.
pub const MAX_QUESTIONS: usize = 16;

/// Time from the start of a session to the second half of the Hello round trip.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Time without any byte from a peer that owes one.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Time that news of bulk kinds waits for more news. Urgent kinds do not wait.
pub const HEADS_DELAY: Duration = Duration::from_millis(20);

// A full frame of heads or references fits its body: widest encoding of each entry.
const HEAD_ENTRY_MAX: usize = (5 + 3 + MAX_ORIGIN_BYTES)
    + (3 + MAX_RANGES * 2 * 9)
    + 12
    + (1 + MAX_NEWEST_REFS * REF_ENTRY_MAX);
const REF_ENTRY_MAX: usize = 32 + 9 + 9 + 33;
const _: () = assert!(16 + MAX_HEADS_PER_FRAME * HEAD_ENTRY_MAX <= MAX_FRAME_BODY_BYTES);
const _: () = assert!(
    8 + MAX_LISTS_PER_FRAME * 16 + MAX_REFS_PER_FRAME * REF_ENTRY_MAX <= MAX_FRAME_BODY_BYTES
);
const _: () = assert!(8 + MAX_RECEIPTS_PER_FRAME * 32 <= MAX_FRAME_BODY_BYTES);
const _: () = assert!(64 + MAX_RECEIPT_BYTES <= MAX_FRAME_BODY_BYTES);
const _: () = assert!(MAX_ENDORSEMENT_BYTES + 2 * MAX_NAME_BYTES + 128 <= MAX_HELLO_BYTES);
const _: () = assert!(MAX_HELLO_BYTES <= MAX_FRAME_BODY_BYTES);
const _: () = assert!(MAX_FRAME_BODY_BYTES <= MAX_DECODED_FRAME_BYTES);
// Everything that a well-behaved peer can have asked for fits the queue, heads beside it.
const _: () = assert!(
    MAX_LISTS_OUTSTANDING
        + MAX_HEADS_OUTSTANDING
        + MAX_RECEIPTS_PER_FRAME
        + MAX_IN_FLIGHT as usize
        + MAX_HEADS_FRAMES_QUEUED
        + 16
        // What this side asks for stands in the same queue.
        + MAX_IN_FLIGHT as usize
        + MAX_LISTS_OUTSTANDING
        + MAX_HEADS_OUTSTANDING
        < MAX_FRAMES_QUEUED
);
const _: () = assert!(MAX_BEACON_BURST_SOURCE < MAX_BEACON_BURST);
const _: () = assert!(MAX_BEACONS_PER_SECOND <= MAX_BEACON_READS_PER_SECOND);
const _: () = assert!(MAX_BEACON_CANDIDATES < MAX_BEACON_NONCES);
const _: () = assert!(DIAL_LIMIT.as_secs() > 60 + HELLO_TIMEOUT.as_secs());
const _: () = assert!(MAX_REFS_OF_ONE_NUMBER < MAX_REFS_PER_FRAME);
const _: () = assert!(URGENT_IN_FLIGHT < MAX_IN_FLIGHT);
const _: () = assert!(REVOCATION_IN_FLIGHT < URGENT_IN_FLIGHT);
const _: () = assert!(MAX_LISTED_AHEAD >= 2 * MAX_ORIGINS);
const _: () = assert!(MAX_HANDSHAKES <= MAX_SESSIONS);
const _: () = assert!(MAX_INCOMING_BUFFER_BYTES / MAX_CALLS_WAITING as u64 >= 3 * 1_200);
const _: () = assert!(MAX_BULK_SEGMENT_BYTES <= MAX_BULK_BYTES_IN_FLIGHT);
const _: () = assert!(MAX_URGENT_SEGMENT_BYTES <= segments::MAX_SEGMENT_BYTES);
const _: () = assert!(MAX_REFS_PER_FRAME <= segments::MAX_REFS);
const _: () = assert!(MAX_BULK_SEGMENT_BYTES <= MAX_PARTIAL_BYTES_PER_SESSION);
const _: () = assert!(3 * MAX_SMALL_SEND_BYTES <= MAX_SMALL_SENDS_KIB as u64 * 1_024);
const _: () = assert!(MAX_WHOLE_BYTES <= MAX_SMALL_SEND_BYTES);
const _: () = assert!(MAX_BULK_SEGMENT_BYTES <= MAX_GREAT_SENDS_KIB as u64 * 1_024);
const _: () = assert!(RANGE_BYTES.is_multiple_of(tidelock_segments::bao::GROUP_BYTES));
const _: () = assert!(RANGE_BYTES <= MAX_RANGE_BYTES && MAX_WHOLE_BYTES >= RANGE_BYTES);
