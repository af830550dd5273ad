//! The allocator against small ranges, a model of what is taken, and its file.

use proptest::prelude::*;

use super::*;

fn network(cidrs: &[&str]) -> PodNetwork {
    PodNetwork { cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(), mtu: 1450 }
}

fn ipam(cidrs: &[&str]) -> Ipam {
    let mut ipam = Ipam::default();
    ipam.set_network(Some(network(cidrs)));
    ipam
}

fn take(ipam: &mut Ipam, id: u8) -> Result<Vec<IpAddr>, IpamError> {
    let attachment = Attachment::new(&format!("c{id}"), "eth0");
    let claim = Claim {
        attachment: &attachment,
        pod: &ObjectKey::new("default", "p"),
        netns: "/run/netns/p",
        network: "orlop",
        host_ports: &[],
    };
    ipam.allocate(claim).map(|record| record.ips.clone())
}

fn give_back(ipam: &mut Ipam, id: u8) {
    ipam.release(&Attachment::new(&format!("c{id}"), "eth0")).expect("was taken");
}

/// The last byte of the IPv4 address.
fn last_byte(ips: &[IpAddr]) -> u8 {
    match ips {
        [IpAddr::V4(ip), ..] => ip.octets()[3],
        other => panic!("{other:?}"),
    }
}

fn ips(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|ip| ip.parse().unwrap()).collect()
}

#[test]
fn network_gateway_and_broadcast_addresses_are_never_given() {
    let mut ipam = ipam(&["10.244.1.0/29"]);
    let given: Vec<_> = (0..5).map(|id| last_byte(&take(&mut ipam, id).unwrap())).collect();
    assert_eq!(given, [2, 3, 4, 5, 6]);
    let cidr = "10.244.1.0/29".parse().unwrap();
    assert_eq!(take(&mut ipam, 5), Err(IpamError::Exhausted(cidr)));
    assert_eq!(ipam.has_room(), Err(IpamError::Exhausted(cidr)));
    assert_eq!(gateway(cidr), Ipv4Addr::new(10, 244, 1, 1));
    assert_eq!(gateway("fd00:1::/64".parse().unwrap()).to_string(), "fd00:1::1");
}

#[test]
fn a_freed_address_is_given_again_only_after_all_others() {
    let mut ipam = ipam(&["10.244.1.0/29"]);
    assert_eq!(last_byte(&take(&mut ipam, 0).unwrap()), 2);
    give_back(&mut ipam, 0);
    let given: Vec<_> = (1..6).map(|id| last_byte(&take(&mut ipam, id).unwrap())).collect();
    assert_eq!(given, [3, 4, 5, 6, 2]);
}

#[test]
fn the_same_attachment_keeps_its_addresses() {
    let mut ipam = ipam(&["10.244.1.0/24", "fd00:1::/64"]);
    assert_eq!(take(&mut ipam, 1), take(&mut ipam, 1));
    assert_eq!(ipam.records().count(), 1);
    // Also when the node has another range by now: a running pod cannot change its address.
    ipam.set_network(Some(network(&["10.244.9.0/24"])));
    assert_eq!(take(&mut ipam, 1).unwrap(), ips(&["10.244.1.2", "fd00:1::2"]));
    assert_eq!(take(&mut ipam, 2).unwrap(), ips(&["10.244.9.2"]));
}

#[test]
fn two_families_come_together_in_the_order_of_the_ranges_or_not_at_all() {
    let mut dual = ipam(&["fd00:1::/64", "10.244.1.0/30"]);
    assert_eq!(take(&mut dual, 0).unwrap(), ips(&["fd00:1::2", "10.244.1.2"]));
    let before = dual.clone();
    let full = "10.244.1.0/30".parse().unwrap();
    assert_eq!(take(&mut dual, 1), Err(IpamError::Exhausted(full)));
    assert_eq!(dual, before, "the free family's address is not lost");
}

#[test]
fn a_wide_ipv6_range_is_walked_from_the_last_address_and_around_its_end() {
    let mut wide = ipam(&["fd00:1::/64"]);
    for id in 0..200 {
        assert_eq!(
            take(&mut wide, id).unwrap(),
            ips(&[&format!("fd00:1::{:x}", u16::from(id) + 2)])
        );
    }
    wide.last_v6 = Some("fd00:1::ffff:ffff:ffff:fffe".parse().unwrap());
    assert_eq!(take(&mut wide, 200).unwrap(), ips(&["fd00:1::ffff:ffff:ffff:ffff"]));
    assert_eq!(take(&mut wide, 201).unwrap(), ips(&["fd00:1::ca"]), "past 200 taken ones");
}

#[test]
fn a_prefix_without_room_for_a_pod_is_full_and_none_is_not_ready() {
    for (cidr, room) in [
        ("10.0.0.0/30", true),
        ("10.0.0.0/31", false),
        ("10.0.0.0/32", false),
        ("255.255.255.255/32", false),
        ("fd00::/127", false),
        ("fd00::/128", false),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", false),
    ] {
        let mut ipam = ipam(&[cidr]);
        let first = take(&mut ipam, 0);
        assert_eq!(first.is_ok(), room, "{cidr}: {first:?}");
        assert!(matches!(take(&mut ipam, 1), Err(IpamError::Exhausted(_))), "{cidr}");
    }
    assert_eq!(take(&mut Ipam::default(), 0), Err(IpamError::NoPodCidr));
}

#[test]
fn another_version_or_a_doubled_address_is_refused() {
    let file = br#"{"version":3,"boot":"b","last":null,"records":[],"new":1}"#;
    assert!(matches!(Ipam::decode(file), Err(DecodeError::Version(3))));
    let entry = r#"{"containerId":"ID","ifname":"eth0","ip":"10.0.0.2","namespace":"","name":"n","netns":""}"#;
    let file = format!(
        r#"{{"version":1,"boot":"b","last":null,"records":[{},{}]}}"#,
        entry.replace("ID", "a"),
        entry.replace("ID", "b")
    );
    assert!(matches!(Ipam::decode(file.as_bytes()), Err(DecodeError::Twice(_))));
}

#[test]
fn a_file_of_the_first_version_is_taken_over() {
    let file = br#"{"version":1,"boot":"b","last":"10.244.1.7","records":[
        {"containerId":"c0","ifname":"eth0","ip":"10.244.1.5","namespace":"default","name":"p","netns":"/n"}]}"#;
    let (mut ipam, boot) = Ipam::decode(file).unwrap();
    assert_eq!(boot, "b");
    ipam.set_network(Some(network(&["10.244.1.0/24", "fd00:1::/64"])));
    assert_eq!(take(&mut ipam, 0).unwrap(), ips(&["10.244.1.5"]));
    assert_eq!(take(&mut ipam, 1).unwrap(), ips(&["10.244.1.8", "fd00:1::2"]));
    let record = ipam.record(&Attachment::new("c0", "eth0")).unwrap();
    assert_eq!((&*record.network, record.mtu), ("orlop", 1450));
}

proptest! {
    #[test]
    fn whatever_happens_no_address_is_given_twice_and_the_file_restores_all(
        steps in prop::collection::vec((any::<bool>(), 0_u8..24), 0..80)
    ) {
        let mut ipam = ipam(&["10.244.7.0/28", "fd00:7::/124"]);
        let mut model: BTreeMap<u8, Vec<IpAddr>> = BTreeMap::new();
        for (add, id) in steps {
            if add {
                match take(&mut ipam, id) {
                    Ok(ips) => {
                        let clash = |used: &Vec<IpAddr>| used.iter().any(|ip| ips.contains(ip));
                        prop_assert!(model.iter().all(|(other, used)| *other == id || !clash(used)));
                        prop_assert!((2..15).contains(&last_byte(&ips)));
                        prop_assert!(ips.len() == 2 && ips[1].is_ipv6());
                        model.insert(id, ips);
                    }
                    Err(_) => prop_assert_eq!(model.len(), 13),
                }
            } else {
                let attachment = Attachment::new(&format!("c{id}"), "eth0");
                let released = ipam.release(&attachment).map(|record| record.ips);
                prop_assert_eq!(released, model.remove(&id));
            }
        }
        let taken: BTreeSet<IpAddr> = model.values().flatten().copied().collect();
        prop_assert_eq!(&taken, &ipam.taken, "nothing leaks");
        let (mut back, boot) = Ipam::decode(&ipam.encode("boot-1")).unwrap();
        back.set_network(ipam.network().cloned());
        prop_assert_eq!(boot, "boot-1");
        prop_assert_eq!(back, ipam);
    }
}
