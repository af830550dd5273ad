//! The rules that kube-proxy's nftables mode writes, in its shape. Pure.
//!
//! Shape: verdict maps from address, protocol and port to a chain a service (`service-ips`,
//! `service-nodeports`), in which `numgen random` picks a chain an endpoint that marks hairpins and
//! DNATs; the checks of new connections against services without endpoints, source ranges and unknown
//! service addresses; masquerade by mark (kubernetes `pkg/proxy/nftables/proxier.go` and its README).

use super::{SERVICE_CIDR, Service, push};

/// Input of `nft -f` that programs the services; node ports answer on `node_ip`.
#[must_use]
pub fn full(services: &[Service], cluster_cidr: &str, node_ip: &str) -> String {
    let mut out = format!("{BASE}add element {T} nodeport-ips {{ {node_ip} }}\n");
    push(
        &mut out,
        format_args!(
            "add rule {T} cluster-ips-check ip daddr {{ {SERVICE_CIDR} }} drop \
             comment \"Drop traffic to unallocated ClusterIPs\""
        ),
    );
    for service in services {
        chains(&mut out, service, cluster_cidr);
        elements(&mut out, service);
    }
    out
}

/// What kube-proxy feeds to `nft -f` when one service's endpoints changed: that service's chains,
/// emptied and written anew, and the chains of endpoints that went.
#[must_use]
pub fn change(old: &Service, new: &Service, cluster_cidr: &str) -> String {
    let mut out = String::new();
    chains(&mut out, new, cluster_cidr);
    let gone = old.endpoints.iter().zip(0..).filter(|(one, _)| !new.endpoints.contains(one));
    for (_, slot) in gone {
        let chain = endpoint_chain(old, slot);
        push(&mut out, format_args!("flush chain {T} {chain}\ndelete chain {T} {chain}"));
    }
    out
}

/// Family and name of the table.
const T: &str = "ip kube-proxy";

/// What is written once, when kube-proxy starts.
const BASE: &str = r#"add table ip kube-proxy { comment "rules for kube-proxy" ; }
add set ip kube-proxy cluster-ips { type ipv4_addr ; comment "Active ClusterIPs" ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; comment "IPs that accept NodePort traffic" ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy firewall-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy reject-chain
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
"#;

/// The service's own chains, emptied and filled.
fn chains(out: &mut String, service: &Service, cidr: &str) {
    let svc = service_chain(service);
    let (ip, proto) = (service.address.ip(), service.protocol.name());
    for (endpoint, slot) in service.endpoints.iter().zip(0..) {
        let chain = endpoint_chain(service, slot);
        let from = endpoint.ip();
        push(
            out,
            format_args!(
                "add chain {T} {chain}\nflush chain {T} {chain}\n\
                 add rule {T} {chain} ip saddr {from} jump mark-for-masquerade\n\
                 add rule {T} {chain} meta l4proto {proto} dnat to {endpoint}"
            ),
        );
    }
    let slots = service.endpoints.len();
    let choices: Vec<String> =
        (0..slots).map(|slot| format!("{slot} : goto {}", endpoint_chain(service, slot))).collect();
    push(
        out,
        format_args!(
            "add chain {T} {svc}\nflush chain {T} {svc}\n\
             add rule {T} {svc} ip daddr {ip} ip saddr != {cidr} jump mark-for-masquerade\n\
             add rule {T} {svc} numgen random mod {slots} vmap {{ {} }}",
            choices.join(" , ")
        ),
    );
    if service.node_port.is_some() {
        let ext = external_chain(service);
        push(
            out,
            format_args!(
                "add chain {T} {ext}\nflush chain {T} {ext}\n\
                 add rule {T} {ext} jump mark-for-masquerade\nadd rule {T} {ext} goto {svc}"
            ),
        );
    }
}

/// Where the maps lead to the service's chains.
fn elements(out: &mut String, service: &Service) {
    let (ip, port, proto) = (service.address.ip(), service.address.port(), service.protocol.name());
    let svc = service_chain(service);
    push(
        out,
        format_args!(
            "add element {T} cluster-ips {{ {ip} }}\n\
             add element {T} service-ips {{ {ip} . {proto} . {port} : goto {svc} }}"
        ),
    );
    if let Some(node_port) = service.node_port {
        let ext = external_chain(service);
        push(
            out,
            format_args!(
                "add element {T} service-nodeports {{ {proto} . {node_port} : goto {ext} }}"
            ),
        );
    }
}

fn service_chain(service: &Service) -> String {
    let (number, proto) = (service.number, service.protocol.name());
    format!("service-{number:08X}-bench/service-{number}/{proto}/http")
}

fn external_chain(service: &Service) -> String {
    let (number, proto) = (service.number, service.protocol.name());
    format!("external-{number:08X}-bench/service-{number}/{proto}/http")
}

fn endpoint_chain(service: &Service, slot: usize) -> String {
    let (number, proto) = (service.number, service.protocol.name());
    let endpoint = service.endpoints.get(slot);
    let (ip, port) = endpoint.map_or((0, 0), |e| (e.ip().to_bits(), e.port()));
    format!("endpoint-{ip:08X}-bench/service-{number}/{proto}/http__{ip:08x}/{port}")
}

#[cfg(test)]
mod tests {
    use super::{
        super::{endpoint, services},
        *,
    };

    #[test]
    fn each_service_has_an_element_and_a_choice_of_all_its_endpoints() {
        let (mut set, target) = services(3, 2, &[endpoint(90), endpoint(91), endpoint(92)]);
        set[0].node_port = Some(30_080);
        let text = full(&set, "10.244.0.0/16", "192.168.0.1");
        assert_eq!(text.matches("add element ip kube-proxy service-ips").count(), 3);
        assert_eq!(text.matches("numgen random mod 2 vmap").count(), 2);
        assert_eq!(text.matches("numgen random mod 3 vmap").count(), 1);
        assert_eq!(text.matches(" dnat to ").count(), 7);
        let element = format!("{} . tcp . 80 : goto service-00000001", target.ip());
        assert!(text.contains(&element), "{element}");
        assert!(text.contains("service-nodeports { tcp . 30080 : goto external-00000000"));
    }

    #[test]
    fn a_change_names_only_its_own_chains() {
        let (set, _) = services(3, 2, &[]);
        let old = &set[1];
        let mut new = old.clone();
        new.endpoints[1] = endpoint(999);
        let text = change(old, &new, "10.244.0.0/16");
        assert!(!text.contains("service-0/"), "{text}");
        assert_eq!(text.matches("delete chain").count(), 1);
        assert!(text.contains(&format!("delete chain ip kube-proxy {}", endpoint_chain(old, 1))));
    }
}
