//! Where XDP is attached: the decisions, by values.

use super::*;

#[test]
fn a_veth_gets_xdp_only_when_asked_for() {
    assert_eq!(wanted(XdpMode::Auto, false), Ok(Place::Native));
    assert_eq!(wanted(XdpMode::Auto, true), Err(Why::Checksums));
    assert_eq!(wanted(XdpMode::Native, true), Ok(Place::Native));
    assert_eq!(wanted(XdpMode::Generic, true), Ok(Place::Generic));
    assert_eq!(wanted(XdpMode::Off, false), Err(Why::Off));
}

#[test]
fn who_takes_frames_is_the_kernels_word_and_else_the_drivers_name() {
    let driver = |name: &str| Driver { name: name.to_owned(), ..Driver::default() };
    assert!(driver("virtio_net").takes_frames(None));
    assert!(!driver("gve").takes_frames(None));
    assert!(driver("gve").takes_frames(Some(true)));
    assert!(!driver("virtio_net").takes_frames(Some(false)));
}

#[test]
fn the_line_names_device_path_and_reason() {
    let error = io::Error::from_raw_os_error;
    let plain = Driver { name: "e1000".to_owned(), mtu: 1_500, merges: false };
    let jumbo = Driver { name: "virtio_net".to_owned(), mtu: 9_000, merges: false };
    let host = Driver { mtu: 1_500, ..jumbo.clone() };
    let merging = Driver { name: "ixgbe".to_owned(), mtu: 1_500, merges: true };
    let filter = Some("xdp_filter".to_owned());
    let paths = BTreeMap::from([
        ("eth0".to_owned(), XdpPath::Native),
        ("eth1".to_owned(), XdpPath::Tc(why(&error(libc::EBUSY), filter, &plain))),
        ("eth2".to_owned(), XdpPath::Tc(why(&error(libc::EOPNOTSUPP), None, &plain))),
        ("eth3".to_owned(), XdpPath::Tc(why(&error(libc::EINVAL), None, &jumbo))),
        ("eth4".to_owned(), XdpPath::Tc(why(&error(libc::EOPNOTSUPP), None, &merging))),
        ("eth5".to_owned(), XdpPath::NativeAlone),
        ("eth7".to_owned(), XdpPath::Generic),
        ("eth6".to_owned(), XdpPath::Tc(why(&error(libc::EOPNOTSUPP), None, &host))),
    ]);
    let line = words(&paths);
    for part in [
        "eth0: XDP in the driver; ",
        "eth1: tc, as XDP program xdp_filter is there, which is not ours; ",
        "eth2: tc, as its driver has no XDP; ",
        "eth3: tc, as its driver refuses XDP: Invalid argument (os error 22); driver virtio_net, \
         MTU 9000 (drivers have XDP up to about 3,000 to 3,500)",
        "eth4: tc, as its driver refuses XDP: ",
        "driver ixgbe, MTU 1500, large receive offload is on; ",
        "eth5: XDP in the driver, but tc for what comes by other devices",
        "eth7: XDP in the stack (generic), but tc for pods here and for unfinished checksums",
        "driver virtio_net, MTU 1500 (it has no XDP while its host merges packets",
    ] {
        assert!(line.contains(part), "{part} not in {line}");
    }
    assert_eq!(words(&BTreeMap::new()), "no device yet");
}
