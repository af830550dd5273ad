//! The services that are asked, and how.

use serde_json::{Map, Value, json};

use super::{
    asking::Question,
    node::{FAR, IP, NAME},
};

/// An endpoint: where, and its state.
type Endpoint = (&'static str, u16, State);

#[derive(Clone, Copy)]
enum State {
    Ready,
    Terminating,
    Unready,
}

const HERE: Endpoint = (IP, 8081, State::Ready);
const ELSEWHERE: Endpoint = (FAR, 8083, State::Ready);

/// One service.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    number: u8,
    kind: &'static str,
    endpoints: &'static [Endpoint],
    spec: Value,
}

/// All of them; the last one is answered.
pub(crate) fn cases() -> Vec<Case> {
    let local = || json!({"externalTrafficPolicy": "Local"});
    let inside = || json!({"internalTrafficPolicy": "Local"});
    let ranges = |range: &str| json!({ "loadBalancerSourceRanges": [range] });
    let rows: Vec<(&str, &str, &[Endpoint], Value)> = vec![
        ("both", "NodePort", &[HERE, ELSEWHERE], json!({})),
        ("none", "NodePort", &[], json!({})),
        ("unready", "NodePort", &[(IP, 8081, State::Unready)], json!({})),
        ("going", "NodePort", &[(IP, 8082, State::Terminating)], json!({})),
        ("going-and-ready", "NodePort", &[(IP, 8082, State::Terminating), ELSEWHERE], json!({})),
        ("local", "NodePort", &[HERE, ELSEWHERE], local()),
        ("local-elsewhere", "NodePort", &[ELSEWHERE], local()),
        ("local-going", "NodePort", &[(IP, 8082, State::Terminating), ELSEWHERE], local()),
        ("local-none", "NodePort", &[], local()),
        ("inside", "NodePort", &[HERE, ELSEWHERE], inside()),
        ("inside-elsewhere", "NodePort", &[ELSEWHERE], inside()),
        ("external", "ClusterIP", &[HERE, ELSEWHERE], json!({"externalIPs": ["203.0.113.12"]})),
        ("external-none", "ClusterIP", &[], json!({"externalIPs": ["203.0.113.13"]})),
        ("balanced", "LoadBalancer", &[HERE, ELSEWHERE], json!({})),
        ("balanced-local", "LoadBalancer", &[ELSEWHERE], local()),
        ("ranged-out", "LoadBalancer", &[HERE, ELSEWHERE], ranges("198.51.100.0/24")),
        ("ranged-in", "LoadBalancer", &[HERE, ELSEWHERE], ranges("192.0.2.99/32")),
        ("nobody-there", "NodePort", &[(IP, 8099, State::Ready)], json!({})),
        ("published", "NodePort", &[HERE], json!({"publishNotReadyAddresses": true})),
    ];
    let rows = rows.into_iter().enumerate();
    rows.map(|(at, (name, kind, endpoints, spec))| Case {
        name,
        number: u8::try_from(at + 1).unwrap(),
        kind,
        endpoints,
        spec,
    })
    .collect()
}

impl Case {
    fn balanced(&self) -> Option<String> {
        (self.kind == "LoadBalancer").then(|| format!("203.0.113.{}", 100 + self.number))
    }

    fn node_port(&self) -> Option<u16> {
        (self.kind != "ClusterIP").then(|| 30_000 + u16::from(self.number))
    }

    /// The Service and its slices.
    pub(crate) fn objects(&self) -> Vec<Value> {
        let ports = ["TCP", "UDP"].map(|protocol| {
            let mut port = json!({"name": protocol.to_lowercase(), "port": 80, "targetPort": 8081, "protocol": protocol});
            if let Some(number) = self.node_port() {
                port["nodePort"] = number.into();
            }
            port
        });
        let spec = json!({"type": self.kind, "clusterIP": format!("10.96.1.{}", self.number), "ports": ports});
        let mut spec: Map<String, Value> = spec.as_object().unwrap().clone();
        spec.extend(self.spec.as_object().unwrap().clone());
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": self.name}, "spec": spec});
        let slices =
            self.endpoints.iter().enumerate().map(|(at, endpoint)| self.slice(at, *endpoint));
        [service].into_iter().chain(slices).collect()
    }

    fn slice(&self, at: usize, (ip, port, state): Endpoint) -> Value {
        let (ready, serving, terminating) = match state {
            State::Ready => (true, true, false),
            State::Terminating => (false, true, true),
            State::Unready => (false, false, false),
        };
        let node = if ip == IP { NAME } else { "far" };
        let ports = ["TCP", "UDP"].map(
            |protocol| json!({"name": protocol.to_lowercase(), "port": port, "protocol": protocol}),
        );
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{at}", self.name),
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": "IPv4",
            "ports": ports,
            "endpoints": [{
                "addresses": [ip],
                "nodeName": node,
                "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            }],
        })
    }

    /// The patch that a load balancer's controller would make.
    pub(crate) fn status(&self) -> Option<String> {
        let ip = self.balanced()?;
        Some(json!({"status": {"loadBalancer": {"ingress": [{ "ip": ip }]}}}).to_string())
    }
}

/// Every service by every address that it has, by both protocols.
pub(crate) fn questions(cases: &[Case]) -> Vec<Question> {
    let mut questions = Vec::new();
    for case in cases {
        let mut ways = vec![("cluster IP", format!("10.96.1.{}:80", case.number))];
        ways.extend(case.node_port().map(|port| ("node port", format!("{IP}:{port}"))));
        ways.extend(case.balanced().map(|ip| ("load balancer", format!("{ip}:80"))));
        let external = case.spec["externalIPs"][0].as_str();
        ways.extend(external.map(|ip| ("external IP", format!("{ip}:80"))));
        for (way, to) in ways {
            for (protocol, is_udp) in [("TCP", false), ("UDP", true)] {
                let about = format!("{} by {way}, {protocol}", case.name);
                questions.push(Question { about, is_udp, to: to.parse().unwrap() });
            }
        }
    }
    questions
}
