//! The same as `xdp_entry` where it runs in the kernel's stack (generic XDP), on what is a socket buffer already.
//!
//! It takes frames in one piece only (no `frags`): for a program that takes more, the kernel copies a packet without
//! room in front of it into a new buffer and forgets where the frame's header ends (6.9 and later, `skb_pp_cow_data`
//! copies no `mac_len`), so that tc's programs would see packets without an Ethernet header.

use aya_ebpf::{macros::xdp, programs::XdpContext};

use crate::{log, xdp_carry::IN_STACK, xdp_entry};

#[xdp]
pub fn xdp_generic(ctx: XdpContext) -> u32 {
    log::told(xdp_entry::enter(&ctx, IN_STACK))
}
