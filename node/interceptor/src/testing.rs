//! Test utilities for this crate and the ones above it: a clock and a recorder that do as told.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tidelock_segments::{AppendError, Appended, RecordClass, Sha256Hash};

use crate::{
    clock::Clock,
    recorder::{AppendDone, Recorder},
};

/// A clock that stands until it is moved.
#[derive(Debug, Default)]
pub struct TestClock {
    nanos: AtomicU64,
    boot_unix_ms: AtomicU64,
}

impl TestClock {
    /// A clock at zero, with this wall time.
    #[must_use]
    pub fn new(unix_ms: u64) -> Arc<Self> {
        Arc::new(Self {
            nanos: AtomicU64::new(0),
            boot_unix_ms: AtomicU64::new(unix_ms),
        })
    }

    /// Moves monotonic and wall time forward.
    pub fn advance(&self, by: Duration) {
        let by = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(by, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::SeqCst))
    }

    fn unix_ms(&self) -> u64 {
        let elapsed = self.nanos.load(Ordering::SeqCst) / 1_000_000;
        self.boot_unix_ms.load(Ordering::SeqCst) + elapsed
    }
}

/// A log in memory that can fail, and keep its callers waiting.
#[derive(Default)]
pub struct MemoryRecorder {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    records: Vec<(RecordClass, Vec<u8>)>,
    held: Vec<(RecordClass, Vec<u8>, AppendDone)>,
    holds: bool,
    failure: Option<AppendError>,
    incarnation: u64,
    began_at: u64,
}

impl MemoryRecorder {
    /// A log that takes everything at once.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// From now on every append fails so, or succeeds again.
    pub fn fail(&self, failure: Option<AppendError>) {
        self.state().failure = failure;
    }

    /// The next incarnation of the log: its records count from 0 again.
    pub fn begin_incarnation(&self) {
        let mut state = self.state();
        state.incarnation += 1;
        state.began_at = u64::try_from(state.records.len()).unwrap_or(u64::MAX);
    }

    /// From now on appends wait for [`MemoryRecorder::release`].
    pub fn hold(&self) {
        self.state().holds = true;
    }

    /// Completes what waits, in order, and holds nothing any more.
    pub fn release(&self) {
        let held = {
            let mut state = self.state();
            state.holds = false;
            std::mem::take(&mut state.held)
        };
        for (class, record, done) in held {
            self.submit(class, record, done);
        }
    }

    /// How many appends wait.
    #[must_use]
    pub fn held(&self) -> usize {
        self.state().held.len()
    }

    /// What is durable, in order.
    #[must_use]
    pub fn records(&self) -> Vec<(RecordClass, Vec<u8>)> {
        self.state().records.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recorder for MemoryRecorder {
    fn submit(&self, class: RecordClass, record: Vec<u8>, done: AppendDone) {
        let result = {
            let mut state = self.state();
            if state.holds {
                state.held.push((class, record, done));
                return;
            }
            match &state.failure {
                Some(failure) => Err(failure.clone()),
                None => {
                    let index = u64::try_from(state.records.len()).unwrap_or(u64::MAX);
                    let leaf = Sha256Hash::of_parts(&[&[0], &record]);
                    state.records.push((class, record));
                    Ok(Appended {
                        incarnation: state.incarnation,
                        index: index - state.began_at,
                        leaf,
                    })
                }
            }
        };
        done(result);
    }
}
