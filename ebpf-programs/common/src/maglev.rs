//! Consistent hashing of flows onto backends (Maglev, NSDI 2016): the layout of its tables.

/// Slots in a block. A table is `2^bits` slots long, at least one block.
pub const BLOCK: usize = 64;

/// One block of a set's table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MaglevKey {
    /// [`crate::service::Service::set`].
    pub set: u32,
    /// The slot divided by [`BLOCK`].
    pub block: u32,
}
const _: () = assert!(size_of::<MaglevKey>() == 8 && align_of::<MaglevKey>() == 4);

/// Backend slots, host order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaglevBlock {
    /// [`crate::service::BackendKey::slot`] by position.
    pub slots: [u16; BLOCK],
}
const _: () = assert!(size_of::<MaglevBlock>() == 128 && align_of::<MaglevBlock>() == 2);
