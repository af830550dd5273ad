//! A program asks to whom its socket is connected. It is shown the service, as it asked for the service.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{helpers, maps};

#[cgroup_sock_addr(getpeername4)]
pub fn cg_getpeername4(ctx: SockAddrContext) -> i32 {
    if let Some(service) = maps::service_of(&ctx, helpers::user_peer(&ctx)) {
        helpers::set_user_peer(&ctx, service);
    }
    1
}
