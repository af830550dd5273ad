//! End-to-end tests and the traffic that benchmarks use.

pub mod bench;
