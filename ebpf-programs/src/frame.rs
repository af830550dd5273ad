//! What the logic needs of a packet, so that tc and XDP run the same.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    programs::TcContext,
};
use ebpf_common::{
    addr::Addr,
    conntrack::{Flow, FlowKey},
    verdict::DropReason,
};

use crate::{apart, helpers, icmp::Quote, nat::Step, packet::Packet};

/// How a difference goes into a transport's checksum.
#[derive(Clone, Copy)]
pub struct Sum {
    /// Offset of the checksum in the packet.
    pub at: usize,
    /// The difference is one of addresses, which are summed in a pseudo header: it counts also where
    /// a device is still to finish the checksum.
    pub pseudo: bool,
    /// Zero stands for "no checksum" and stays (UDP).
    pub zero_is_none: bool,
    /// The packet is IPv6, whose header has no checksum of its own.
    pub v6: bool,
}

/// Where a packet is, and what the kernel says of ways from there: enough to open a flow.
pub trait Arrival {
    /// The device by which the packet came in or leaves.
    fn ifindex(&self) -> u32;
    /// The device by which `dst` is reached; 0 for this node itself.
    fn route(&self, src: &Addr, dst: &Addr) -> Result<u32, DropReason>;
    /// The same for what leaves under this node's address ([`helpers::way_out`]).
    fn way_out(&self, src: &mut Addr, dst: &Addr) -> Result<u32, DropReason>;
    /// Inserts a flow's row of answers ([`crate::nat::insert_reverse`]).
    fn insert_reverse(&self, key: &FlowKey, flow: &Flow, flags: u16) -> i32;
    /// Whether a socket of this node speaks or may speak to what a packet of `key` comes from.
    fn has_socket(&self, key: &FlowKey) -> bool;
}

/// A packet in an Ethernet frame.
pub trait Frame: Arrival {
    /// The `EtherType`, network order.
    fn ether_type(&self) -> Result<[u8; 2], DropReason>;
    /// A pointer to a `T` at a constant offset in the headers if it lies wholly in memory that can be
    /// reached directly.
    fn at<T>(&self, offset: usize) -> Option<*mut T>;
    /// Makes that many bytes reachable directly if they can be.
    fn pull(&self, length: u32) -> Result<(), DropReason>;
    /// A copy of what lies at any offset.
    fn load<T: Copy>(&self, offset: usize) -> Result<T, DropReason>;
    /// Writes at any offset.
    fn store<T: Copy>(&self, offset: usize, value: &T) -> Result<(), DropReason>;
    /// Folds a difference (of [`helpers::difference`]) into a transport's checksum.
    fn fold(&self, sum: Sum, difference: u32) -> Result<(), DropReason>;
    /// Replaces addresses and ports as the flow says.
    fn translate(&self, packet: &Packet, flow: &Flow) -> Result<(), DropReason>;
    /// Reads the packet that an error quotes ([`crate::icmp::read`]).
    fn quote(&self, packet: &Packet, quote: &mut Quote) -> Result<bool, DropReason>;
    /// Makes both rows of a flow and translates the packet ([`crate::nat::open`]).
    fn open(&self, packet: &Packet, flow: &mut Flow, flags: u16) -> Step;
    /// Whether a flow's packets would now leave in another way ([`crate::nat::leaves_otherwise`]).
    fn leaves_otherwise(&self, key: &FlowKey, flow: &Flow, now: &mut Flow) -> bool;
}

impl Arrival for TcContext {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        helpers::ifindex(self)
    }

    #[inline(always)]
    fn route(&self, src: &Addr, dst: &Addr) -> Result<u32, DropReason> {
        apart::route(self, src, dst)
    }

    #[inline(always)]
    fn way_out(&self, src: &mut Addr, dst: &Addr) -> Result<u32, DropReason> {
        apart::way_out(self, src, dst)
    }

    #[inline(always)]
    fn insert_reverse(&self, key: &FlowKey, flow: &Flow, flags: u16) -> i32 {
        apart::insert_reverse(self, key, flow, flags)
    }

    #[inline(always)]
    fn has_socket(&self, key: &FlowKey) -> bool {
        apart::has_socket(self, key)
    }
}

impl Frame for TcContext {
    #[inline(always)]
    fn ether_type(&self) -> Result<[u8; 2], DropReason> {
        Ok(helpers::ether_type(self))
    }

    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.data() + offset;
        if start + size_of::<T>() > self.data_end() {
            return None;
        }
        Some(start as *mut T)
    }

    #[inline(always)]
    fn pull(&self, length: u32) -> Result<(), DropReason> {
        self.pull_data(length).map_err(|_errno| DropReason::Malformed)
    }

    #[inline(always)]
    fn load<T: Copy>(&self, offset: usize) -> Result<T, DropReason> {
        TcContext::load(self, offset).map_err(|_errno| DropReason::Malformed)
    }

    #[inline(always)]
    fn store<T: Copy>(&self, offset: usize, value: &T) -> Result<(), DropReason> {
        TcContext::store(self, offset, value, 0).map_err(|_errno| DropReason::Rewrite)
    }

    #[inline(always)]
    fn fold(&self, sum: Sum, difference: u32) -> Result<(), DropReason> {
        let mut flags = 0;
        if sum.zero_is_none {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        if sum.pseudo {
            flags |= u64::from(BPF_F_PSEUDO_HDR);
        }
        let difference = u64::from(difference);
        if sum.pseudo && sum.v6 {
            return fold_v6(self, sum.at, difference, flags);
        }
        self.l4_csum_replace(sum.at, 0, difference, flags).map_err(|_errno| DropReason::Rewrite)
    }

    #[inline(always)]
    fn translate(&self, packet: &Packet, flow: &Flow) -> Result<(), DropReason> {
        apart::translate(self, packet, flow)
    }

    #[inline(always)]
    fn quote(&self, packet: &Packet, quote: &mut Quote) -> Result<bool, DropReason> {
        apart::quote(self, packet, quote)
    }

    #[inline(always)]
    fn open(&self, packet: &Packet, flow: &mut Flow, flags: u16) -> Step {
        apart::open(self, packet, flow, flags)
    }

    #[inline(always)]
    fn leaves_otherwise(&self, key: &FlowKey, flow: &Flow, now: &mut Flow) -> bool {
        apart::leaves_otherwise(self, key, flow, now)
    }
}

/// `BPF_F_IPV6` of `linux/bpf.h`: an address of IPv6 changes one checksum only, so the sum that a
/// device took of the whole packet (`CHECKSUM_COMPLETE`) stays as it is.
const BPF_F_IPV6: u64 = 1 << 7;
/// The helper does not know a flag.
const EINVAL: i64 = -22;

#[inline(always)]
fn fold_v6(ctx: &TcContext, at: usize, difference: u64, flags: u64) -> Result<(), DropReason> {
    match ctx.l4_csum_replace(at, 0, difference, flags | BPF_F_IPV6) {
        Ok(()) => Ok(()),
        Err(EINVAL) => {
            // Without the flag the kernel takes the difference out of that sum: it is put back.
            ctx.l4_csum_replace(at, 0, difference, flags).map_err(|_errno| DropReason::Rewrite)?;
            helpers::sum_again(ctx, difference as u32);
            Ok(())
        }
        Err(_) => Err(DropReason::Rewrite),
    }
}
