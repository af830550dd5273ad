//! Small programs of the bench's own, and running programs in the kernel's test harness: the `bpf(2)` calls
//! for it. Effects.
//!
//! The kernel's harness does not renew a packet between repetitions, and most programs change it. So a
//! program of ours writes the headers anew each time and then goes on into the one that is measured.
#![expect(unsafe_code, reason = "bpf(2) takes raw pointers")]

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, ensure};

/// Commands of `enum bpf_cmd` (linux/bpf.h).
const MAP_CREATE: u64 = 0;
const MAP_UPDATE_ELEM: u64 = 2;
const PROG_LOAD: u64 = 5;
const PROG_TEST_RUN: u64 = 10;
const OBJ_GET_INFO_BY_FD: u64 = 15;
const LINK_CREATE: u64 = 28;
/// `BPF_MAP_TYPE_PROG_ARRAY`.
const PROG_ARRAY: u32 = 3;
/// Places of `enum bpf_attach_type`.
const TCX_INGRESS: u32 = 46;
const XDP: u32 = 37;
/// `XDP_FLAGS_DRV_MODE`: in the driver or not at all.
const XDP_IN_DRIVER: u32 = 1 << 2;
/// `BPF_F_XDP_HAS_FRAGS`: the program copes with frames in pieces.
const XDP_HAS_FRAGS: u32 = 1 << 5;
/// `BPF_F_TEST_XDP_LIVE_FRAMES`: what the program says is done.
const LIVE_FRAMES: u32 = 1 << 1;
/// Bytes of Ethernet, IPv4 and UDP headers, which a program of ours writes.
pub const HEADERS: usize = 42;
/// Bytes of a whole frame: the shortest that Ethernet knows, without its checksum.
pub const FRAME: usize = 60;

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tc,
    Xdp,
}

impl Kind {
    /// `enum bpf_prog_type`.
    const fn number(self) -> u32 {
        match self {
            Self::Tc => 3,
            Self::Xdp => 6,
        }
    }

    /// Offset of `data` in the context; `data_end` follows it.
    const fn data(self) -> u16 {
        match self {
            Self::Tc => 76,
            Self::Xdp => 0,
        }
    }
}

/// What a program that looks at nothing does with every packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    XdpPass,
    XdpDrop,
    TcDrop,
}

/// Loads a program that only gives a verdict.
///
/// # Errors
/// What the kernel says.
pub fn verdict(verdict: Verdict) -> Result<OwnedFd> {
    let (kind, value) = match verdict {
        Verdict::XdpPass => (Kind::Xdp, 2),
        Verdict::XdpDrop => (Kind::Xdp, 1),
        Verdict::TcDrop => (Kind::Tc, 2),
    };
    load(kind, &[op(0xb7, 0, 0, 0, value), EXIT])
}

/// Attaches it to a device for as long as what is returned lives.
///
/// # Errors
/// What the kernel says: a driver without XDP, a kernel without tcx.
pub fn attach(program: &OwnedFd, kind: Verdict, ifindex: u32) -> Result<OwnedFd> {
    let (place, flags) = match kind {
        Verdict::TcDrop => (TCX_INGRESS, 0),
        Verdict::XdpPass | Verdict::XdpDrop => (XDP, XDP_IN_DRIVER),
    };
    let mut attributes = [0_u64; 8];
    attributes[0] = pair(word(program), ifindex);
    attributes[1] = pair(place, flags);
    owned(bpf(LINK_CREATE, &mut attributes)).with_context(|| format!("attach {kind:?}"))
}

/// A packet source: frames with these headers and one of 64 source ports, sent out of the device that they
/// are said to have come by.
///
/// # Errors
/// What the kernel says.
pub fn source(headers: &[u8; HEADERS]) -> Result<OwnedFd> {
    let mut code = write_headers(Kind::Xdp, headers);
    let first_port = i32::from(u16::from_be_bytes([headers[34], headers[35]]));
    code.extend([
        op(0x85, 0, 0, 0, 7),          // r0 = bpf_get_prandom_u32()
        op(0x57, 0, 0, 0, 63),         // r0 &= 63
        op(0x07, 0, 0, 0, first_port), // r0 += first port
        op(0xdc, 0, 0, 0, 16),         // r0 = big endian, 16 bits
        op(0x6b, 6, 0, 34, 0),         // source port = r0
        op(0xb7, 0, 0, 0, 3),          // XDP_TX
        EXIT,
    ]);
    load(Kind::Xdp, &code)
}

/// Sends `count` frames of a source out of a device, as fast as it goes, on this core.
///
/// # Errors
/// What the kernel says.
pub fn send(source: &OwnedFd, ifindex: u32, count: u32) -> Result<()> {
    let frame = [0_u8; FRAME];
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context = [0, u32::try_from(FRAME)?, 0, ifindex, 0, 0];
    let mut attributes = [0_u64; 10];
    attributes[0] = u64::from(word(source));
    attributes[1] = pair(u32::try_from(FRAME)?, 0);
    attributes[2] = address(frame.as_ptr());
    attributes[4] = pair(count, 0);
    attributes[5] = pair(u32::try_from(size_of_val(&context))?, 0);
    attributes[6] = address(context.as_ptr());
    attributes[8] = pair(LIVE_FRAMES, 0);
    bpf(PROG_TEST_RUN, &mut attributes).context("send frames")?;
    Ok(())
}

/// What running a program on the same packet over and over says.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Nanoseconds of a run behind the writing of the headers.
    pub with_ns: u32,
    /// Nanoseconds of the writing alone.
    pub without_ns: u32,
    /// What the program said last.
    pub verdict: u32,
    /// The packet came out of the last run other than it went in.
    pub is_changed: bool,
}

/// Runs a loaded program of this process `repeat` times on a packet with these headers. XDP programs meet it as
/// a frame that came by the device.
///
/// # Errors
/// When there is no such program, or the kernel refuses to run it.
pub fn measure(name: &str, headers: &[u8; HEADERS], repeat: u32, device: u32) -> Result<Run> {
    let kind = if name.starts_with("xdp") { Kind::Xdp } else { Kind::Tc };
    let target = find(name)?;
    let empty = load(kind, &[op(0xb7, 0, 0, 0, 2), EXIT])?;
    let wrapped = |target| Wrapped::new(kind, target, headers);
    let (with_ns, verdict, is_changed) = wrapped(&target)?.run(headers, repeat, device)?;
    let (without_ns, _, _) = wrapped(&empty)?.run(headers, repeat, device)?;
    Ok(Run { with_ns, without_ns, verdict, is_changed })
}

/// A program behind one that writes headers.
struct Wrapped {
    kind: Kind,
    program: OwnedFd,
    _array: OwnedFd,
}

impl Wrapped {
    fn new(kind: Kind, target: &OwnedFd, headers: &[u8; HEADERS]) -> Result<Self> {
        let mut attributes = [0_u64; 8];
        attributes[0] = pair(PROG_ARRAY, 4);
        attributes[1] = pair(4, 1);
        let array = owned(bpf(MAP_CREATE, &mut attributes)).context("make a program array")?;
        let (key, value) = (0_u32, word(target));
        let mut attributes = [0_u64; 8];
        attributes[0] = u64::from(word(&array));
        attributes[1] = address(&raw const key);
        attributes[2] = address(&raw const value);
        bpf(MAP_UPDATE_ELEM, &mut attributes).context("put the program into the array")?;
        let mut code = vec![op(0xbf, 7, 1, 0, 0)]; // r7 = context
        if kind == Kind::Xdp {
            code.extend(restore_length());
        }
        code.extend(write_headers(kind, headers));
        code.extend([
            op(0xbf, 1, 7, 0, 0), // r1 = context
            op(0x18, 2, 1, 0, i32::try_from(word(&array))?),
            0,                     // r2 = the array
            op(0xb7, 3, 0, 0, 0),  // r3 = 0
            op(0x85, 0, 0, 0, 12), // bpf_tail_call
            op(0xb7, 0, 0, 0, 99),
            EXIT,
        ]);
        Ok(Self { kind, program: load(kind, &code)?, _array: array })
    }

    /// Nanoseconds of a run, the last verdict, and whether the packet came out changed.
    fn run(&self, headers: &[u8; HEADERS], repeat: u32, device: u32) -> Result<(u32, u32, bool)> {
        // The harness looks at the headers too, before the program writes them.
        let mut frame = [0_u8; FRAME];
        frame[..HEADERS].copy_from_slice(headers);
        let mut out = [0_u8; FRAME + 256];
        let context = [0, u32::try_from(FRAME)?, 0, device, 0, 0];
        let mut attributes = [0_u64; 10];
        attributes[0] = u64::from(word(&self.program));
        attributes[1] = pair(u32::try_from(FRAME)?, u32::try_from(out.len())?);
        attributes[2] = address(frame.as_ptr());
        attributes[3] = address(out.as_mut_ptr());
        attributes[4] = pair(repeat, 0);
        if self.kind == Kind::Xdp {
            attributes[5] = pair(u32::try_from(size_of_val(&context))?, 0);
            attributes[6] = address(context.as_ptr());
        }
        bpf(PROG_TEST_RUN, &mut attributes).context("run the program")?;
        let (duration, verdict) = (high(attributes[4]), high(attributes[0]));
        ensure!(verdict != 99, "the program was not reached");
        Ok((duration, verdict, out[..FRAME] != frame))
    }
}

/// Sends UDP without a checksum. A veth pair leaves a checksum unfinished, which XDP cannot know.
///
/// # Errors
/// What the kernel says.
pub fn send_without_checksum(socket: &std::net::UdpSocket) -> Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on))?;
    // SAFETY: the descriptor is the socket's own, and the value lives through the call with that length.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NO_CHECK,
            (&raw const on).cast(),
            length,
        )
    };
    ensure!(result == 0, "SO_NO_CHECK: {}", io::Error::last_os_error());
    Ok(())
}

/// Takes off what an earlier run put before the frame.
fn restore_length() -> Vec<u64> {
    let length = i32::try_from(FRAME).unwrap_or(0);
    vec![
        op(0x61, 2, 1, 0, 0),       // r2 = data
        op(0x61, 3, 1, 4, 0),       // r3 = data_end
        op(0x1f, 3, 2, 0, 0),       // r3 -= r2
        op(0x15, 3, 0, 4, length),  // if r3 == length goto done
        op(0x07, 3, 0, 0, -length), // r3 -= length
        op(0xbf, 2, 3, 0, 0),       // r2 = r3
        op(0xbf, 1, 7, 0, 0),       // r1 = context
        op(0x85, 0, 0, 0, 44),      // bpf_xdp_adjust_head
        op(0xbf, 1, 7, 0, 0),       // done: r1 = context
    ]
}

/// Leaves the start of the frame in r6; ends the program if the frame is too short.
fn write_headers(kind: Kind, headers: &[u8; HEADERS]) -> Vec<u64> {
    let data = kind.data();
    let mut code = vec![
        op(0x61, 6, 1, data, 0),     // r6 = data
        op(0x61, 3, 1, data + 4, 0), // r3 = data_end
        op(0xbf, 4, 6, 0, 0),        // r4 = r6
        op(0x07, 4, 0, 0, 42),       // r4 += length
        op(0xbd, 4, 3, 2, 0),        // if r4 <= r3 goto + 2
        op(0xb7, 0, 0, 0, 0),
        EXIT,
    ];
    for (chunk, offset) in headers.chunks(4).zip((0_u16..).step_by(4)) {
        code.push(match *chunk {
            [a, b, c, d] => op(0x62, 6, 0, offset, i32::from_ne_bytes([a, b, c, d])),
            [a, b] => op(0x6a, 6, 0, offset, i32::from(u16::from_ne_bytes([a, b]))),
            _ => 0,
        });
    }
    code
}

const EXIT: u64 = 0x95;

/// One instruction (`struct bpf_insn`).
const fn op(code: u8, dst: u8, src: u8, offset: u16, immediate: i32) -> u64 {
    let [o0, o1] = offset.to_le_bytes();
    let [i0, i1, i2, i3] = immediate.to_le_bytes();
    u64::from_le_bytes([code, dst | (src << 4), o0, o1, i0, i1, i2, i3])
}

fn load(kind: Kind, code: &[u64]) -> Result<OwnedFd> {
    let mut log = vec![0_u8; 1 << 16];
    let mut attributes = [0_u64; 10];
    attributes[0] = pair(kind.number(), u32::try_from(code.len())?);
    attributes[1] = address(code.as_ptr());
    attributes[2] = address(c"GPL".as_ptr());
    attributes[3] = pair(1, u32::try_from(log.len())?);
    attributes[4] = address(log.as_mut_ptr());
    if kind == Kind::Xdp {
        // As the measured program: else the kernel lets neither call the other.
        attributes[5] = pair(0, XDP_HAS_FRAGS);
        attributes[8] = pair(0, XDP);
    }
    owned(bpf(PROG_LOAD, &mut attributes)).with_context(|| {
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(0);
        format!("load: {}", String::from_utf8_lossy(log.get(..end).unwrap_or_default()))
    })
}

/// The program of that name among this process's descriptors. The kernel keeps 15 bytes of names.
fn find(name: &str) -> Result<OwnedFd> {
    let short = name.get(..15).unwrap_or(name);
    for entry in std::fs::read_dir("/proc/self/fd").context("list descriptors")? {
        let entry = entry?;
        let is_program = std::fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().contains("bpf-prog"));
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if is_program && program_name(number)? == short {
            // SAFETY: the descriptor is open in this process: no thread closes a program while we look.
            let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
            return borrowed.try_clone_to_owned().context("copy the descriptor");
        }
    }
    anyhow::bail!("no program {name} is loaded")
}

fn program_name(descriptor: i32) -> Result<String> {
    // struct bpf_prog_info: the name is at byte 64, 16 bytes long.
    let mut info = [0_u8; 80];
    let mut attributes = [0_u64; 8];
    attributes[0] = pair(descriptor.cast_unsigned(), 80);
    attributes[1] = address(info.as_mut_ptr());
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes).context("ask for a program's name")?;
    let name = &info[64..];
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}

fn bpf<const N: usize>(command: u64, attributes: &mut [u64; N]) -> io::Result<i64> {
    // SAFETY: the attributes live through the call and have the length that is given; the addresses in
    // them are of memory that the caller keeps alive, as long as it says beside them.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of::<[u64; N]>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: io::Result<i64>) -> io::Result<OwnedFd> {
    let descriptor = i32::try_from(result?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn word(descriptor: &OwnedFd) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

fn address<T>(pointer: *const T) -> u64 {
    u64::try_from(pointer.addr()).unwrap_or(0)
}

/// Two 32-bit fields in the order in which they lie in memory.
const fn pair(first: u32, second: u32) -> u64 {
    let [a, b, c, d] = first.to_ne_bytes();
    let [e, f, g, h] = second.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// The second of the two.
const fn high(pair: u64) -> u32 {
    let [_, _, _, _, a, b, c, d] = pair.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}
