//! Policy bundles, trust, the Cedar engine, active and last-known-good slots, posture
