//! Rows of BPF maps, many in one call.
//!
//! Effects only. `BPF_MAP_*_BATCH` (kernel 5.6) carry thousands of rows over in one system call; a map
//! type without them, or a kernel that refuses them, is written and read row by row instead.
#![expect(unsafe_code, reason = "bpf(2) takes raw pointers")]

use std::{
    fmt, io,
    marker::PhantomData,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use aya::Pod;

/// Commands of `enum bpf_cmd` (linux/bpf.h).
const MAP_CREATE: i32 = 0;
const LOOKUP_ELEM: i32 = 1;
const UPDATE_ELEM: i32 = 2;
const DELETE_ELEM: i32 = 3;
const GET_NEXT_KEY: i32 = 4;
const LOOKUP_BATCH: i32 = 24;
const UPDATE_BATCH: i32 = 26;
const DELETE_BATCH: i32 = 27;

/// `ENOTSUPP` of the kernel's own headers: what a map type without batches answers.
const ENOTSUPP: i32 = 524;
/// Rows in one call: what the kernel copies in one go stays below a megabyte.
const ROWS: usize = 4_096;
/// A bucket of a hash map must fit into one call; more colliding rows than this are no hash map.
const ROWS_MAX: usize = 1 << 20;

/// The row of a list at this place could not be written, and why.
pub type Failed = (usize, io::Error);

/// A map of keys and values of fixed size: hash maps, with or without eviction, and tries.
pub struct RowMap<K, V> {
    map: OwnedFd,
    has_batches: AtomicBool,
    rows: PhantomData<fn() -> (K, V)>,
}

impl<K, V> fmt::Debug for RowMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RowMap").field(&self.map).finish()
    }
}

/// `struct` of the batch commands in `union bpf_attr`.
#[repr(C)]
struct BatchAttributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

/// `struct` of the commands for one row in `union bpf_attr`.
#[repr(C)]
struct RowAttributes {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The first fields of `BPF_MAP_CREATE` in `union bpf_attr`.
#[repr(C)]
struct CreateAttributes {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// `BPF_MAP_TYPE_HASH` of `enum bpf_map_type`.
const HASH: u32 = 1;
/// Rows get their memory when they are written.
const NO_PREALLOC: u32 = 1;

impl<K: Pod, V: Pod> RowMap<K, V> {
    /// Makes a hash map that no program knows yet and that ends with its last descriptor.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn create(rows: u32) -> io::Result<Self> {
        let size = |bytes: usize| u32::try_from(bytes).map_err(io::Error::other);
        let mut attributes = CreateAttributes {
            map_type: HASH,
            key_size: size(size_of::<K>())?,
            value_size: size(size_of::<V>())?,
            max_entries: rows,
            map_flags: NO_PREALLOC,
        };
        let map = bpf(MAP_CREATE, &mut attributes)?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(Self::new(unsafe { OwnedFd::from_raw_fd(map) }))
    }

    /// Takes a map whose keys and values have the size of `K` and `V`, which the caller has checked.
    #[must_use]
    pub const fn new(map: OwnedFd) -> Self {
        Self { map, has_batches: AtomicBool::new(true), rows: PhantomData }
    }

    /// The map itself.
    #[must_use]
    pub const fn map(&self) -> &OwnedFd {
        &self.map
    }

    /// Reads and writes row by row from now on, as on a kernel without batches.
    pub fn forgo_batches(&self) {
        self.has_batches.store(false, Ordering::Relaxed);
    }

    /// Inserts or replaces rows, in their order. What failed is told by its place; the others are
    /// written. `E2BIG`: the map is full.
    pub fn update(&self, rows: &[(K, V)]) -> Vec<Failed> {
        let mut failed = Vec::new();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (part, start) in rows.chunks(ROWS).zip((0..).step_by(ROWS)) {
            keys.clear();
            values.clear();
            keys.extend(part.iter().map(|(key, _)| *key));
            values.extend(part.iter().map(|(_, value)| *value));
            self.each(UPDATE_BATCH, &mut keys, &mut values, |at, error| {
                failed.push((start + at, error));
            });
        }
        failed
    }

    /// Deletes rows. A row that is gone already is none that failed.
    pub fn delete(&self, keys: &[K]) -> Vec<Failed> {
        let mut failed = Vec::new();
        for (part, start) in keys.chunks(ROWS).zip((0..).step_by(ROWS)) {
            self.each(DELETE_BATCH, &mut part.to_vec(), &mut [], |at, error| {
                if error.raw_os_error() != Some(libc::ENOENT) {
                    failed.push((start + at, error));
                }
            });
        }
        failed
    }

    /// Every row. Rows that are written meanwhile may be missing or stand twice.
    ///
    /// # Errors
    ///
    /// What the kernel says to reading.
    pub fn dump(&self) -> io::Result<Vec<(K, V)>> {
        if self.has_batches.load(Ordering::Relaxed) {
            match self.dump_batches() {
                Err(error) if is_unknown(&error) => self.forgo_batches(),
                result => return result,
            }
        }
        self.dump_rows()
    }

    /// The value of a key.
    ///
    /// # Errors
    ///
    /// What the kernel says to reading.
    pub fn row(&self, key: &K) -> io::Result<Option<V>> {
        let mut key = *key;
        let mut value = vec![0_u8; size_of::<V>()];
        match self.one(LOOKUP_ELEM, address(&mut key), address(&mut value[..])) {
            Ok(()) => Ok(Some(read(&value))),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Carries a command out for each key, in batches while the map has them. After a row that fails
    /// it goes on with the next.
    fn each(
        &self,
        command: i32,
        keys: &mut [K],
        values: &mut [V],
        mut failed: impl FnMut(usize, io::Error),
    ) {
        let mut at = 0;
        while at < keys.len() && self.has_batches.load(Ordering::Relaxed) {
            let count = keys.len() - at;
            let value = values.get_mut(at..).map_or(0, address);
            let (done, result) =
                self.batch(command, (0, 0), (address(&mut keys[at]), value), count);
            match result {
                Ok(()) => at = keys.len(),
                Err(error) if is_unknown(&error) && done == 0 => self.forgo_batches(),
                Err(error) => {
                    failed(at + done, error);
                    at += done + 1;
                }
            }
        }
        let command = if command == UPDATE_BATCH { UPDATE_ELEM } else { DELETE_ELEM };
        for (at, key) in keys.iter_mut().enumerate().skip(at) {
            let value = values.get_mut(at).map_or(0, address);
            if let Err(error) = self.one(command, address(key), value) {
                failed(at, error);
            }
        }
    }

    fn dump_batches(&self) -> io::Result<Vec<(K, V)>> {
        let mut found = Vec::new();
        let mut room = ROWS;
        // The place to go on from: four bytes for a hash map, a key for a trie.
        let mut cursor = vec![0_u8; size_of::<K>().max(8)];
        let mut from = 0;
        loop {
            let mut keys = vec![0_u8; room * size_of::<K>()];
            let mut values = vec![0_u8; room * size_of::<V>()];
            let at = address(&mut cursor[..]);
            let rows = (address(&mut keys[..]), address(&mut values[..]));
            let (done, result) = self.batch(LOOKUP_BATCH, (from, at), rows, room);
            let is_last = match result {
                Ok(()) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                // One bucket has more rows than there is room for.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && room < ROWS_MAX => {
                    room *= 2;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let keys = keys.chunks_exact(size_of::<K>()).map(read);
            let values = values.chunks_exact(size_of::<V>()).map(read);
            found.extend(keys.zip(values).take(done));
            if is_last {
                return Ok(found);
            }
            from = at;
        }
    }

    fn dump_rows(&self) -> io::Result<Vec<(K, V)>> {
        let mut found = Vec::new();
        let mut last: Option<K> = None;
        loop {
            let mut next = vec![0_u8; size_of::<K>()];
            let from = last.as_mut().map_or(0, address);
            match self.one(GET_NEXT_KEY, from, address(&mut next[..])) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
                Err(error) => return Err(error),
            }
            let key: K = read(&next);
            found.extend(self.row(&key)?.map(|value| (key, value)));
            last = Some(key);
        }
    }

    /// One batch command. Gives the number of rows that were done, also when it failed.
    fn batch(
        &self,
        command: i32,
        (from, to): (u64, u64),
        (keys, values): (u64, u64),
        count: usize,
    ) -> (usize, io::Result<()>) {
        let mut attributes = BatchAttributes {
            in_batch: from,
            out_batch: to,
            keys,
            values,
            count: u32::try_from(count).unwrap_or(u32::MAX),
            map: self.map.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        let result = bpf(command, &mut attributes).map(|_zero| ());
        // The kernel writes back how many it did, unless it refused before the first.
        let done = usize::try_from(attributes.count).unwrap_or(0);
        let is_untouched = result.is_err() && command != LOOKUP_BATCH && done >= count;
        (if is_untouched { 0 } else { done }, result)
    }

    fn one(&self, command: i32, key: u64, value: u64) -> io::Result<()> {
        let map = self.map.as_raw_fd().cast_unsigned();
        bpf(command, &mut RowAttributes { map, pad: 0, key, value, flags: 0 }).map(|_zero| ())
    }
}

fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP))
}

fn bpf<T>(command: i32, attributes: &mut T) -> io::Result<i32> {
    let attributes = std::ptr::from_mut(attributes);
    // SAFETY: the attributes are those of the command, live through the call and are as long as said.
    // Addresses in them are of memory that the callers above hold through the call and that is as
    // long as the keys and values of the map times the count, since `RowMap::new` asks for a map
    // whose sizes are those of `K` and `V`. Both are plain bytes (`Pod`).
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, libc::c_long::from(command), attributes, size_of::<T>())
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

/// A value from its bytes.
fn read<T: Pod>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>(), "rows are read in their own size");
    // SAFETY: there are as many bytes as the type has, and any bytes are a value of it (`Pod`).
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

/// What the kernel is told to read from or write to.
fn address<T: ?Sized>(memory: &mut T) -> u64 {
    // The kernel reads and writes through it: its provenance must stay known.
    u64::try_from(std::ptr::from_mut(memory).cast::<u8>().expose_provenance()).unwrap_or(0)
}
