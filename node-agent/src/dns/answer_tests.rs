//! The specification's examples, one by one, over bytes.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::{
    dns::{
        message::{encode_query, parse_upstream},
        snapshot,
    },
    model::{
        EndpointPort, EndpointRow, EndpointSliceRow, ObjectKey, Protocol, ServiceKind, ServicePort,
        ServiceRow,
    },
};

const DOMAIN: &str = "cluster.local";

fn service(kind: ServiceKind, cluster_ip: Option<&str>, ports: &[(&str, u16)]) -> ServiceRow {
    ServiceRow {
        kind,
        cluster_ips: cluster_ip.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: ports
            .iter()
            .map(|(name, port)| ServicePort {
                name: (*name).into(),
                protocol: Protocol::Tcp,
                port: *port,
                node_port: 0,
            })
            .collect(),
        ..ServiceRow::default()
    }
}

fn endpoint(ip: &str, hostname: &str, ready: bool) -> EndpointRow {
    EndpointRow {
        ip: ip.parse().unwrap(),
        ready,
        serving: ready,
        hostname: hostname.into(),
        ..EndpointRow::default()
    }
}

fn slice(service: &str, endpoints: Vec<EndpointRow>) -> EndpointSliceRow {
    EndpointSliceRow {
        service: ObjectKey::new("default", service),
        ports: vec![EndpointPort { name: "https".into(), protocol: Protocol::Tcp, port: 443 }],
        endpoints,
        ..EndpointSliceRow::default()
    }
}

fn zone() -> Zone {
    let external = |target: &str| ServiceRow {
        external_name: target.into(),
        ..service(ServiceKind::ExternalName, None, &[])
    };
    let mut both = service(ServiceKind::ClusterIp, Some("10.3.0.3"), &[("sctp", 7)]);
    both.cluster_ips.push("fd00::3".parse().unwrap());
    both.ports[0].protocol = Protocol::Sctp;
    let eager = ServiceRow { publish_not_ready: true, ..service(ServiceKind::Headless, None, &[]) };
    let services = [
        ("kubernetes", service(ServiceKind::ClusterIp, Some("10.3.0.1"), &[("https", 443)])),
        ("unnamed", service(ServiceKind::NodePort, Some("10.3.0.2"), &[("", 80)])),
        ("dual", service(ServiceKind::ClusterIp, Some("fd00::1"), &[])),
        ("both", both),
        ("pair", service(ServiceKind::Headless, None, &[("https", 443)])),
        ("headless", service(ServiceKind::Headless, None, &[("https", 443)])),
        ("asleep", service(ServiceKind::Headless, None, &[("https", 443)])),
        ("eager", eager),
        ("moving", service(ServiceKind::Headless, None, &[("https", 443)])),
        ("foo", external("www.example.com")),
        ("inner", external("kubernetes.default.svc.cluster.local.")),
        ("loop", external("loop.default.svc.cluster.local")),
    ];
    let services = services.map(|(name, row)| (ObjectKey::new("default", name), row));
    let moving = || endpoint("10.3.0.120", "", true);
    let slices = [
        slice("headless", vec![endpoint("10.3.0.100", "My-Pet", true)]),
        slice(
            "headless",
            vec![endpoint("10.3.0.101", "", true), endpoint("10.3.0.102", "c", false)],
        ),
        slice("asleep", vec![endpoint("10.3.0.103", "a", false)]),
        slice("eager", vec![endpoint("10.3.0.104", "a", false)]),
        // On its way from one slice to another.
        slice("moving", vec![moving()]),
        slice("moving", vec![endpoint("10.3.0.119", "", true), moving()]),
        // A slice of each family: the same pods.
        slice("pair", vec![endpoint("10.3.0.110", "one", true), endpoint("10.3.0.111", "", true)]),
        slice("pair", vec![endpoint("fd00::110", "one", true), endpoint("fd00::111", "", true)]),
    ];
    Zone::new(services.iter().map(|(key, row)| (key, row)), slices.iter())
}

fn outcome(name: &str, qtype: u16) -> Outcome {
    let zone = zone();
    let query = encode_query(0, &Name::from_text(name).unwrap(), qtype);
    answer(&query, Knowledge { zone: Some(&zone), domain: DOMAIN }, Transport::Udp)
}

/// What a reply says: its code, and addresses and aliases, sorted.
fn says(name: &str, qtype: u16) -> String {
    let Outcome::Reply(bytes) = outcome(name, qtype) else { return "elsewhere".to_owned() };
    let read = parse_upstream(&bytes).unwrap();
    let mut answers: Vec<_> = read.answers.iter().map(|r| data_text(&r.data)).collect();
    answers.sort();
    let counts = [6, 8].map(|at| u16::from_be_bytes([bytes[at], bytes[at + 1]]));
    let code = match read.rcode {
        0 if counts[0] == 0 => "no data",
        0 => "",
        2 => "server failure",
        3 => "no such name",
        other => panic!("code {other}"),
    };
    // A "no" comes with the SOA that says how long it holds (RFC 2308).
    assert_eq!(counts[1], u16::from(matches!(code, "no data" | "no such name")), "{name}");
    format!("{code}{}", answers.join(" "))
}

fn data_text(data: &Data) -> String {
    match data {
        Data::A(ip) => ip.to_string(),
        Data::Aaaa(ip) => ip.to_string(),
        Data::Cname(name) => format!("={}", name.labels().join(".")),
        Data::Ns(_) | Data::Ptr(_) | Data::Srv { .. } | Data::Txt(_) | Data::Soa { .. } => {
            panic!("not read from upstream answers")
        }
    }
}

#[test]
fn addresses_are_those_of_the_specification() {
    let cases = [
        // 2.3.1
        ("kubernetes.default.svc.cluster.local", rtype::A, "10.3.0.1"),
        ("KUBERNETES.Default.svc.CLUSTER.local", rtype::A, "10.3.0.1"),
        ("kubernetes.default.svc.cluster.local", rtype::AAAA, "no data"),
        ("unnamed.default.svc.cluster.local", rtype::A, "10.3.0.2"),
        ("dual.default.svc.cluster.local", rtype::AAAA, "fd00::1"),
        ("dual.default.svc.cluster.local", rtype::A, "no data"),
        // 2.4.1
        ("headless.default.svc.cluster.local", rtype::A, "10.3.0.100 10.3.0.101"),
        ("my-pet.headless.default.svc.cluster.local", rtype::A, "10.3.0.100"),
        ("10-3-0-101.headless.default.svc.cluster.local", rtype::A, "10.3.0.101"),
        ("moving.default.svc.cluster.local", rtype::A, "10.3.0.119 10.3.0.120"),
        ("10-3-0-120.moving.default.svc.cluster.local", rtype::A, "10.3.0.120"),
        ("c.headless.default.svc.cluster.local", rtype::A, "no such name"),
        ("asleep.default.svc.cluster.local", rtype::A, "no such name"),
        ("eager.default.svc.cluster.local", rtype::A, "10.3.0.104"),
        ("a.eager.default.svc.cluster.local", rtype::AAAA, "no data"),
        // 2.6
        ("10-244-1-5.default.pod.cluster.local", rtype::A, "10.244.1.5"),
        ("10-244-1-5.default.pod.cluster.local", rtype::AAAA, "no data"),
        ("web.default.pod.cluster.local", rtype::A, "no such name"),
        ("10-244-1-500.default.pod.cluster.local", rtype::A, "no such name"),
        // Names that exist only because something is below them.
        ("cluster.local", rtype::A, "no data"),
        ("svc.cluster.local", rtype::A, "no data"),
        ("default.svc.cluster.local", rtype::A, "no data"),
        ("_tcp.kubernetes.default.svc.cluster.local", rtype::A, "no data"),
        ("_https._tcp.kubernetes.default.svc.cluster.local", rtype::A, "no data"),
        ("kubernetes.default.svc.cluster.local", rtype::TXT, "no data"),
        // Names that do not.
        ("absent.default.svc.cluster.local", rtype::A, "no such name"),
        ("kubernetes.absent.svc.cluster.local", rtype::A, "no such name"),
        ("absent.svc.cluster.local", rtype::A, "no such name"),
        ("x.kubernetes.default.svc.cluster.local", rtype::A, "no such name"),
        ("_udp.kubernetes.default.svc.cluster.local", rtype::A, "no such name"),
        ("_http._tcp.kubernetes.default.svc.cluster.local", rtype::SRV, "no such name"),
        ("_x._tcp.unnamed.default.svc.cluster.local", rtype::SRV, "no such name"),
        ("a.b.c.d.e.svc.cluster.local", rtype::A, "no such name"),
        ("kubernetes.default.cluster.local", rtype::A, "no such name"),
        // Aliases inside the cluster are followed, but not for ever.
        (
            "inner.default.svc.cluster.local",
            rtype::A,
            "10.3.0.1 =kubernetes.default.svc.cluster.local",
        ),
        ("foo.default.svc.cluster.local", rtype::CNAME, "=www.example.com"),
        ("loop.default.svc.cluster.local", rtype::A, "server failure"),
        // Somebody else's.
        ("www.example.com", rtype::A, "elsewhere"),
        ("notcluster.local", rtype::A, "elsewhere"),
        ("local", rtype::A, "elsewhere"),
        ("9.9.9.9.in-addr.arpa", rtype::PTR, "elsewhere"),
        ("foo.default.svc.cluster.local", rtype::A, "elsewhere"),
    ];
    for (name, qtype, expected) in cases {
        let said = says(name, qtype);
        assert_eq!(said, expected, "{name} type {qtype}");
    }
}

#[test]
fn names_of_two_families_have_the_addresses_of_both() {
    let cases = [
        ("both.default.svc.cluster.local", rtype::A, "10.3.0.3"),
        ("both.default.svc.cluster.local", rtype::AAAA, "fd00::3"),
        ("both.default.svc.cluster.local", rtype::ANY, "10.3.0.3 fd00::3"),
        ("_sctp.both.default.svc.cluster.local", rtype::A, "no data"),
        ("pair.default.svc.cluster.local", rtype::A, "10.3.0.110 10.3.0.111"),
        ("pair.default.svc.cluster.local", rtype::AAAA, "fd00::110 fd00::111"),
        ("one.pair.default.svc.cluster.local", rtype::A, "10.3.0.110"),
        ("one.pair.default.svc.cluster.local", rtype::AAAA, "fd00::110"),
        ("10-3-0-111.pair.default.svc.cluster.local", rtype::A, "10.3.0.111"),
        ("10-3-0-111.pair.default.svc.cluster.local", rtype::AAAA, "no data"),
        ("fd00--111.pair.default.svc.cluster.local", rtype::AAAA, "fd00::111"),
        ("fd00-10-244--5.default.pod.cluster.local", rtype::AAAA, "fd00:10:244::5"),
        ("fd00--5.default.pod.cluster.local", rtype::A, "no data"),
    ];
    for (name, qtype, expected) in cases {
        let said = says(name, qtype);
        assert_eq!(said, expected, "{name} type {qtype}");
    }
}

/// The reply holds this text or name somewhere after the question.
fn reply_holds(name: &str, qtype: u16, parts: &[&[u8]]) {
    let Outcome::Reply(bytes) = outcome(name, qtype) else { panic!("{name} is not answered") };
    for part in parts {
        assert!(bytes.windows(part.len()).any(|window| window == *part), "{name}: {part:?}");
    }
}

#[test]
fn ports_reverse_names_and_the_version_are_those_of_the_specification() {
    reply_holds("dns-version.cluster.local", rtype::TXT, &[b"\x051.1.0"]);
    // Priority 0, weight 100, port 443, target.
    let target =
        b"\x00\x00\x00\x64\x01\xbb\x0akubernetes\x07default\x03svc\x07cluster\x05local\x00";
    reply_holds("_https._tcp.kubernetes.default.svc.cluster.local", rtype::SRV, &[target]);
    let two: [&[u8]; 2] = [
        b"\x00\x00\x00\x32\x01\xbb\x06my-pet\x08headless",
        b"\x00\x00\x00\x32\x01\xbb\x0a10-3-0-101\x08headless",
    ];
    reply_holds("_https._tcp.headless.default.svc.cluster.local", rtype::SRV, &two);
    reply_holds("1.0.3.10.in-addr.arpa", rtype::PTR, &[b"\x0akubernetes\x07default"]);
    reply_holds("100.0.3.10.in-addr.arpa", rtype::PTR, &[b"\x06my-pet\x08headless"]);
    let reverse = format!("1.{}0.0.d.f.ip6.arpa", "0.".repeat(27));
    reply_holds(&reverse, rtype::PTR, &[b"\x04dual\x07default"]);
    let reverse = format!("0.1.1.{}0.0.d.f.ip6.arpa", "0.".repeat(25));
    reply_holds(&reverse, rtype::PTR, &[b"\x03one\x04pair\x07default"]);
    assert_eq!(zone().names_of([10, 3, 0, 120].into(), DOMAIN).len(), 1);
    // A pod of both families is a target once; its two addresses are asked for by its name.
    let quarters: [&[u8]; 3] = [
        b"\x00\x00\x00\x21\x01\xbb\x03one\x04pair",
        b"\x00\x00\x00\x21\x01\xbb\x0a10-3-0-111\x04pair",
        b"\x00\x00\x00\x21\x01\xbb\x09fd00--111\x04pair",
    ];
    reply_holds("_https._tcp.pair.default.svc.cluster.local", rtype::SRV, &quarters);
    reply_holds(
        "_sctp._sctp.both.default.svc.cluster.local",
        rtype::SRV,
        &[b"\x00\x64\x00\x07\x04both"],
    );
    reply_holds("cluster.local", rtype::SOA, &[b"\x02ns\x03dns\x07cluster\x05local\x00"]);
}

#[test]
fn an_external_name_is_resolved_by_the_upstream_server() {
    let Outcome::Resolve(pending) = outcome("foo.default.svc.cluster.local", rtype::A) else {
        panic!("must ask upstream")
    };
    assert_eq!(pending.target.labels(), ["www", "example", "com"]);
    let address = Record {
        owner: Some(pending.target.clone()),
        ttl: 300,
        data: Data::A([192, 0, 2, 53].into()),
    };
    let read = parse_upstream(&complete(pending.clone(), Some((0, vec![address])))).unwrap();
    let answers: Vec<_> = read.answers.iter().map(|r| data_text(&r.data)).collect();
    assert_eq!((read.rcode, answers), (0, vec!["=www.example.com".into(), "192.0.2.53".into()]));
    assert_eq!(parse_upstream(&complete(pending, None)).unwrap().rcode, 2);
}

#[test]
fn without_a_zone_cluster_names_fail_and_others_are_forwarded() {
    let knowledge = Knowledge { zone: None, domain: DOMAIN };
    let ask = |name: &str| {
        let query = encode_query(9, &Name::from_text(name).unwrap(), rtype::A);
        answer(&query, knowledge, Transport::Udp)
    };
    let Outcome::Reply(reply) = ask("a.b.svc.cluster.local") else { panic!("answers") };
    assert_eq!(parse_upstream(&reply).unwrap().rcode, 2);
    assert_eq!(ask("example.com"), Outcome::Forward);
}

#[test]
fn the_question_comes_back_with_its_case_and_answers_rotate() {
    let zone = zone();
    let knowledge = Knowledge { zone: Some(&zone), domain: DOMAIN };
    let first = |id| {
        let name = Name::from_text("HeadLess.default.svc.cluster.local").unwrap();
        let query = encode_query(id, &name, rtype::A);
        let Outcome::Reply(reply) = answer(&query, knowledge, Transport::Udp) else {
            panic!("answers")
        };
        assert_eq!(reply[12..query.len()], query[12..]);
        data_text(&parse_upstream(&reply).unwrap().answers[0].data)
    };
    assert_ne!(first(0), first(1));
    assert_eq!(first(0), first(2));
}

#[test]
fn other_classes_transfers_and_edns_versions_are_refused() {
    let zone = zone();
    let knowledge = Knowledge { zone: Some(&zone), domain: DOMAIN };
    let name = Name::from_text("kubernetes.default.svc.cluster.local").unwrap();
    let code = |query: &[u8]| {
        let Outcome::Reply(reply) = answer(query, knowledge, Transport::Tcp) else {
            panic!("answers")
        };
        u16::from(reply[3] & 0x0f)
    };
    assert_eq!(code(&encode_query(1, &name, rtype::AXFR)), 5);
    let mut chaos = encode_query(1, &name, rtype::A);
    *chaos.last_mut().unwrap() = 3;
    assert_eq!(code(&chaos), 5);
    // An OPT record of version 1; its upper code bits say 1, as BADVERS is 16.
    let mut edns = encode_query(1, &name, rtype::A);
    edns[11] = 1;
    edns.extend_from_slice(&[0, 0, 41, 4, 208, 0, 1, 0, 0, 0, 0]);
    let Outcome::Reply(reply) = answer(&edns, knowledge, Transport::Udp) else { panic!("answers") };
    assert_eq!((reply[3] & 0x0f, reply[reply.len() - 6]), (0, 1));
}

#[test]
fn a_damaged_snapshot_is_refused_wherever_it_is_damaged() {
    let file = snapshot::encode(&zone());
    assert_eq!(snapshot::decode(&file).unwrap(), zone());
    for at in 0..file.len() {
        let mut damaged = file.clone();
        damaged[at] ^= 0x40;
        assert!(snapshot::decode(&damaged).is_err(), "byte {at}");
        assert!(snapshot::decode(&file[..at]).is_err(), "cut at {at}");
    }
}

proptest! {
    #[test]
    fn no_query_makes_the_server_panic_or_exceed_the_limit(
        labels in prop::collection::vec("[a-z_0-9-]{1,12}", 0..6),
        inside in any::<bool>(), qtype in prop::sample::select(vec![1_u16, 2, 5, 6, 12, 16, 28, 33, 255]),
        noise in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut name = labels.join(".");
        if inside {
            name.push_str(".default.svc.cluster.local");
        }
        let name = name.trim_start_matches('.');
        let mut query = encode_query(3, &Name::from_text(name).unwrap(), qtype);
        let zone = zone();
        let knowledge = Knowledge { zone: Some(&zone), domain: DOMAIN };
        if let Outcome::Reply(reply) = answer(&query, knowledge, Transport::Udp) {
            prop_assert!(reply.len() <= 512);
            prop_assert_eq!(&reply[..2], &query[..2]);
        }
        query.extend_from_slice(&noise);
        let _outcome = answer(&query, knowledge, Transport::Udp);
        let _outcome = answer(&noise, knowledge, Transport::Udp);
    }

    #[test]
    fn any_zone_survives_its_file(
        rows in prop::collection::btree_map(
            "[a-z]{1,8}", (0_u8..3, prop::collection::vec(any::<u32>(), 0..4)), 0..10)
    ) {
        let services: Vec<_> = rows.iter().map(|(name, (kind, _))| {
            let row = match kind {
                0 => service(ServiceKind::ClusterIp, Some("10.3.0.9"), &[("a", 1), ("", 2)]),
                1 => service(ServiceKind::Headless, None, &[("a", 1)]),
                _ => ServiceRow {
                    external_name: "x.y".into(), ..service(ServiceKind::ExternalName, None, &[])
                },
            };
            (ObjectKey::new("default", name), row)
        }).collect();
        let slices: Vec<_> = rows.iter().map(|(name, (_, ips))| {
            let endpoints = ips.iter().map(|ip| EndpointRow {
                ip: IpAddr::from(ip.to_be_bytes()), ..endpoint("10.0.0.1", "", true)
            });
            slice(name, endpoints.collect())
        }).collect();
        let zone = Zone::new(services.iter().map(|(key, row)| (key, row)), slices.iter());
        prop_assert_eq!(snapshot::decode(&snapshot::encode(&zone)), Ok(zone));
    }
}
