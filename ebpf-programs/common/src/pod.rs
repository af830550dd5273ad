//! The map types cross the kernel's border as plain bytes: the crate's only unsafe.
#![expect(unsafe_code, reason = "aya's marker trait for map types is unsafe to implement")]

use aya::Pod;

use crate::{
    config::Config,
    conntrack::{Flow, FlowKey},
    endpoint::Endpoint,
    service::{Backend, BackendKey, Service, ServiceKey},
    tunnel::Tunnel,
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

pod!(Config, Flow, FlowKey, Endpoint, Backend, BackendKey, Service, ServiceKey, Tunnel);
