//! A datagram leaves an unconnected UDP socket.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use ebpf_common::socket::DATAGRAM;

use crate::socket;

#[cgroup_sock_addr(sendmsg4)]
pub fn cg_sendmsg4(ctx: SockAddrContext) -> i32 {
    socket::translate::<false>(&ctx, DATAGRAM)
}
