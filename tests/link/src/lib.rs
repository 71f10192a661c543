//! A bad link in user space, for tests: the kernel's own emulator is not there on every machine, and it
//! knows neither seeds nor virtual time.
//!
//! [`Link`] is one direction, pure: a datagram of so many bytes is offered at a time, and the answer
//! is when it arrives or why it does not. Nothing in it sleeps, asks for the time or opens anything,
//! and the same seed and the same offers give the same answers. [`Relay`] is a thin shell of two
//! links and two UDP sockets around it.
//!
//! It is no product code, depends on none, and no node relays through it outside of tests. What
//! [`Random`] it draws from, other tests draw from too.

mod link;
mod random;
mod relay;

pub use link::{Counters, Fate, Link, LinkConfig, LinkConfigError, Loss, Outage};
pub use random::Random;
pub use relay::{Relay, Side};
