//! Pins of other versions of the kernel ABI: what an agent before an upgrade left, or before a way back.
//!
//! Effects, but for [`is_version`]. Programs of another version run in front of ours, over maps that nobody
//! writes any more. They serve the node until ours can, and then have to go.

use std::{
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::Duration,
};

use super::apply::Runner;
use crate::{chain::chain, sys::bpf};

/// The part of a round that this is.
const VERSIONS: &str = "other versions";
/// How long another version's programs serve while something of ours is in trouble: one device that refuses, say. After
/// it what nobody follows any more is worse than what is missing.
const PATIENCE: Duration = Duration::from_secs(300);

impl Runner {
    /// Ends what agents of other versions left, as soon as everything that is known to be wanted is programmed and
    /// attached.
    pub(super) fn remove_other_versions(&mut self) {
        let is_short = self.services.is_only_short();
        let is_fine = |part: &&str| *part == VERSIONS || *part == "services" && is_short;
        let is_late = self.began.elapsed() > PATIENCE;
        let is_served = (is_late || self.trouble.keys().all(is_fine)) && self.knows_all();
        if let Some(pins) = &self.programs.pins
            && is_served
            && !self.is_alone
        {
            let outcome = remove_others(pins);
            self.is_alone = outcome.is_ok();
            self.note(VERSIONS, outcome.map_err(|error| chain(&error)));
        }
    }

    /// Whether settings are to wait until services are written: with them, addresses of services that are not known yet
    /// are refused, which another version's programs still translate.
    pub(super) fn waits_for_services(&self) -> bool {
        let has_others =
            || self.programs.pins.as_deref().is_some_and(|pins| !others(pins).is_empty());
        !self.is_alone && !self.services.is_known() && has_others()
    }

    /// Whether all sources have said what there is, and devices were looked at.
    fn knows_all(&self) -> bool {
        let tables = &self.tables;
        let pods = tables.endpoints.is_synced() || !self.config.waits_for_pods;
        // Who sends by a closed channel says nothing any more.
        let overlay = match tables.overlay.has_changed() {
            Ok(_) => tables.overlay.borrow().is_some() && tables.tunnels.is_synced(),
            Err(_) => true,
        };
        let services = tables.services.is_synced() && tables.slices.is_synced();
        services && pods && overlay && !self.attached.addresses.is_empty()
    }
}

/// Detaches the programs of all versions but the one that is pinned in `own`, and removes their pins, with which
/// their maps and the flows in them end.
///
/// # Errors
///
/// The first that the kernel or the file system says; all versions are tried.
fn remove_others(own: &Path) -> io::Result<()> {
    let mut outcome = Ok(());
    for path in others(own) {
        match remove(&path) {
            Ok(()) => tracing::info!(pins = %path.display(), "programs of another version removed"),
            Err(error) => outcome = outcome.and(Err(error)),
        }
    }
    outcome
}

/// The folders of other versions beside this one's. One that cannot be read is looked for in the next round.
fn others(own: &Path) -> Vec<PathBuf> {
    let entries = own.parent().and_then(|root| fs::read_dir(root).ok()).into_iter().flatten();
    let paths = entries.flatten().map(|entry| entry.path());
    let is_other = |path: &PathBuf| {
        path != own && path.file_name().is_some_and(|name| name.to_str().is_some_and(is_version))
    };
    paths.filter(is_other).collect()
}

/// Links first: who dies in between leaves maps without programs, and not programs whose maps may be made anew.
fn remove(folder: &Path) -> io::Result<()> {
    let links = folder.join("links");
    match fs::read_dir(&links) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        entries => {
            for entry in entries? {
                let pin = entry?.path();
                // An agent of that version that still runs may hold the link: its pin alone does not keep it.
                if let Err(error) =
                    bpf::open_pin(&pin).and_then(|link| bpf::link_detach(link.as_fd()))
                {
                    tracing::warn!(pin = %pin.display(), %error, "cannot detach a link");
                }
                fs::remove_file(&pin)?;
            }
        }
    }
    fs::remove_dir_all(folder)
}

fn is_version(name: &str) -> bool {
    name.strip_prefix('v').is_some_and(|number| {
        !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_agent_calls_so_is_a_version() {
        assert!(is_version("v2") && is_version("v10"));
        for other in ["v", "2", "v2b", "vault", "v-1", ""] {
            assert!(!is_version(other), "{other}");
        }
    }
}
