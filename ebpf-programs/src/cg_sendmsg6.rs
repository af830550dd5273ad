//! A datagram leaves an unconnected UDP socket.
//!
//! To an IPv4-mapped address the kernel sends by its IPv4 half, and `cg_sendmsg4` is asked.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use ebpf_common::socket::DATAGRAM;

use crate::socket;

#[cgroup_sock_addr(sendmsg6)]
pub fn cg_sendmsg6(ctx: SockAddrContext) -> i32 {
    socket::translate::<true>(&ctx, DATAGRAM)
}
