//! Writing a set of files so that readers see all old or all new ones.
//!
//! The files lie in a folder with a time in its name; `..data` is a link to it that one rename(2)
//! replaces; each visible name is a link through `..data`. A file that is a mount's source stays valid.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

/// Files by their path below the volume, with mode bits.
pub type Files = BTreeMap<String, (Vec<u8>, u32)>;

/// Makes the visible content of `dir` exactly `files`. Equal content touches nothing.
///
/// # Errors
/// The file operation that failed; what readers see is then unchanged, and retry helps.
pub fn write(dir: &Path, files: &Files) -> io::Result<()> {
    let data = dir.join("..data");
    let old = fs::read_link(&data).ok();
    if old.as_ref().is_some_and(|old| same(&dir.join(old), files)) {
        return Ok(());
    }
    let fresh = unused_name(dir);
    let folder = dir.join(&fresh);
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    for (path, (content, mode)) in files {
        let path = folder.join(checked(path)?);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
    }
    let temporary = dir.join("..data_tmp");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    symlink(&fresh, &temporary)?;
    fs::rename(&temporary, &data)?;
    link_names(dir, files)?;
    // The old files go last: until here a reader may have been among them.
    match old {
        Some(old) => fs::remove_dir_all(dir.join(old)),
        None => Ok(()),
    }
}

/// A name that no folder in `dir` has; the number grows with each write.
fn unused_name(dir: &Path) -> PathBuf {
    let free = |number: &u64| !dir.join(format!("..{number}")).exists();
    PathBuf::from(format!("..{}", (1..).find(free).unwrap_or(u64::MAX)))
}

fn checked(path: &str) -> io::Result<&str> {
    let bad = path.is_empty()
        || path.starts_with('/')
        || path.starts_with("..")
        || path.split('/').any(|part| part == "..");
    if bad {
        let message = format!("invalid path {path:?}: must be relative and must not contain '..'");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(path)
}

fn same(folder: &Path, files: &Files) -> bool {
    let equal = files.iter().all(|(path, (content, mode))| {
        let path = folder.join(path);
        fs::read(&path).is_ok_and(|old| old == *content)
            && fs::metadata(&path).is_ok_and(|meta| meta.permissions().mode() & 0o7777 == *mode)
    });
    equal && count(folder).is_ok_and(|found| found == files.len())
}

fn count(folder: &Path) -> io::Result<usize> {
    let mut files = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        files += if entry.file_type()?.is_dir() { count(&entry.path())? } else { 1 };
    }
    Ok(files)
}

/// Links for the first part of each path; links of names that are gone are removed.
fn link_names(dir: &Path, files: &Files) -> io::Result<()> {
    let names: BTreeSet<&str> = files.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &names {
        let link = dir.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(name), link)?;
        }
    }
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let text = name.to_string_lossy();
        if !text.starts_with("..") && !names.contains(&*text) {
            fs::remove_file(dir.join(&name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(rows: &[(&str, &str)]) -> Files {
        rows.iter()
            .map(|(path, text)| ((*path).to_owned(), (text.as_bytes().to_vec(), 0o644)))
            .collect()
    }

    #[test]
    fn content_changes_behind_stable_names_and_old_folders_go() {
        let dir = tempfile::tempdir().expect("a folder");
        let dir = dir.path();
        write(dir, &files(&[("a", "1"), ("sub/b", "2")])).expect("written");
        assert_eq!(fs::read_to_string(dir.join("a")).expect("a file"), "1");
        assert_eq!(fs::read_to_string(dir.join("sub/b")).expect("a file"), "2");
        let first = fs::read_link(dir.join("..data")).expect("a link");
        write(dir, &files(&[("a", "1"), ("sub/b", "2")])).expect("written");
        assert_eq!(fs::read_link(dir.join("..data")).expect("a link"), first, "nothing to do");

        write(dir, &files(&[("a", "3")])).expect("written");
        assert_eq!(fs::read_to_string(dir.join("a")).expect("a file"), "3");
        assert!(fs::symlink_metadata(dir.join("sub")).is_err(), "its link is gone");
        assert!(!dir.join(first).exists(), "the old files are gone");
    }

    #[test]
    fn a_path_cannot_leave_the_volume() {
        let dir = tempfile::tempdir().expect("a folder");
        for path in ["../x", "/etc/x", "a/../../x", "..data/x", ""] {
            assert!(write(dir.path(), &files(&[(path, "1")])).is_err(), "{path}");
            assert!(fs::symlink_metadata(dir.path().join("..data")).is_err(), "nothing is shown");
        }
    }
}
