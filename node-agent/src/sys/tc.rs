//! tc filters over netlink, for kernels without tcx (before 6.6).
//!
//! Effects only. A filter cannot be pinned: it is put at a fixed priority and handle, replaced in
//! place by the next agent, and kept when this one goes.

use std::io;

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    tc::{
        self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
    },
};
use nix::net::if_::if_indextoname;

/// Priority of our filters: low enough to run before most, leaving room in front.
pub const PRIORITY: u16 = 10;
/// Handle of our filters at that priority; "or" as bytes.
pub const HANDLE: u16 = 0x6f72;

/// Puts `program` on a device, or in the place of the one that an earlier agent put there.
///
/// # Errors
///
/// What the kernel or aya says; `ENODEV` when the device is gone.
pub fn attach(
    program: &mut SchedClassifier,
    ifindex: u32,
    direction: TcAttachType,
) -> io::Result<()> {
    let name = interface_name(ifindex)?;
    match qdisc_add_clsact(&name) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        // Another's clsact is as good as ours.
        Err(TcError::NetlinkError(_)) if has_clsact(&name, direction) => {}
        Err(error) => return Err(io::Error::other(error)),
    }
    let handle = TcHandle::new(0, HANDLE);
    let options = NlOptions { priority: PRIORITY, handle, classid: None };
    let made = program.attach_with_options(&name, direction, TcAttachOptions::Netlink(options));
    let id = match made {
        Ok(id) => id,
        // Taken by an earlier agent: replaced in place.
        Err(_) => {
            let old = SchedClassifierLink::attached(&name, direction, PRIORITY, handle, None)?;
            program.attach_to_link(old).map_err(other)?
        }
    };
    keep(program.take_link(id).map_err(other)?);
    Ok(())
}

/// Takes our filter off a device. Used by tests and by an agent that is told to leave.
///
/// # Errors
///
/// What the kernel or aya says.
pub fn detach(ifindex: u32, direction: TcAttachType, name: &str) -> io::Result<()> {
    tc::qdisc_detach_program(&interface_name(ifindex)?, direction, name).map_err(io::Error::other)
}

fn has_clsact(name: &str, direction: TcAttachType) -> bool {
    // Looking for a filter by name fails with "not found" only where the qdisc exists.
    match tc::qdisc_detach_program(name, direction, "orlop-no-such-filter") {
        Err(TcError::IoError(error)) => error.kind() == io::ErrorKind::NotFound,
        Ok(())
        | Err(
            TcError::NetlinkError(_)
            | TcError::NulError(_)
            | TcError::AlreadyAttached
            | TcError::InvalidTcxAttach(_)
            | TcError::InvalidLinkOperation,
        ) => false,
    }
}

#[expect(clippy::mem_forget, reason = "aya's drop would take the filter off; it must outlive us")]
fn keep(link: SchedClassifierLink) {
    std::mem::forget(link);
}

/// The name of an interface.
///
/// # Errors
///
/// `ENODEV` or `ENXIO` when there is none with this index.
pub fn interface_name(ifindex: u32) -> io::Result<String> {
    let name = if_indextoname(ifindex)?;
    name.into_string().map_err(io::Error::other)
}

fn other(error: ProgramError) -> io::Error {
    io::Error::other(error)
}
