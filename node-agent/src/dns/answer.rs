//! One query in, what to do about it out.
//!
//! Pure. Names below the cluster domain and reverse names of the cluster's addresses are answered
//! here; everything else is somebody else's to answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    message::{
        CLASS_ANY, CLASS_IN, Data, Name, Query, Rcode, Record, Response, Unreadable,
        encode_refusal, encode_response, parse_query, rtype,
    },
    zone::{Lookup, Zone},
};

/// The largest UDP payload that we send: what fits into IPv6's smallest MTU (DNS flag day 2020), so
/// that no answer is ever fragmented on its way through the overlay.
pub const UDP_PAYLOAD_BYTES: u16 = 1232;
/// Seconds; what CoreDNS's kubernetes plugin gives by default.
const TTL: u32 = 5;
/// Aliases followed inside the cluster before we give up.
const ALIASES: usize = 8;

/// How a query came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// What the server knows.
#[derive(Clone, Copy, Debug)]
pub struct Knowledge<'a> {
    /// `None` while no zone was ever loaded: cluster names are then a server failure, not unknown.
    pub zone: Option<&'a Zone>,
    /// Lower case, without dots at its ends.
    pub domain: &'a str,
}

/// What to do with a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Reply(Vec<u8>),
    /// Hand the query to an upstream server as it is; when there is none, send [`failure`].
    Forward,
    /// Ask an upstream server for `target`, then send [`complete`].
    Resolve(Pending),
    Ignore,
}

/// An answer that ends in a name outside the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    query: Query,
    limit: usize,
    aliases: Vec<Record>,
    pub target: Name,
    pub qtype: u16,
}

/// Decides on a query.
#[must_use]
pub fn answer(bytes: &[u8], knowledge: Knowledge<'_>, transport: Transport) -> Outcome {
    let query = match parse_query(bytes) {
        Ok(query) => query,
        Err(Unreadable::Ignore) => return Outcome::Ignore,
        Err(Unreadable::Refuse { id, opcode_bits, rcode }) => {
            return Outcome::Reply(encode_refusal(id, opcode_bits, rcode));
        }
    };
    let limit = limit_of(&query, transport);
    let plain = |rcode| Outcome::Reply(encode_response(&query, &empty(rcode), limit));
    if query.edns.is_some_and(|edns| edns.version != 0) {
        return plain(Rcode::BadVers);
    }
    if !matches!(query.qclass, CLASS_IN | CLASS_ANY)
        || matches!(query.qtype, rtype::AXFR | rtype::IXFR)
    {
        return plain(Rcode::Refused);
    }
    let labels = query.name.labels();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    if let Some(relative) = below(&labels, knowledge.domain) {
        return match knowledge.zone {
            None => plain(Rcode::ServFail),
            Some(zone) => in_cluster(&query, relative, (zone, knowledge.domain), limit),
        };
    }
    let reverse = reverse_address(&labels).zip(knowledge.zone);
    let names = reverse.map(|(ip, zone)| zone.names_of(ip, knowledge.domain)).unwrap_or_default();
    if names.is_empty() {
        return Outcome::Forward;
    }
    let wanted = matches!(query.qtype, rtype::PTR | rtype::ANY);
    let answers = if wanted { names.into_iter().map(own).collect() } else { Vec::new() };
    Outcome::Reply(encode_response(&query, &found(answers, knowledge.domain), limit))
}

/// "Server failure" for a query that nobody answered; `None` when it is not even a query.
#[must_use]
pub fn failure(bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
    let query = parse_query(bytes).ok()?;
    Some(encode_response(&query, &empty(Rcode::ServFail), limit_of(&query, transport)))
}

/// The whole answer, once the upstream server has said what the target is; `None` when it has not.
#[must_use]
pub fn complete(pending: Pending, upstream: Option<(u16, Vec<Record>)>) -> Vec<u8> {
    let mut response = empty(Rcode::ServFail);
    if let Some((rcode, records)) = upstream {
        response.answers = pending.aliases;
        response.answers.extend(records);
        response.rcode = match rcode {
            0 => Rcode::NoError,
            3 => Rcode::NxDomain,
            _ => Rcode::ServFail,
        };
    }
    encode_response(&pending.query, &response, pending.limit)
}

fn limit_of(query: &Query, transport: Transport) -> usize {
    match transport {
        Transport::Tcp => usize::from(u16::MAX),
        // 512 without EDNS (RFC 1035), and a smaller size in it counts as 512 (RFC 6891).
        Transport::Udp => {
            let size = query.edns.map_or(512, |edns| edns.udp_size.max(512));
            usize::from(size.min(UDP_PAYLOAD_BYTES))
        }
    }
}

/// The labels before the domain; `None` when the name is not in it.
fn below<'a, 'b>(labels: &'a [&'b str], domain: &str) -> Option<&'a [&'b str]> {
    let count = domain.split('.').count();
    let (relative, tail) = labels.split_at_checked(labels.len().checked_sub(count)?)?;
    tail.iter().copied().eq(domain.split('.')).then_some(relative)
}

fn in_cluster(
    query: &Query,
    relative: &[&str],
    (zone, domain): (&Zone, &str),
    limit: usize,
) -> Outcome {
    let reply = |response| Outcome::Reply(encode_response(query, &response, limit));
    let mut lookup = zone.lookup(relative, domain, query.qtype);
    let mut aliases: Vec<Record> = Vec::new();
    let mut owner: Option<Name> = None;
    if relative.is_empty() && matches!(query.qtype, rtype::SOA | rtype::ANY) {
        return reply(found(soa(domain, None).into_iter().collect(), domain));
    }
    while let Lookup::Alias(target) = lookup {
        let Some(target) = Name::from_text(&target).filter(|_| aliases.len() < ALIASES) else {
            return reply(empty(Rcode::ServFail));
        };
        let alias = Record { owner, ttl: TTL, data: Data::Cname(target.clone()) };
        aliases.push(alias);
        if query.qtype == rtype::CNAME {
            return reply(found(aliases, domain));
        }
        let labels = target.labels();
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let Some(relative) = below(&labels, domain) else {
            let (query, qtype) = (query.clone(), query.qtype);
            return Outcome::Resolve(Pending { query, limit, aliases, target, qtype });
        };
        lookup = zone.lookup(relative, domain, query.qtype);
        owner = Some(target);
    }
    let mut answers = aliases;
    let mut rcode = Rcode::NoError;
    match lookup {
        Lookup::Records(records) => {
            let turn = usize::from(query.id) % records.len().max(1);
            let mut records: Vec<_> = records
                .into_iter()
                .map(|data| Record { owner: owner.clone(), ttl: TTL, data })
                .collect();
            // Clients take the first address; each query starts elsewhere.
            records.rotate_left(turn);
            answers.extend(records);
            return reply(found(answers, domain));
        }
        Lookup::NxDomain => rcode = Rcode::NxDomain,
        Lookup::NoData | Lookup::Alias(_) => {}
    }
    let authority = soa(domain, Name::from_text(domain)).into_iter().collect();
    reply(Response { rcode, authoritative: true, answers, authority })
}

fn own(data: Data) -> Record {
    Record { owner: None, ttl: TTL, data }
}

const fn empty(rcode: Rcode) -> Response {
    Response { rcode, authoritative: false, answers: Vec::new(), authority: Vec::new() }
}

/// A positive answer, or "no such data" with the zone's SOA when there is none.
fn found(answers: Vec<Record>, domain: &str) -> Response {
    let none = answers.is_empty();
    let authority = none.then(|| soa(domain, Name::from_text(domain))).flatten();
    Response {
        rcode: Rcode::NoError,
        authoritative: true,
        answers,
        authority: authority.into_iter().collect(),
    }
}

/// The SOA record; its last number is how long "no" may be remembered (RFC 2308 section 4).
fn soa(domain: &str, owner: Option<Name>) -> Option<Record> {
    let primary = Name::from_text(&format!("ns.dns.{domain}"))?;
    let mailbox = Name::from_text(&format!("hostmaster.{domain}"))?;
    // Serial, refresh, retry, expire, minimum; nobody transfers the zone, so the first is constant.
    let numbers = [1, 7200, 1800, 86400, TTL];
    Some(Record { owner, ttl: TTL, data: Data::Soa { primary, mailbox, numbers } })
}

/// The address of a name under `in-addr.arpa` or `ip6.arpa`.
fn reverse_address(labels: &[&str]) -> Option<IpAddr> {
    match labels {
        [d, c, b, a, "in-addr", "arpa"] => {
            let octet = |text: &str| text.parse::<u8>().ok();
            Some(IpAddr::V4(Ipv4Addr::new(octet(a)?, octet(b)?, octet(c)?, octet(d)?)))
        }
        [nibbles @ .., "ip6", "arpa"] if nibbles.len() == 32 => {
            let mut bits = 0_u128;
            for nibble in nibbles.iter().rev() {
                let digit = u8::from_str_radix(nibble, 16).ok().filter(|n| *n < 16)?;
                bits = (bits << 4) | u128::from(digit);
            }
            Some(IpAddr::V6(Ipv6Addr::from_bits(bits)))
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
