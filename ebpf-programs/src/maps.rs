//! Every map, and safe typed look-ups over them.
//!
//! aya's look-ups are unsafe since a row may be deleted and its memory used for another row while we
//! read it. The rows read here are copied at once, are at most 128 bytes of plain integers, and a
//! torn copy is at worst a wrong backend for one connection that its client would have lost anyway;
//! memory of a map always stays readable (RCU). That is the reason behind each `SAFETY` below.
//!
//! Before 6.3 the kernel takes keys and rows from the program's stack, from packets and from maps, but not from
//! memory that a global function was handed (`map_key_value_types`, kernel/bpf/verifier.c): keys of flows and
//! rows to insert have to be copied by who has them from its caller; small keys are copied here.
#![expect(unsafe_code, reason = "map rows are reached through raw pointers")]

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{
        Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key,
        ring_buf::RingBufEntry,
    },
    programs::SockAddrContext,
};
use ebpf_common::{
    addr::Addr,
    affinity::{Affinity, AffinityKey, MemberKey},
    config::Config,
    conntrack::{Flow, FlowKey, LED_TO},
    device::Device,
    endpoint::{Endpoint, HAS_FLOWS},
    event::{Event, RING_BYTES},
    fragment::{Fragment, FragmentKey},
    maglev::{BLOCK, MaglevBlock, MaglevKey},
    maps::{
        AFFINITY_MAX, BACKENDS_MAX, CONNTRACK_MAX, DEVICES_MAX, ENDPOINTS_MAX, FRAGMENTS_MAX,
        MAGLEV_MAX, MEMBERS_MAX, NETNS_MAX, NODE_ADDRS_MAX, SERVICES_MAX, SOURCE_RANGES_MAX,
        TRACE_FLOWS_MAX, TUNNELS_MAX,
    },
    netns::Netns,
    service::{Backend, BackendKey, Peer, Service, ServiceKey, SocketTranslation, SourceRange},
    trace as steps,
    tunnel::Tunnel,
    verdict::{Budget, DROP_REASONS, DropReason},
};

use crate::{
    next_hop::{PLACES, Path},
    trace,
};

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static SERVICES: HashMap<ServiceKey, Service> =
    HashMap::with_max_entries(SERVICES_MAX, BPF_F_NO_PREALLOC);
#[map]
static BACKENDS: HashMap<BackendKey, Backend> =
    HashMap::with_max_entries(BACKENDS_MAX, BPF_F_NO_PREALLOC);
#[map]
static NODE_ADDRS: HashMap<Addr, u32> =
    HashMap::with_max_entries(NODE_ADDRS_MAX, BPF_F_NO_PREALLOC);
#[map]
static LOCAL_MACS: HashMap<[u8; 8], u32> =
    HashMap::with_max_entries(NODE_ADDRS_MAX, BPF_F_NO_PREALLOC);
#[map]
static ENDPOINTS: HashMap<Addr, Endpoint> =
    HashMap::with_max_entries(ENDPOINTS_MAX, BPF_F_NO_PREALLOC);
#[map]
static TUNNELS: LpmTrie<Addr, Tunnel> = LpmTrie::with_max_entries(TUNNELS_MAX, 0);
#[map]
static CONNTRACK: HashMap<FlowKey, Flow> =
    HashMap::with_max_entries(CONNTRACK_MAX, BPF_F_NO_PREALLOC);
/// One row while nothing grows; the loader puts the former table in its place.
#[map]
static CONNTRACK_OLD: HashMap<FlowKey, Flow> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map]
static MEMBERS: HashMap<MemberKey, u32> = HashMap::with_max_entries(MEMBERS_MAX, BPF_F_NO_PREALLOC);
#[map]
static AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::with_max_entries(AFFINITY_MAX, 0);
#[map]
static SOURCE_RANGES: LpmTrie<SourceRange, u32> =
    LpmTrie::with_max_entries(SOURCE_RANGES_MAX, BPF_F_NO_PREALLOC);
#[map]
static MAGLEV: HashMap<MaglevKey, MaglevBlock> =
    HashMap::with_max_entries(MAGLEV_MAX, BPF_F_NO_PREALLOC);
#[map]
static NETNS: HashMap<u64, Netns> = HashMap::with_max_entries(NETNS_MAX, BPF_F_NO_PREALLOC);
#[map]
static DEVICES: HashMap<u32, Device> = HashMap::with_max_entries(DEVICES_MAX, BPF_F_NO_PREALLOC);
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment> =
    LruHashMap::with_max_entries(FRAGMENTS_MAX, 0);
/// Flows that a traced run would have added, for what it looks up next and for the programs that its packet
/// meets then. Not pinned: each copy has its own, and real packets' programs leave it alone.
#[map]
static TRACE_FLOWS: HashMap<FlowKey, Flow> =
    HashMap::with_max_entries(TRACE_FLOWS_MAX, BPF_F_NO_PREALLOC);
/// Known to XDP alone and made anew with each load.
#[map]
static PATHS: PerCpuArray<Path> = PerCpuArray::with_max_entries(PLACES, 0);
#[map]
static REFUSALS: PerCpuArray<Budget> = PerCpuArray::with_max_entries(1, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(DROP_REASONS, 0);
/// Not pinned: each load of the programs has its own, which its agent reads.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);
#[map]
static EVENTS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[btf_map]
static SOCKETS: SkStorage<SocketTranslation> = SkStorage::new();

/// The settings; `None` only if the kernel lost its array.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

#[inline(always)]
pub fn service(key: &ServiceKey) -> Option<Service> {
    // SAFETY: copied at once, see the module's head.
    let row = unsafe { SERVICES.get(key) };
    trace::look_up(steps::SERVICE, key, row);
    row.copied()
}

#[inline(always)]
pub fn backend(key: &BackendKey) -> Option<Backend> {
    // SAFETY: copied at once, see the module's head.
    let row = unsafe { BACKENDS.get(key) };
    trace::look_up(steps::BACKEND, key, row);
    row.copied()
}

/// A backend that is compared with others; only the one that is chosen is noted.
#[inline(always)]
pub fn candidate(key: &BackendKey) -> Option<Backend> {
    // SAFETY: copied at once, see the module's head.
    unsafe { BACKENDS.get(key) }.copied()
}

/// The slot at a position of a block, which is less than the block's length.
#[inline(always)]
pub fn maglev_cell(key: &MaglevKey, position: usize) -> Option<u16> {
    // SAFETY: one integer is read; see the module's head.
    unsafe { MAGLEV.get(key) }?.slots.get(position & (BLOCK - 1)).copied()
}

#[inline(always)]
pub fn is_node_address(addr: &Addr) -> bool {
    node_address(addr).is_some()
}

/// The flags of an address of this node.
#[inline(always)]
pub fn node_address(addr: &Addr) -> Option<&'static u32> {
    let addr = &{ *addr };
    // SAFETY: a row of one integer; see the module's head.
    let row = unsafe { NODE_ADDRS.get(addr) };
    trace::look_up(steps::NODE_ADDRESS, addr, row);
    row
}

#[inline(always)]
pub fn is_local_mac(mac: [u8; 6]) -> bool {
    LOCAL_MACS.get_ptr([mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0]).is_some()
}

#[inline(always)]
pub fn endpoint(addr: &Addr) -> Option<&'static Endpoint> {
    let addr = &{ *addr };
    // SAFETY: see the module's head; a row that goes while it is read delivers to a pod that goes.
    let row = unsafe { ENDPOINTS.get(addr) };
    trace::look_up(steps::ENDPOINT, addr, row);
    row
}

#[inline(always)]
pub fn tunnel(addr: &Addr) -> Option<&'static Tunnel> {
    let row = TUNNELS.get(Key::new(128, *addr));
    trace::look_up(steps::TUNNEL, addr, row);
    row
}

/// A flow's row, in the table or in the one before it grew.
#[inline(always)]
pub fn flow(key: &FlowKey) -> Option<&'static Flow> {
    let row = CONNTRACK.get_ptr_mut(key).or_else(|| CONNTRACK_OLD.get_ptr_mut(key));
    let row = if trace::is_on() { row.or_else(|| TRACE_FLOWS.get_ptr_mut(key)) } else { row };
    // SAFETY: the row stays readable for the program's run (RCU); another CPU may age it meanwhile,
    // by aligned stores of whole integers.
    let row = row.map(|flow| unsafe { &*flow });
    trace::look_up(steps::FLOW, key, row);
    row
}

/// Notes a packet of a flow; writes only what changes, since the row is shared between CPUs. Volatile, as
/// the compiler takes what a reference leads to for unchanging and drops writes to it.
#[inline(always)]
pub fn touch(flow: &'static Flow, seen: u8, now_s: u32) {
    if trace::is_on() {
        return;
    }
    let row = core::ptr::from_ref(flow).cast_mut();
    if flow.seen & seen != seen {
        // SAFETY: `flow` hands out rows of maps only, which programs may write.
        unsafe { (&raw mut (*row).seen).write_volatile(flow.seen | seen) };
    }
    if flow.last_seen != now_s {
        // SAFETY: as above.
        unsafe { (&raw mut (*row).last_seen).write_volatile(now_s) };
    }
}

/// Remembers where in its set a flow's backend was found.
#[inline(always)]
pub fn set_slot(flow: &'static Flow, slot: u32) {
    if trace::is_on() {
        return;
    }
    let row = core::ptr::from_ref(flow).cast_mut();
    // SAFETY: `flow` hands out rows of maps only, which programs may write.
    unsafe { (&raw mut (*row).slot).write_volatile(slot) };
}

/// Inserts a row that must not exist yet.
#[inline(always)]
pub fn insert_flow(key: &FlowKey, flow: &Flow) -> Result<(), i32> {
    if trace::is_on() {
        let is_free = CONNTRACK.get_ptr(key).is_none() && TRACE_FLOWS.get_ptr(key).is_none();
        trace::look_up(steps::ADD_FLOW, key, is_free.then_some(flow));
        return if is_free { TRACE_FLOWS.insert(key, flow, 0) } else { Err(EEXIST) };
    }
    if CONNTRACK_OLD.get_ptr(key).is_some() {
        return Err(EEXIST);
    }
    CONNTRACK.insert(key, flow, u64::from(BPF_NOEXIST))
}

/// The result of inserting a row that exists.
pub const EEXIST: i32 = -17;

#[inline(always)]
pub fn remove_flow(key: &FlowKey) {
    if trace::is_on() {
        trace::step(steps::REMOVE_FLOW, key);
        let _absent: Result<(), i32> = TRACE_FLOWS.remove(key);
        return;
    }
    // An absent row is what we want.
    let _absent: Result<(), i32> = CONNTRACK.remove(key);
    let _absent: Result<(), i32> = CONNTRACK_OLD.remove(key);
}

/// Notes that what is delivered to a pod of this node may be an answer to be translated.
#[inline(always)]
pub fn mark_flows(addr: &Addr) {
    if trace::is_on() {
        return;
    }
    if let Some(row) = ENDPOINTS.get_ptr_mut({ *addr }) {
        // SAFETY: the row stays readable and writable for the program's run (RCU).
        note(unsafe { &(*row).flags }, HAS_FLOWS);
    }
}

/// Notes that flows lead to where a row of a map of endpoints, tunnels or the node's addresses leads.
#[inline(always)]
pub fn mark_led(flags: &'static u32) {
    if !trace::is_on() {
        note(flags, LED_TO);
    }
}

/// Sets a flag of a row by a store of its byte, which no other flag that a program sets shares: another CPU
/// may set another one.
#[inline(always)]
fn note(flags: &'static u32, flag: u32) {
    if *flags & flag != 0 {
        return;
    }
    let byte = flag.trailing_zeros() / 8;
    // Little-endian, as all of BPF's objects here are.
    let place = core::ptr::from_ref(flags).cast_mut().cast::<u8>().wrapping_add(byte as usize);
    // SAFETY: the callers hand in a part of a row of a map, which stays readable and writable for the program's
    // run (RCU).
    unsafe { place.write_volatile((flag >> (byte * 8)) as u8) };
}

#[inline(always)]
pub fn device(ifindex: u32) -> Option<&'static Device> {
    // SAFETY: the row stays readable for the program's run (RCU); the agent replaces it whole.
    let row = unsafe { DEVICES.get(ifindex) };
    trace::look_up(steps::DEVICE, &ifindex, row);
    row
}

/// The ports of a fragmented packet whose first fragment was seen.
#[inline(always)]
pub fn fragment(key: &FragmentKey) -> Option<Fragment> {
    // SAFETY: copied at once, see the module's head.
    let row = unsafe { FRAGMENTS.get(key) };
    trace::look_up(steps::FRAGMENT, key, row);
    row.copied()
}

#[inline(always)]
pub fn remember_fragment(key: &FragmentKey, fragment: &Fragment) {
    if trace::is_on() {
        trace::look_up(steps::KEEP_FRAGMENT, key, Some(fragment));
        return;
    }
    // Without memory its later fragments are dropped and counted.
    let _full: Result<(), i32> = FRAGMENTS.insert(key, fragment, 0);
}

/// Takes one out of this second's budget of answers that tell of refusals.
#[inline(always)]
pub fn may_refuse(now_s: u32) -> bool {
    if trace::is_on() {
        return true;
    }
    let Some(budget) = REFUSALS.get_ptr_mut(0) else { return false };
    // SAFETY: the pointer is this CPU's own row, valid while the program runs.
    unsafe { &mut *budget }.take(now_s)
}

#[inline(always)]
pub fn count(reason: DropReason) {
    if trace::is_on() {
        trace::step(steps::DROP, &(reason as u32));
        return;
    }
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: the pointer is this CPU's own slot, aligned and valid while the program runs.
        unsafe { *counter += 1 }
    }
}

/// What a client of a service had, by its key.
#[inline(always)]
pub fn client(key: &AffinityKey) -> Option<Affinity> {
    // SAFETY: copied at once, see the module's head.
    let row = unsafe { AFFINITY.get(key) };
    trace::look_up(steps::CLIENT, key, row);
    row.copied()
}

/// Remembers a client's backend. A full map forgets whoever was not seen for the longest time.
#[inline(always)]
pub fn keep_client(key: &AffinityKey, affinity: &Affinity) {
    if trace::is_on() {
        trace::look_up(steps::KEEP_CLIENT, key, Some(affinity));
        return;
    }
    // Without memory the client is not remembered and chooses anew next time.
    let _full: Result<(), i32> = AFFINITY.insert(key, affinity, 0);
}

/// Notes that a remembered client opened another connection.
#[inline(always)]
pub fn use_client(key: &AffinityKey, now_s: u32) {
    if trace::is_on() {
        return;
    }
    if let Some(affinity) = AFFINITY.get_ptr_mut(key) {
        // SAFETY: the row stays writable for the program's run (RCU); an aligned store of one integer.
        unsafe { (*affinity).last_used = now_s }
    }
}

/// The slot of a backend in a set.
#[inline(always)]
pub fn member(key: &MemberKey) -> Option<u32> {
    // SAFETY: copied at once, see the module's head.
    let row = unsafe { MEMBERS.get(key) };
    trace::look_up(steps::MEMBER, key, row);
    row.copied()
}

/// Whether a range of the service holds the address.
#[inline(always)]
pub fn in_source_range(client: SourceRange) -> bool {
    // The whole key: 32 bits of service, 128 of address.
    let row = SOURCE_RANGES.get(Key::new(160, client));
    trace::look_up(steps::SOURCE_RANGE, &client, row);
    row.is_some()
}

#[inline(always)]
pub fn netns(cookie: u64) -> Option<Netns> {
    // SAFETY: copied at once, see the module's head.
    let row = unsafe { NETNS.get(cookie) };
    trace::look_up(steps::NETNS, &cookie, row);
    row.copied()
}

/// Room for an event, to be filled in and submitted; counts the event where there is none.
#[inline(always)]
pub fn new_event() -> Option<RingBufEntry<Event>> {
    let entry = EVENTS.reserve::<Event>(0);
    if entry.is_none()
        && let Some(lost) = EVENTS_LOST.get_ptr_mut(0)
    {
        // SAFETY: the pointer is this CPU's own slot, aligned and valid while the program runs.
        unsafe { *lost += 1 }
    }
    entry
}

/// Remembers on the socket that `backend` stands for `service`; whether that is news.
#[inline(always)]
pub fn remember(ctx: &SockAddrContext, service: Peer, backend: Peer) -> bool {
    // SAFETY: the context's socket is valid while the program runs.
    let translation = unsafe { SOCKETS.get_or_insert_ptr_mut(ctx, None) };
    // SAFETY: null or this socket's storage, zeroed when made, which lives as long as the socket.
    if let Some(translation) = unsafe { translation.as_mut() } {
        return translation.remember(service, backend);
    }
    true
}

/// The service for which `backend` stands on this socket.
#[inline(always)]
pub fn service_of(ctx: &SockAddrContext, backend: Peer) -> Option<Peer> {
    // SAFETY: the context's socket is valid while the program runs.
    let translation = unsafe { SOCKETS.get_ptr_mut(ctx) };
    // SAFETY: null or this socket's storage, which lives as long as the socket.
    unsafe { translation.as_ref() }.and_then(|translation| translation.service_of(backend))
}

/// A place for a way of XDP's packets.
#[inline(always)]
pub fn path(place: u32) -> Option<&'static mut Path> {
    // SAFETY: the pointer is this CPU's own slot; XDP programs do not interrupt each other on a CPU, and
    // nothing else knows the map. A program holds one such reference at a time.
    PATHS.get_ptr_mut(place).map(|path| unsafe { &mut *path })
}
