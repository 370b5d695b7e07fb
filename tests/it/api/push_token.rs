//! Push tokens.
