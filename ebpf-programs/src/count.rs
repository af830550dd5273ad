//! What a verdict means for the hook, and counting of drops. No per-packet logging.

use ebpf_common::{conntrack::FlowKey, verdict::DropReason};

use crate::{events, maps};

/// Leave the packet to the next program or the stack (`TC_ACT_UNSPEC`, `TCX_NEXT`).
pub const PASS: i32 = -1;
/// Drop the packet (`TC_ACT_SHOT`, `TCX_DROP`).
pub const DROP: i32 = 2;

/// Counts a drop and gives its verdict.
#[inline(always)]
pub fn drop(reason: DropReason) -> i32 {
    maps::count(reason);
    events::dropped(reason, None);
    DROP
}

/// The same for a packet that was read.
#[inline(always)]
pub fn drop_of(reason: DropReason, key: &FlowKey) -> i32 {
    maps::count(reason);
    events::dropped(reason, Some(key));
    DROP
}
