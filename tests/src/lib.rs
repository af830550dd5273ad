//! End-to-end tests and the load they use.

pub mod bench;
pub mod dns;
