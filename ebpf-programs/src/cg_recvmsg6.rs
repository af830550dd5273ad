//! A datagram reached a UDP socket whose program asks who sent it. It is shown the service, as it
//! asked for the service.
//!
//! IPv4 on such a socket comes as `::ffff:a.b.c.d`, which is how [`ebpf_common::addr::Addr`] writes IPv4.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::socket;

#[cgroup_sock_addr(recvmsg6)]
pub fn cg_recvmsg6(ctx: SockAddrContext) -> i32 {
    socket::show_service::<true>(&ctx)
}
