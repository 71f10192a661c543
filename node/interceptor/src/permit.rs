//! The value that executors demand.

use crate::{action::Action, answer::RecordPosition};

/// Proof that this action was allowed and that the record of it is durable (INV-14).
///
/// Only the interceptor makes one, out of a durable record of an allow. It can be neither built nor
/// copied, so it is used once:
///
/// ```compile_fail,E0451
/// # use tidelock_interceptor::{Action, Permit, RecordPosition};
/// fn forge(action: Action, record: RecordPosition) -> Permit {
///     Permit { action: Box::new(action), record }
/// }
/// ```
///
/// ```compile_fail,E0624
/// # use tidelock_interceptor::{Action, Permit, RecordPosition};
/// fn forge(action: Action, record: RecordPosition) -> Permit {
///     Permit::new(Box::new(action), record)
/// }
/// ```
///
/// ```compile_fail,E0599
/// # use tidelock_interceptor::Permit;
/// fn copy(permit: &Permit) -> Permit {
///     Permit::clone(permit)
/// }
/// ```
///
/// ```compile_fail,E0382
/// # use tidelock_interceptor::Permit;
/// fn execute(permit: Permit) {}
/// fn twice(permit: Permit) {
///     execute(permit);
///     execute(permit);
/// }
/// ```
///
/// Once is fine:
///
/// ```
/// # use tidelock_interceptor::{Action, Permit};
/// fn execute(permit: Permit) -> Action {
///     permit.into_action()
/// }
/// ```
#[derive(Debug)]
#[must_use = "an allowed action that nobody executes should be given up on purpose"]
pub struct Permit {
    action: Box<Action>,
    record: RecordPosition,
}

impl Permit {
    pub(crate) fn new(action: Box<Action>, record: RecordPosition) -> Self {
        Self { action, record }
    }

    /// What may be executed: bit for bit what was judged (INV-15).
    #[must_use]
    pub fn action(&self) -> &Action {
        &self.action
    }

    /// Where the allow is recorded.
    #[must_use]
    pub fn record(&self) -> RecordPosition {
        self.record
    }

    /// Spends the permit.
    #[must_use]
    pub fn into_action(self) -> Action {
        *self.action
    }
}
