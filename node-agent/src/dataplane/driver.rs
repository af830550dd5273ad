//! What a device's driver can do with XDP, and what its refusals mean.
//!
//! Pure, but for [`Driver::of`].

use std::io;

use super::xdp::Why;
use crate::sys::{
    ethtool::{self, Offload},
    xdp,
};

/// What there is to know of a device's driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Driver {
    pub(super) name: String,
    pub(super) mtu: u32,
    /// The device merges packets that come in, which XDP does not go with.
    pub(super) merges: bool,
}

/// Drivers without a queue between sender and receiver, whose senders leave checksums to nobody.
pub(super) const UNFINISHED: [&str; 3] = ["veth", "tun", "vif"];

/// Drivers that have XDP and take frames of other devices, for kernels that do not tell (before 6.3); those with
/// `ndo_xdp_xmit` in Linux 6.1.
const TAKE_FRAMES: [&str; 14] = [
    "bnxt_en",
    "ena",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "mlx5_core",
    "mvneta",
    "mvpp2",
    "sfc",
    "st_gmac",
    "veth",
    "virtio_net",
];

/// A packet of this length lies in one page beside the room that XDP asks for (igb takes
/// up to 3,046 bytes, veth 3,520).
const USUAL_MTU_MAX: u32 = 3_000;

impl Driver {
    pub(super) fn of(device: &xdp::Device) -> Self {
        let ask = |name: &str| ethtool::driver(name).unwrap_or_default();
        Self {
            name: ask(&device.name),
            mtu: device.mtu,
            merges: ethtool::offload(&device.name, Offload::Lro).unwrap_or(false),
        }
    }

    pub(super) fn takes_frames(&self, kernel_says: Option<bool>) -> bool {
        kernel_says.unwrap_or_else(|| self.has_xdp())
    }

    /// Whether it is known to have XDP.
    fn has_xdp(&self) -> bool {
        TAKE_FRAMES.contains(&self.name.as_str())
    }

    /// What may be the reason for a refusal, beside the kernel's word, which names none.
    fn hints(&self) -> String {
        let name = if self.name.is_empty() { "unknown" } else { &self.name };
        let mut hints = format!("driver {name}, MTU {}", self.mtu);
        if self.mtu > USUAL_MTU_MAX {
            hints.push_str(" (drivers have XDP up to about 3,000 to 3,500)");
        }
        if self.merges {
            hints.push_str(", large receive offload is on");
        } else if self.name == "virtio_net" {
            // `virtnet_xdp_set`: offloads that the host has not let the driver switch (CTRL_GUEST_OFFLOADS).
            hints.push_str(
                " (it has no XDP while its host merges packets or leaves checksums to it)",
            );
        }
        hints
    }
}

/// What a failure to attach says; `program` is the name of the one that runs there.
pub(super) fn why(error: &io::Error, program: Option<String>, driver: &Driver) -> Why {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => {
            Why::Foreign(program.unwrap_or_else(|| "of another name space".to_owned()))
        }
        // Drivers say the same to settings that XDP does not go with.
        Some(libc::EOPNOTSUPP)
            if !driver.has_xdp() && !driver.merges && driver.mtu <= USUAL_MTU_MAX =>
        {
            Why::NoDriver
        }
        _ => Why::Refused(format!("{error}; {}", driver.hints())),
    }
}
