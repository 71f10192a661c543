//! Where records go.

use tidelock_segments::{AppendError, Appended, AuditLog, RecordClass};

/// Called exactly once, when the record is durable or cannot become so.
pub type AppendDone = Box<dyn FnOnce(Result<Appended, AppendError>) + Send>;

/// The audit log, as the interceptor sees it. The real one is [`AuditLog`]; the one in
/// [`testing`](crate::testing) fails and delays on demand.
pub trait Recorder: Send + Sync {
    /// Hands over one record and returns at once. Until `done` is called with a position the
    /// record must be taken for lost.
    fn submit(&self, class: RecordClass, record: Vec<u8>, done: AppendDone);
}

impl Recorder for AuditLog {
    fn submit(&self, class: RecordClass, record: Vec<u8>, done: AppendDone) {
        Self::submit(self, class, record, done);
    }
}
