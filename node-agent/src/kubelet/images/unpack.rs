//! A layer's tar stream into a folder that overlayfs can take as one of its lower ones.

use std::{
    io::{self, Read},
    path::{Component, Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use tar::EntryType;

use crate::sys::rootdir::{Attributes, RootDir, Special, WHITEOUT, device};

/// Name of an entry that hides all of its folder's lower content (OCI image specification, "Layer").
const OPAQUE: &str = ".wh..wh..opq";

/// Prefix of an entry that hides one lower name.
const HIDE: &str = ".wh.";

/// PAX keyword prefix of extended attributes, as GNU tar and Go write it.
const XATTR: &str = "SCHILY.xattr.";

/// How a layer is compressed; told by its first bytes, since media types are often wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn of(head: &[u8]) -> Self {
        if head.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip
        } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            Self::Zstd
        } else {
            Self::None
        }
    }
}

/// Unpacks `blob` into `target` and returns the digest of its uncompressed bytes, `sha256:…`. Blocks.
///
/// # Errors
/// When the stream is not a sound layer, or of writing; what was written is left for the caller.
pub(super) fn unpack_layer(mut blob: impl Read, target: &Path) -> io::Result<String> {
    let mut head = [0; 4];
    let mut filled = 0;
    while let Some(rest) = head.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match blob.read(rest)? {
            0 => break,
            count => filled += count,
        }
    }
    let start = head.get(..filled).unwrap_or_default();
    let blob = start.chain(blob);
    match Compression::of(start) {
        Compression::None => unpack_tar(blob, target),
        Compression::Gzip => unpack_tar(flate2::read::MultiGzDecoder::new(blob), target),
        Compression::Zstd => unpack_tar(zstd::Decoder::new(blob)?, target),
    }
}

fn unpack_tar(stream: impl Read, target: &Path) -> io::Result<String> {
    let root = RootDir::open(target)?;
    let mut stream = Hashed { stream, hash: Sha256::new() };
    let mut folders = Vec::new();
    {
        let mut archive = tar::Archive::new(&mut stream);
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = inside(&entry.path()?)?;
            let attributes = attributes(&mut entry)?;
            if entry.header().entry_type().is_dir() {
                folders.push((path.clone(), attributes.clone()));
            }
            put(&root, &mut entry, &path, &attributes).map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            })?;
        }
    }
    // Making a folder's entries changed its time. Deeper ones first, for the same reason.
    for (path, attributes) in folders.iter().rev() {
        root.dir(path, attributes)?;
    }
    // The padding after the archive's end belongs to the digest.
    io::copy(&mut stream, &mut io::sink())?;
    root.sync()?;
    Ok(format!("sha256:{}", hex(&stream.hash.finalize())))
}

fn put<R: Read>(
    root: &RootDir,
    entry: &mut tar::Entry<'_, R>,
    path: &Path,
    attributes: &Attributes,
) -> io::Result<()> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if name == OPAQUE {
        let folder = path.parent().unwrap_or_else(|| Path::new(""));
        return root.opaque(folder);
    }
    if let Some(hidden) = name.strip_prefix(HIDE) {
        if hidden.is_empty() || hidden == "." || hidden == ".." {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a whiteout of nothing"));
        }
        return root.special(&path.with_file_name(hidden), WHITEOUT, attributes);
    }
    let header = entry.header();
    let numbers = || -> io::Result<u64> {
        Ok(device(header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)))
    };
    match header.entry_type() {
        EntryType::Directory => root.dir(path, attributes),
        EntryType::Symlink => {
            let to = entry.link_name()?.ok_or(io::ErrorKind::InvalidData)?;
            root.symlink(path, &to, attributes)
        }
        EntryType::Link => {
            let to = entry.link_name()?.ok_or(io::ErrorKind::InvalidData)?;
            root.link(path, &inside(&to)?)
        }
        EntryType::Char => root.special(path, Special::Character(numbers()?), attributes),
        EntryType::Block => root.special(path, Special::Block(numbers()?), attributes),
        EntryType::Fifo => root.special(path, Special::Fifo, attributes),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            root.file(path, attributes, entry)
        }
        EntryType::XGlobalHeader => Ok(()),
        kind @ (EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader | _) => {
            Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("tar entry of type {:?}", char::from(kind.as_byte())),
            ))
        }
    }
}

/// The path relative to the root; one with `..` in it is refused rather than guessed at.
fn inside(path: &Path) -> io::Result<PathBuf> {
    let mut inside = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => inside.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                let message = format!("path {} leads out of the layer", path.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
        }
    }
    Ok(inside)
}

fn attributes<R: Read>(entry: &mut tar::Entry<'_, R>) -> io::Result<Attributes> {
    let mut xattrs = Vec::new();
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            if let Some(name) = extension.key().ok().and_then(|key| key.strip_prefix(XATTR)) {
                xattrs.push((name.to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    let header = entry.header();
    let id = |id: u64| {
        u32::try_from(id).map_err(|_large| io::Error::new(io::ErrorKind::InvalidData, "owner"))
    };
    Ok(Attributes {
        uid: id(header.uid()?)?,
        gid: id(header.gid()?)?,
        mode: header.mode()?,
        mtime: i64::try_from(header.mtime()?).unwrap_or(0),
        xattrs,
    })
}

/// A reader that hashes what passes.
struct Hashed<R> {
    stream: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(space)?;
        self.hash.update(space.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string cannot fail.
        write!(text, "{byte:02x}").unwrap_or_default();
        text
    })
}

/// Digest of a small blob, `sha256:…`.
pub(super) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}
