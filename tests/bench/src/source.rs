//! The children of the packet benchmarks: programs on devices, frames out of them, and who answers and asks
//! before frames are sent. Effects.

use std::{
    io::BufRead as _,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{
    orlop,
    packets::{BACKEND_PORT, CLIENT, FLOWS, NODE_PORT},
    raw::{self, HEADERS, Verdict},
    traffic::{pin, say},
};

/// An answer that has not come by then does not come.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What a child of the role `hold` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct HoldFlags {
    /// The device.
    #[arg(long)]
    pub index: u32,
    /// `xdp-pass`, `xdp-drop` or `tc-drop`.
    #[arg(long)]
    pub kind: String,
}

/// The child's life: a program on the device, and frames out of it when ordered.
///
/// # Errors
/// When the kernel does not take the program; failures of an order are answered.
pub fn hold(flags: &HoldFlags) -> Result<()> {
    let kind = match flags.kind.as_str() {
        "xdp-pass" => Verdict::XdpPass,
        "xdp-drop" => Verdict::XdpDrop,
        "tc-drop" => Verdict::TcDrop,
        other => bail!("--kind {other}: expected xdp-pass, xdp-drop or tc-drop"),
    };
    let program = raw::verdict(kind)?;
    let _link = raw::attach(&program, kind, flags.index)?;
    pin(1);
    say("ready")?;
    let mut source: Option<(String, OwnedFd)> = None;
    answer_orders(|order| {
        let [_, text, count] = order.split(' ').collect::<Vec<_>>()[..] else {
            bail!("unknown order {order}")
        };
        if source.as_ref().is_none_or(|(made_of, _)| made_of != text) {
            source = Some((text.to_owned(), raw::source(&unhex(text)?)?));
        }
        let (_, program) = source.as_ref().context("made above")?;
        let start = Instant::now();
        raw::send(program, flags.index, count.parse().context("count")?)?;
        Ok(start.elapsed().as_nanos().to_string())
    })
}

/// Orders to a child with Orlop's programs: `run PROGRAM HEADERS COUNT DEVICE` is answered by the nanoseconds of
/// a run behind the writing of the headers, those of the writing alone, the verdict, and 1 if the frame came out
/// changed. An XDP program meets it as if it came by the device of that index.
///
/// # Errors
/// When standard input or output break; failures of an order are answered.
pub fn take_orders() -> Result<()> {
    answer_orders(|order| {
        let [_, name, text, count, device] = order.split(' ').collect::<Vec<_>>()[..] else {
            bail!("unknown order {order}")
        };
        pin(1);
        let (count, device) = (count.parse().context("count")?, device.parse().context("device")?);
        let run = raw::measure(name, &unhex(text)?, count, device)?;
        let changed = u32::from(run.is_changed);
        Ok(format!("{} {} {} {changed}", run.with_ns, run.without_ns, run.verdict))
    })
}

fn answer_orders(mut answer: impl FnMut(&str) -> Result<String>) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.context("read an order")?;
        match answer(&line) {
            Ok(words) => say(&words)?,
            Err(error) => say(&format!("error {error:#}"))?,
        }
    }
    Ok(())
}

/// The child's life: answers datagrams with themselves.
///
/// # Errors
/// When the port is taken.
pub fn udp_echo(address: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind((address, BACKEND_PORT)).context("bind")?;
    raw::send_without_checksum(&socket)?;
    say("ready")?;
    let mut bytes = [0; 2048];
    loop {
        let (count, from) = socket.recv_from(&mut bytes).context("receive")?;
        // What is lost is asked for again.
        let _sent: bool = socket.send_to(&bytes[..count], from).is_ok();
    }
}

/// The child's life: two answers by each flow of the packet source, so that every connection table knows
/// them as established.
///
/// # Errors
/// When no answer comes.
pub fn prime() -> Result<()> {
    let node = Ipv4Addr::new(192, 168, 0, 1);
    for flow in 0..FLOWS {
        let socket = UdpSocket::bind((*CLIENT.ip(), CLIENT.port() + flow)).context("bind")?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        raw::send_without_checksum(&socket)?;
        for _turn in 0..2 {
            let mut answer = [0; 8];
            socket.send_to(b"question", (node, NODE_PORT)).context("ask")?;
            let (_, from) = socket.recv_from(&mut answer).context("no answer")?;
            anyhow::ensure!(from == (node, NODE_PORT).into(), "an answer from {from}");
        }
    }
    say("ready")
}

/// Ethernet, IPv4 and UDP headers of a frame of the shortest length; UDP without a checksum.
///
/// # Errors
/// When the Ethernet address is none.
pub fn headers(mac: &str, from: SocketAddrV4, to: SocketAddrV4) -> Result<[u8; HEADERS]> {
    let ip_len = u16::try_from(raw::FRAME - 14)?;
    let mut ip = vec![0x45, 0];
    ip.extend(ip_len.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(from.ip().octets());
    ip.extend(to.ip().octets());
    let mut sum: u32 = ip
        .chunks(2)
        .map(|two| u32::from(two[0]) << 8 | u32::from(two.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let checksum = !u16::try_from(sum)?;
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut out = orlop::mac(mac)?.to_vec();
    out.extend([2, 0, 0, 0, 0, 9, 8, 0]);
    out.extend(ip);
    out.extend(from.port().to_be_bytes());
    out.extend(to.port().to_be_bytes());
    out.extend((ip_len - 20).to_be_bytes());
    out.extend([0, 0]);
    <[u8; HEADERS]>::try_from(out).ok().context("headers have a fixed length")
}

/// Headers as an order has them.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<[u8; HEADERS]> {
    let byte =
        |at: usize| text.get(at * 2..at * 2 + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    let bytes: Option<Vec<u8>> = (0..HEADERS).map(byte).collect();
    bytes.and_then(|bytes| <[u8; HEADERS]>::try_from(bytes).ok()).context("headers in hex")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_a_right_checksum_and_survive_the_order() {
        let made = headers(
            "02:00:00:00:00:01",
            CLIENT,
            SocketAddrV4::new(Ipv4Addr::new(10, 244, 2, 10), 7),
        )
        .unwrap();
        let words = made[14..34].chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1]));
        let sum: u32 = words.sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        assert_eq!(unhex(&hex(&made)).unwrap(), made);
        assert_eq!(u16::from_be_bytes([made[38], made[39]]), 26);
    }
}
