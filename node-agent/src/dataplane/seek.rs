//! Flows that are over although packets of them may still come: datagrams to a frontend that is withdrawn, and
//! whatever a pod of this node had that is gone.
//!
//! Pure; the walk over the table that asks for it is `collect.rs`'s. While a frontend's backends stay in their set,
//! for another frontend leads there, nothing but this tells a flow of datagrams that its own is gone; upstream
//! deletes the entries of its connection tracking (`pkg/proxy/conntrack/cleanup.go`). A connection of TCP drains, as
//! there. What a pod leaves behind would be met by the next one with its address.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::{
    UDP,
    addr::Addr,
    conntrack::{FORWARD, Flow, FlowKey},
    service::{SCOPE_EXTERNAL, SCOPE_INTERNAL, Service, ServiceKey},
};

/// What a walk is to look for. Empty: nothing.
///
/// Of ports there are 65,536, and of pods at most as many as the node had since the last walk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sought {
    /// Ports of frontends that lead elsewhere now, or nowhere.
    ports: BTreeSet<[u8; 2]>,
    /// Any port: it is not known what was withdrawn.
    any_port: bool,
    /// Addresses of pods that are gone, and since when (seconds of the monotonic clock).
    pods: BTreeMap<Addr, u32>,
}

impl Sought {
    /// Flows by every frontend that is gone: after a start, as an earlier agent may have died between its
    /// withdrawal and the walk.
    #[must_use]
    pub fn any_port() -> Self {
        Self { any_port: true, ..Self::default() }
    }

    /// Flows by these frontends, unless they lead where they led; those of datagrams only.
    pub fn frontends(keys: &[ServiceKey]) -> Self {
        let ports = keys.iter().filter(|key| key.proto == UDP).map(|key| key.port).collect();
        Self { ports, ..Self::default() }
    }

    /// Flows of a pod that is gone.
    #[must_use]
    pub fn pod(addr: Addr, since_s: u32) -> Self {
        Self { pods: BTreeMap::from([(addr, since_s)]), ..Self::default() }
    }

    /// Whether there is nothing to look for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.any_port && self.ports.is_empty() && self.pods.is_empty()
    }

    /// Looks for what `more` asks for too.
    pub fn add(&mut self, more: Self) {
        self.any_port |= more.any_port;
        self.ports.extend(more.ports);
        self.pods.extend(more.pods);
    }

    /// Of some rows, those to delete: both halves of each flow, the forward one first. `frontend` finds a row of
    /// the frontends, `is_here` says whether a pod of this node has an address now.
    ///
    /// # Errors
    ///
    /// What `frontend` says.
    pub fn over<E>(
        &self,
        rows: &[(FlowKey, Flow)],
        mut frontend: impl FnMut(&ServiceKey) -> Result<Option<Service>, E>,
        is_here: impl Fn(&Addr) -> bool,
    ) -> Result<Vec<FlowKey>, E> {
        let mut over = Vec::new();
        for (key, flow) in rows.iter().filter(|(_, flow)| flow.direction == FORWARD) {
            let is_asked = key.proto == UDP && flow.set != 0;
            let is_over = self.is_of_gone_pod(key, flow, &is_here)
                || is_asked
                    && (self.any_port || self.ports.contains(&key.dport))
                    && !leads(key, flow, &mut frontend)?;
            if is_over {
                over.extend([*key, flow.opposite(key.proto)]);
            }
        }
        Ok(over)
    }

    /// Whether a pod had the flow, at either end, that is gone. Another one that has its address has the flows of
    /// later seconds.
    fn is_of_gone_pod(&self, key: &FlowKey, flow: &Flow, is_here: impl Fn(&Addr) -> bool) -> bool {
        let is_gone = |addr: &Addr| {
            let since = self.pods.get(addr)?;
            Some(!is_here(addr) || flow.last_seen.wrapping_sub(*since).cast_signed() <= 0)
        };
        [&key.src, &flow.dst].into_iter().filter_map(is_gone).any(|is_gone| is_gone)
    }
}

/// Whether the frontend that a flow asked still leads to the set from which its backend was chosen. A row at the
/// address itself goes before a node port's.
fn leads<E>(
    key: &FlowKey,
    flow: &Flow,
    frontend: &mut impl FnMut(&ServiceKey) -> Result<Option<Service>, E>,
) -> Result<bool, E> {
    for addr in [key.dst, key.dst.any()] {
        let mut is_there = false;
        for scope in [SCOPE_INTERNAL, SCOPE_EXTERNAL] {
            let row = frontend(&ServiceKey { addr, port: key.dport, proto: key.proto, scope })?;
            if row.is_some_and(|row| row.set == flow.set) {
                return Ok(true);
            }
            is_there |= row.is_some();
        }
        if is_there {
            return Ok(false);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use ebpf_common::{TCP, conntrack::REVERSE};

    use super::*;

    const SERVICE: Addr = Addr::v4([10, 96, 0, 1]);
    const NODE: Addr = Addr::v4([192, 0, 2, 1]);
    const CLIENT: Addr = Addr::v4([198, 51, 100, 9]);
    const POD: Addr = Addr::v4([10, 244, 1, 7]);

    fn flow(proto: u8, to: (Addr, u16), set: u32) -> [(FlowKey, Flow); 2] {
        let key = FlowKey {
            src: CLIENT,
            dst: to.0,
            sport: [1, 2],
            dport: to.1.to_be_bytes(),
            proto,
            reserved: [0; 3],
        };
        let flow = Flow {
            src: CLIENT,
            dst: POD,
            sport: key.sport,
            dport: [0, 53],
            set,
            direction: FORWARD,
            last_seen: 100,
            ..Flow::default()
        };
        let answer = Flow { src: key.dst, dst: CLIENT, direction: REVERSE, ..flow };
        [(key, flow), (flow.opposite(proto), answer)]
    }

    fn over(sought: &Sought, rows: &[(FlowKey, Flow)], services: &[(ServiceKey, u32)]) -> usize {
        let frontend = |asked: &ServiceKey| {
            let row = services.iter().find(|(key, _)| key == asked);
            Ok::<_, Infallible>(row.map(|(_, set)| Service { set: *set, ..Service::default() }))
        };
        let over = sought.over(rows, frontend, |_addr| false).unwrap();
        if let [first, second, ..] = over[..] {
            assert_eq!(
                [first, second],
                [rows[0].0, rows[1].0],
                "both halves, the forward one first"
            );
        }
        over.len()
    }

    fn at(addr: Addr, port: u16, scope: u8) -> ServiceKey {
        ServiceKey { addr, port: port.to_be_bytes(), proto: UDP, scope }
    }

    #[test]
    fn datagrams_end_with_their_frontend_and_connections_drain() {
        let sought = Sought::frontends(&[at(SERVICE, 53, SCOPE_INTERNAL)]);
        let asked = flow(UDP, (SERVICE, 53), 7);
        let there = [(at(SERVICE, 53, SCOPE_INTERNAL), 7)];
        assert_eq!(over(&sought, &asked, &there), 0, "it is back");
        assert_eq!(over(&sought, &asked, &[]), 2);
        assert_eq!(over(&sought, &asked, &[(there[0].0, 8)]), 2, "another service has it");
        assert_eq!(over(&sought, &flow(TCP, (SERVICE, 53), 7), &[]), 0);
        assert_eq!(over(&sought, &flow(UDP, (SERVICE, 53), 0), &[]), 0, "no service's");
        let other = flow(UDP, (SERVICE, 54), 7);
        assert_eq!(over(&sought, &other, &[]), 0, "nobody asked for it");
        assert_eq!(over(&Sought::any_port(), &other, &[]), 2);
        let tcp = ServiceKey { proto: TCP, ..at(SERVICE, 53, SCOPE_INTERNAL) };
        assert!(Sought::frontends(&[tcp]).is_empty());
    }

    #[test]
    fn a_node_port_is_asked_at_any_address_by_either_scope_and_behind_one_of_the_address() {
        let any = |scope| at(Addr::ANY_V4, 30_053, scope);
        let sought = Sought::frontends(&[any(SCOPE_INTERNAL)]);
        let asked = flow(UDP, (NODE, 30_053), 7);
        for scope in [SCOPE_INTERNAL, SCOPE_EXTERNAL] {
            assert_eq!(over(&sought, &asked, &[(any(scope), 7)]), 0, "{scope}");
        }
        assert_eq!(over(&sought, &asked, &[]), 2);
        let taken = [(any(SCOPE_INTERNAL), 7), (at(NODE, 30_053, SCOPE_INTERNAL), 8)];
        assert_eq!(over(&sought, &asked, &taken), 2);
    }

    #[test]
    fn a_pod_that_is_gone_takes_its_flows_along_and_its_successor_keeps_its_own() {
        for (addr, gone) in [(CLIENT, 2), (POD, 2), (NODE, 0)] {
            let sought = Sought::pod(addr, 90);
            for proto in [TCP, UDP] {
                let rows = flow(proto, (SERVICE, 53), 7);
                let there = [(at(SERVICE, 53, SCOPE_INTERNAL), 7)];
                assert_eq!(over(&sought, &rows, &there), gone, "{addr} {proto}");
            }
        }
        let rows = flow(TCP, (SERVICE, 53), 7);
        for (since, gone) in [(99, 0), (100, 2), (101, 2)] {
            let no_frontend = |_key: &ServiceKey| Ok::<_, Infallible>(None);
            let over = Sought::pod(POD, since).over(&rows, no_frontend, |_addr| true).unwrap();
            assert_eq!(over.len(), gone, "{since}");
        }
    }
}
