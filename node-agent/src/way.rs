//! `node-agent trace FROM TO:PORT`: which way a connection would take through this node's programs.
//!
//! Effects: loads the copy of the programs that traces, runs it, and asks the kernel for its devices.
//! Nothing is written but the copy's own notes. Call it on a thread that may block.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use ebpf_common::{
    SCTP, TCP, UDP,
    addr::Addr,
    config::Config,
    service::Peer,
    socket::{Ask, CONNECT},
    trace::{self as steps, PLAIN, Step},
};
use serde_json::Value;

use crate::{
    chain::chain,
    dataplane::{
        look::Look,
        trace::{Hop, Names, frame, tc_verdict, xdp_verdict},
        tracer::{Answer, Run, Tracer},
        xdp,
    },
    model::{LocalEndpoint, ObjectKey, ServiceKind, ServiceRow},
    sys::{netlink::Netlink, socket::netns_cookie},
    table::Table,
};

/// What names are looked up in.
#[derive(Clone, Debug)]
pub struct Known {
    pub services: Table<ObjectKey, ServiceRow>,
    pub endpoints: Table<IpAddr, LocalEndpoint>,
}

/// Programs that a packet may pass one after another; more is a loop.
const MAX_HOPS: usize = 6;
/// The device at whose ingress the node's own packets to services are translated.
const HOST_PEER: &str = "orlop.net";
/// Port of the made-up client: the first of Linux's ephemeral range.
const CLIENT_PORT: u16 = 32_768;

/// Where a connection starts.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Start {
    Pod(Arc<LocalEndpoint>),
    Node,
    Outside(IpAddr),
}

/// Traces a connection and gives its hops.
///
/// # Errors
/// What is wrong with the question, or why the programs cannot be run.
pub fn trace(
    pins: &Path,
    known: &Known,
    arguments: &BTreeMap<&str, &str>,
) -> Result<Value, String> {
    let argument = |name| arguments.get(name).copied().unwrap_or_default();
    let proto = match argument("protocol") {
        "" | "tcp" => TCP,
        "udp" => UDP,
        "sctp" => SCTP,
        other => return Err(format!("unknown protocol {other:?}; there are tcp, udp, sctp")),
    };
    let (start, to) = known.resolve(argument("from"), argument("to"))?;
    let look = Look::below(pins);
    let config = look.config().map_err(words)?;
    let (names, endpoints) = (known.names()?, known.endpoints.clone());
    let tracer = Tracer::load(pins).map_err(|error| chain(&error))?;
    let pins = pins.to_owned();
    let mut way = Way { pins, tracer, look, config, names, endpoints, proto, hops: Vec::new() };
    match start {
        Start::Pod(pod) => way.start_at_pod(&pod, to)?,
        Start::Node => way.start_at_node(to)?,
        Start::Outside(ip) => way.start_outside(ip, to)?,
    }
    Ok(way.hops.iter().map(Hop::json).collect())
}

/// The hops for people.
#[must_use]
pub fn text(hops: &[Value]) -> String {
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut out = String::new();
    for hop in hops {
        out += &format!("{} ({})\n", word(&hop["place"]), word(&hop["program"]));
        for decision in hop["decisions"].as_array().into_iter().flatten() {
            out += &format!("    {}\n", word(decision));
        }
        out += &format!("  => {}\n", word(&hop["result"]));
    }
    out
}

struct Way {
    pins: PathBuf,
    tracer: Tracer,
    look: Look,
    config: Config,
    names: Names,
    endpoints: Table<IpAddr, LocalEndpoint>,
    proto: u8,
    hops: Vec<Hop>,
}

impl Way {
    fn start_at_pod(&mut self, pod: &LocalEndpoint, to: SocketAddr) -> Result<(), String> {
        let Some(to) = self.socket(pod.netns_cookie, to)? else { return Ok(()) };
        let packet = frame(SocketAddr::new(pod.ip, CLIENT_PORT), to, self.proto, pod.host_mac);
        self.packets("tc_from_pod", pod.host_ifindex, packet)
    }

    fn start_at_node(&mut self, to: SocketAddr) -> Result<(), String> {
        let cookie = netns_cookie().map_err(words)?;
        let Some(to) = self.socket(cookie, to)? else { return Ok(()) };
        let dst = Addr::from(to.ip());
        let source = SocketAddr::new(self.config.gateway_for(&dst).ip(), CLIENT_PORT);
        let packet = frame(source, to, self.proto, [0; 6]);
        let vxlan_ifindex = self.config.vxlan_ifindex;
        if let Some(pod) = self.endpoints.row(&to.ip()) {
            return self.packets("tc_to_pod", pod.host_ifindex, packet);
        }
        let host = self.names.devices.iter().find(|(_, name)| *name == HOST_PEER);
        if self.config.is_service_address(&dst)
            && let Some((host, _)) = host
        {
            return self.packets("tc_from_host", *host, packet);
        }
        if self.look.is_elsewhere(to.ip()).map_err(words)? && vxlan_ifindex != 0 {
            return self.packets("tc_to_overlay", vxlan_ifindex, packet);
        }
        self.hops.push(Hop {
            place: "this node's network stack".to_owned(),
            program: "no program",
            decisions: Vec::new(),
            result: format!("the kernel's routes lead to {to}"),
        });
        Ok(())
    }

    fn start_outside(&mut self, ip: IpAddr, to: SocketAddr) -> Result<(), String> {
        let (ifindex, mac) = underlay(to.ip())?;
        let mut packet = frame(SocketAddr::new(ip, CLIENT_PORT), to, self.proto, mac);
        if let Some(program) = xdp::running(&self.pins, ifindex) {
            let run = self.tracer.xdp(program, ifindex, &packet).map_err(|error| chain(&error))?;
            let place = format!("a packet at {}, before the stack", self.names.device(ifindex));
            let goes_on = run.verdict == XDP_PASS;
            self.note(place, program, &run, xdp_verdict(run.verdict));
            if !goes_on {
                return Ok(());
            }
            packet = run.frame;
        }
        self.packets("tc_from_underlay", ifindex, packet)
    }

    /// The hop at the socket: where it goes, or `None` if it is refused. The kernel asks no program about
    /// sockets of SCTP.
    fn socket(&mut self, netns: u64, to: SocketAddr) -> Result<Option<SocketAddr>, String> {
        if self.proto == SCTP {
            return Ok(Some(to));
        }
        let wanted =
            Peer { addr: Addr::from(to.ip()), port: to.port().to_be_bytes(), reserved: [0; 2] };
        // What chance would be for TCP, and the socket for UDP.
        let [random, _] = halves(RandomState::new().build_hasher().finish());
        let ask = Ask { netns, wanted, random, proto: self.proto, call: CONNECT, reserved: [0; 6] };
        let (answer, noted) = self.tracer.ask(&ask).map_err(|error| chain(&error))?;
        let (next, result) = match answer {
            Answer::Left => (Some(to), "left as it is".to_owned()),
            Answer::Translated(peer) => {
                let backend = SocketAddr::new(peer.addr.ip(), u16::from_be_bytes(peer.port));
                (Some(backend), format!("the socket goes to {backend}"))
            }
            Answer::Refused(reason) => (None, format!("refused: {}", reason.words())),
        };
        let decisions = self.sentences(&noted);
        let place = format!("a socket connects to {to}, asked by the twin of the socket programs");
        self.hops.push(Hop { place, program: "tc_trace_socket", decisions, result });
        Ok(next)
    }

    /// A tc program and those to whose devices the packet is sent.
    fn packets(
        &mut self,
        program: &'static str,
        ifindex: u32,
        packet: Vec<u8>,
    ) -> Result<(), String> {
        let (mut program, mut ifindex, mut packet) = (program, ifindex, packet);
        while self.hops.len() < MAX_HOPS {
            if !self.tracer.has(program) {
                return Err(format!("this agent has no program {program}"));
            }
            let run = self.tracer.then_tc(program, ifindex, &packet);
            let run = run.map_err(|error| chain(&error))?;
            let place = format!("a packet at {}", self.names.device(ifindex));
            self.note(place, program, &run, tc_verdict(run.verdict));
            let sent = run.steps.iter().rev().find(|step| step.kind == steps::REDIRECT);
            let to_overlay = sent.is_some_and(|step| {
                step.key[..2] == [self.config.vxlan_ifindex, PLAIN] && program != "tc_to_overlay"
            });
            if !to_overlay {
                return Ok(());
            }
            (program, ifindex, packet) = ("tc_to_overlay", self.config.vxlan_ifindex, run.frame);
        }
        Ok(())
    }

    fn note(&mut self, place: String, program: &'static str, run: &Run, result: &str) {
        let decisions = self.sentences(&run.steps);
        self.hops.push(Hop { place, program, decisions, result: result.to_owned() });
    }

    /// The steps in words. What a program looks up again is said once.
    fn sentences(&self, steps: &[Step]) -> Vec<String> {
        let is_news = |at: &usize| !steps[..*at].contains(&steps[*at]);
        let news = (0..steps.len()).filter(is_news);
        news.map(|at| self.names.words(&steps[at])).collect()
    }
}

/// `XDP_PASS` of linux/bpf.h.
const XDP_PASS: i32 = 2;

impl Known {
    fn resolve(&self, from: &str, to: &str) -> Result<(Start, SocketAddr), String> {
        let pods =
            if let Some(name) = from.strip_prefix("pod/") { self.pods(name)? } else { vec![] };
        let ip: Option<IpAddr> = from.parse().ok();
        if pods.is_empty() && ip.is_none() && from != "node" {
            return Err(format!(
                "FROM is {from:?}; want pod/NAME or pod/NAME.NAMESPACE, node, or an address"
            ));
        }
        let fits = |to: &SocketAddr| match ip {
            Some(ip) => ip.is_ipv4() == to.is_ipv4(),
            None => pods.is_empty() || pods.iter().any(|pod| pod.ip.is_ipv4() == to.is_ipv4()),
        };
        let to = self.targets(to)?.into_iter().find(fits);
        let to = to.ok_or("FROM has no address of a family that TO has")?;
        let pod = pods.into_iter().find(|pod| pod.ip.is_ipv4() == to.is_ipv4());
        let start = match (pod, ip) {
            (Some(pod), _) => Start::Pod(pod),
            (None, Some(ip)) => Start::Outside(ip),
            (None, None) => Start::Node,
        };
        Ok((start, to))
    }

    fn targets(&self, to: &str) -> Result<Vec<SocketAddr>, String> {
        if let Ok(address) = to.parse() {
            return Ok(vec![address]);
        }
        let wrong = || {
            format!(
                "TO is {to:?}; want svc/NAME[.NAMESPACE]:PORT, pod/NAME[.NAMESPACE]:PORT or ADDRESS:PORT"
            )
        };
        let (name, port) = to.rsplit_once(':').ok_or_else(wrong)?;
        let port: u16 = port.parse().map_err(|_not| wrong())?;
        let ips: Vec<IpAddr> = if let Some(name) = name.strip_prefix("svc/") {
            cluster_ips(&key(name), &*self.service(name)?)?
        } else {
            let name = name.strip_prefix("pod/").ok_or_else(wrong)?;
            self.pods(name)?.iter().map(|pod| pod.ip).collect()
        };
        Ok(ips.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
    }

    fn service(&self, name: &str) -> Result<Arc<ServiceRow>, String> {
        let key = key(name);
        self.services.row(&key).ok_or_else(|| format!("there is no service {key}"))
    }

    fn pods(&self, name: &str) -> Result<Vec<Arc<LocalEndpoint>>, String> {
        let key = key(name);
        let rows = self.endpoints.changes_since(0).upserts;
        let found = rows.into_iter().map(|(_, row)| row).filter(|row| row.pod == key);
        let found: Vec<_> = found.collect();
        if found.is_empty() { Err(format!("this node has no pod {key}")) } else { Ok(found) }
    }

    fn names(&self) -> Result<Names, String> {
        let links = Netlink::open().map_err(words)?.links().map_err(words)?;
        let pods = self.endpoints.changes_since(0).upserts;
        Ok(Names {
            devices: links.into_iter().map(|link| (link.index, link.name)).collect(),
            pods: pods.into_iter().map(|(ip, row)| (ip, row.pod.to_string())).collect(),
            services: self.frontends(),
        })
    }

    /// Where services answer, by address and port; node ports at the any-address.
    fn frontends(&self) -> BTreeMap<SocketAddr, String> {
        let mut services = BTreeMap::new();
        for (key, row) in self.services.changes_since(0).upserts {
            for port in &row.ports {
                let ips = row.cluster_ips.iter().chain(&row.external_ips).chain(&row.ingress_ips);
                for ip in ips {
                    services.insert(SocketAddr::new(*ip, port.port), key.to_string());
                }
                for any in [Addr::ANY_V4, Addr::ANY_V6].iter().filter(|_any| port.node_port != 0) {
                    services.insert(SocketAddr::new(any.ip(), port.node_port), key.to_string());
                }
            }
        }
        services
    }
}

fn cluster_ips(service: &ObjectKey, row: &ServiceRow) -> Result<Vec<IpAddr>, String> {
    match row.kind {
        ServiceKind::Headless => {
            Err(format!("service {service} has no cluster IP; its name leads to pods"))
        }
        ServiceKind::ExternalName => {
            let name = &row.external_name;
            Err(format!("service {service} has no cluster IP; its name leads to {name}"))
        }
        ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => {
            Ok(row.cluster_ips.clone())
        }
    }
}

/// `NAME` or `NAME.NAMESPACE`.
fn key(name: &str) -> ObjectKey {
    let (name, namespace) = name.rsplit_once('.').unwrap_or((name, "default"));
    ObjectKey::new(namespace, name)
}

/// The device that has the address, else the first by which others reach the node; and its MAC.
fn underlay(address: IpAddr) -> Result<(u32, [u8; 6]), String> {
    let mut netlink = Netlink::open().map_err(words)?;
    let mut first = None;
    for link in netlink.links().map_err(words)? {
        let ours = link.name.starts_with("orl") || link.name == "lo";
        let (false, Some(mac)) = (ours, link.mac) else { continue };
        let addresses = netlink.addresses(link.index).map_err(words)?;
        if addresses.iter().any(|(ip, _)| *ip == address) {
            return Ok((link.index, mac));
        }
        if first.is_none() && !addresses.is_empty() {
            first = Some((link.index, mac));
        }
    }
    first.ok_or_else(|| "this node has no network device with an address".to_owned())
}

const fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Protocol, ServicePort};

    fn known() -> Known {
        let known = Known { services: Table::new(), endpoints: Table::new() };
        for ip in ["10.244.1.7", "fd00:244::7"] {
            let ip: IpAddr = ip.parse().unwrap();
            let row = LocalEndpoint {
                pod: ObjectKey::new("shop", "web"),
                ip,
                netns_cookie: 1,
                host_ifindex: 7,
                host_mac: [2; 6],
                pod_mac: [3; 6],
                host_ports: [].into(),
            };
            known.endpoints.upsert(ip, row);
        }
        let of_kind = |kind, external_name: &str| ServiceRow {
            kind,
            external_name: external_name.into(),
            ..ServiceRow::default()
        };
        let key = |name| ObjectKey::new("shop", name);
        known.services.upsert(key("less"), of_kind(ServiceKind::Headless, ""));
        known.services.upsert(key("far"), of_kind(ServiceKind::ExternalName, "far.example"));
        known
    }

    #[test]
    fn every_address_of_a_service_has_its_name() {
        let known = Known { services: Table::new(), endpoints: Table::new() };
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let row = ServiceRow {
            cluster_ips: vec![ip("10.96.0.1")],
            external_ips: vec![ip("192.0.2.1")].into(),
            ingress_ips: vec![ip("172.31.0.5")].into(),
            ports: vec![ServicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: 30_080,
            }],
            ..ServiceRow::default()
        };
        known.services.upsert(ObjectKey::new("d", "web"), row);
        let frontends = known.frontends();
        let at = ["10.96.0.1:80", "192.0.2.1:80", "172.31.0.5:80", "0.0.0.0:30080", "[::]:30080"];
        for at in at {
            assert_eq!(
                frontends.get(&at.parse().unwrap()).map(String::as_str),
                Some("d/web"),
                "{at}"
            );
        }
    }

    #[test]
    fn ends_are_found_by_name_and_family() {
        let known = known();
        let resolve = |from, to| known.resolve(from, to);
        let (start, to) = resolve("pod/web.shop", "[fd00::1]:80").unwrap();
        assert!(matches!(start, Start::Pod(pod) if pod.ip.is_ipv6()) && to.is_ipv6());
        let (start, _) = resolve("node", "pod/web.shop:80").unwrap();
        assert_eq!(start, Start::Node);
        let (start, _) = resolve("192.0.2.1", "10.0.0.1:80").unwrap();
        assert!(matches!(start, Start::Outside(_)));
        let wrong = [
            ("pod/web", "10.0.0.1:80", "this node has no pod default/web"),
            ("node", "svc/web:80", "there is no service default/web"),
            ("node", "web", "TO is \"web\""),
            ("x", "10.0.0.1:80", "FROM is \"x\""),
            ("192.0.2.1", "[fd00::1]:80", "no address of a family"),
            (
                "pod/web.shop",
                "svc/less.shop:80",
                "service shop/less has no cluster IP; its name leads to pods",
            ),
            ("node", "svc/far.shop:80", "its name leads to far.example"),
        ];
        for (from, to, message) in wrong {
            let error = resolve(from, to).expect_err(message);
            assert!(error.contains(message), "{error}");
        }
    }
}
