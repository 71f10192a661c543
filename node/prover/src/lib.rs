//! Whether a policy bundle permits anything that another one does not.
//!
//! `NotWider` is a security claim: a trust file may let such a bundle decide with fewer signatures. So everything of a
//! bundle that bears on a permit is either compared ([`compare_limits`]: limits of age, times, the engines, the
//! entities) or proved (policies and schema); whatever is neither ends in [`Widening::Unproven`]. A proof goes
//! in three steps, each where it does no harm: [`questions`] makes scripts for a solver and [`confirm`] looks at its
//! models, both in a confined worker; [`settle`] makes a verdict of the answers.
//!
//! What this crate is not: it starts no process, so it asks no solver; it opens no file and reads no clock. It
//! decides nothing, and no crate that decides knows it.
//!
//! Start reading in `questions.rs` (what is asked, and why an error can only cost a proof), then `terms.rs` (the
//! question in terms), then `compare.rs` (what no solver sees). Decision 0034 has the reasons.

mod compare;
mod counterexample;
pub mod limits;
mod pair;
mod questions;
mod scribe;
mod settle;
mod shapes;
mod shortcuts;
mod terms;
mod widening;
mod worlds;

pub use compare::compare_limits;
pub use counterexample::confirm;
pub use questions::{ModelOf, Part, Question, Questions, questions};
pub use settle::{Confirm, Solve, settle};
pub use widening::{Counterexample, WhyUnproven, Widening};
