//! Side-by-side benchmarks: every subject in the same run, in interleaved rounds.
//!
//! `lb`, `programming`, `overlay`, `agent` are the benchmarks (effects), `packets` and `nanoseconds` the part of `lb` without sockets, `source` its children; `hosts` makes the network namespaces (effects),
//! `kube_proxy` the services and the peers' rule sets (pure), `orlop` the agent's dataplane as a subject (effects),
//! `traffic` the client and server processes (effects), `measure` the rounds (effects), `report` turns samples into
//! rows and ratios (pure), `chart` rows into a picture (pure).

pub mod agent;
pub mod chart;
pub mod hosts;
pub mod kube_proxy;
pub mod lb;
pub mod measure;
pub mod nanoseconds;
pub mod orlop;
pub mod output;
pub mod overlay;
pub mod packets;
pub mod program;
pub mod programming;
pub mod raw;
pub mod report;
pub mod source;
pub mod tool;
pub mod traffic;
