//! The kernel ABI: what eBPF programs and the agent must agree on, byte for byte.
//!
//! Pure: no allocation, no I/O. Everything here is tested on the host and runs in the kernel.
#![no_std]
#![warn(missing_docs)]

/// Version of the map layouts. It is part of the pin path, so that two layouts never share a map.
pub const ABI_VERSION: u32 = 1;
