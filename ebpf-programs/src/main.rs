//! Orlop's programs for the kernel. One file per program; all in one object, so that maps are shared.
#![no_std]
#![no_main]
#![deny(unused_results, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod apart;
mod apart_xdp;
mod arrival;
mod carry;
mod cg_connect4;
mod cg_connect6;
mod cg_getpeername4;
mod cg_getpeername6;
mod cg_recvmsg4;
mod cg_recvmsg6;
mod cg_sendmsg4;
mod cg_sendmsg6;
mod consistent;
mod count;
mod driver_frame;
mod encap;
mod events;
mod fragment;
mod frame;
mod helpers;
mod icmp;
#[cfg(feature = "log")]
mod log;
#[cfg(not(feature = "log"))]
#[path = "log_off.rs"]
mod log;
mod maps;
mod meeting;
mod nat;
mod next_hop;
mod packet;
mod pass;
mod refuse;
mod rewrite;
mod route;
mod service;
mod socket;
mod tc_from_host;
mod tc_from_overlay;
mod tc_from_pod;
mod tc_from_underlay;
mod tc_to_overlay;
mod tc_to_pod;
mod tc_to_underlay;
mod tc_trace_socket;
mod trace;
mod xdp_carry;
mod xdp_entry;
mod xdp_generic;
mod xdp_open;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
