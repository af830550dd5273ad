//! A program asks to whom its socket is connected. It is shown the service, as it asked for the
//! service.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::socket;

#[cgroup_sock_addr(getpeername4)]
pub fn cg_getpeername4(ctx: SockAddrContext) -> i32 {
    socket::show_service::<false>(&ctx)
}
