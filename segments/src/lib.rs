//! Bounded content-addressed segment store, audit log, Merkle tree and checkpoints
