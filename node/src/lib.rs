//! The node: command line, configuration, wiring and lifetimes
