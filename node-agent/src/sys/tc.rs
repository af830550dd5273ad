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
    let no_qdisc = match qdisc_add_clsact(&name) {
        Ok(()) | Err(TcError::AlreadyAttached) => None,
        // It may be there already, ours or another's. If it is not, this error is the reason for
        // the next one: without the module sch_ingress for one.
        Err(error) => Some(error),
    };
    let handle = TcHandle::new(0, HANDLE);
    let options = NlOptions { priority: PRIORITY, handle, classid: None };
    let made = program.attach_with_options(&name, direction, TcAttachOptions::Netlink(options));
    let made = made.or_else(|_taken| {
        // Taken by an earlier agent: replaced in place.
        let old = SchedClassifierLink::attached(&name, direction, PRIORITY, handle, None)
            .map_err(TcError::IoError)?;
        program.attach_to_link(old)
    });
    match (made, no_qdisc) {
        (Ok(id), _) => {
            keep(program.take_link(id).map_err(other)?);
            Ok(())
        }
        (Err(_), Some(error)) => Err(io::Error::other(error)),
        (Err(error), None) => Err(other(error)),
    }
}

/// Takes our filter off a device, by the name of its program. Without one, and without the device, nothing is to
/// be done.
///
/// # Errors
///
/// What the kernel or aya says.
pub fn detach(ifindex: u32, direction: TcAttachType, name: &str) -> io::Result<()> {
    let device = match interface_name(ifindex) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
            return Ok(());
        }
        device => device?,
    };
    match tc::qdisc_detach_program(&device, direction, name) {
        Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(io::Error::other),
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
