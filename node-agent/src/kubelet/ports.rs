//! Which ports of the node a pod wants. Pure.

use k8s_openapi::api::core::v1::PodSpec;

use crate::model::{HostPort, Protocol};

/// Every `hostPort` of a pod's containers that live as long as the pod: those of a pod on the node's own
/// network are no less taken for being its containers' own.
#[must_use]
pub(super) fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|one| one.restart_policy.as_deref() == Some("Always"));
    let containers = sidecars.chain(&spec.containers);
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let number = |number: i32| u16::try_from(number).ok().filter(|number| *number != 0);
            let host_ip = port.host_ip.as_deref().and_then(|text| text.parse().ok());
            Some(HostPort {
                host_ip: host_ip.filter(|ip: &std::net::IpAddr| !ip.is_unspecified()),
                host_port: number(port.host_port?)?,
                protocol: match port.protocol.as_deref() {
                    Some("UDP") => Protocol::Udp,
                    Some("SCTP") => Protocol::Sctp,
                    _ => Protocol::Tcp,
                },
                container_port: number(port.container_port)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ports_of_containers_and_sidecars_with_a_port_of_the_node() {
        let spec: PodSpec = serde_json::from_value(json!({
            "initContainers": [
                {"name": "once", "ports": [{"containerPort": 1, "hostPort": 1}]},
                {"name": "side", "restartPolicy": "Always",
                 "ports": [{"containerPort": 53, "hostPort": 5353, "protocol": "UDP"}]},
            ],
            "containers": [
                {"name": "web", "ports": [
                    {"containerPort": 80, "hostPort": 8080, "hostIP": "192.0.2.1"},
                    {"containerPort": 81},
                    {"containerPort": 82, "hostPort": 82, "hostIP": "0.0.0.0", "protocol": "SCTP"},
                ]},
            ],
        }))
        .unwrap();
        let texts: Vec<String> = host_ports(&spec)
            .iter()
            .map(|port| format!("{port} -> {}", port.container_port))
            .collect();
        assert_eq!(texts, ["5353/UDP -> 53", "192.0.2.1:8080/TCP -> 80", "82/SCTP -> 82"]);
    }
}
