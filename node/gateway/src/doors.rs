//! What the gateway needs behind its doors: something that decides, something that operates.
//!
//! The node implements both. The gateway itself judges nothing but who is calling and how much:
//! it cannot make a permit, and it never reads a request's body by itself.

use std::future::Future;
use std::pin::Pin;

use serde_json::Value;
use tidelock_interceptor::{
    Ask, Caller, Done, InvalidRequest, Mode, ReportDone, Search, SearchDone,
};

/// A future that the gateway can hold without knowing its type.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Ends the wait for a decision: `done` is called at once with a deny, unless it has been called,
/// and no permit will be made (`Pending::give_up` of the interceptor).
pub type GiveUp = Box<dyn FnOnce() + Send>;

/// Decides. The one implementation that counts wraps the interceptor; tests have their own.
///
/// All methods are called on the server's own threads. A decision must not wait for anything there; the
/// others may wait for an engine, and are called so that the rest of the server goes on.
pub trait Decider: Send + Sync + 'static {
    /// Judges one request for one authenticated caller, and calls `done` exactly once when
    /// the answer may be given: an allow only after its record is durable. What comes back is
    /// called when nobody waits any more.
    fn decide(&self, ask: Ask<'_>, caller: &Caller, mode: Mode, done: Done) -> GiveUp;

    /// Judges one page of a search, or records that it could not be read, and calls `done` exactly once.
    /// Nothing is permitted by it.
    fn search(&self, search: Result<&Search, InvalidRequest>, caller: &Caller, done: SearchDone);

    /// Takes a caller's word on what became of an action that was allowed to it, and calls `done`
    /// exactly once.
    fn report(&self, body: &[u8], caller: &Caller, done: ReportDone);

    /// The node's state, as `GET /v1/status` shows it.
    fn status(&self) -> Value;

    /// Whether the node would decide now; if not, why not.
    ///
    /// # Errors
    ///
    /// The reason, in words for an operator.
    fn ready(&self) -> Result<(), String>;

    /// The node's metrics in the Prometheus text format, each line ended. The gateway adds its own.
    fn metrics(&self) -> String;
}

/// Carries out what the local operator asks for.
pub trait Operator: Send + Sync + 'static {
    /// Runs the operation `op` with these arguments. Without `apply` it only says what it would
    /// do.
    fn call(&self, op: &str, body: Value, apply: bool) -> BoxFuture<Result<Value, OperatorError>>;
}

/// Why an operation was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct OperatorError {
    /// The HTTP status that fits; anything that is no error status is answered as 500.
    pub status: u16,
    /// A stable code.
    pub code: String,
    /// What went wrong, and the way out.
    pub message: String,
}
