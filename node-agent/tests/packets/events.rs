//! What programs tell whoever listens: a row a connection, and none while nobody does.

#[cfg(test)]
mod tests {
    use ebpf_common::{
        TCP, UDP,
        config::{Config, EVENTS},
        event::{CLOSED, DROPPED, Event, OPENED, PACKET, RING_BYTES},
        service::Peer,
        verdict::DropReason,
    };

    use crate::{
        frame::{ACK, End, FIN, Frame, RST},
        kernel::{DROP, Kernel, addr, config, redirected, with_kernel},
    };

    fn listen(kernel: &mut Kernel) {
        let config = config();
        kernel.set_config(Config { flags: config.flags | EVENTS, ..config });
    }

    fn events(kernel: &mut Kernel) -> Vec<Event> {
        std::iter::from_fn(|| kernel.ring.next()).collect()
    }

    fn peer(end: End<'_>) -> Peer {
        Peer { addr: addr(end.0), port: end.1.to_be_bytes(), reserved: [0; 2] }
    }

    /// Checks the only event: what was decided, of whom, and what it was translated to.
    #[track_caller]
    fn only(kernel: &mut Kernel, kind: u8, [from, to]: [End<'_>; 2]) -> Event {
        let all = events(kernel);
        let [event] = all.as_slice() else { panic!("{all:?}") };
        let (from, to) = (peer(from), peer(to));
        assert_eq!((event.kind, event.path, event.netns, event.reserved), (kind, PACKET, 0, 0));
        assert_eq!((event.key.src, event.key.sport), (from.addr, from.port), "{event:?}");
        assert_eq!((event.key.dst, event.key.dport), (to.addr, to.port), "{event:?}");
        assert!(event.at > 0);
        *event
    }

    #[test]
    fn a_connection_is_told_when_it_begins_and_ends_and_not_between() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.service, 80), &[(at.pod2, 8080)]);
            let ends = [(at.pod, 40_000), (at.service, 80)];
            let asked = Frame::tcp(ends[0], ends[1]);
            let _nobody_listens = kernel.run("tc_from_pod", &asked.bytes());
            assert_eq!(events(kernel), []);

            listen(kernel);
            let again = Frame::tcp((at.pod, 40_001), (at.service, 80));
            let _opened = kernel.run("tc_from_pod", &again.bytes());
            let event = only(kernel, OPENED, [(at.pod, 40_001), ends[1]]);
            assert_eq!((event.source, event.to), (peer((at.pod, 40_001)), peer((at.pod2, 8080))));

            let data = Frame { flags: ACK, ..asked.clone() };
            let answer = redirected(&data, (at.pod2, 8080)).answer();
            for packet in [&data, &answer] {
                let _known = kernel.run("tc_from_pod", &packet.bytes());
            }
            assert_eq!(events(kernel), [], "it goes on");

            // The backend has no more to say, the client still may.
            let half = Frame { flags: FIN | ACK, ..answer };
            let _half_closed = kernel.run("tc_from_pod", &half.bytes());
            assert_eq!(events(kernel), []);
            let fin = Frame { flags: FIN | ACK, ..data };
            for _ in 0..2 {
                let _closed = kernel.run("tc_from_pod", &fin.bytes());
            }
            let event = only(kernel, CLOSED, ends);
            assert_eq!((event.to, event.direction), (peer((at.pod2, 8080)), 0));
        });
    }

    #[test]
    fn a_backend_that_resets_and_one_that_goes_end_it() {
        with_kernel(|kernel, at| {
            listen(kernel);
            kernel.serve(TCP, (at.service, 80), &[(at.pod2, 8080)]);
            let asked = Frame::tcp((at.pod, 40_000), (at.service, 80));
            let answer = redirected(&asked, (at.pod2, 8080)).answer();
            let _opened = kernel.run("tc_from_pod", &asked.bytes());
            assert_eq!(events(kernel).len(), 1);
            let reset = Frame { flags: RST, ..answer };
            let _reset = kernel.run("tc_from_pod", &reset.bytes());
            let event = only(kernel, CLOSED, [(at.pod2, 8080), (at.pod, 40_000)]);
            assert_eq!(event.direction, 1, "told by the row of answers");
            assert_eq!(event.source, peer((at.service, 80)));

            let service = kernel.serve(UDP, (at.service, 53), &[(at.pod2, 53)]);
            let datagram = Frame::udp((at.pod, 40_000), (at.service, 53));
            let _opened = kernel.run("tc_from_pod", &datagram.bytes());
            kernel.set_backends(service.set, &[(at.far_pod, 53)]);
            let _moved = kernel.run("tc_from_pod", &datagram.bytes());
            let told: Vec<(u8, Peer)> =
                events(kernel).iter().map(|event| (event.kind, event.to)).collect();
            let (first, second) = (peer((at.pod2, 53)), peer((at.far_pod, 53)));
            assert_eq!(told, [(OPENED, first), (CLOSED, first), (OPENED, second)]);
        });
    }

    #[test]
    fn a_refusal_and_a_drop_have_their_reason() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.service, 80), &[]);
            let ends = [(at.pod, 40_000), (at.service, 80)];
            let asked = Frame::tcp(ends[0], ends[1]);
            let _nobody_listens = kernel.run("tc_from_pod", &asked.bytes());
            assert_eq!(events(kernel), []);
            listen(kernel);
            let _refused = kernel.run("tc_from_pod", &asked.bytes());
            let event = only(kernel, DROPPED, ends);
            assert_eq!(u32::from(event.reason), DropReason::NoBackend as u32);
            let ping = Frame::ping((at.pod, 7), at.service);
            let _dropped = kernel.run("tc_from_pod", &ping.bytes());
            let event = only(kernel, DROPPED, [(at.pod, 7), (at.service, 0)]);
            assert_eq!(u32::from(event.reason), DropReason::ServiceAddress as u32);
            let mut bent = asked.bytes();
            // Neither family's version.
            bent[14] = 0x10;
            let _unread = kernel.run("tc_from_pod", &bent);
            let told = events(kernel);
            assert!(told.iter().all(|event| event.key.proto == 0), "{told:?}");
            assert_eq!(told.len(), 1, "nothing could be read");
        });
    }

    #[test]
    fn a_full_ring_counts_what_it_loses_and_drops_no_packet() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.service, 80), &[(at.pod2, 8080)]);
            listen(kernel);
            // A packet that is dropped as it is, so that one test run can repeat it.
            let reset = Frame { flags: RST, ..Frame::tcp((at.pod, 40_000), (at.service, 80)) };
            let reset = reset.bytes();
            let (room, before) = (RING_BYTES / 112, kernel.ring.lost().unwrap());
            let _most = kernel.run_often("tc_from_pod", &reset, room + 100);
            let verdict = kernel.run("tc_from_pod", &reset).0;
            let lost = kernel.ring.lost().unwrap() - before;
            let told = u64::try_from(events(kernel).len()).unwrap();
            assert_eq!(told + lost, u64::from(room) + 101);
            assert!(lost >= 100, "{lost}");
            assert_eq!(verdict, DROP, "as ever");
        });
    }
}
