//! Lines of text where something is decided, by `aya-log`, for whoever works on the programs. Only with the
//! feature `log`; otherwise `log_off.rs` stands in, whose functions are empty.
//!
//! A line takes more stack than there is where the programs decide. So a note is taken there, in a row of a
//! map, and the line is made of it when the program has its verdict, by functions that its outermost frame
//! calls. Of several notes about one packet the last is told, and a program that interrupts another between
//! note and line on the same CPU takes the other's place.
#![expect(unsafe_code, reason = "map rows are reached through raw pointers")]

use aya_ebpf::{macros::map, maps::PerCpuArray};
use aya_log_ebpf::{debug, info, trace, warn};
use ebpf_common::{
    conntrack::{Flow, FlowKey},
    event::{CLOSED, DROPPED, Event, OPENED, PACKET, SOCKET},
    service::Peer,
    socket::Ask,
    verdict::{DROP_REASONS, DropReason},
};

use crate::{pass::Pass, trace as tracing};

/// What a program has decided and not told yet; `kind` is 0 when there is nothing.
#[map]
static NOTE: PerCpuArray<Event> = PerCpuArray::with_max_entries(1, 0);

/// Beside the kinds of events: XDP leaves a packet to tc, for the [`Pass`] in `reason`.
const PASSED: u8 = 4;

/// A flow is opened or ends.
#[inline(always)]
pub fn flow(kind: u8, key: &FlowKey, flow: &Flow) {
    let Some(note) = note(kind, 0) else { return };
    note.path = PACKET;
    note.key = *key;
    note.to = Peer { addr: flow.dst, port: flow.dport, reserved: [0; 2] };
}

/// A packet is dropped; there is no key where nothing could be read of it.
#[inline(always)]
pub fn dropped(reason: DropReason, key: Option<&FlowKey>) {
    let Some(note) = note(DROPPED, reason as u8) else { return };
    note.path = PACKET;
    match key {
        Some(key) => note.key = *key,
        None => note.key.proto = 0,
    }
}

/// XDP leaves a packet to tc.
#[inline(always)]
pub fn passed(why: Pass, key: &FlowKey) {
    let Some(note) = note(PASSED, why as u8) else { return };
    note.key = *key;
}

/// A socket goes to a backend, or is refused.
#[inline(always)]
pub fn socket(kind: u8, ask: &Ask, backend: &Peer, reason: u8) {
    let Some(note) = note(kind, reason) else { return };
    note.path = SOCKET;
    note.netns = ask.netns;
    note.key.dst = ask.wanted.addr;
    note.key.dport = ask.wanted.port;
    note.key.proto = ask.proto;
    note.to = *backend;
}

#[inline(always)]
fn note(kind: u8, reason: u8) -> Option<&'static mut Event> {
    if tracing::is_on() {
        return None;
    }
    let note = row()?;
    note.kind = kind;
    note.reason = reason;
    Some(note)
}

#[inline(always)]
fn row() -> Option<&'static mut Event> {
    // SAFETY: null or this CPU's own row, aligned and valid while the program runs; two programs that
    // write into it at once mix up their lines and nothing else.
    unsafe { NOTE.get_ptr_mut(0)?.as_mut() }
}

/// Makes a line of the last note about a packet; gives the verdict back.
#[inline(always)]
pub fn told<V>(verdict: V) -> V {
    let _nothing: u32 = log_packet();
    verdict
}

/// The same for the programs at sockets, which leave no room for a frame between theirs and the line's.
#[inline(always)]
pub fn told_at_socket<V>(verdict: V) -> V {
    let _nothing: u32 = log_connected();
    let _nothing: u32 = log_refused();
    verdict
}

/// Global, so that the verifier follows it once for a program.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn log_packet() -> u32 {
    let Some(note) = row() else { return 0 };
    match core::mem::take(&mut note.kind) {
        OPENED => opened(note),
        CLOSED => closed(note),
        DROPPED => dropped_packet(note),
        PASSED => passed_packet(note),
        _ => {}
    }
    0
}

/// The note about a socket, if it is of this kind and not told yet.
#[inline(always)]
fn take(kind: u8) -> Option<&'static Event> {
    let note = row()?;
    if note.kind != kind || note.path != SOCKET {
        return None;
    }
    note.kind = 0;
    Some(note)
}

#[inline(never)]
fn opened(note: &Event) {
    let Event { key, to, .. } = note;
    info!(
        (),
        target: "ebpf",
        "flow opened: {:i} port {} to {:i} port {} goes to {:i} port {}",
        key.src.octets(), u16::from_be_bytes(key.sport), key.dst.octets(),
        u16::from_be_bytes(key.dport), to.addr.octets(), u16::from_be_bytes(to.port)
    );
}

#[inline(never)]
fn closed(note: &Event) {
    let key = &note.key;
    debug!(
        (),
        target: "ebpf",
        "flow ends: {:i} port {} to {:i} port {}",
        key.src.octets(), u16::from_be_bytes(key.sport), key.dst.octets(),
        u16::from_be_bytes(key.dport)
    );
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn log_connected() -> u32 {
    let Some(Event { key, to, .. }) = take(OPENED) else { return 0 };
    info!(
        (),
        target: "ebpf",
        "socket to {:i} port {} goes to {:i} port {}",
        key.dst.octets(), u16::from_be_bytes(key.dport), to.addr.octets(),
        u16::from_be_bytes(to.port)
    );
    0
}

#[inline(never)]
fn dropped_packet(note: &Event) {
    let key = &note.key;
    warn!(
        (),
        target: "ebpf",
        "packet dropped: {:i} port {} to {:i} port {}: {}",
        key.src.octets(), u16::from_be_bytes(key.sport), key.dst.octets(),
        u16::from_be_bytes(key.dport), words(&REASONS, note.reason)
    );
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn log_refused() -> u32 {
    let Some(note) = take(DROPPED) else { return 0 };
    let key = &note.key;
    warn!(
        (),
        target: "ebpf",
        "socket to {:i} port {} refused: {}",
        key.dst.octets(), u16::from_be_bytes(key.dport), words(&REASONS, note.reason)
    );
    0
}

#[inline(never)]
fn passed_packet(note: &Event) {
    let key = &note.key;
    trace!(
        (),
        target: "ebpf",
        "left to tc by XDP: {:i} port {} to {:i} port {}: {}",
        key.src.octets(), u16::from_be_bytes(key.sport), key.dst.octets(),
        u16::from_be_bytes(key.dport), words(&PASSES, note.reason)
    );
}

/// Room for the longest words. All are as long, as the verifier wants to know how much is copied.
const WORDS: usize = 72;

type Words<const N: usize> = [[u8; WORDS]; N];

macro_rules! table {
    ($all:expr) => {{
        let mut all = [[b' '; WORDS]; _];
        let mut at = 0;
        while at < all.len() {
            all[at] = padded($all[at].words());
            at += 1;
        }
        all
    }};
}

static REASONS: Words<{ DROP_REASONS as usize }> = table!(DropReason::ALL);
static PASSES: Words<{ Pass::ALL.len() }> = table!(Pass::ALL);

const fn padded(words: &str) -> [u8; WORDS] {
    let words = words.as_bytes();
    let mut padded = [b' '; WORDS];
    let mut at = 0;
    while at < words.len() {
        padded[at] = words[at];
        at += 1;
    }
    padded
}

#[inline(always)]
fn words<const N: usize>(table: &'static Words<N>, number: u8) -> &'static str {
    let number = usize::from(number);
    let words = &table[if number < N { number } else { 0 }];
    // SAFETY: words in ASCII and spaces.
    unsafe { core::str::from_utf8_unchecked(words) }
}
