//! Bounded content-addressed segment store, audit log, Merkle tree and checkpoints.
//!
//! A node keeps everything below one root directory ([`Root`]), within one ceiling in allocated
//! bytes ([`Ledger`]). Immutable segments lie in the [`Store`] under the BLAKE3 of their bytes. The
//! [`AuditLog`] appends records durably (many callers, one sync), seals them into signed,
//! hash-linked segments, and evicts those only with custody receipts of enough peers.
//!
//! What this crate is not: it knows nothing of networks, X.509 or policy, reads no configuration and
//! no clock. Certificate chains inside endorsements are judged by `tidelock-transport`.
//!
//! Where to start: `docs/src/format.md` for the bytes, [`verify_segment`] for what a good segment
//! is, [`Store::put`] for the write protocol, `log.rs` for commit, seal, recovery and eviction, and
//! [`testing::SimDisk`] for how crashes are tested.

mod age;
pub mod bao;
mod body;
mod checkpoint;
mod codec;
mod crypt;
#[doc(hidden)]
pub mod decoders;
mod disk;
mod format;
mod frame;
mod id;
mod keys;
mod ledger;
pub mod limits;
mod log;
pub mod merkle;
pub mod offline;
mod partial;
mod proof;
mod receipt;
mod root;
mod store;
pub mod testing;
mod verify;
pub mod volume;

pub use age::{AgeError, AgeIdentity, AgeRecipients};
pub use body::{
    AuditBody, AuditSpan, BodyError, Compression, RecordReader, SealOptions, parse_body,
    read_records, read_records_with,
};
pub use checkpoint::{Checkpoint, CheckpointError, origin_line};
pub use codec::CodecError;
pub use crypt::{CryptError, KEY_BYTES, KeyUnwrap, KeyWrap, SegmentKey, SiteKey, WrappedKey};
pub use disk::{
    DIRECT_BUFFER_ALIGN_BYTES, Disk, DiskError, DiskFault, DiskFile, DiskOp, FileKind, FileStat,
    OpenMode, RealDisk, Volume,
};
pub use format::{
    FormatError, Head, MAGIC, SegmentHeader, SegmentRef, VerifiedSegment, seal_signed,
    seal_unsigned, verify_segment,
};
pub use frame::Damage;
pub use id::{DomainId, IdError, Kind, NodeId, Origin, SegmentId, Sha256Hash};
pub use keys::{Endorsement, KeyError, LogKey, LogPublicKey};
pub use ledger::{CeilingReached, Charge, Ladder, Ledger, Reservation, Usage};
pub use log::{
    AppendError, Appended, AuditLog, EndorseError, LogConfig, LogError, LogStat, NamedHead,
    OwnSegment, RecordClass, Recovery, named_heads,
};
pub use partial::{Accepted, Partial, PartialError, PartialInfo};
pub use proof::{
    ConsistencyProof, ProofError, RecordProof, prove_consistency, prove_record,
    verify_consistency_proof, verify_record_proof,
};
pub use receipt::{CustodyReceipt, ReceiptError};
pub use root::{Root, RootError, RootOptions};
pub use store::{
    ForeignReport, PutOutcome, RebuildProgress, ScrubPace, ScrubReport, Store, StoreError,
    StoreRecovery,
};
pub use verify::{
    AuditFault, AuditReport, OriginReport, VerifyOptions, VerifyProgress, verify_log,
    verify_log_with,
};
