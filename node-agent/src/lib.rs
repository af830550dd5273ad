//! The Orlop node agent: what one node does with what the API server says.
//!
//! Each subsystem folder has a pure part that decides and an effect part that acts; `sys` holds every
//! system call. `agent.rs` wires them by hand.

pub mod address;
pub mod agent;
pub mod chain;
mod changes;
pub mod cni;
pub mod config;
pub mod dataplane;
pub mod debug;
pub mod dns;
pub mod ends;
pub mod healthz;
pub mod join;
pub mod kubelet;
pub mod listen;
pub mod metrics;
pub mod model;
pub mod overlay;
pub mod parse;
pub mod problems;
pub mod readers;
pub mod readiness;
#[cfg(test)]
mod refusing;
mod service_event;
pub mod sheet;
pub mod snapshot;
pub mod sys;
pub mod table;
pub mod watch;
pub mod way;
