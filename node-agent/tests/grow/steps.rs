//! Every step of the connection table's growth by itself, with programs of before and after it side by
//! side as they are while links are swapped, and with a new start after each.

use std::{collections::BTreeMap, path::Path, thread};

use ebpf_common::{
    config::Config,
    conntrack::{Flow, FlowKey},
    endpoint::Endpoint,
    maps as names,
    service::{Service, ServiceKey},
};
use node_agent::{
    dataplane::{
        grow,
        load::{Programs, TcHook},
        maps::Maps,
        size::{self, Connections, Sizes, Step},
    },
    sys::map::{RowMap, Walk},
};

use crate::{
    frame::{ACK, Frame, TCP},
    pins,
    place::{is_possible, own_namespaces},
    rows::Rows,
};

const POD: &str = "10.244.1.7";
const BACKEND: &str = "10.244.1.8";
const SERVICE: (&str, u16) = ("10.96.3.4", 80);
const REDIRECT: i32 = 7;
/// Loopback.
const DEVICE: u32 = 1;

/// The programs as one agent has loaded them; dropping it is that agent's death.
struct Agent {
    programs: Programs,
    maps: Maps,
}

impl Agent {
    fn start(pins: &Path) -> Self {
        let (programs, maps) = Programs::load(Some(pins)).unwrap();
        Self { programs, maps }
    }

    fn run(&mut self, frame: &Frame) -> (i32, Vec<u8>) {
        self.programs.test_run(TcHook::FromPod, DEVICE, &frame.bytes()).unwrap()
    }

    /// How large both tables are.
    fn tables(&self) -> (u32, u32) {
        (self.maps.connections().max(), self.maps.old_connections().max())
    }
}

/// What becomes of both directions of each flow, by the client's port.
type Flows = BTreeMap<u16, [Vec<u8>; 2]>;

/// An answer of an established connection as the backend sends it, which opens nothing, and a packet of
/// the client's.
fn both(port: u16) -> [Frame; 2] {
    let asked = Frame { flags: ACK, ..Frame::tcp((POD, port), SERVICE) };
    let answer = Frame { flags: ACK, ..Frame::tcp((BACKEND, 8080), (POD, port)) };
    [answer, asked]
}

/// Opens a flow by one agent's programs.
fn open(flows: &mut Flows, port: u16, agent: &mut Agent) {
    let (verdict, _) = agent.run(&Frame::tcp((POD, port), SERVICE));
    assert_eq!(verdict, REDIRECT, "port {port}");
    let outs = both(port).map(|frame| {
        let (verdict, out) = agent.run(&frame);
        assert_eq!(verdict, REDIRECT, "port {port}");
        assert_ne!(out, frame.bytes(), "port {port} is translated");
        out
    });
    flows.insert(port, outs);
}

/// Every flow is known to every agent's programs, in both directions, as when it was opened.
fn check(flows: &Flows, agents: &mut [&mut Agent], when: &str) {
    for (at, agent) in agents.iter_mut().enumerate() {
        for (port, outs) in flows {
            let now = both(*port).map(|frame| agent.run(&frame));
            let then = outs.clone().map(|out| (REDIRECT, out));
            assert_eq!(now, then, "{when}: port {port} by programs {at}");
        }
    }
    // Nothing was opened a second time. The last one that was started has both tables.
    let newest = agents.iter().max_by_key(|agent| agent.tables()).unwrap();
    let (table, old) = (newest.maps.connections(), newest.maps.old_connections());
    let rows = table.count().unwrap() + old.count().unwrap();
    assert_eq!(rows, 2 * u64::try_from(flows.len()).unwrap(), "{when}");
}

fn set_up(pins: &Path) -> Agent {
    pins::pin::<FlowKey, Flow>(pins, names::CONNTRACK, 64);
    let mut first = Agent::start(pins);
    let rows = Rows::below(pins);
    let services = [ebpf_common::addr::Net::new("10.96.0.0".parse().unwrap(), 16); 2];
    rows.set_config(Config { services, ..Config::default() });
    let backend = format!("{BACKEND}:8080").parse().unwrap();
    let to = format!("{}:{}", SERVICE.0, SERVICE.1);
    rows.put_service(&to, TCP, Service::default(), &[backend]);
    for (ip, ifindex) in [(POD, 7), (BACKEND, 8)] {
        let endpoint = Endpoint { ifindex, ..Endpoint::default() };
        first.maps.put_endpoint(ip.parse().unwrap(), &endpoint).unwrap();
    }
    first
}

/// The step that follows from what is pinned.
fn next(agent: &Agent) -> Option<Step> {
    let (table, old) = (agent.maps.connections(), agent.maps.old_connections());
    let tables = Connections {
        rows: table.count().unwrap(),
        max: table.max(),
        old_max: old.max(),
        old_is_empty: old.count().unwrap() == 0,
    };
    size::next_step(tables, &Sizes::for_memory(4 << 30))
}

fn in_namespaces(test: impl FnOnce(&Path) + Send) {
    if !is_possible() {
        return;
    }
    let run = || test(&own_namespaces().join("orlop"));
    if let Err(panic) = thread::scope(|scope| scope.spawn(run).join()) {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn every_flow_is_known_to_all_programs_at_every_step_and_after_a_death_at_any() {
    in_namespaces(|pins| {
        let folder = pins::folder(pins);
        let (mut flows, mut ports) = (Flows::new(), 40_000..);
        let mut port = || ports.next().unwrap();
        let mut before = set_up(pins);
        assert_eq!(before.tables(), (64, 1), "taken as it was");
        while next(&before).is_none() {
            open(&mut flows, port(), &mut before);
        }
        assert_eq!(flows.len(), 25, "two rows each, three quarters of 64 are not enough");

        let mut seen = Vec::new();
        while let Some(step) = next(&before) {
            seen.push(step);
            grow::change_pins(&folder, step).unwrap();
            // The agent dies; its programs stay where they are attached. Another one starts, goes on,
            // and dies once more in the middle of moving.
            let mut after = Agent::start(pins);
            check(&flows, &mut [&mut before, &mut after], &format!("{step:?}"));
            open(&mut flows, port(), &mut before);
            open(&mut flows, port(), &mut after);
            check(&flows, &mut [&mut after, &mut before], &format!("{step:?}, opened by both"));
            if step == Step::Move {
                let mut walk = Walk::by(8);
                while !walk.is_over() {
                    let (from, to) = (after.maps.old_connections(), after.maps.connections());
                    let count = grow::move_rows(from, to, &mut walk).unwrap();
                    check(&flows, &mut [&mut before, &mut after], "moving");
                    if count > 0 && flows.len() < 40 {
                        open(&mut flows, port(), &mut after);
                        break;
                    }
                }
            }
            before = after;
        }
        let moves = seen.iter().filter(|step| **step == Step::Move).count();
        assert!(moves > 2, "deaths while moving: {seen:?}");
        seen.dedup();
        assert_eq!(seen, [Step::Offer { rows: 128 }, Step::Exchange, Step::Move, Step::Retire]);
        assert_eq!(before.tables(), (128, 1));
        let count = before.maps.connections().count().unwrap();
        assert_eq!(count, 2 * u64::try_from(flows.len()).unwrap());
    });
}

#[test]
fn what_packets_note_on_a_row_while_it_moves_is_kept() {
    in_namespaces(|_pins| {
        let (from, to) = (RowMap::create(8).unwrap(), RowMap::create(8).unwrap());
        let key = |port| FlowKey { sport: [0, port], ..FlowKey::default() };
        let flow = |seen| Flow { seen, last_seen: 7, ..Flow::default() };
        // One row was copied before, and each of the two has noted something since.
        assert!(from.insert(&key(1), &flow(3)).unwrap());
        assert!(to.insert(&key(1), &flow(4)).unwrap());
        assert!(from.insert(&key(2), &flow(1)).unwrap());
        assert_eq!(grow::move_rows(&from, &to, &mut Walk::new()).unwrap(), 2);
        assert_eq!(to.row(&key(2)).unwrap(), Some(flow(1)));
        assert_eq!(to.row(&key(1)).unwrap().map(|flow| flow.seen), Some(4), "opened anew");
        assert_eq!(from.count().unwrap(), 0);
    });
}

#[test]
fn a_full_table_loses_no_row_that_is_to_move() {
    in_namespaces(|_pins| {
        let (from, to) = (RowMap::create(8).unwrap(), RowMap::create(3).unwrap());
        let key = |port| FlowKey { sport: [0, port], ..FlowKey::default() };
        for port in 0..8 {
            assert!(from.insert(&key(port), &Flow::default()).unwrap());
        }
        let error = grow::move_rows(&from, &to, &mut Walk::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::E2BIG));
        assert_eq!((from.count().unwrap(), to.count().unwrap()), (5, 3));
    });
}

#[test]
fn a_start_removes_what_was_never_put_in_place_and_takes_maps_of_any_size() {
    in_namespaces(|pins| {
        pins::pin::<ServiceKey, Service>(pins, names::SERVICES, 8);
        pins::pin::<FlowKey, Flow>(pins, "CONNTRACK_OLD_new", 128);
        let agent = Agent::start(pins);
        assert_eq!(agent.maps.services().max(names::SERVICES), 8);
        assert_eq!(agent.tables().1, 1);
        assert!(!pins::folder(pins).join("CONNTRACK_OLD_new").exists());
        // The others are by this node's memory.
        let first = Sizes::for_memory(memory_bytes()).first;
        assert_eq!(agent.maps.services().max(names::BACKENDS), first[names::BACKENDS]);
        assert_eq!(agent.tables().0, first[names::CONNTRACK]);
    });
}

fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}
