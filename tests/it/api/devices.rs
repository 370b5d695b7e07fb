//! Listing, linking and removing devices.
