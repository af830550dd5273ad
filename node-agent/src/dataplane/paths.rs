//! Which path each kind of traffic takes on this node and why, in words for people.
//!
//! Pure.

use super::{load::TcPath, status::Report, xdp};

/// Why a device of the node's has no programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untranslated {
    /// The programs look for the IP header behind Ethernet's.
    NoEthernet,
    /// It is not among those that the agent was told.
    NotChosen,
    /// The agent was told it, and there is none with an address that others can reach.
    NotThere,
}

impl Untranslated {
    /// What that means.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::NoEthernet => {
                "its packets have no Ethernet header; no service answers clients there, and pods' packets leave by \
                 it under the pods' own addresses"
            }
            Self::NotChosen => {
                "--devices does not name it; no service answers clients there, and pods' packets leave by it under \
                 the pods' own addresses"
            }
            Self::NotThere => {
                "--devices names it, and there is none with an address that others can reach"
            }
        }
    }
}

/// Where a socket program is missing: what is different then.
const WITHOUT: [(&str, &str); 4] = [
    ("cg_connect", "connections go by the packet path"),
    ("cg_sendmsg", "unconnected UDP goes by the packet path"),
    ("cg_recvmsg", "answers to unconnected UDP come from the backend's address"),
    ("cg_getpeername", "getpeername() shows the backend's address"),
];

impl Report {
    /// A line for each kind of traffic.
    #[must_use]
    pub fn path_lines(&self) -> Vec<String> {
        let mut lines = vec![line("services from this node", &self.socket_words())];
        lines.extend(self.missing.iter().map(|name| {
            let is_of = |(prefix, _): &&(&str, &str)| name.starts_with(*prefix);
            let without = WITHOUT.iter().find(is_of).map_or("", |(_, words)| *words);
            line("", &format!("but this kernel has no hook for {name}: {without}"))
        }));
        lines.extend([
            line("connected UDP, SCTP, raw", &self.datagram_words()),
            line("pods, tunnels, node ports", tc_words(self.tc)),
            line("services from outside", &xdp::words(&self.xdp)),
        ]);
        lines.extend(
            self.untranslated.iter().map(|(name, why)| {
                line("not translated", &format!("device {name}: {}", why.words()))
            }),
        );
        lines.push(line(
            "restart",
            &match &self.pins {
                Some(path) => format!("invisible (pinned below {})", path.display()),
                None => "ends all translation (nothing is pinned)".to_owned(),
            },
        ));
        lines
    }

    fn socket_words(&self) -> String {
        let has = |prefix: &str| self.hooks.iter().any(|name| name.starts_with(prefix));
        match &self.sockets {
            None if self.has_host => {
                "per packet by orlop.host (no cgroup is given whose sockets to translate)"
                    .to_owned()
            }
            None => {
                "not translated (no cgroup is given, and there is no device orlop.host)".to_owned()
            }
            Some(cgroup) => {
                let hooks = [("connect", "cg_connect"), ("sendmsg", "cg_sendmsg")];
                let hooks: Vec<&str> =
                    hooks.iter().filter(|(_, of)| has(of)).map(|(call, _)| *call).collect();
                if hooks.is_empty() {
                    return format!("no program at the sockets of cgroup {}", cgroup.display());
                }
                format!("translated at {} (cgroup {})", hooks.join(" and "), cgroup.display())
            }
        }
    }

    /// What no program at a socket may or can translate: it would stay with a backend that goes.
    fn datagram_words(&self) -> String {
        let own = match (self.has_host, &self.sockets) {
            (true, _) => "the node's own by orlop.host",
            (false, Some(_)) => {
                "of the node's own connected UDP at connect and the others not at all, as there is no device \
                 orlop.host"
            }
            (false, None) => "the node's own not at all, as there is no device orlop.host",
        };
        format!(
            "per packet: pods' by their links, {own}; SCTP where a service's targetPort is its port"
        )
    }
}

/// A line of the status under its name.
pub(super) fn line(name: &str, words: &str) -> String {
    format!("{name:25} {words}")
}

/// A way of tc as it is called in JSON and metrics.
pub(super) const fn tc_name(path: TcPath) -> &'static str {
    match path {
        TcPath::Tcx => "tcx",
        TcPath::Clsact => "clsact",
    }
}

const fn tc_words(path: Option<TcPath>) -> &'static str {
    match path {
        Some(TcPath::Tcx) => "per packet by tcx links",
        Some(TcPath::Clsact) => "per packet by clsact filters (this kernel has no tcx)",
        None => "no device attached yet",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The lines of a node of which this is known.
    fn lines(report: Report) -> String {
        report.path_lines().join("\n")
    }

    fn usual() -> Report {
        Report {
            sockets: Some("/sys/fs/cgroup".into()),
            hooks: vec!["cg_connect4", "cg_sendmsg4", "cg_recvmsg4", "cg_getpeername4"],
            has_host: true,
            tc: Some(TcPath::Tcx),
            ..Report::default()
        }
    }

    #[test]
    fn each_kind_of_traffic_has_its_path() {
        assert_eq!(
            lines(usual()),
            "services from this node   translated at connect and sendmsg (cgroup /sys/fs/cgroup)\n\
             connected UDP, SCTP, raw  per packet: pods' by their links, the node's own by orlop.host; SCTP where a \
             service's targetPort is its port\n\
             pods, tunnels, node ports per packet by tcx links\n\
             services from outside     no device yet\n\
             restart                   ends all translation (nothing is pinned)"
        );
    }

    #[test]
    fn a_hook_that_the_kernel_lacks_is_named_with_what_it_costs() {
        let lacking = Report { missing: vec!["cg_getpeername4"], ..usual() };
        let text = lines(lacking);
        assert!(text.contains(
            "but this kernel has no hook for cg_getpeername4: getpeername() shows the backend's address"
        ));
        let none = Report { hooks: vec!["cg_sendmsg4"], missing: vec!["cg_connect4"], ..usual() };
        let text = lines(none);
        assert!(text.contains("translated at sendmsg (cgroup"), "{text}");
        assert!(text.contains("cg_connect4: connections go by the packet path"), "{text}");
        for name in super::super::load::CGROUP_HOOKS.map(|(name, _)| name) {
            assert!(WITHOUT.iter().any(|(prefix, _)| name.starts_with(prefix)), "{name}");
        }
    }

    #[test]
    fn without_sockets_or_the_host_device_it_says_what_is_left() {
        let text = lines(Report { sockets: None, ..usual() });
        assert!(text.contains("services from this node   per packet by orlop.host"), "{text}");
        let text = lines(Report { has_host: false, ..usual() });
        assert!(text.contains("connected UDP at connect and the others not at all"), "{text}");
        let text = lines(Report { sockets: None, has_host: false, ..usual() });
        assert!(text.contains("services from this node   not translated"), "{text}");
        assert!(text.contains("the node's own not at all"), "{text}");
    }

    #[test]
    fn a_device_without_programs_is_named_with_the_reason() {
        let untranslated = BTreeMap::from([
            ("eth1".to_owned(), Untranslated::NotChosen),
            ("eth9".to_owned(), Untranslated::NotThere),
            ("tun0".to_owned(), Untranslated::NoEthernet),
        ]);
        let text = lines(Report { untranslated, ..usual() });
        for words in [
            "not translated            device eth1: --devices does not name it",
            "not translated            device eth9: --devices names it, and there is none",
            "not translated            device tun0: its packets have no Ethernet header",
        ] {
            assert!(text.contains(words), "{words} not in\n{text}");
        }
    }
}
