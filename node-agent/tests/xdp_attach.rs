//! Where the XDP program attaches, on the running kernel: whose it replaces, whose it leaves alone.

#[cfg(test)]
#[path = "support/place.rs"]
mod place;

#[cfg(test)]
mod tests {
    use std::{
        os::fd::AsFd as _,
        path::PathBuf,
        thread,
        time::{Duration, Instant},
    };

    use aya::{EbpfLoader, programs::Xdp as XdpProgram};
    use node_agent::{
        dataplane::{
            XdpMode,
            load::Programs,
            object,
            xdp::{Why, Xdp, XdpPath},
        },
        sys::{
            bpf,
            ethtool::{self, Offload},
            netdev,
            netlink::Netlink,
        },
    };

    use super::place::{ip, is_possible, own_namespaces};

    /// Runs a test in namespaces of its own with a veth pair `e0`, `e1` and a BPF file system.
    fn with_device(test: impl Fn(PathBuf, u32) + Send + Sync) {
        if !is_possible() {
            return;
        }
        let run = || {
            let bpf = own_namespaces();
            ip("link add e0 type veth peer name e1
                link set e0 up
                link set e1 up");
            // Else the kernel says, rightly, that `e0` takes no frames: nobody would take them in behind it.
            ethtool::set_offload("e1", Offload::Gro, true).unwrap();
            test(bpf, nix::net::if_::if_nametoindex("e0").unwrap());
        };
        if let Err(panic) = thread::scope(|scope| scope.spawn(run).join()) {
            std::panic::resume_unwind(panic);
        }
    }

    fn path(xdp: &Xdp) -> XdpPath {
        xdp.paths()["e0"].clone()
    }

    /// Number of the XDP program on the device.
    fn program(ifindex: u32) -> Option<u32> {
        let mut netlink = Netlink::open().unwrap();
        node_agent::sys::xdp::device(&mut netlink, ifindex).unwrap().program
    }

    #[test]
    fn a_new_agent_swaps_the_program_in_place_and_takes_it_off_when_told() {
        with_device(|bpf, ifindex| {
            let mut netlink = Netlink::open().unwrap();
            let (mut programs, _maps) = Programs::load(Some(&bpf)).unwrap();
            let mut xdp = Xdp::new(&mut programs, XdpMode::Native);
            assert!(xdp.attach(&mut netlink, ifindex, "e0"));
            assert_eq!(path(&xdp), XdpPath::Native);
            let first = program(ifindex).unwrap();
            drop((xdp, programs));
            assert_eq!(program(ifindex), Some(first), "it outlives the agent");
            let (mut programs, _maps) = Programs::load(Some(&bpf)).unwrap();
            let mut xdp = Xdp::new(&mut programs, XdpMode::Native);
            assert!(xdp.attach(&mut netlink, ifindex, "e0"));
            let second = program(ifindex).unwrap();
            assert_ne!(first, second);
            let mut off = Xdp::new(&mut programs, XdpMode::Off);
            assert!(!off.attach(&mut netlink, ifindex, "e0"));
            assert_eq!(path(&off), XdpPath::Tc(Why::Off));
            // The kernel frees a link a little after its last pin.
            let end = Instant::now() + Duration::from_secs(5);
            while program(ifindex).is_some() && Instant::now() < end {
                thread::yield_now();
            }
            assert_eq!(program(ifindex), None);
        });
    }

    #[test]
    fn a_veth_is_left_to_tc_unless_asked_for_and_generic_is_never_taken_instead() {
        with_device(|_bpf, ifindex| {
            let mut netlink = Netlink::open().unwrap();
            let (mut programs, _maps) = Programs::load(None).unwrap();
            let mut xdp = Xdp::new(&mut programs, XdpMode::Auto);
            assert!(!xdp.attach(&mut netlink, ifindex, "e0"));
            assert_eq!((path(&xdp), program(ifindex)), (XdpPath::Tc(Why::Checksums), None));
            // Devices of a bridge have no driver of their own.
            ip("link add br0 type bridge");
            let bridge = nix::net::if_::if_nametoindex("br0").unwrap();
            assert!(!xdp.attach(&mut netlink, bridge, "br0"));
            assert_eq!(xdp.paths()["br0"], XdpPath::Tc(Why::NoDriver));
            let mut generic = Xdp::new(&mut programs, XdpMode::Generic);
            assert!(!generic.attach(&mut netlink, bridge, "br0"), "no driver to take frames");
            assert_eq!(generic.paths()["br0"], XdpPath::Generic);
            drop(generic);
            assert_eq!(program(bridge), None, "nothing pinned, nothing left");
        });
    }

    #[test]
    fn anothers_program_is_left_alone_and_named() {
        with_device(|bpf, ifindex| {
            let mut netlink = Netlink::open().unwrap();
            let mut other = EbpfLoader::new().load(object()).unwrap();
            let theirs: &mut XdpProgram =
                other.program_mut("xdp_entry").unwrap().try_into().unwrap();
            theirs.load().unwrap();
            let link = theirs.attach("e0", aya::programs::xdp::XdpMode::Driver).unwrap();
            let before = program(ifindex);
            let (mut programs, _maps) = Programs::load(Some(&bpf)).unwrap();
            let mut xdp = Xdp::new(&mut programs, XdpMode::Native);
            assert!(!xdp.attach(&mut netlink, ifindex, "e0"));
            assert_eq!(path(&xdp), XdpPath::Tc(Why::Foreign("xdp_entry".to_owned())));
            assert_eq!(program(ifindex), before);
            // When it goes, the next look finds the device free.
            let theirs: &mut XdpProgram =
                other.program_mut("xdp_entry").unwrap().try_into().unwrap();
            theirs.detach(link).unwrap();
            assert!(xdp.attach(&mut netlink, ifindex, "e0"));
            assert_eq!(path(&xdp), XdpPath::Native);
        });
    }

    #[test]
    fn a_driver_that_takes_no_frames_is_told_apart_until_it_does() {
        with_device(|_bpf, ifindex| {
            if netdev::takes_frames(ifindex).unwrap().is_none() {
                // Before 6.3 the driver's name decides.
                return;
            }
            ethtool::set_offload("e1", Offload::Gro, false).unwrap();
            let mut netlink = Netlink::open().unwrap();
            let (mut programs, _maps) = Programs::load(None).unwrap();
            let mut xdp = Xdp::new(&mut programs, XdpMode::Native);
            for _ in 0..2 {
                assert!(!xdp.attach(&mut netlink, ifindex, "e0"));
                assert_eq!(path(&xdp), XdpPath::NativeAlone);
            }
            ethtool::set_offload("e1", Offload::Gro, true).unwrap();
            assert!(xdp.attach(&mut netlink, ifindex, "e0"));
            assert_eq!(path(&xdp), XdpPath::Native);
        });
    }

    #[test]
    fn a_driver_that_refuses_is_named_with_what_may_be_its_reason() {
        with_device(|_bpf, ifindex| {
            let mut netlink = Netlink::open().unwrap();
            let (mut programs, _maps) = Programs::load(None).unwrap();
            // A veth has XDP only where it takes in by as many queues as its other end sends by.
            ip("link add q0 numtxqueues 1 numrxqueues 1 type veth peer name q1 numtxqueues 4 numrxqueues 4
                link set q0 up
                link set q1 up");
            let queues = nix::net::if_::if_nametoindex("q0").unwrap();
            let mut xdp = Xdp::new(&mut programs, XdpMode::Native);
            assert!(!xdp.attach(&mut netlink, queues, "q0"));
            let words = xdp.paths()["q0"].to_string();
            assert!(words.starts_with("tc, as its driver refuses XDP: "), "{words}");
            assert!(words.contains("driver veth, MTU 1500"), "{words}");
            // The others are none the worse for it.
            assert!(xdp.attach(&mut netlink, ifindex, "e0"));
        });
    }

    #[test]
    fn a_link_that_somebody_detached_is_made_anew_once_it_is_doubted() {
        for is_pinned in [true, false] {
            with_device(|bpf, ifindex| {
                let mut netlink = Netlink::open().unwrap();
                let (mut programs, _maps) =
                    Programs::load(is_pinned.then_some(bpf.as_path())).unwrap();
                let mut xdp = Xdp::new(&mut programs, XdpMode::Native);
                assert!(xdp.attach(&mut netlink, ifindex, "e0"));
                let first = program(ifindex).unwrap();
                xdp.doubt();
                assert!(xdp.attach(&mut netlink, ifindex, "e0"), "{}", path(&xdp));
                assert_eq!(program(ifindex), Some(first), "what runs is left alone");
                if is_pinned {
                    let links = bpf.join(format!("v{}/links", ebpf_common::ABI_VERSION));
                    let pin = links.join(format!("xdp_entry_native_{ifindex}"));
                    bpf::link_detach(bpf::open_pin(&pin).unwrap().as_fd()).unwrap();
                    assert_eq!(program(ifindex), None);
                    xdp.doubt();
                    assert!(xdp.attach(&mut netlink, ifindex, "e0"));
                    assert_eq!(program(ifindex), Some(first));
                }
            });
        }
    }

    #[test]
    fn a_device_that_is_gone_is_forgotten() {
        with_device(|bpf, ifindex| {
            let mut netlink = Netlink::open().unwrap();
            let (mut programs, _maps) = Programs::load(Some(&bpf)).unwrap();
            let mut xdp = Xdp::new(&mut programs, XdpMode::Native);
            assert!(xdp.attach(&mut netlink, ifindex, "e0"));
            let pins = || {
                let folder = bpf.join(format!("v{}/links", ebpf_common::ABI_VERSION));
                std::fs::read_dir(folder).unwrap().count()
            };
            assert_eq!(pins(), 1);
            ip("link delete e0");
            xdp.keep(|_ifindex| false);
            assert_eq!((pins(), xdp.paths().len()), (0, 0));
        });
    }
}
