//! Writes the "newc" archives that Linux takes as initramfs (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).
//! Pure: entries in, bytes out.

/// What an entry is.
#[derive(Debug)]
pub(crate) enum Kind {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    /// Character device: major, minor.
    Device(u32, u32),
}

/// One entry: a path without leading slash, permission bits, and what it is.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: String,
    pub(crate) permissions: u32,
    pub(crate) kind: Kind,
}

/// The archive of `entries`, in their order; a folder must come before what it holds.
pub(crate) fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for (inode, entry) in (1_u32..).zip(entries) {
        let (kind_bits, device, data): (u32, (u32, u32), &[u8]) = match &entry.kind {
            Kind::Directory => (0o040_000, (0, 0), &[]),
            Kind::File(bytes) => (0o100_000, (0, 0), bytes),
            Kind::Symlink(target) => (0o120_000, (0, 0), target.as_bytes()),
            Kind::Device(major, minor) => (0o020_000, (*major, *minor), &[]),
        };
        push(&mut out, inode, kind_bits | entry.permissions, device, &entry.path, data);
    }
    push(&mut out, 0, 0, (0, 0), "TRAILER!!!", &[]);
    out
}

#[expect(clippy::too_many_arguments, reason = "the fields of one header, in its order")]
fn push(out: &mut Vec<u8>, inode: u32, mode: u32, device: (u32, u32), path: &str, data: &[u8]) {
    let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
    // Fields: ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check.
    let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(data);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_is_header_name_and_data_each_padded_to_four_bytes() {
        let file =
            Entry { path: "ab".into(), permissions: 0o755, kind: Kind::File(b"hi".to_vec()) };
        let bytes = archive(&[file]);
        assert_eq!(bytes.get(..6), Some(b"070701".as_slice()));
        assert_eq!(bytes.get(14..22), Some(b"000081ed".as_slice()), "mode of a regular file, 0755");
        assert_eq!(bytes.get(54..62), Some(b"00000002".as_slice()), "file size");
        assert_eq!(bytes.get(94..102), Some(b"00000003".as_slice()), "name with its NUL");
        // 110 bytes of header, 3 of name, 3 of padding, then data.
        assert_eq!(bytes.get(110..120), Some(b"ab\0\0\0\0hi\0\0".get(..10).unwrap()));
        assert!(bytes.len().is_multiple_of(4));
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }

    #[test]
    fn device_carries_its_numbers_and_link_its_target() {
        let bytes = archive(&[
            Entry { path: "c".into(), permissions: 0o600, kind: Kind::Device(5, 1) },
            Entry { path: "l".into(), permissions: 0o777, kind: Kind::Symlink("/x".into()) },
        ]);
        assert_eq!(bytes.get(78..94), Some(b"0000000500000001".as_slice()));
        assert!(bytes.windows(2).any(|window| window == b"/x"));
    }
}
