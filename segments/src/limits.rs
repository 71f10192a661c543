//! Every limit of this crate, with what it costs in the worst case (INV-07).

/// Longest node id, domain or policy name: a DNS label's length.
pub const MAX_NAME_BYTES: usize = 63;

/// Longest origin text. `audit/` + 63 + `/` + 16 + `/` + 20 digits is 107 bytes.
pub const MAX_ORIGIN_BYTES: usize = 255;

/// Largest encoded segment header. Domain, origin and fixed fields need at most 400 bytes.
pub const MAX_HEADER_BYTES: usize = 1024;

/// Largest endorsement, chain included: four certificates of 6 KiB and a signature.
pub const MAX_ENDORSEMENT_BYTES: usize = 28 * 1024;

/// Largest encoded segment trailer: one endorsement, a key and a signature.
pub const MAX_TRAILER_BYTES: usize = 32 * 1024;

/// Most certificates in an endorsement's chain.
pub const MAX_CHAIN_CERTIFICATES: usize = 6;

/// Largest segment file. A reader holds one whole segment in memory, so a node that verifies
/// `n` segments at once needs `n` times this.
pub const MAX_SEGMENT_BYTES: u64 = 32 * 1024 * 1024;

/// Largest segment body.
pub const MAX_BODY_BYTES: u64 = MAX_SEGMENT_BYTES - 64 * 1024;

/// Most ranges in a head: 32 x 16 bytes on the wire. Further holes are merged away from the end.
pub const MAX_HEAD_RANGES: usize = 32;

/// Largest encoded custody receipt: one endorsement and fixed fields.
pub const MAX_RECEIPT_BYTES: usize = 32 * 1024;

/// Largest canonical audit record (ruling 22).
pub const MAX_RECORD_BYTES: usize = 65_535;

/// Bytes of records (their lengths included) after which a block of a sealed body is closed.
pub const BLOCK_BYTES: usize = 64 * 1024;

/// Largest block: one record of the greatest length, alone. A reader of records holds one block, and
/// its encrypted and compressed form once more.
pub const MAX_BLOCK_BYTES: usize = MAX_RECORD_BYTES + 4;

/// Most blocks in a sealed body: an index of 12 KiB, and twice the blocks that the largest active file
/// fills, as two neighbours together always hold more than [`BLOCK_BYTES`].
pub const MAX_BLOCKS: usize = 1024;

/// Most bytes of records that a sealed body unpacks to, so that a small file cannot cost a reader more
/// than reading the largest honest one.
pub const MAX_RAW_BYTES: u64 = MAX_LOG_FILE_BYTES;

/// Most bytes by which a zstd frame exceeds what it holds: its header and those of raw blocks.
pub const MAX_ZSTD_GROWTH_BYTES: usize = 32;

/// Most wrapped keys in an encrypted body.
pub const MAX_WRAPPED_KEYS: usize = 8;

/// Most age recipients of a log: 16 stanzas of about 100 bytes in each segment.
pub const MAX_AGE_RECIPIENTS: usize = 16;

/// Most bytes of all wrapped keys of a body together.
pub const MAX_WRAPPED_BYTES: usize = 4096;

/// Smallest size of an active log file and so of `LogConfig::segment_bytes`: the file header, one
/// mark and one record of the greatest length always fit.
pub const MIN_LOG_FILE_BYTES: u64 = 128 * 1024;

/// Largest size of an active log file. The records of the active file are held in memory until
/// sealed, so this is also the log's worst-case memory, twice while sealing.
pub const MAX_LOG_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// Most records waiting for the commit thread: with [`MAX_QUEUE_BYTES`] the worst case is 16 MiB.
pub const MAX_QUEUE_RECORDS: usize = 65_536;

/// Most record bytes waiting for the commit thread.
pub const MAX_QUEUE_BYTES: usize = 16 * 1024 * 1024;

/// Most record bytes written and synced at once; bounds the commit buffer.
pub const MAX_BATCH_BYTES: usize = 1024 * 1024;

/// Length of the active file's header block, and the offset of its first frame.
pub const LOG_HEADER_BYTES: u64 = 4096;

/// Largest checkpoint note, cosignatures included.
pub const MAX_CHECKPOINT_BYTES: usize = 8 * 1024;

/// Most receipts kept for one segment: 64 x 32 KiB while listing.
pub const MAX_RECEIPTS_PER_SEGMENT: usize = 64;

/// Largest file written with `Root::write_atomic` and read with `Root::read`.
pub const MAX_STATE_FILE_BYTES: u64 = MAX_SEGMENT_BYTES;

/// Deepest path below the root, in components.
pub const MAX_PATH_DEPTH: usize = 4;

/// Smallest ceiling that a root accepts at start; below it not even one active file fits.
pub const MIN_CEILING_BYTES: u64 = 1024 * 1024;

/// Most references returned by one `Store::refs` call.
pub const MAX_REFS: usize = 4096;

/// Largest catalog of the store's index: held in memory twice while it is written or read. 16 bytes
/// a range and 300 a log.
pub const MAX_CATALOG_BYTES: usize = 24 * 1024 * 1024;

/// Most gaps between held audit segments, over all logs: 16 bytes each in memory. A segment that would
/// leave one more is refused.
pub const MAX_CHAIN_RANGES: usize = 262_144;

/// Most audit logs of which anything is held: about 600 bytes each in memory.
pub const MAX_AUDIT_LOGS: usize = 16_384;

/// Segments that are stored together, with shared syncs: as many files are open and as many threads
/// sync them at once, over all sessions, with 64 KiB of stack each: 2 MiB, and as much for pages of the
/// index. What follows the catalog's last announcement in the journal must have room in it.
pub const MAX_PUT_GROUP: usize = 32;

/// Most pages of the index in memory, 16 KiB and one open file each: 1 MiB.
pub const MAX_CACHED_PAGES: usize = 64;

/// Places of segments remembered, twice: about 250 bytes each, 1 MiB together.
pub const MAX_PLACES_REMEMBERED: usize = 2048;

/// Most names of one directory in memory while it is walked: about 100 bytes each, 3 MiB. Every piece
/// costs a pass over the directory.
pub const NAMES_AT_ONCE: usize = 32_768;

/// Most segments pinned at once.
pub const MAX_PINS: usize = 4096;

/// Most entries that one question about missing custody looks at.
pub const MAX_CUSTODY_LOOKS: usize = 8192;

/// Most foreign paths kept for a report.
pub const MAX_FOREIGN_PATHS: usize = 16;
/// Most content in one slice of a segment (`bao`): a slice is held in memory, with at most 72 KiB of
/// hashes, once by whoever serves it and once by whoever takes it.
pub const MAX_SLICE_BYTES: u64 = 1024 * 1024;

/// Content that a partial may have taken since it was made durable last, and so the most that a loss of
/// power can cost it.
pub const MAP_INTERVAL_BYTES: u64 = 2 * 1024 * 1024;

/// Content that a partial may have taken since it noted last, without a sync, what is there: the most
/// that a kill of the process can cost it.
pub const NOTE_INTERVAL_BYTES: u64 = 256 * 1024;

/// Most partials below one root, in use or not.
pub const MAX_PARTIALS: usize = 64;

/// Most bytes of all partials together. Memory for their hashes while all are in use: 1.1 MiB.
pub const MAX_PARTIAL_BYTES: u64 = 256 * 1024 * 1024;

/// Largest map of a partial: every hash pair of the largest segment and 1.5 KiB around them.
pub const MAX_MAP_BYTES: usize = 133 * 1024;

/// Most bytes of hash pairs remembered of segments that are being served in ranges: eight of the
/// largest segments, or hundreds of usual ones.
pub const MAX_OUTBOARDS_BYTES: usize = 1024 * 1024;

/// Most steps of one offline repair; further findings are left for the next. At most about 600 bytes
/// each in the note, so 1.2 MiB.
pub const MAX_REPAIR_STEPS: usize = 2_048;

/// Most repairs noted before the node records them.
pub const MAX_REPAIR_NOTES: usize = 64;

/// Largest note of repairs; the tool and the node hold it in memory once.
pub const MAX_REPAIRS_BYTES: u64 = 4 * 1024 * 1024;

/// Blocks reserved for the growth of a directory by one more entry: an ext4 directory grows from
/// one block to three when it becomes indexed.
pub const DIRECTORY_SLACK_BLOCKS: u64 = 4;

/// Log files that hold records and are not sealed, the active one included. Each keeps its records in
/// memory until it is sealed: at most 4 x 16 MiB, with one more while the oldest is being sealed. Further
/// appends wait, bounded by their timeouts.
pub const MAX_UNSEALED_FILES: usize = 4;

/// Other earlier logs whose heads the first record of a log names, beside the one before it: at most
/// 300 bytes each.
pub const MAX_OTHER_HEADS: usize = 16;

/// Quarantined files that the first record of a log names, and that a recovery tells of: at most
/// [`MAX_QUARANTINED_PATH_BYTES`] each. Of further ones it says how many.
pub const MAX_QUARANTINED_NAMED: usize = 64;

/// Longest path of a log file or segment in the quarantine: `quarantine/segments-audit-`, 64 digits, an
/// ending and a number.
pub const MAX_QUARANTINED_PATH_BYTES: usize = 128;

/// Batches whose head may wait for its signature. The next one is signed before it is written: at worst
/// one signature, about 25 microseconds, on the path of a commit.
pub const MAX_UNSIGNED_BATCHES: u64 = 64;

/// Largest header of a volume: two node ids, a domain and fixed fields.
pub const MAX_VOLUME_HEADER_BYTES: usize = 512;

/// Largest front of an entry of a volume, and its place in the index: an origin and fixed fields.
pub const MAX_VOLUME_FRONT_BYTES: usize = 384;

/// Most entries of a volume. Whoever reads or writes one holds its index in memory, in two forms.
pub const MAX_VOLUME_ENTRIES: usize = 16_384;

/// Largest index of a volume: 6 MiB and a few bytes.
pub const MAX_VOLUME_INDEX_BYTES: usize = MAX_VOLUME_ENTRIES * MAX_VOLUME_FRONT_BYTES + 16;

/// Largest volume: what a FAT file system keeps in one file.
pub const MAX_VOLUME_BYTES: u64 = u32::MAX as u64;

/// Smallest limit that can be set for a volume; one that holds a single larger entry exceeds it.
pub const MIN_VOLUME_BYTES: u64 = 4 * 1024;

/// Largest header of an encrypted volume, its recipients named; longer is refused before it is read.
pub const MAX_VOLUME_AGE_HEADER_BYTES: usize = 4 * 1024;

const _: () = assert!(MAX_VOLUME_FRONT_BYTES > MAX_ORIGIN_BYTES + 32 + 32 + 48);
const _: () = assert!(
    MAX_SEGMENT_BYTES + (MAX_VOLUME_INDEX_BYTES + MAX_VOLUME_HEADER_BYTES) as u64 + 4096
        < MAX_VOLUME_BYTES
);
const _: () = assert!(MAX_AGE_RECIPIENTS * 120 + 256 <= MAX_VOLUME_AGE_HEADER_BYTES);
const _: () = assert!(MAX_CHAIN_RANGES * 16 + MAX_AUDIT_LOGS * 600 < MAX_CATALOG_BYTES);
const _: () = assert!(MAX_CATALOG_BYTES as u64 + 12 <= MAX_STATE_FILE_BYTES);
const _: () = assert!(MAX_MAP_BYTES as u64 > MAX_SEGMENT_BYTES / (16 * 1024) * 64 + 1536);
const _: () = assert!(MAX_PARTIAL_BYTES >= MAX_SEGMENT_BYTES);
const _: () = assert!(MAX_HEADER_BYTES > MAX_ORIGIN_BYTES + MAX_NAME_BYTES + 128);
const _: () = assert!(MAX_TRAILER_BYTES > MAX_ENDORSEMENT_BYTES + 256);
const _: () = assert!(MAX_RECEIPT_BYTES > MAX_ENDORSEMENT_BYTES + MAX_ORIGIN_BYTES + 512);
const _: () = assert!(
    MAX_BODY_BYTES + MAX_HEADER_BYTES as u64 + MAX_TRAILER_BYTES as u64 + 64 <= MAX_SEGMENT_BYTES
);
const _: () = assert!(MIN_LOG_FILE_BYTES > LOG_HEADER_BYTES + MAX_RECORD_BYTES as u64 + 4096);
const _: () = assert!(MAX_LOG_FILE_BYTES + 1024 * 1024 <= MAX_BODY_BYTES);
const _: () = assert!(MAX_AGE_RECIPIENTS * 120 + 256 <= MAX_WRAPPED_BYTES);
const _: () = assert!(MAX_BLOCK_BYTES <= BLOCK_BYTES + 4);
const _: () = assert!(2 * (MAX_RAW_BYTES / BLOCK_BYTES as u64) + 3 <= MAX_BLOCKS as u64);
const _: () = assert!(MAX_BATCH_BYTES > MAX_RECORD_BYTES);
const _: () = assert!(MAX_QUEUE_BYTES >= MAX_BATCH_BYTES);
const _: () = assert!(MAX_UNSEALED_FILES >= 2);
// The first record of a log with all that it names: a head has an origin, a root, a size and keys.
const _: () = assert!(
    MAX_QUARANTINED_NAMED * (MAX_QUARANTINED_PATH_BYTES + 3)
        + (MAX_OTHER_HEADS + 2) * (MAX_ORIGIN_BYTES + 160)
        + 4096
        <= MAX_RECORD_BYTES
);
