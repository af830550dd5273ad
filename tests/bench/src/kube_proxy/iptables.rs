//! The rules that kube-proxy's iptables mode writes, in its shape. Pure.
//!
//! Shape: one `KUBE-SERVICES` rule a service port (matched in order, which is the O(n) that users feel),
//! a `KUBE-SVC-…` chain that picks an endpoint by `statistic`, a `KUBE-SEP-…` chain an endpoint that
//! marks hairpins and DNATs, `KUBE-EXT-…` for node ports, the masquerade mark in `KUBE-POSTROUTING`,
//! and the filter jumps for new connections (kubernetes `pkg/proxy/iptables/proxier.go`).

use std::fmt::Write as _;

use super::{Service, push};

/// Input of `iptables-restore --noflush` that programs the services.
#[must_use]
pub fn full(services: &[Service], cluster_cidr: &str) -> String {
    let mut parts = Parts::default();
    for service in services {
        parts.dispatch(service);
        parts.endpoints(service, cluster_cidr);
    }
    format!("{}{BASE_JUMPS}COMMIT\n{FILTER}{FILTER_JUMPS}COMMIT\n", parts.nat())
}

/// What kube-proxy feeds to `iptables-restore --noflush` when one service's endpoints changed: the
/// dispatch rules of all services, the chains of the changed one, and the endpoint chains that went.
#[must_use]
pub fn change(services: &[Service], old: &Service, new: &Service, cluster_cidr: &str) -> String {
    let mut parts = Parts::default();
    for service in services {
        parts.dispatch(service);
    }
    parts.endpoints(new, cluster_cidr);
    let gone = old.endpoints.iter().zip(0..).filter(|(one, _)| !new.endpoints.contains(one));
    let mut stale = String::new();
    for (_, slot) in gone {
        let chain = endpoint_chain(old, slot);
        push(&mut parts.chains, format_args!(":{chain} - [0:0]"));
        push(&mut stale, format_args!("-X {chain}"));
    }
    format!("{}{stale}COMMIT\n{FILTER}COMMIT\n", parts.nat())
}

/// Written once, when kube-proxy starts: what leads from the built-in chains to its own.
const BASE_JUMPS: &str = "\
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
";

/// The filter table; no service without endpoints or with source ranges is in the set, so most of
/// its chains are empty.
const FILTER: &str = "\
*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
";

const FILTER_JUMPS: &str = "\
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
";

/// Chain and rule lines of the nat table.
#[derive(Default)]
struct Parts {
    chains: String,
    rules: String,
}

impl Parts {
    fn nat(&self) -> String {
        let Self { chains, rules } = self;
        format!(
            "*nat\n\
             :KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
             :KUBE-MARK-MASQ - [0:0]\n{chains}\
             -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
             -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
             -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" \
             -j MASQUERADE --random-fully\n\
             -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n{rules}\
             -A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must \
             be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n"
        )
    }

    /// The rules that lead to the service's own chains.
    fn dispatch(&mut self, service: &Service) {
        let (label, proto) = (service.label(), service.protocol.name());
        let (ip, port) = (service.address.ip(), service.address.port());
        let svc = service_chain(service);
        push(
            &mut self.rules,
            format_args!(
                "-A KUBE-SERVICES -d {ip}/32 -p {proto} -m comment --comment \"{label} cluster IP\" \
                 -m {proto} --dport {port} -j {svc}"
            ),
        );
        if let Some(node_port) = service.node_port {
            let ext = external_chain(service);
            push(
                &mut self.rules,
                format_args!(
                    "-A KUBE-NODEPORTS -p {proto} -m comment --comment \"{label}\" \
                     -m {proto} --dport {node_port} -j {ext}"
                ),
            );
        }
    }

    /// The service's own chains.
    fn endpoints(&mut self, service: &Service, cidr: &str) {
        let (label, proto) = (service.label(), service.protocol.name());
        let (ip, port) = (service.address.ip(), service.address.port());
        let svc = service_chain(service);
        let Self { chains, rules } = self;
        push(chains, format_args!(":{svc} - [0:0]"));
        push(
            rules,
            format_args!(
                "-A {svc} ! -s {cidr} -d {ip}/32 -p {proto} -m comment --comment \
                 \"{label} cluster IP\" -m {proto} --dport {port} -j KUBE-MARK-MASQ"
            ),
        );
        if service.node_port.is_some() {
            let ext = external_chain(service);
            push(chains, format_args!(":{ext} - [0:0]"));
            push(
                rules,
                format_args!(
                    "-A {ext} -m comment --comment \"masquerade traffic for {label} external \
                     destinations\" -j KUBE-MARK-MASQ\n-A {ext} -j {svc}"
                ),
            );
        }
        for (endpoint, slot) in service.endpoints.iter().zip(0..) {
            let sep = endpoint_chain(service, slot);
            let choice = odds(service.endpoints.len(), slot);
            push(chains, format_args!(":{sep} - [0:0]"));
            let from = endpoint.ip();
            push(
                rules,
                format_args!(
                    "-A {svc} -m comment --comment \"{label} -> {endpoint}\" {choice}-j {sep}\n\
                     -A {sep} -s {from}/32 -m comment --comment \"{label}\" -j KUBE-MARK-MASQ\n\
                     -A {sep} -p {proto} -m comment --comment \"{label}\" -m {proto} -j DNAT \
                     --to-destination {endpoint}"
                ),
            );
        }
    }
}

fn service_chain(service: &Service) -> String {
    format!("KUBE-SVC-{:016X}", service.number)
}

fn external_chain(service: &Service) -> String {
    format!("KUBE-EXT-{:016X}", service.number)
}

/// Named by service and endpoint, as kube-proxy's hash is.
fn endpoint_chain(service: &Service, slot: usize) -> String {
    let ip = service.endpoints.get(slot).map_or(0, |endpoint| endpoint.ip().to_bits());
    format!("KUBE-SEP-{:08X}{ip:08X}", service.number)
}

/// The match that makes the choice uniform, with kube-proxy's digits; none for the last endpoint.
fn odds(endpoints: usize, slot: usize) -> String {
    let left = endpoints - slot;
    let mut out = String::new();
    if left > 1 {
        #[expect(clippy::cast_precision_loss, clippy::as_conversions, reason = "thousands at most")]
        let chance = 1.0 / left as f64;
        // Writing to a String cannot fail.
        let _infallible = write!(out, "-m statistic --mode random --probability {chance:.10} ");
    }
    out
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddrV4};

    use super::{super::Protocol, *};

    fn service(endpoints: &[u8]) -> Service {
        let at = |n: &u8| SocketAddrV4::new(Ipv4Addr::new(10, 244, 0, *n), 8080);
        Service {
            number: 7,
            protocol: Protocol::Tcp,
            address: SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 9), 80),
            node_port: Some(30_080),
            endpoints: endpoints.iter().map(at).collect(),
        }
    }

    #[test]
    fn endpoints_are_chosen_with_falling_odds_and_the_last_without() {
        let text = full(&[service(&[1, 2, 3])], "10.244.0.0/16");
        let odds: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("->"))
            .map(|line| {
                line.split("--probability ")
                    .nth(1)
                    .map_or("rest", |p| p.split(' ').next().unwrap_or(p))
            })
            .collect();
        assert_eq!(odds, ["0.3333333333", "0.5000000000", "rest"]);
        assert_eq!(text.matches("-j DNAT").count(), 3);
        assert_eq!(text.matches("--dport 30080 -j KUBE-EXT-").count(), 1);
    }

    #[test]
    fn a_change_rewrites_all_dispatch_rules_but_only_its_own_chains() {
        let (old, new) = (service(&[1, 2]), service(&[1, 3]));
        let other = Service { number: 8, ..service(&[4]) };
        let text = change(&[other, new.clone()], &old, &new, "10.244.0.0/16");
        assert_eq!(text.matches("-A KUBE-SERVICES -d").count(), 2);
        assert_eq!(text.matches("-j DNAT").count(), 2);
        assert_eq!(text.matches("-X KUBE-SEP-").count(), 1, "{text}");
    }
}
