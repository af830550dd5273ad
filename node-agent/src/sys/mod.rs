//! The doors to the kernel: the only place of the agent with `unsafe`, raw descriptors and commands.

pub mod bpf;
pub mod cgroup;
pub mod daemon;
pub mod ethtool;
pub mod exec;
pub mod map;
pub mod memory;
pub mod netdev;
pub mod netlink;
pub mod netns;
pub mod notices;
pub mod rootdir;
pub mod route;
pub mod sandbox;
pub mod socket;
pub mod sysctl;
pub mod tc;
pub mod tmpfs;
pub mod vxlan;
pub mod xdp;
