//! The kubelet: pods of this node, from spec to processes and back to status.

pub mod images;
pub mod runtime;
