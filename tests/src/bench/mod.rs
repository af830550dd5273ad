//! Side-by-side benchmarks: every subject in the same run, in interleaved rounds.
//!
//! `hosts` makes the network namespaces (effects), `kube_proxy` the peers' rule sets (pure), `orlop` the agent's
//! dataplane as a subject (effects), `traffic` the client and server processes (effects), `report` turns samples into rows and ratios (pure).

pub mod hosts;
pub mod kube_proxy;
pub mod orlop;
pub mod report;
pub mod traffic;
