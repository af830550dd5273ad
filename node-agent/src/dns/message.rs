//! DNS messages: reading queries and upstream answers, writing responses.
//!
//! Pure; never panics on any bytes. RFC 1035 section 4, EDNS(0) as in RFC 6891.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Fixed part of every message (RFC 1035 section 4.1.1).
const HEADER_BYTES: usize = 12;
/// Longest name on the wire (RFC 1035 section 2.3.4).
const NAME_BYTES: usize = 255;
/// A pointer to the question's name, which always starts right after the header.
const QUESTION_POINTER: [u8; 2] = [0xc0, 12];

/// Record types that we know (IANA "Resource Record (RR) TYPEs").
pub mod rtype {
    pub const A: u16 = 1;
    pub const NS: u16 = 2;
    pub const CNAME: u16 = 5;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const TXT: u16 = 16;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const OPT: u16 = 41;
    pub const IXFR: u16 = 251;
    pub const AXFR: u16 = 252;
    pub const ANY: u16 = 255;
}

/// Class `IN`, and `ANY` in questions.
pub const CLASS_IN: u16 = 1;
pub const CLASS_ANY: u16 = 255;

/// Response codes (RFC 1035 section 4.1.1; 16 is RFC 6891's).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Rcode {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    BadVers = 16,
}

/// A domain name in wire form, without compression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(Vec<u8>);

impl Name {
    /// From text with dots; a dot at the end changes nothing. `None` when it is no domain name.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text);
        let mut wire = Vec::new();
        for label in text.split('.').filter(|_| !text.is_empty()) {
            let length = u8::try_from(label.len()).ok().filter(|n| (1..64).contains(n))?;
            wire.push(length);
            wire.extend_from_slice(label.as_bytes());
        }
        wire.push(0);
        (wire.len() <= NAME_BYTES).then_some(Self(wire))
    }

    /// Its labels in lower case, most specific first. Bytes that are no UTF-8 become replacement
    /// characters, which no name of a cluster has.
    #[must_use]
    pub fn labels(&self) -> Vec<String> {
        let mut labels = Vec::new();
        let mut rest = self.0.as_slice();
        while let Some((&length, tail)) = rest.split_first() {
            let Some((label, next)) = tail.split_at_checked(usize::from(length)) else { break };
            if label.is_empty() {
                break;
            }
            labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
            rest = next;
        }
        labels
    }
}

/// A query with one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    pub id: u16,
    pub recursion_desired: bool,
    /// As the client wrote it: the answer repeats it with its case.
    pub name: Name,
    pub qtype: u16,
    pub qclass: u16,
    /// EDNS(0): the client's UDP payload size and version.
    pub edns: Option<Edns>,
}

/// The part of an OPT record that we act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns {
    /// Bytes.
    pub udp_size: u16,
    pub version: u8,
}

/// Why there is no query to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// No header, or a response: silence, else two servers could answer each other for ever.
    Ignore,
    /// Answer with this code and nothing but the header.
    Refuse { id: u16, opcode_bits: u16, rcode: Rcode },
}

/// Data of a record that we write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Cname(Name),
    Ns(Name),
    Ptr(Name),
    Srv { priority: u16, weight: u16, port: u16, target: Name },
    Txt(Box<str>),
    Soa { primary: Name, mailbox: Name, numbers: [u32; 5] },
}

/// A record that we write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// `None` is the question's name.
    pub owner: Option<Name>,
    /// Seconds.
    pub ttl: u32,
    pub data: Data,
}

/// What a response says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub rcode: Rcode,
    pub authoritative: bool,
    pub answers: Vec<Record>,
    pub authority: Vec<Record>,
}

/// Reads a query.
///
/// # Errors
/// What to do instead of answering it.
pub fn parse_query(bytes: &[u8]) -> Result<Query, Unreadable> {
    let (Some(id), Some(flags)) = (u16_at(bytes, 0), u16_at(bytes, 2)) else {
        return Err(Unreadable::Ignore);
    };
    if bytes.len() < HEADER_BYTES || flags & 0x8000 != 0 {
        return Err(Unreadable::Ignore);
    }
    let opcode_bits = flags & 0x7800;
    let refuse = |rcode| Unreadable::Refuse { id, opcode_bits, rcode };
    if opcode_bits != 0 {
        return Err(refuse(Rcode::NotImp));
    }
    parse_body(bytes, id, flags & 0x0100 != 0).ok_or_else(|| refuse(Rcode::FormErr))
}

fn parse_body(bytes: &[u8], id: u16, recursion_desired: bool) -> Option<Query> {
    if u16_at(bytes, 4)? != 1 {
        return None;
    }
    let (name, at) = read_name(bytes, HEADER_BYTES)?;
    // The first name of a message has nothing before it to point to.
    if at != HEADER_BYTES + name.0.len() {
        return None;
    }
    let (qtype, qclass) = (u16_at(bytes, at)?, u16_at(bytes, at + 2)?);
    let records = [6, 8, 10].map(|count| u16_at(bytes, count).map_or(0, u32::from));
    let mut at = at + 4;
    let mut edns = None;
    for _ in 0..records.iter().sum::<u32>() {
        let record = read_record(bytes, at)?;
        if record.rtype == rtype::OPT {
            let [_, version, _, _] = record.ttl.to_be_bytes();
            let doubled = edns.replace(Edns { udp_size: record.class, version }).is_some();
            if doubled {
                return None;
            }
        }
        at = record.end;
    }
    Some(Query { id, recursion_desired, name, qtype, qclass, edns })
}

/// A query of our own, for an upstream server.
#[must_use]
pub fn encode_query(id: u16, name: &Name, qtype: u16) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + name.0.len() + 4);
    // Recursion desired; one question.
    for value in [id, 0x0100, 1, 0, 0, 0] {
        out.extend_from_slice(&value.to_be_bytes());
    }
    out.extend_from_slice(&name.0);
    out.extend_from_slice(&qtype.to_be_bytes());
    out.extend_from_slice(&CLASS_IN.to_be_bytes());
    out
}

/// What an upstream server says about a name: its aliases and addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// The low four bits of the response code, as they came.
    pub rcode: u16,
    pub truncated: bool,
    pub answers: Vec<Record>,
}

/// Reads the aliases and addresses out of an upstream answer; `None` when it is malformed.
#[must_use]
pub fn parse_upstream(bytes: &[u8]) -> Option<Upstream> {
    let flags = u16_at(bytes, 2)?;
    let mut at = HEADER_BYTES;
    for _ in 0..u16_at(bytes, 4)? {
        let (_, end) = read_name(bytes, at)?;
        at = end.checked_add(4)?;
    }
    let mut answers = Vec::new();
    for _ in 0..u16_at(bytes, 6)? {
        let record = read_record(bytes, at)?;
        let data = bytes.get(record.data..record.end)?;
        let data = match record.rtype {
            rtype::A => Some(Data::A(<[u8; 4]>::try_from(data).ok()?.into())),
            rtype::AAAA => Some(Data::Aaaa(<[u8; 16]>::try_from(data).ok()?.into())),
            rtype::CNAME => Some(Data::Cname(read_name(bytes, record.data)?.0)),
            _ => None,
        };
        if let Some(data) = data {
            answers.push(Record { owner: Some(record.owner), ttl: record.ttl, data });
        }
        at = record.end;
    }
    Some(Upstream { rcode: flags & 0x000f, truncated: flags & 0x0200 != 0, answers })
}

/// Whether bytes are an answer to a question of ours: its id, and the same question.
#[must_use]
pub fn is_answer_to(bytes: &[u8], query: &[u8]) -> bool {
    let question = |message: &[u8]| {
        let (name, at) = read_name(message, HEADER_BYTES)?;
        Some((name.labels(), u16_at(message, at)?, u16_at(message, at + 2)?))
    };
    u16_at(bytes, 0) == u16_at(query, 0)
        && u16_at(bytes, 2).is_some_and(|flags| flags & 0x8000 != 0)
        && (u16_at(bytes, 4) == Some(0) || question(bytes) == question(query))
}

/// Writes a response of at most `limit` bytes. What does not fit is left out and marked truncated.
#[must_use]
pub fn encode_response(query: &Query, response: &Response, limit: usize) -> Vec<u8> {
    // Response, recursion available; authoritative and recursion desired as they are.
    let mut flags = 0x8080 | (code(response.rcode) & 0x000f);
    flags |= if response.authoritative { 0x0400 } else { 0 };
    flags |= if query.recursion_desired { 0x0100 } else { 0 };
    let mut out = vec![0; HEADER_BYTES];
    out.extend_from_slice(&query.name.0);
    out.extend_from_slice(&query.qtype.to_be_bytes());
    out.extend_from_slice(&query.qclass.to_be_bytes());
    let opt = query.edns.map(|_| opt_record(response.rcode));
    let room = limit.saturating_sub(opt.map_or(0, |record| record.len()));
    let (answers, whole) = append(&mut out, &response.answers, room);
    let (authority, also_whole) =
        if whole { append(&mut out, &response.authority, room) } else { (0, true) };
    if !whole || !also_whole {
        flags |= 0x0200;
    }
    if let Some(record) = opt {
        out.extend_from_slice(&record);
    }
    let counts = [query.id, flags, 1, answers, authority, u16::from(opt.is_some())];
    for (slot, value) in out.chunks_exact_mut(2).zip(counts) {
        slot.copy_from_slice(&value.to_be_bytes());
    }
    out
}

/// Writes a response that has only a header.
#[must_use]
pub fn encode_refusal(id: u16, opcode_bits: u16, rcode: Rcode) -> Vec<u8> {
    let flags = 0x8080 | opcode_bits | (code(rcode) & 0x000f);
    [id, flags, 0, 0, 0, 0].iter().flat_map(|value| value.to_be_bytes()).collect()
}

/// Appends records while they fit; says how many, and whether these were all.
fn append(out: &mut Vec<u8>, records: &[Record], limit: usize) -> (u16, bool) {
    for (count, record) in (0_u16..).zip(records) {
        let start = out.len();
        write_record(out, record);
        if out.len() > limit {
            out.truncate(start);
            return (count, false);
        }
    }
    (u16::try_from(records.len()).unwrap_or(u16::MAX), true)
}

fn write_record(out: &mut Vec<u8>, record: &Record) {
    match &record.owner {
        None => out.extend_from_slice(&QUESTION_POINTER),
        Some(owner) => out.extend_from_slice(&owner.0),
    }
    out.extend_from_slice(&type_of(&record.data).to_be_bytes());
    out.extend_from_slice(&CLASS_IN.to_be_bytes());
    out.extend_from_slice(&record.ttl.to_be_bytes());
    let data = data_bytes(&record.data);
    // The longest data is a SOA of two names and 20 bytes, or a text of 256 bytes.
    out.extend_from_slice(&u16::try_from(data.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(&data);
}

const fn type_of(data: &Data) -> u16 {
    match data {
        Data::A(_) => rtype::A,
        Data::Aaaa(_) => rtype::AAAA,
        Data::Cname(_) => rtype::CNAME,
        Data::Ns(_) => rtype::NS,
        Data::Ptr(_) => rtype::PTR,
        Data::Srv { .. } => rtype::SRV,
        Data::Txt(_) => rtype::TXT,
        Data::Soa { .. } => rtype::SOA,
    }
}

fn data_bytes(data: &Data) -> Vec<u8> {
    match data {
        Data::A(ip) => ip.octets().to_vec(),
        Data::Aaaa(ip) => ip.octets().to_vec(),
        Data::Cname(name) | Data::Ns(name) | Data::Ptr(name) => name.0.clone(),
        Data::Srv { priority, weight, port, target } => {
            let numbers = [*priority, *weight, *port];
            let mut out: Vec<u8> = numbers.iter().flat_map(|n| n.to_be_bytes()).collect();
            out.extend_from_slice(&target.0);
            out
        }
        Data::Txt(text) => {
            let text = text.as_bytes();
            let length = u8::try_from(text.len()).unwrap_or(u8::MAX);
            let mut out = vec![length];
            out.extend(text.iter().take(usize::from(length)));
            out
        }
        Data::Soa { primary, mailbox, numbers } => {
            let mut out = primary.0.clone();
            out.extend_from_slice(&mailbox.0);
            out.extend(numbers.iter().flat_map(|n| n.to_be_bytes()));
            out
        }
    }
}

/// An OPT record: root name, our UDP payload size, the upper bits of the code, version 0.
fn opt_record(rcode: Rcode) -> [u8; 11] {
    let [opt_high, opt_low] = rtype::OPT.to_be_bytes();
    let [size_high, size_low] = super::answer::UDP_PAYLOAD_BYTES.to_be_bytes();
    let extended = u8::try_from(code(rcode) >> 4).unwrap_or_default();
    [0, opt_high, opt_low, size_high, size_low, extended, 0, 0, 0, 0, 0]
}

const fn code(rcode: Rcode) -> u16 {
    // The discriminants are the protocol's numbers, and `repr(u16)` makes the cast exact.
    rcode as u16
}

struct RawRecord {
    owner: Name,
    rtype: u16,
    class: u16,
    ttl: u32,
    /// Where its data starts, and where the next record does.
    data: usize,
    end: usize,
}

fn read_record(bytes: &[u8], at: usize) -> Option<RawRecord> {
    let (owner, at) = read_name(bytes, at)?;
    let ttl = bytes.get(at + 4..at + 8)?.try_into().ok()?;
    let data = at + 10;
    let end = data + usize::from(u16_at(bytes, at + 8)?);
    if end > bytes.len() {
        return None;
    }
    Some(RawRecord {
        owner,
        rtype: u16_at(bytes, at)?,
        class: u16_at(bytes, at + 2)?,
        ttl: u32::from_be_bytes(ttl),
        data,
        end,
    })
}

/// Reads a name, following compression pointers; says where the bytes after it start. Each pointer
/// must point before the one that led there, so there can be no loop.
fn read_name(bytes: &[u8], start: usize) -> Option<(Name, usize)> {
    let mut wire = Vec::new();
    let mut at = start;
    let mut end = None;
    let mut lowest = start;
    loop {
        let length = *bytes.get(at)?;
        match length & 0xc0 {
            0 => {
                let next = at + 1 + usize::from(length);
                wire.extend_from_slice(bytes.get(at..next)?);
                if wire.len() > NAME_BYTES {
                    return None;
                }
                if length == 0 {
                    return Some((Name(wire), end.unwrap_or(next)));
                }
                at = next;
            }
            0xc0 => {
                let target = usize::from(u16_at(bytes, at)? & 0x3fff);
                end = end.or(Some(at + 2));
                if target >= lowest {
                    return None;
                }
                (lowest, at) = (target, target);
            }
            _ => return None,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(pair.try_into().ok()?))
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
