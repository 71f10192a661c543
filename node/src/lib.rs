//! The node: command line, configuration, wiring and lifetimes.
//!
//! Everything that decides, stores or speaks lives in the rooms below; this crate reads the config,
//! opens the rooms in order, joins them and closes them again. Start at [`run`]. The library form
//! exists for the `tests/` package, which plays [`demo`]'s story on another ground.

pub mod ca;
pub mod cli;
pub mod clock;
pub mod config;
pub mod demo;
pub mod run;
pub mod sealing;
pub(crate) mod worker;
