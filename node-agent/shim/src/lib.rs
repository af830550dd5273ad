//! What the per-pod shim and the agent must understand the same way.

pub mod channel;
pub mod wire;
