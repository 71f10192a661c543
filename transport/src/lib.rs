//! Identity, revocation, TLS, frames, the sync state machine and its QUIC shell
