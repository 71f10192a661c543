//! Doors to the world: each executor takes a Permit by value
