//! A stub resolver's bytes (RFC 1035): one question for an address, its answer, and `resolv.conf`. Pure.

use std::net::Ipv4Addr;

/// What a resolver reads from `/etc/resolv.conf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ResolvConf {
    pub(crate) servers: Vec<Ipv4Addr>,
    pub(crate) searches: Vec<String>,
    /// Dots from which a name is tried as it is before the search list.
    pub(crate) ndots: usize,
}

impl ResolvConf {
    /// Lines that are not understood are passed over, as the C library does.
    pub(crate) fn parse(text: &str) -> Self {
        let mut conf = Self { servers: Vec::new(), searches: Vec::new(), ndots: 1 };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    conf.servers.extend(words.filter_map(|word| word.parse::<Ipv4Addr>().ok()));
                }
                Some("search") => conf.searches = words.map(str::to_owned).collect(),
                Some("options") => {
                    for ndots in words.filter_map(|word| word.strip_prefix("ndots:")?.parse().ok())
                    {
                        conf.ndots = ndots;
                    }
                }
                _ => {}
            }
        }
        conf
    }

    /// The names to ask for, in order.
    pub(crate) fn candidates(&self, host: &str) -> Vec<String> {
        if let Some(absolute) = host.strip_suffix('.') {
            return vec![absolute.to_owned()];
        }
        let searched = self.searches.iter().map(|domain| format!("{host}.{domain}"));
        if host.matches('.').count() >= self.ndots {
            std::iter::once(host.to_owned()).chain(searched).collect()
        } else {
            searched.chain(std::iter::once(host.to_owned())).collect()
        }
    }
}

/// What a server said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Address(Ipv4Addr),
    /// No address of this kind, with the response code (0: the name has none; 3: no such name).
    None(u8),
}

/// A recursive query for the A record of `name`.
pub(crate) fn query(id: u16, name: &str) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    // Recursion desired; one question.
    bytes.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        // A label has at most 63 bytes (RFC 1035 section 2.3.4).
        let label = label.as_bytes().get(..63).unwrap_or(label.as_bytes());
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend_from_slice(label);
    }
    bytes.extend_from_slice(&[0, 0, 1, 0, 1]);
    bytes
}

/// The first address in a reply to query `id`; `None` when it is not a whole reply to it.
pub(crate) fn parse(reply: &[u8], id: u16) -> Option<Answer> {
    let word = |at: usize| Some(u16::from_be_bytes([*reply.get(at)?, *reply.get(at + 1)?]));
    if word(0)? != id || reply.get(2)? & 0x80 == 0 {
        return None;
    }
    let code = reply.get(3)? & 0xf;
    let mut at = 12;
    for _ in 0..word(4)? {
        at = skip_name(reply, at)? + 4;
    }
    for _ in 0..word(6)? {
        at = skip_name(reply, at)?;
        let (kind, size) = (word(at)?, usize::from(word(at + 8)?));
        let data = reply.get(at + 10..at + 10 + size)?;
        if let (1, &[a, b, c, d]) = (kind, data) {
            return Some(Answer::Address(Ipv4Addr::new(a, b, c, d)));
        }
        at += 10 + size;
    }
    Some(Answer::None(code))
}

/// The place after a name: labels up to a zero, or up to a pointer.
fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            length if length >= 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_go_through_the_search_list_first() {
        let conf = ResolvConf::parse(
            "# x\nnameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local\noptions ndots:5\n",
        );
        assert_eq!(conf.servers, [Ipv4Addr::new(10, 96, 0, 10)]);
        assert_eq!(
            conf.candidates("nginx"),
            ["nginx.default.svc.cluster.local", "nginx.svc.cluster.local", "nginx"]
        );
        assert_eq!(conf.candidates("a.b."), ["a.b"]);
        assert_eq!(ResolvConf::parse("search x").candidates("a.b"), ["a.b", "a.b.x"]);
    }

    #[test]
    fn address_is_read_behind_question_and_alias() {
        let mut reply = query(7, "a.b");
        reply[2] |= 0x80;
        reply[7] = 2;
        // An alias (type 5) of two bytes, then the address, both named by a pointer to the question.
        reply.extend_from_slice(&[0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 2, 0xc0, 12]);
        reply.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 10, 96, 3, 4]);
        assert_eq!(parse(&reply, 7), Some(Answer::Address(Ipv4Addr::new(10, 96, 3, 4))));
        assert_eq!(parse(&reply, 8), None, "another query's");
        assert_eq!(parse(&reply[..reply.len() - 1], 7), None, "cut off");
    }

    #[test]
    fn no_such_name_is_told_with_its_code() {
        let mut reply = query(7, "a.b");
        reply[2] |= 0x80;
        reply[3] = 3;
        assert_eq!(parse(&reply, 7), Some(Answer::None(3)));
    }
}
