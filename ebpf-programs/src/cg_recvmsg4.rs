//! A datagram reached a UDP socket whose program asks who sent it. It is shown the service, as it
//! asked for the service.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::socket;

#[cgroup_sock_addr(recvmsg4)]
pub fn cg_recvmsg4(ctx: SockAddrContext) -> i32 {
    socket::show_service::<false>(&ctx)
}
