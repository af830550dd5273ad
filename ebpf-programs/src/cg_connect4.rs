//! A socket connects: TCP, and UDP that remembers its peer.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::service;

#[cgroup_sock_addr(connect4)]
pub fn cg_connect4(ctx: SockAddrContext) -> i32 {
    service::translate_socket(&ctx)
}
