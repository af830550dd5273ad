//! The rules that kube-proxy's iptables mode writes, in its shape. Pure.
//!
//! Shape: one `KUBE-SERVICES` rule a service port (matched in order, which is the O(n) that users feel),
//! a `KUBE-SVC-…` chain that picks an endpoint by `statistic`, a `KUBE-SEP-…` chain an endpoint that
//! marks hairpins and DNATs, the masquerade mark in `KUBE-POSTROUTING`, and the conntrack rules of
//! `KUBE-FORWARD` (kubernetes `pkg/proxy/iptables/proxier.go`).

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
};

/// A TCP service and its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub address: SocketAddrV4,
    pub endpoints: Vec<SocketAddrV4>,
}

/// `count` services on port 80 of consecutive addresses of 10.96.0.0/12, the one measured in the
/// middle, where a linear search meets it after half of the others. Only it has `real` endpoints;
/// the others' are addresses that nobody has.
#[must_use]
pub fn services(count: u32, real: &[SocketAddrV4]) -> (Vec<Service>, SocketAddrV4) {
    let middle = count / 2;
    let address = |n: u32| {
        SocketAddrV4::new(Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + n), 80)
    };
    let endpoints = |n: u32| -> Vec<SocketAddrV4> {
        let base = Ipv4Addr::new(10, 32, 0, 0).to_bits() + n * 2;
        (0..2).map(|i| SocketAddrV4::new(Ipv4Addr::from_bits(base + i), 8080)).collect()
    };
    let all = (0..count)
        .map(|n| Service {
            address: address(n),
            endpoints: if n == middle { real.to_vec() } else { endpoints(n) },
        })
        .collect();
    (all, address(middle))
}

/// Input of `iptables-restore` that programs the services.
#[must_use]
pub fn iptables(services: &[Service], cluster_cidr: &str) -> String {
    let mut chains = String::new();
    let mut rules = String::new();
    for (n, service) in services.iter().enumerate() {
        service_rules(n, service, cluster_cidr, (&mut chains, &mut rules));
    }
    format!(
        "*nat\n\
         :KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
         :KUBE-MARK-MASQ - [0:0]\n{chains}\
         -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" \
         -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n{rules}\
         -A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports\" \
         -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n\
         *filter\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n"
    )
}

fn service_rules(n: usize, service: &Service, cidr: &str, out: (&mut String, &mut String)) {
    let (chains, rules) = out;
    let (ip, port) = (service.address.ip(), service.address.port());
    let name = format!("bench/service-{n}:http");
    let svc = format!("KUBE-SVC-{n:016X}");
    push(chains, format_args!(":{svc} - [0:0]"));
    push(
        rules,
        format_args!(
            "-A KUBE-SERVICES -d {ip}/32 -p tcp -m comment --comment \"{name} cluster IP\" \
             -m tcp --dport {port} -j {svc}"
        ),
    );
    push(
        rules,
        format_args!(
            "-A {svc} ! -s {cidr} -d {ip}/32 -p tcp -m comment --comment \"{name} cluster IP\" \
             -m tcp --dport {port} -j KUBE-MARK-MASQ"
        ),
    );
    for (i, endpoint) in service.endpoints.iter().enumerate() {
        let sep = format!("KUBE-SEP-{n:012X}{i:04X}");
        let left = service.endpoints.len() - i;
        let choice = if left == 1 { String::new() } else { probability(left) };
        push(chains, format_args!(":{sep} - [0:0]"));
        push(
            rules,
            format_args!("-A {svc} -m comment --comment \"{name} -> {endpoint}\" {choice}-j {sep}"),
        );
        let from = endpoint.ip();
        push(
            rules,
            format_args!("-A {sep} -s {from}/32 -m comment --comment \"{name}\" -j KUBE-MARK-MASQ"),
        );
        push(
            rules,
            format_args!(
                "-A {sep} -p tcp -m comment --comment \"{name}\" -m tcp -j DNAT \
                 --to-destination {endpoint}"
            ),
        );
    }
}

/// The chance that makes the choice uniform when `left` endpoints are left, with kube-proxy's digits.
fn probability(left: usize) -> String {
    #[expect(clippy::cast_precision_loss, reason = "at most thousands of endpoints")]
    let chance = 1.0 / left as f64;
    format!("-m statistic --mode random --probability {chance:.10} ")
}

fn push(out: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _infallible = writeln!(out, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measured_service_stands_in_the_middle_with_the_real_endpoints() {
        let real = [SocketAddrV4::new(Ipv4Addr::new(10, 244, 0, 3), 8080)];
        let (services, target) = services(1000, &real);
        assert_eq!(services.len(), 1000);
        assert_eq!(services[500].address, target);
        assert_eq!(services[500].endpoints, real);
        assert_eq!(services[499].endpoints.len(), 2);
    }

    #[test]
    fn endpoints_are_chosen_with_falling_odds_and_the_last_without() {
        let endpoint = |n| SocketAddrV4::new(Ipv4Addr::new(10, 244, 0, n), 8080);
        let address = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 9), 80);
        let service = Service { address, endpoints: vec![endpoint(1), endpoint(2), endpoint(3)] };
        let text = iptables(&[service], "10.244.0.0/16");
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
    }
}
