//! The places of tc programs, and how packets reach them there.
//!
//! Pure.

use aya::programs::TcAttachType;

use crate::sys::bpf::AttachType;

/// A place for a tc program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TcHook {
    /// Host end of a pod's veth pair, ingress.
    FromPod,
    /// Host end of a pod's veth pair, egress: what the stack sends to the pod.
    ToPod,
    /// VXLAN device, ingress.
    FromOverlay,
    /// VXLAN device, egress.
    ToOverlay,
    /// The node's network devices, ingress.
    FromUnderlay,
    /// The node's network devices, egress.
    ToUnderlay,
    /// Peer of the host device, ingress: the node's own packets to services.
    FromHost,
}

impl TcHook {
    /// All places, in the order in which they are loaded.
    pub const ALL: [Self; 7] = [
        Self::FromPod,
        Self::ToPod,
        Self::FromOverlay,
        Self::ToOverlay,
        Self::FromUnderlay,
        Self::ToUnderlay,
        Self::FromHost,
    ];

    /// The program's name in the object.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::FromPod => "tc_from_pod",
            Self::ToPod => "tc_to_pod",
            Self::FromOverlay => "tc_from_overlay",
            Self::ToOverlay => "tc_to_overlay",
            Self::FromUnderlay => "tc_from_underlay",
            Self::ToUnderlay => "tc_to_underlay",
            Self::FromHost => "tc_from_host",
        }
    }

    pub(super) const fn tcx(self) -> AttachType {
        match self {
            Self::FromPod | Self::FromOverlay | Self::FromUnderlay | Self::FromHost => {
                AttachType::TcxIngress
            }
            Self::ToPod | Self::ToOverlay | Self::ToUnderlay => AttachType::TcxEgress,
        }
    }

    pub(super) const fn direction(self) -> TcAttachType {
        match self {
            Self::FromPod | Self::FromOverlay | Self::FromUnderlay | Self::FromHost => {
                TcAttachType::Ingress
            }
            Self::ToPod | Self::ToOverlay | Self::ToUnderlay => TcAttachType::Egress,
        }
    }
}

/// How packets reach our tc programs on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcPath {
    /// tcx links (6.6 and newer).
    Tcx,
    /// clsact filters over netlink.
    Clsact,
}
