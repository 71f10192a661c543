//! The mesh of peers: who may speak (identity, revocation, TLS), what is said (frames, the sans-io
//! session machine) and the thin quinn shell around it.
//!
//! It is not a store and not a policy: it never looks inside a segment's body. Start reading at
//! [`session`], the pure protocol core; [`shell`] is the only place with sockets in it.

pub mod beacon;
pub mod congestion;
pub mod dial;
pub mod endorse;
pub mod frame;
pub mod identity;
pub mod limits;
pub mod registry;
pub mod revocation;
pub mod session;
pub mod shell;
pub mod svid;
pub mod tls;
pub mod verifier;
