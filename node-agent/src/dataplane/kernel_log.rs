//! The programs' own lines of text, in debug builds with the feature `kernel-log`: from their ring into this
//! process's log, under the target `ebpf` (`RUST_LOG=info,ebpf=trace`).
//!
//! Task: the reader of the ring; it ends with the dataplane.

use std::{io, os::fd::AsFd as _};

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::task::JoinSet;
use tracing::{Level, level_filters::LevelFilter};

use super::load::LoadError;
use crate::sys::exec;

#[cfg(not(debug_assertions))]
compile_error!(
    "the feature kernel-log is for debug builds: each new connection pays for its lines"
);

/// The programs' ring of lines.
pub(super) const RING: &str = "AYA_LOGS";

/// The most detailed level of which the programs write lines, as `aya_log::Level` numbers them; 0 is none.
pub(super) fn level() -> u8 {
    match LevelFilter::current().into_level() {
        None => 0,
        Some(Level::ERROR) => 1,
        Some(Level::WARN) => 2,
        Some(Level::INFO) => 3,
        Some(Level::DEBUG) => 4,
        Some(_) => 5,
    }
}

/// Takes the ring of the loaded programs and starts to read it.
///
/// # Errors
///
/// [`LoadError::NoMap`] when the object has none or it is taken.
pub(super) fn start(object: &mut Ebpf, tasks: &mut JoinSet<()>) -> Result<(), LoadError> {
    let mut logger = EbpfLogger::init(object).map_err(|_none| LoadError::NoMap { name: RING })?;
    tasks.spawn(async move {
        let read = async {
            let alarm = exec::watch(logger.as_fd().try_clone_to_owned()?)?;
            loop {
                let mut ready = alarm.readable().await?;
                ready.clear_ready();
                logger.flush();
            }
        };
        let ended: io::Result<()> = read.await;
        tracing::warn!(?ended, "lines of the kernel programs are not read any more");
    });
    Ok(())
}
