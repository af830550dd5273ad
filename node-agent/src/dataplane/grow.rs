//! Larger maps in the place of full ones, while packets pass.
//!
//! Effects; what is next is decided in `size.rs`. The pins are the truth: each step makes the new map
//! whole, renames its pin over the former one's (atomic in a BPF file system), loads the programs anew
//! over what is pinned then and swaps them inside the links. Every state of the pins is one that
//! programs of the state before it may run beside, so that whoever dies between any two steps leaves
//! a node that works, and the next start goes on from there.
//!
//! Maps that only the agent writes are copied. The connection table is written by packets: the large
//! one is first put where programs only look (`CONNTRACK_OLD`), and when all look there, both change
//! places. Then rows move in the background, and at last the empty one makes way for one of one row.

use std::{
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::Pod;
use ebpf_common::{
    conntrack::{Flow, FlowKey},
    maps as names,
};

use super::{
    load::{CGROUP_HOOKS, LoadError, MAPS, Programs, TcHook},
    maps::Maps,
    size::Step,
};
use crate::sys::{
    bpf,
    map::{RowMap, Walk},
};

/// The pin of a map that is about to replace another; dots are not allowed there.
fn successor(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}_new"))
}

/// Removes what somebody left who died before the new map had its place.
pub(super) fn clean(folder: &Path) -> io::Result<()> {
    for name in MAPS {
        match fs::remove_file(successor(folder, name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Puts a map into the place of the one that is pinned under a name.
fn replace<K, V>(folder: &Path, name: &str, map: &RowMap<K, V>) -> io::Result<()> {
    let new = successor(folder, name);
    bpf::pin(map.as_fd(), &new)?;
    fs::rename(new, folder.join(name))
}

/// Makes a larger copy of a map that only the agent writes, and pins it in that one's place. The caller
/// writes nothing until the programs know it.
///
/// # Errors
///
/// What the kernel says; nothing has changed then.
pub fn enlarge<K: Pod, V: Pod>(
    folder: &Path,
    (name, rows): (&str, u32),
    from: &RowMap<K, V>,
) -> io::Result<()> {
    let map = RowMap::create_named(name, rows)?;
    let mut walk = Walk::new();
    while !walk.is_over() {
        if let Some((_, error)) = map.update(&from.next(&mut walk)?).into_iter().next() {
            return Err(error);
        }
    }
    replace(folder, name, &map)
}

/// Changes the pins of the connection tables for a step; the programs are to be loaded anew after it.
///
/// # Errors
///
/// What the kernel says; nothing has changed then.
pub fn change_pins(folder: &Path, step: Step) -> io::Result<()> {
    let put = |rows| {
        let map = RowMap::<FlowKey, Flow>::create_named(names::CONNTRACK_OLD, rows)?;
        replace(folder, names::CONNTRACK_OLD, &map)
    };
    match step {
        Step::Offer { rows } => put(rows),
        Step::Exchange => {
            let [one, other] = [names::CONNTRACK, names::CONNTRACK_OLD].map(|one| folder.join(one));
            let (here, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::EXCHANGE);
            Ok(rustix::fs::renameat_with(here, one, here, other, flags)?)
        }
        Step::Retire => put(1),
        Step::Move => Ok(()),
    }
}

/// Moves the next rows of a walk: each is in one of the tables at any time, and what packets note on the
/// old row while it is copied is noted on the new one too. Returns how many rows were there.
///
/// # Errors
///
/// What the kernel says; `E2BIG` when the new table is full.
pub fn move_rows(
    from: &RowMap<FlowKey, Flow>,
    to: &RowMap<FlowKey, Flow>,
    walk: &mut Walk,
) -> io::Result<usize> {
    let rows = from.next(walk)?;
    let mut done = Vec::with_capacity(rows.len());
    let mut outcome = Ok(());
    for (key, flow) in &rows {
        match to.insert(key, flow) {
            // A row that is there is a flow that was opened anew.
            Ok(_inserted) => done.push(*key),
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    // From now on packets find the new rows. What they noted on the old ones before that:
    for (key, copied) in rows.iter().take(done.len()) {
        if let Some(last) = from.row(key)?
            && let Some(now) = to.row(key)?
            && last.seen & !copied.seen & !now.seen != 0
        {
            to.update(&[(*key, Flow { seen: now.seen | last.seen, ..now })]);
        }
    }
    let failed = from.delete(&done).into_iter().next();
    outcome?;
    failed.map_or(Ok(rows.len()), |(_, error)| Err(error))
}

impl Programs {
    /// Loads the programs anew over the maps that are pinned now. Those that run are still the former
    /// ones: see [`Self::swap`].
    ///
    /// # Errors
    ///
    /// [`LoadError`]; nothing has changed then.
    pub fn load_anew(&mut self) -> Result<Maps, LoadError> {
        let (mut object, missing) = Self::load_object(self.pins.as_deref(), &self.sizes)?;
        let maps = Maps::take(&mut object)?;
        (self.object, self.missing) = (object, missing);
        Ok(maps)
    }

    /// Puts the loaded programs into every pinned link and every filter of ours, in the place of those
    /// that run there. Links whose device or cgroup is gone are forgotten.
    ///
    /// # Errors
    ///
    /// [`LoadError::Attach`] for the first that could not be swapped; all others are.
    pub fn swap(&mut self) -> Result<(), LoadError> {
        let mut outcome = Ok(());
        for (hook, ifindex) in self.filters.clone() {
            match self.filter(hook, ifindex) {
                Err(source) if !is_gone(&source) => {
                    let target = format!("device {ifindex}");
                    outcome = outcome.and(Err(LoadError::Attach {
                        name: hook.program(),
                        target,
                        source,
                    }));
                }
                Ok(()) | Err(_) => {}
            }
        }
        let Some(links) = self.pins.as_ref().map(|folder| folder.join("links")) else {
            return outcome;
        };
        let failed = |source| LoadError::Folder { path: links.clone(), source };
        for entry in fs::read_dir(&links).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Some(name) = entry.file_name().to_str().and_then(program_of) else { continue };
            if self.missing.contains(name) {
                continue;
            }
            if let Err(source) = self.swap_one(name, &entry.path()) {
                let target = format!("link {}", entry.path().display());
                outcome = outcome.and(Err(LoadError::Attach { name, target, source }));
            }
        }
        outcome
    }

    fn swap_one(&mut self, name: &'static str, pin: &Path) -> io::Result<()> {
        let is_tc = TcHook::ALL.iter().any(|hook| hook.program() == name);
        let descriptor = if is_tc {
            self.classifier(name).map_err(io::Error::other)?.fd()
        } else {
            self.sock_addr(name).map_err(io::Error::other)?.fd()
        };
        let program = descriptor.map_err(io::Error::other)?;
        match bpf::open_pin(pin).and_then(|link| bpf::link_update(link.as_fd(), program.as_fd())) {
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => fs::remove_file(pin),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// The program of a pinned link: the pin's name begins with it. XDP's links are [`super::xdp::Xdp`]'s.
fn program_of(link: &str) -> Option<&'static str> {
    let of_socket = CGROUP_HOOKS.iter().map(|(name, _)| *name).find(|name| *name == link);
    of_socket.or_else(|| {
        let mut programs = TcHook::ALL.iter().map(|hook| hook.program());
        programs.find(|name| {
            let number = link.strip_prefix(name).and_then(|rest| rest.strip_prefix('_'));
            number.is_some_and(|number| number.parse::<u32>().is_ok())
        })
    })
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_links_name_tells_its_program() {
        assert_eq!(program_of("cg_connect4"), Some("cg_connect4"));
        assert_eq!(program_of("tc_from_pod_12"), Some("tc_from_pod"));
        assert_eq!(program_of("tc_to_overlay_3"), Some("tc_to_overlay"));
        for other in ["tc_from_pod", "tc_from_pod_x", "cg_connect4_1", "xdp_entry_native_3", ""] {
            assert_eq!(program_of(other), None, "{other}");
        }
    }
}
