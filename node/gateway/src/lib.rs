//! Doors for callers: the decision API over HTTP on loopback and a Unix socket
