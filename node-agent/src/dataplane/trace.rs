//! What a traced run noted, in words; and the packets that are traced.
//!
//! Pure: steps and names in, sentences out.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use ebpf_common::{
    SCTP, TCP,
    addr::Addr,
    device::{Device, XDP},
    packet::{ETH_IPV4, ETH_LEN, IPV4_LEN, TCP_SYN},
    service::{ELSEWHERE, KEEP_SOURCE, SCOPE_EXTERNAL, SOURCE_RANGES},
    trace::{self as steps, Step},
    tunnel::{HERE, ROUTED},
    verdict::DropReason,
};
use serde_json::{Value, json};

use super::flows::protocol;

/// One program's part of the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Where it happens.
    pub place: String,
    pub program: &'static str,
    pub decisions: Vec<String>,
    pub result: String,
}

/// What numbers and addresses are called.
#[derive(Clone, Debug, Default)]
pub struct Names {
    pub devices: BTreeMap<u32, String>,
    pub pods: BTreeMap<IpAddr, String>,
    /// Frontends and the services that have them; node ports at the any-address.
    pub services: BTreeMap<SocketAddr, String>,
}

impl Hop {
    /// The hop for `-o json`.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "place": self.place,
            "program": self.program,
            "decisions": self.decisions,
            "result": self.result,
        })
    }
}

impl Names {
    /// A device by its index.
    #[must_use]
    pub fn device(&self, ifindex: u32) -> String {
        let name = self.devices.get(&ifindex).map_or("unknown device", String::as_str);
        format!("{name} ({ifindex})")
    }

    fn addr(&self, addr: &Addr) -> String {
        match self.pods.get(&addr.ip()) {
            Some(pod) => format!("{addr} (pod {pod})"),
            None => addr.to_string(),
        }
    }

    fn peer(&self, addr: &Addr, port: [u8; 2]) -> String {
        let address = SocketAddr::new(addr.ip(), u16::from_be_bytes(port));
        match (self.services.get(&address), self.pods.get(&addr.ip())) {
            (Some(service), _) => format!("{address} (service {service})"),
            (None, Some(pod)) => format!("{address} (pod {pod})"),
            (None, None) => address.to_string(),
        }
    }

    /// A step in words.
    #[must_use]
    pub fn words(&self, step: &Step) -> String {
        let yes = step.yes != 0;
        let not = if yes { "" } else { "not " };
        let about = self.addr(&addr(&step.key, 0));
        match step.kind {
            steps::SERVICE => self.frontend(step),
            steps::BACKEND if yes => format!(
                "slot {} of set {}: backend {}",
                step.key[1],
                step.key[0],
                self.peer(&addr(&step.row, 0), port(step.row[4])[0])
            ),
            steps::BACKEND => format!("slot {} of set {} is empty", step.key[1], step.key[0]),
            steps::NODE_ADDRESS => format!("{about} is {not}an address of this node"),
            steps::CLIENT if yes => format!(
                "the client {about} had backend {} before",
                self.peer(&addr(&step.row, 0), port(step.row[4])[0])
            ),
            steps::CLIENT => format!("the client {about} is not remembered"),
            steps::KEEP_CLIENT => format!(
                "the client {about} would be remembered with backend {}",
                self.peer(&addr(&step.row, 0), port(step.row[4])[0])
            ),
            steps::MEMBER => format!(
                "{} is {}in set {}",
                self.peer(&addr(&step.key, 1), port(step.key[5])[0]),
                if yes { "still " } else { "no more " },
                step.key[0]
            ),
            steps::SOURCE_RANGE => format!(
                "the client {} is {not}in the service's source ranges",
                self.addr(&addr(&step.key, 1))
            ),
            steps::NETNS if yes => format!(
                "the network namespace is known as {} and {}",
                self.addr(&addr(&step.row, 0)),
                self.addr(&addr(&step.row, 4))
            ),
            steps::NETNS => "the network namespace is none of Orlop's".to_owned(),
            steps::ENDPOINT if yes => {
                format!("{about} is a pod of this node behind {}", self.device(step.row[0]))
            }
            steps::ENDPOINT => format!("{about} is no pod of this node"),
            steps::TUNNEL if yes && step.row[4] & HERE != 0 => {
                format!("{about} is of this node's own pods' range, and the stack's")
            }
            steps::TUNNEL if yes => format!(
                "{about} is reached by node {} {}",
                addr(&step.row, 0),
                if step.row[4] & ROUTED == 0 { "through the tunnel" } else { "by routes" }
            ),
            steps::TUNNEL => format!("no other node has {about}"),
            _ => self.deed(step),
        }
    }

    fn frontend(&self, step: &Step) -> String {
        let [port_low, port_high, proto, scope] = step.key[4].to_ne_bytes();
        let from = if scope == SCOPE_EXTERNAL { "outside" } else { "the cluster" };
        let at = self.peer(&addr(&step.key, 0), [port_low, port_high]);
        let what = format!("{at} {} for clients from {from}", protocol(proto));
        if step.yes == 0 {
            return format!("no frontend {what}");
        }
        let [set, count, _service, affinity_s, ..] = step.row;
        let mut words = format!("frontend {what}: set {set} with {count} backends");
        let [flags_low, flags_high, maglev_bits, _] = step.row[4].to_ne_bytes();
        let flags = u16::from_ne_bytes([flags_low, flags_high]);
        if affinity_s != 0 {
            words += &format!(", a client keeps its backend for {affinity_s} s");
        }
        if flags & SOURCE_RANGES != 0 {
            words += ", only clients of its source ranges";
        }
        if flags & KEEP_SOURCE != 0 {
            words += ", the client's address is kept";
        }
        if flags & ELSEWHERE != 0 {
            words += ", other nodes have some";
        }
        if maglev_bits != 0 {
            words += ", consistent hashing for clients outside";
        }
        words
    }

    /// What is done or would be.
    fn deed(&self, step: &Step) -> String {
        let flow = || {
            let [from, to] = port(step.key[8]);
            let proto = protocol(step.key[9].to_ne_bytes()[0]);
            let (src, dst) = (addr(&step.key, 0), addr(&step.key, 4));
            format!("{proto} {} to {}", self.peer(&src, from), self.peer(&dst, to))
        };
        let becomes = || {
            let [from, to] = port(step.row[8]);
            let (src, dst) = (addr(&step.row, 0), addr(&step.row, 4));
            format!("{} to {}", self.peer(&src, from), self.peer(&dst, to))
        };
        match step.kind {
            steps::FLOW if step.yes != 0 => {
                format!("known flow {} becomes {}", flow(), becomes())
            }
            steps::FLOW => format!("no flow {} is known", flow()),
            steps::ADD_FLOW if step.yes != 0 => {
                format!("the flow {} would be noted as {}", flow(), becomes())
            }
            steps::ADD_FLOW => format!("the flow {} is taken; another port is tried", flow()),
            steps::REMOVE_FLOW => format!("the flow {} would be forgotten", flow()),
            steps::MAGLEV => {
                format!(
                    "the flow's hash chooses a backend of set {}, on every node alike",
                    step.key[0]
                )
            }
            steps::FRAGMENT if step.yes != 0 => "a piece of a packet whose ports are known".into(),
            steps::FRAGMENT => "a piece of a packet whose ports are not known".into(),
            steps::KEEP_FRAGMENT => "the ports of a packet in pieces would be noted".into(),
            steps::DEVICE => self.device_row(step),
            steps::DROP => format!("counted: {}", reason(step.key[0])),
            steps::REDIRECT => self.redirect(step.key[0], step.key[1]),
            steps::TUNNEL_KEY => {
                format!("tunnelled to node {} (network {})", addr(&step.key, 0), step.key[4])
            }
            steps::ROUTE if step.yes != 0 => {
                let to = self.addr(&addr(&step.key, 0));
                format!("the kernel's routes to {to} lead out of {}", self.device(step.row[0]))
            }
            steps::ROUTE => format!("no route to {}", self.addr(&addr(&step.key, 0))),
            steps::NEXT_HOP if step.yes != 0 => {
                let to = self.addr(&addr(&step.key, 0));
                format!("the next hop to {to} is known, out of {}", self.device(step.row[0]))
            }
            steps::NEXT_HOP => {
                format!("no next hop to {} is known", self.addr(&addr(&step.key, 0)))
            }
            other => format!("step of unknown kind {other}"),
        }
    }

    fn device_row(&self, step: &Step) -> String {
        let device = self.device(step.key[0]);
        if step.yes == 0 {
            return format!("{device} is no device by which others reach this node");
        }
        // The flags are the row's last two bytes.
        let [_, _, low, high] = step.row[size_of::<Device>() / 4 - 1].to_ne_bytes();
        let takes = u16::from_ne_bytes([low, high]) & XDP != 0;
        format!("{device} {} frames from XDP", if takes { "takes" } else { "takes no" })
    }

    fn redirect(&self, ifindex: u32, how: u32) -> String {
        let device = self.device(ifindex);
        match how {
            steps::PEER => format!("handed to the pod at the other end of {device}"),
            steps::NEIGHBOUR => format!("sent out of {device} to the next hop"),
            steps::INWARD => format!("taken in again at {device}"),
            _ => format!("sent out of {device}"),
        }
    }
}

/// What a tc program's verdict means (`TC_ACT_…` of linux/pkt_cls.h).
#[must_use]
pub fn tc_verdict(verdict: i32) -> &'static str {
    match verdict {
        -1 | 0 => "left to the host's network stack",
        2 => "dropped",
        7 => "sent on",
        _ => "another verdict",
    }
}

/// What an XDP program's verdict means (`enum xdp_action` of linux/bpf.h).
#[must_use]
pub fn xdp_verdict(verdict: i32) -> &'static str {
    match verdict {
        1 => "dropped",
        2 => "left to the tc programs and the stack",
        3 => "sent back out of its device",
        4 => "sent on",
        _ => "aborted",
    }
}

fn reason(number: u32) -> &'static str {
    let index = usize::try_from(number).unwrap_or(usize::MAX);
    DropReason::ALL.get(index).map_or("unknown reason", |reason| reason.words())
}

fn addr(words: &[u32], from: usize) -> Addr {
    Addr::from_words([words[from], words[from + 1], words[from + 2], words[from + 3]])
}

/// The two ports, or the port and what follows it, of a word.
const fn port(word: u32) -> [[u8; 2]; 2] {
    let [a, b, c, d] = word.to_ne_bytes();
    [[a, b], [c, d]]
}

/// A packet that opens a connection, as a device would see it.
#[must_use]
pub fn frame(from: SocketAddr, to: SocketAddr, proto: u8, to_mac: [u8; 6]) -> Vec<u8> {
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let (mut transport, sum_at) = match proto {
        TCP => {
            let rest = [0, 0, 0, 1, 0, 0, 0, 0, 0x50, TCP_SYN, 0xff, 0xff, 0, 0, 0, 0];
            ([&ports[..], &rest].concat(), Some(16))
        }
        SCTP => (association(&ports), None),
        _ => ([&ports[..], &[0, 12, 0, 0], b"orlo"].concat(), Some(6)),
    };
    let length = u16::try_from(transport.len()).unwrap_or(0).to_be_bytes();
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let pair = [octets(from.ip()), octets(to.ip())].concat();
    if let Some(at) = sum_at {
        let sum = checksum(&[&pair[..], &[0, proto], &length, &transport].concat());
        transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    let mut header = if from.is_ipv4() {
        let total = u16::try_from(IPV4_LEN + transport.len()).unwrap_or(0).to_be_bytes();
        let mut header =
            [&[0x45, 0][..], &total, &[0, 1, 0x40, 0, 64, proto, 0, 0], &pair].concat();
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    } else {
        [&[0x60, 0, 0, 0][..], &length, &[proto, 64], &pair].concat()
    };
    // IPv6's type (IANA).
    let kind = if from.is_ipv4() { ETH_IPV4 } else { [0x86, 0xdd] };
    let mut frame = [&to_mac[..], &[2, 0, 0, 0, 0, 1], &kind].concat();
    debug_assert_eq!(frame.len(), ETH_LEN);
    frame.append(&mut header);
    frame.append(&mut transport);
    frame
}

/// What begins an association of SCTP: a header and the chunk INIT (RFC 9260, 3.1 and 3.3.2).
fn association(ports: &[u8]) -> Vec<u8> {
    let init = [1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1];
    let mut packet = [ports, &[0; 8], &init].concat();
    let sum = crc32c(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    packet
}

/// SCTP's checksum (RFC 9260, appendix A), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let one = |crc: u32, _bit| if crc & 1 == 0 { crc >> 1 } else { (crc >> 1) ^ 0x82f6_3b78 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), one))
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let pair = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    let sum: u32 = bytes.chunks(2).map(pair).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_have_right_checksums() {
        for (from, to) in
            [("10.0.0.1:40000", "10.96.0.1:80"), ("[fd00::1]:40000", "[fd00:10:96::1]:80")]
        {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            for proto in [TCP, ebpf_common::UDP] {
                let frame = frame(from, to, proto, [1; 6]);
                let (header, pair) = if from.is_ipv4() { (20, 12) } else { (40, 8) };
                let (ip, transport) = frame[ETH_LEN..].split_at(header);
                let length = u16::try_from(transport.len()).unwrap().to_be_bytes();
                let pseudo = [&ip[pair..], &[0, proto], &length, transport].concat();
                assert_eq!(checksum(&pseudo), 0, "{from} {proto}");
                if from.is_ipv4() {
                    assert_eq!(checksum(ip), 0);
                }
            }
        }
    }

    #[test]
    fn an_association_of_sctp_begins_with_a_right_checksum() {
        // The check value of CRC-32C in the catalogue of CRCs (RevEng).
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let (from, to) = ("10.0.0.1:40000".parse().unwrap(), "10.96.0.1:80".parse().unwrap());
        let mut packet = frame(from, to, SCTP, [1; 6]).split_off(ETH_LEN + IPV4_LEN);
        assert_eq!(packet.len(), 32);
        let sum: Vec<u8> = packet.splice(8..12, [0; 4]).collect();
        assert_eq!(sum, crc32c(&packet).to_le_bytes());
    }

    #[test]
    fn steps_read_as_sentences() {
        let names = Names {
            devices: BTreeMap::from([(7, "orl7".to_owned())]),
            pods: BTreeMap::from([("10.244.2.3".parse().unwrap(), "default/web-1".to_owned())]),
            services: BTreeMap::from([("10.96.0.1:80".parse().unwrap(), "default/web".to_owned())]),
        };
        let put = |field: &mut [u32], addr: Addr| field[..4].copy_from_slice(&addr.words());
        let mut step = Step { kind: steps::SERVICE, yes: 1, ..Step::default() };
        put(&mut step.key, Addr::v4([10, 96, 0, 1]));
        step.key[4] = u32::from_ne_bytes([0, 80, TCP, 0]);
        step.row[..4].copy_from_slice(&[5, 3, 1, 60]);
        assert_eq!(
            names.words(&step),
            "frontend 10.96.0.1:80 (service default/web) TCP for clients from the cluster: \
             set 5 with 3 backends, a client keeps its backend for 60 s"
        );
        let mut step = Step { kind: steps::BACKEND, yes: 1, ..Step::default() };
        step.key[..2].copy_from_slice(&[5, 2]);
        put(&mut step.row, Addr::v4([10, 244, 2, 3]));
        step.row[4] = u32::from_ne_bytes([31, 144, 0, 0]);
        assert_eq!(
            names.words(&step),
            "slot 2 of set 5: backend 10.244.2.3:8080 (pod default/web-1)"
        );
        let mut step = Step { kind: steps::REDIRECT, ..Step::default() };
        step.key[..2].copy_from_slice(&[7, steps::PEER]);
        assert_eq!(names.words(&step), "handed to the pod at the other end of orl7 (7)");
        let step = Step { kind: steps::DROP, ..Step::default() };
        assert_eq!(names.words(&step), "counted: service has no ready endpoint");
    }
}
