//! The map types cross the kernel's border as plain bytes: the crate's only unsafe.
#![expect(unsafe_code, reason = "aya's marker trait for map types is unsafe to implement")]

use aya::Pod;

use crate::{
    addr::Addr,
    affinity::{Affinity, AffinityKey, MemberKey},
    config::Config,
    conntrack::{Flow, FlowKey},
    device::Device,
    endpoint::Endpoint,
    fragment::{Fragment, FragmentKey},
    maglev::{MaglevBlock, MaglevKey},
    netns::Netns,
    service::{Backend, BackendKey, Service, ServiceKey, SourceRange},
    tunnel::Tunnel,
    verdict::Budget,
};

macro_rules! pod {
    ($($name:ty),*) => {
        $(
            // SAFETY: repr(C), integers and byte arrays only, no implicit padding (the size is
            // asserted beside the type), so every byte is initialised and any bytes are a value.
            unsafe impl Pod for $name {}
        )*
    };
}

pod!(Addr, Affinity, AffinityKey, MemberKey, Config, Flow, FlowKey, Device, Endpoint, Fragment);
pod!(FragmentKey, MaglevBlock, MaglevKey, Netns, Backend, BackendKey, Service, ServiceKey);
pod!(SourceRange, Tunnel, Budget);
