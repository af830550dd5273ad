//! Rows of real maps: in batches and one by one, and what a full map does to a round.

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::IpAddr};

    use ebpf_common::{
        addr::Addr,
        service::{Backend, BackendKey, Service, ServiceKey, SourceRange},
    };
    use node_agent::{
        dataplane::{load::Programs, plan::Batch},
        sys::map::RowMap,
    };

    /// Maps need root and a kernel that lets it use them.
    #[expect(clippy::print_stdout, reason = "a test that is skipped says so")]
    fn is_possible() -> bool {
        let made = RowMap::<u32, u64>::create(1);
        if let Err(error) = &made {
            println!("skipped: this process may not make BPF maps ({error})");
        }
        made.is_ok()
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
}
