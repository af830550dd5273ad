//! A socket connects: TCP, and UDP that remembers its peer.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use ebpf_common::socket::CONNECT;

use crate::socket;

#[cgroup_sock_addr(connect4)]
pub fn cg_connect4(ctx: SockAddrContext) -> i32 {
    socket::translate::<false>(&ctx, CONNECT)
}
