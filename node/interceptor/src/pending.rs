//! Requests whose record is not durable yet.
//!
//! INV-14: an allow waits here as a draft that cannot be answered with. Two things can end the
//! wait, and whichever comes first ends it for good: the record becomes durable (or fails), or the
//! wait is given up. After giving up, a record that becomes durable after all makes no permit, and
//! a `not_released` outcome follows it into the log (ruling 21).

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tidelock_segments::{AppendError, Appended};

use crate::{
    action::Action,
    answer::{Answer, Done, Mode, Outcome, RecordPosition},
    limits::MAX_PENDING,
    permit::Permit,
    reason::{Decision, Reason},
};

/// The draft of an outcome.
pub(crate) struct Draft {
    pub(crate) answer: Answer,
    pub(crate) action: Option<Box<Action>>,
    pub(crate) mode: Mode,
    pub(crate) done: Done,
}

enum State {
    Waiting(Box<Draft>),
    GivenUp { was_allow: bool },
    Finished,
}

/// What a completion came to.
#[expect(
    clippy::large_enum_variant,
    reason = "made and taken apart at once, never stored"
)]
pub(crate) enum Completed {
    /// Somebody has to be told.
    Answered(Done, Outcome),
    /// An allow became durable too late.
    NotReleased(RecordPosition),
    /// Nothing is left to do.
    Nothing,
}

pub(crate) struct Slot {
    state: Mutex<State>,
}

impl Slot {
    pub(crate) fn new(draft: Draft) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::Waiting(Box::new(draft))),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_waiting(&self) -> bool {
        matches!(*self.state(), State::Waiting(_))
    }

    /// The recorder has spoken.
    pub(crate) fn complete(&self, result: Result<Appended, AppendError>) -> Completed {
        let state = std::mem::replace(&mut *self.state(), State::Finished);
        match (state, result) {
            (State::Waiting(draft), Ok(appended)) => {
                let Draft {
                    mut answer,
                    action,
                    mode,
                    done,
                } = *draft;
                let record = RecordPosition::from(appended);
                answer.record = Some(record);
                // INV-14: the one place where a permit is made, out of a durable record.
                let permit = match (answer.decision, mode, action) {
                    (Decision::Allow, Mode::Decide, Some(action)) => {
                        Some(Permit::new(action, record))
                    }
                    _ => None,
                };
                Completed::Answered(done, Outcome { answer, permit })
            }
            (State::Waiting(draft), Err(error)) => {
                let reason = match error {
                    AppendError::Capacity => Reason::AuditCapacity,
                    _ => Reason::AuditUnavailable,
                };
                deny(*draft, reason)
            }
            (State::GivenUp { was_allow: true }, Ok(appended)) => {
                Completed::NotReleased(appended.into())
            }
            (State::GivenUp { .. } | State::Finished, _) => Completed::Nothing,
        }
    }

    /// The wait is over without the recorder.
    pub(crate) fn give_up(&self) -> Completed {
        let mut state = self.state();
        match std::mem::replace(&mut *state, State::Finished) {
            State::Waiting(draft) => {
                let was_allow =
                    draft.answer.decision == Decision::Allow && draft.mode == Mode::Decide;
                *state = State::GivenUp { was_allow };
                drop(state);
                deny(*draft, Reason::AuditUnavailable)
            }
            other => {
                *state = other;
                Completed::Nothing
            }
        }
    }
}

/// How far a request has come that somebody may give up.
pub(crate) struct Stage(Mutex<Step>);

enum Step {
    /// It waits for an engine, or for a decision point.
    Judging,
    /// It waited for one, and nobody waits for it any more.
    GivenUp,
    /// It waits for its record.
    Recording(Arc<Slot>),
}

impl Stage {
    pub(crate) fn judging() -> Self {
        Self(Mutex::new(Step::Judging))
    }

    fn step(&self) -> MutexGuard<'_, Step> {
        // Nothing that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_before_record(&self) -> bool {
        matches!(*self.step(), Step::Judging)
    }

    pub(crate) fn is_given_up(&self) -> bool {
        matches!(*self.step(), Step::GivenUp)
    }

    /// Gives up. Returns the slot that is to be given up with it.
    pub(crate) fn give_up(&self) -> Option<Arc<Slot>> {
        let mut step = self.step();
        match &*step {
            Step::Judging => {
                *step = Step::GivenUp;
                None
            }
            Step::GivenUp => None,
            Step::Recording(slot) => Some(Arc::clone(slot)),
        }
    }

    /// Goes on to the record, before that is handed over. Returns the slot if it was given up meanwhile.
    pub(crate) fn record(&self, slot: Arc<Slot>) -> Option<Arc<Slot>> {
        let mut step = self.step();
        match &*step {
            Step::GivenUp => Some(slot),
            _ => {
                *step = Step::Recording(slot);
                None
            }
        }
    }
}

fn deny(draft: Draft, reason: Reason) -> Completed {
    let answer = draft.answer.unrecorded(reason);
    Completed::Answered(
        draft.done,
        Outcome {
            answer,
            permit: None,
        },
    )
}

/// The slots in order of their deadlines, which is the order they came in.
#[derive(Default)]
pub(crate) struct Queue {
    slots: VecDeque<(Duration, Arc<Slot>)>,
}

impl Queue {
    /// Adds a slot. Returns false when there are too many (INV-07).
    pub(crate) fn push(&mut self, deadline: Duration, slot: Arc<Slot>) -> bool {
        self.drop_finished();
        if self.slots.len() >= MAX_PENDING {
            self.slots.retain(|(_, slot)| slot.is_waiting());
        }
        if self.slots.len() >= MAX_PENDING {
            return false;
        }
        self.slots.push_back((deadline, slot));
        true
    }

    fn drop_finished(&mut self) {
        while self
            .slots
            .front()
            .is_some_and(|(_, slot)| !slot.is_waiting())
        {
            self.slots.pop_front();
        }
    }

    /// Takes the next slot whose deadline has passed.
    pub(crate) fn pop_overdue(&mut self, now: Duration) -> Option<Arc<Slot>> {
        self.drop_finished();
        let overdue = self
            .slots
            .front()
            .is_some_and(|(deadline, _)| *deadline <= now);
        if overdue {
            self.slots.pop_front().map(|(_, slot)| slot)
        } else {
            None
        }
    }

    /// How many still wait.
    pub(crate) fn waiting(&self) -> usize {
        self.slots
            .iter()
            .filter(|(_, slot)| slot.is_waiting())
            .count()
    }
}
