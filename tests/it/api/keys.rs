//! Bundles, refill and counts.
