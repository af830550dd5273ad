//! A datagram leaves an unconnected UDP socket.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::service;

#[cgroup_sock_addr(sendmsg4)]
pub fn cg_sendmsg4(ctx: SockAddrContext) -> i32 {
    service::translate_socket(&ctx)
}
