//! A socket connects: TCP, and UDP that remembers its peer.
//!
//! IPv4 on such a socket comes as `::ffff:a.b.c.d`, which is how [`ebpf_common::addr::Addr`] writes IPv4.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use ebpf_common::socket::CONNECT;

use crate::socket;

#[cgroup_sock_addr(connect6)]
pub fn cg_connect6(ctx: SockAddrContext) -> i32 {
    socket::translate::<true>(&ctx, CONNECT)
}
