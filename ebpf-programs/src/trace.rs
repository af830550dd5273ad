//! Runs that write nothing and note what they looked up and did.
//!
//! A trace runs a second copy of the object on packets made by the agent, over the same maps. Whether
//! a copy traces is a constant that the loader sets in read-only data: the verifier knows its value and
//! takes the branches out of the programs that real packets meet, and nothing in a packet can turn
//! tracing on. Every function that writes to a shared map asks [`is_on`] first.
#![expect(unsafe_code, reason = "map rows are reached through raw pointers")]

use core::{mem::size_of, ptr};

use aya_ebpf::{Global, macros::map, maps::Array};
use ebpf_common::trace::{KEY_WORDS, ROW_WORDS, STEPS, Step};

/// 1 in a copy that traces; set by name before the copy is loaded.
#[unsafe(no_mangle)]
static TRACING: Global<u8> = Global::new(0);

/// What the run noted. Not pinned: each copy has its own.
#[map]
static TRACE: Array<Step> = Array::with_max_entries(STEPS, 0);
/// How many steps the run has noted.
#[map]
static TRACE_LENGTH: Array<u32> = Array::with_max_entries(1, 0);

/// Whether this copy traces.
#[inline(always)]
pub fn is_on() -> bool {
    TRACING.load() != 0
}

/// Notes that `key` was looked up and what row there is.
#[inline(always)]
pub fn look_up<K: Copy, V: Copy>(kind: u32, key: &K, row: Option<&V>) {
    if is_on() {
        record(kind, key, row.map_or(ptr::null(), ptr::from_ref));
    }
}

/// Notes a step that a value of integers describes.
#[inline(always)]
pub fn step<K: Copy>(kind: u32, what: &K) {
    if is_on() {
        record::<K, ()>(kind, what, ptr::null());
    }
}

/// Not inlined: the stack of the programs is full.
#[inline(never)]
fn record<K: Copy, V: Copy>(kind: u32, key: *const K, row: *const V) {
    const { assert!(size_of::<K>() <= KEY_WORDS * 4 && size_of::<V>() <= ROW_WORDS * 4) };
    let Some(length) = TRACE_LENGTH.get_ptr_mut(0) else { return };
    // SAFETY: the row of an array, valid while the program runs; one trace runs at a time.
    let at = unsafe { *length };
    // SAFETY: as above.
    unsafe { *length = at + 1 };
    let Some(step) = TRACE.get_ptr_mut(at) else { return };
    // SAFETY: as above.
    let step = unsafe { &mut *step };
    step.kind = kind;
    step.yes = u32::from(!row.is_null());
    // SAFETY: both are valid for their type's size, which the assertion above keeps inside the
    // field; keys and rows of maps are made of words.
    unsafe { ptr::copy_nonoverlapping(key, step.key.as_mut_ptr().cast(), 1) };
    if !row.is_null() {
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(row, step.row.as_mut_ptr().cast(), 1) };
    }
}
