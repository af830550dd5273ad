//! Rows of BPF maps, many in one call.
//!
//! Effects only. `BPF_MAP_*_BATCH` (kernel 5.6) carry thousands of rows over in one system call; a map
//! type without them, or a kernel that refuses them, is written and read row by row instead.
#![expect(unsafe_code, reason = "bpf(2) takes raw pointers")]

use std::{
    fmt, io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use aya::{
    Pod,
    maps::{MapData, MapError},
};

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
    max: u32,
    has_batches: AtomicBool,
    rows: PhantomData<fn() -> (K, V)>,
}

impl<K, V> fmt::Debug for RowMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RowMap").field(&self.map).finish()
    }
}

impl<K, V> AsFd for RowMap<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

/// How far a walk through a map has come. Rows that are written or deleted meanwhile may be seen or not;
/// all others are seen once.
#[derive(Debug)]
pub struct Walk {
    /// The place to go on from: four bytes for a hash map, a key for a trie.
    cursor: Vec<u8>,
    /// Rows for which there is room in one call.
    room: usize,
    has_begun: bool,
    is_over: bool,
}

impl Walk {
    /// A walk from the beginning.
    #[must_use]
    pub const fn new() -> Self {
        Self::by(ROWS)
    }

    /// The same, with at most so many rows at a time, unless more collide.
    #[must_use]
    pub const fn by(room: usize) -> Self {
        Self { cursor: Vec::new(), room, has_begun: false, is_over: false }
    }

    /// Whether every row was seen.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.is_over
    }
}

impl Default for Walk {
    fn default() -> Self {
        Self::new()
    }
}

/// Keys and values of one call.
#[derive(Debug, Default)]
struct Buffers {
    keys: Vec<u8>,
    values: Vec<u8>,
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
    inner_map: u32,
    numa_node: u32,
    name: [u8; NAME],
}

/// `BPF_OBJ_NAME_LEN`, with its NUL.
const NAME: usize = 16;

/// `BPF_MAP_TYPE_HASH` of `enum bpf_map_type`.
const HASH: u32 = 1;
/// Rows get their memory when they are written.
const NO_PREALLOC: u32 = 1;
/// `BPF_NOEXIST`: a row that is there already stays as it is.
const NO_EXIST: u64 = 1;

impl<K: Pod, V: Pod> RowMap<K, V> {
    /// Makes a hash map that no program knows yet and that ends with its last descriptor.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(rows: u32) -> io::Result<Self> {
        Self::create_named("", rows)
    }

    /// The same under a name of at most 15 bytes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create_named(name: &str, rows: u32) -> io::Result<Self> {
        let size = |bytes: usize| u32::try_from(bytes).map_err(io::Error::other);
        let mut attributes = CreateAttributes {
            map_type: HASH,
            key_size: size(size_of::<K>())?,
            value_size: size(size_of::<V>())?,
            max_entries: rows,
            map_flags: NO_PREALLOC,
            inner_map: 0,
            numa_node: 0,
            name: [0; NAME],
        };
        for (place, byte) in attributes.name[..NAME - 1].iter_mut().zip(name.bytes()) {
            *place = byte;
        }
        let map = bpf(MAP_CREATE, &mut attributes)?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(Self::new(unsafe { OwnedFd::from_raw_fd(map) }, rows))
    }

    /// Opens a pinned map.
    ///
    /// # Errors
    /// When nothing is pinned there, or a map whose rows are of another size.
    pub fn open(path: &Path) -> io::Result<Self> {
        let map = MapData::from_pin(path).map_err(of_kernel)?;
        let info = map.info().map_err(of_kernel)?;
        let sizes = [(info.key_size(), size_of::<K>()), (info.value_size(), size_of::<V>())];
        if sizes.iter().any(|(found, wanted)| usize::try_from(*found).ok() != Some(*wanted)) {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        Ok(Self::new(map.fd().as_fd().try_clone_to_owned()?, info.max_entries()))
    }

    /// Takes a map whose keys and values have the size of `K` and `V`, which the caller has checked.
    #[must_use]
    pub const fn new(map: OwnedFd, max: u32) -> Self {
        Self { map, max, has_batches: AtomicBool::new(true), rows: PhantomData }
    }

    /// Rows for which there is room.
    #[must_use]
    pub const fn max(&self) -> u32 {
        self.max
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

    /// Some thousand rows more of a walk, in memory of that size. Without batches it is all of them.
    ///
    /// # Errors
    /// What the kernel says to reading.
    pub fn next(&self, walk: &mut Walk) -> io::Result<Vec<(K, V)>> {
        let mut buffers = Buffers::default();
        match self.next_into(walk, &mut buffers)? {
            Some(count) => Ok(rows(&buffers, count).collect()),
            None => self.dump_rows(),
        }
    }

    /// How many rows there are: 0.1 µs a row.
    ///
    /// # Errors
    /// What the kernel says to reading.
    pub fn count(&self) -> io::Result<u64> {
        let (mut total, mut walk, mut buffers) = (0, Walk::new(), Buffers::default());
        while !walk.is_over {
            let count = match self.next_into(&mut walk, &mut buffers)? {
                Some(count) => count,
                None => self.dump_rows()?.len(),
            };
            total += u64::try_from(count).unwrap_or(0);
        }
        Ok(total)
    }

    /// `None` where the map has no batches; the walk is then over.
    fn next_into(&self, walk: &mut Walk, buffers: &mut Buffers) -> io::Result<Option<usize>> {
        if self.has_batches.load(Ordering::Relaxed) {
            match self.step(walk, buffers) {
                Err(error) if is_unknown(&error) && !walk.has_begun => self.forgo_batches(),
                result => return result.map(Some),
            }
        }
        walk.is_over = true;
        Ok(None)
    }

    /// Inserts a row unless there is one of its key. Says whether it did.
    ///
    /// # Errors
    /// What the kernel says; `E2BIG` when the map is full.
    pub fn insert(&self, key: &K, value: &V) -> io::Result<bool> {
        let (mut key, mut value) = (*key, *value);
        let map = self.map.as_raw_fd().cast_unsigned();
        let (key, value) = (address(&mut key), address(&mut value));
        match bpf(UPDATE_ELEM, &mut RowAttributes { map, pad: 0, key, value, flags: NO_EXIST }) {
            Ok(_zero) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The value of a key.
    ///
    /// # Errors
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
        let (mut found, mut walk, mut buffers) = (Vec::new(), Walk::new(), Buffers::default());
        while !walk.is_over {
            let count = self.step(&mut walk, &mut buffers)?;
            found.extend(rows(&buffers, count));
        }
        Ok(found)
    }

    /// Reads on into the buffers; gives how many rows.
    fn step(&self, walk: &mut Walk, buffers: &mut Buffers) -> io::Result<usize> {
        walk.cursor.resize(size_of::<K>().max(8), 0);
        loop {
            buffers.keys.resize(walk.room * size_of::<K>(), 0);
            buffers.values.resize(walk.room * size_of::<V>(), 0);
            let at = address(&mut walk.cursor[..]);
            let from = if walk.has_begun { at } else { 0 };
            let rows = (address(&mut buffers.keys[..]), address(&mut buffers.values[..]));
            let (done, result) = self.batch(LOOKUP_BATCH, (from, at), rows, walk.room);
            match result {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => walk.is_over = true,
                // One bucket has more rows than there is room for.
                Err(error)
                    if error.raw_os_error() == Some(libc::ENOSPC) && walk.room < ROWS_MAX =>
                {
                    walk.room *= 2;
                    continue;
                }
                Err(error) => return Err(error),
            }
            walk.has_begun = true;
            return Ok(done);
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

/// The first rows of a call.
fn rows<K: Pod, V: Pod>(buffers: &Buffers, count: usize) -> impl Iterator<Item = (K, V)> {
    let keys = buffers.keys.chunks_exact(size_of::<K>()).map(read);
    keys.zip(buffers.values.chunks_exact(size_of::<V>()).map(read)).take(count)
}

/// The kernel's error inside aya's.
fn of_kernel(error: MapError) -> io::Error {
    if let MapError::SyscallError(error) = error {
        return error.io_error;
    }
    io::Error::other(error)
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
