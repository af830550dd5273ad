//! Rows of real maps: in batches and one by one, and what a full map does to a round.

#[cfg(test)]
#[expect(dead_code, reason = "devices are for other tests")]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/rows.rs"]
mod rows;

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        net::IpAddr,
        thread,
        time::{Duration, Instant},
    };

    use aya::maps::{HashMap, Map, MapData};
    use ebpf_common::{
        ABI_VERSION, TCP,
        addr::Addr,
        affinity::{Affinity, AffinityKey},
        conntrack::{FORWARD, Flow, FlowKey, LED_TO, REVERSE, SEEN_FIN, SEEN_REPLY},
        maps::{self as names, NODE_ADDRS},
        service::{Backend, BackendKey, Service, ServiceKey, SourceRange},
    };
    use node_agent::{
        dataplane::{collect::Collector, load::Programs, look::Look, plan::Batch, seek::Sought},
        sys::map::{RowMap, Walk},
    };

    use super::{
        place::own_namespaces,
        rows::{Rows, addr},
    };

    /// Maps need root and a kernel that lets it use them.
    fn is_possible() -> bool {
        let made = RowMap::<u32, u64>::create(1);
        if let Err(error) = &made {
            skip::because(&format!("this process may not make BPF maps ({error})"));
        }
        made.is_ok()
    }

    /// Clients whose time is over do not count, though their rows are there.
    #[test]
    fn the_fill_of_the_map_of_clients_is_those_who_keep_their_backend() {
        if !is_possible() {
            return;
        }
        let test = || {
            let pins = own_namespaces().join("orlop");
            let (_programs, _maps) = Programs::load(Some(&pins)).unwrap();
            let rows = Rows::below(&pins);
            let sticky = Service { affinity_s: 60, ..Service::default() };
            let backend = ["10.244.1.7:80".parse().unwrap()];
            let service = rows.put_service("10.96.0.1:80", TCP, sticky, &backend).service;
            let clock = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            let now_s = u32::try_from(clock.tv_sec).unwrap();
            let put = |client, service, age: u32| {
                let last_used = now_s.wrapping_sub(age);
                let row = Affinity { last_used, ..Affinity::default() };
                rows.put_client(AffinityKey { client: addr(client), service }, row);
            };
            put("192.0.2.1", service, 1);
            put("192.0.2.2", service, 3_600);
            put("192.0.2.3", service + 1, 1);
            let look = Look::below(&pins);
            let fill = look.forgetful().unwrap();
            let named: Vec<_> = fill.iter().map(|fill| (fill.map, fill.rows)).collect();
            assert_eq!(named, [(names::AFFINITY, 1), (names::FRAGMENTS, 0)]);
            assert!(fill[0].max >= u64::from(names::AFFINITY_MAX));
            assert!(look.fill().unwrap().contains(&fill[0]), "metrics have it too");
        };
        thread::scope(|scope| scope.spawn(test).join()).unwrap();
    }

    fn map(rows: u32) -> RowMap<u32, u64> {
        RowMap::create(rows).unwrap()
    }

    #[test]
    fn batches_and_single_rows_do_the_same() {
        if !is_possible() {
            return;
        }
        for forgo in [false, true] {
            let map = map(20_000);
            if forgo {
                map.forgo_batches();
            }
            let rows: Vec<(u32, u64)> = (0..10_000).map(|n| (n, u64::from(n) * 3)).collect();
            assert!(map.update(&rows).is_empty());
            let found: BTreeMap<u32, u64> = map.dump().unwrap().into_iter().collect();
            assert_eq!(found, rows.iter().copied().collect(), "{forgo}");
            assert_eq!((map.row(&7).unwrap(), map.row(&10_000).unwrap()), (Some(21), None));
            // Every second one, and some that are not there.
            let gone: Vec<u32> = (0..12_000).step_by(2).collect();
            assert!(map.delete(&gone).is_empty());
            assert_eq!(map.dump().unwrap().len(), 5_000);
        }
    }

    #[test]
    fn a_full_map_takes_what_it_can_and_says_which_rows_it_has_not() {
        if !is_possible() {
            return;
        }
        for forgo in [false, true] {
            let map = map(4);
            if forgo {
                map.forgo_batches();
            }
            assert!(map.update(&[(1, 1), (2, 1)]).is_empty());
            let failed = map.update(&[(3, 1), (4, 1), (5, 1), (1, 9), (6, 1)]);
            let places: Vec<usize> = failed.iter().map(|(at, _)| *at).collect();
            assert_eq!(places, [2, 4], "a row that is there already is replaced");
            assert!(failed.iter().all(|(_, error)| error.raw_os_error() == Some(libc::E2BIG)));
            assert_eq!(map.row(&1).unwrap(), Some(9));
        }
    }

    #[test]
    fn a_walk_sees_every_row_once_while_others_go_and_counts_in_batches() {
        if !is_possible() {
            return;
        }
        for forgo in [false, true] {
            let map = map(20_000);
            if forgo {
                map.forgo_batches();
            }
            let rows: Vec<(u32, u64)> = (0..10_000).map(|n| (n, 0)).collect();
            assert!(map.update(&rows).is_empty());
            assert_eq!(map.count().unwrap(), 10_000);
            let (mut walk, mut seen, mut parts) = (Walk::by(100), Vec::new(), 0);
            while !walk.is_over() {
                let part: Vec<u32> =
                    map.next(&mut walk).unwrap().into_iter().map(|(key, _)| key).collect();
                assert!(map.delete(&part).is_empty());
                seen.extend(part);
                parts += 1;
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..10_000).collect::<Vec<_>>(), "{forgo}");
            assert!(forgo || parts >= 100, "{parts}");
            assert_eq!(map.count().unwrap(), 0);
        }
    }

    #[test]
    fn an_inserted_row_takes_the_place_of_none() {
        if !is_possible() {
            return;
        }
        let map = map(2);
        assert!(map.insert(&1, &7).unwrap());
        assert!(!map.insert(&1, &8).unwrap());
        assert_eq!(map.row(&1).unwrap(), Some(7));
        assert!(map.insert(&2, &7).unwrap());
        assert_eq!(map.insert(&3, &7).unwrap_err().raw_os_error(), Some(libc::E2BIG));
    }

    /// Bytes of this process that are resident.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = status.split_whitespace().nth(1).unwrap().parse().unwrap();
        pages * 4096
    }

    #[test]
    #[expect(clippy::print_stdout, reason = "a measurement is worth reading")]
    fn half_a_million_flows_are_walked_in_parts_and_in_little_memory() {
        if !is_possible() {
            return;
        }
        let (table, old) = (RowMap::create(1 << 19).unwrap(), RowMap::create(1).unwrap());
        // Every fourth flow has ended; all others are idle, so that their other halves are looked up.
        for block in 0..500_u32 {
            let rows: Vec<_> = (0..500).flat_map(|n| pair(block * 500 + n)).collect();
            assert!(table.update(&rows).is_empty());
        }
        let (mut collector, before, start) = (Collector::default(), resident(), Instant::now());
        let (mut parts, mut longest) = (0, Duration::ZERO);
        collector.begin();
        while collector.is_walking() {
            let start = Instant::now();
            collector.part((&table, &old), 100, |_, _| Ok(Vec::new()), |_, _| {}).unwrap();
            longest = longest.max(start.elapsed());
            parts += 1;
        }
        let (took, grown) = (start.elapsed(), resident().saturating_sub(before));
        println!("500,000 rows: {took:?} in {parts} parts, the longest {longest:?}, {grown} bytes");
        assert_eq!(collector.rows(), 375_000);
        assert_eq!(table.count().unwrap(), 375_000);
        assert!(parts >= 15, "{parts}");
        assert!(grown < 16 << 20, "{grown} bytes");
        // What is left are whole flows.
        let (key, flow) = pair(1)[0];
        assert_eq!(table.row(&key).unwrap().map(|row| row.src), Some(flow.src));
        assert_eq!(table.row(&pair(0)[0].0).unwrap().map(|row| row.src), None);
    }

    /// Walks until there is nothing to walk for.
    fn walk(collector: &mut Collector, tables: (&RowMap<FlowKey, Flow>, &RowMap<FlowKey, Flow>)) {
        let nobody =
            |sought: &Sought, rows: &[_]| sought.over(rows, |_key| Ok(None), |_addr| false);
        while collector.is_walking() {
            collector.part(tables, 60, nobody, |_, _| {}).unwrap();
        }
    }

    #[test]
    fn flows_by_a_frontend_that_is_gone_are_found_wherever_they_stand() {
        if !is_possible() {
            return;
        }
        let (table, old) = (RowMap::create(1 << 10).unwrap(), RowMap::create(1).unwrap());
        let flow = |number| pair(number).map(|(key, row)| (udp(key), Flow { set: 7, ..row }));
        let mut collector = Collector::default();
        for number in 1..=100 {
            assert!(table.update(&flow(number)).is_empty());
        }
        let gone = Sought::frontends(&[ServiceKey { proto: 17, port: [0; 2], ..key(1) }]);
        let other = Sought::frontends(&[ServiceKey { proto: 17, ..key(1) }]);
        collector.seek(other.clone());
        walk(&mut collector, (&table, &old));
        assert_eq!((table.count().unwrap(), collector.rows()), (200, 200), "nobody asked for it");
        // A walk that is under way may have passed some.
        collector.begin();
        collector.seek(gone.clone());
        walk(&mut collector, (&table, &old));
        assert_eq!((table.count().unwrap(), collector.rows()), (0, 0));
        // While the table grows, rows may move behind the walk's back.
        let growing = RowMap::create(1 << 10).unwrap();
        assert!(growing.update(&flow(1)).is_empty());
        collector.seek(gone);
        walk(&mut collector, (&table, &growing));
        assert!(table.update(&flow(1)).is_empty());
        collector.begin();
        walk(&mut collector, (&table, &old));
        assert_eq!(table.count().unwrap(), 0);
    }

    fn udp(key: FlowKey) -> FlowKey {
        FlowKey { proto: 17, ..key }
    }

    fn pair(number: u32) -> [(FlowKey, Flow); 2] {
        let [a, b, c, d] = number.to_be_bytes();
        let client = Addr::v4([10, a, b, c]);
        let key = FlowKey { src: client, sport: [d, 1], proto: 6, ..FlowKey::default() };
        let seen = SEEN_REPLY | if number.is_multiple_of(4) { SEEN_FIN } else { 0 };
        let forward = Flow {
            src: client,
            sport: [d, 1],
            dst: Addr::v4([10, 244, 0, 1]),
            seen,
            last_seen: 60,
            direction: FORWARD,
            ..Flow::default()
        };
        let reverse = Flow {
            src: key.dst,
            dst: client,
            dport: key.sport,
            seen,
            direction: REVERSE,
            ..forward
        };
        [(key, forward), (forward.opposite(6), Flow { sport: key.dport, ..reverse })]
    }

    fn key(last: u8) -> ServiceKey {
        let addr = Addr::from(IpAddr::from([10, 96, 0, last]));
        ServiceKey { addr, port: [0, 80], proto: 6, scope: 0 }
    }

    #[test]
    fn the_rows_of_services_come_back_as_they_were_written() {
        if !is_possible() {
            return;
        }
        let (_programs, maps) = Programs::load(None).unwrap();
        let range = |bits| (bits, SourceRange { service: 3, addr: Addr::v4([10, 0, 0, 0]) });
        let service = Service { set: 1, count: 1, service: 3, ..Service::default() };
        let backends = vec![(BackendKey { set: 1, slot: 0 }, Backend::default())];
        let batches = [
            Batch::PutBackends(backends),
            Batch::PutRanges(vec![range(32 + 104), range(32 + 112)]),
            Batch::PutServices(vec![(key(1), service)]),
        ];
        assert!(maps.services().write(&batches).is_empty());
        let mut rows = maps.services().read().unwrap();
        rows.ranges.sort_unstable();
        assert_eq!(rows.services, [(key(1), service)]);
        assert_eq!(rows.ranges, [range(136), range(144)]);
        let gone = Batch::DelRanges(vec![range(136), range(144), range(150)]);
        assert!(maps.services().write(&[gone]).is_empty());
        assert_eq!(maps.services().read().unwrap().ranges, []);
    }

    #[test]
    fn addresses_of_the_node_keep_what_programs_note_there() {
        if !is_possible() {
            return;
        }
        let test = || {
            let pins = own_namespaces().join("orlop");
            let (_programs, mut maps) = Programs::load(Some(&pins)).unwrap();
            let [stays, goes, comes] = [1, 2, 3].map(|last| IpAddr::from([192, 0, 2, last]));
            maps.set_node_addresses(&BTreeSet::from([stays, goes])).unwrap();
            let pin = MapData::from_pin(pins.join(format!("v{ABI_VERSION}/{NODE_ADDRS}"))).unwrap();
            let mut rows: HashMap<_, Addr, u32> = Map::HashMap(pin).try_into().unwrap();
            rows.insert(Addr::from(stays), 1 | LED_TO, 0).unwrap();
            maps.set_node_addresses(&BTreeSet::from([stays, comes])).unwrap();
            let rows: BTreeMap<Addr, u32> = rows.iter().map(Result::unwrap).collect();
            assert_eq!(rows, [(stays.into(), 1 | LED_TO), (comes.into(), 1)].into());
        };
        thread::scope(|scope| scope.spawn(test).join()).unwrap();
    }
}
