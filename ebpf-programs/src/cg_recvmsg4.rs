//! A datagram reached a UDP socket whose program asks who sent it. It is shown the service, as it asked for the service.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{helpers, maps};

#[cgroup_sock_addr(recvmsg4)]
pub fn cg_recvmsg4(ctx: SockAddrContext) -> i32 {
    if let Some(service) = maps::service_of(&ctx, helpers::user_peer(&ctx)) {
        helpers::set_user_peer(&ctx, service);
    }
    1
}
