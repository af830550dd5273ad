//! New Services: what is refused, and in which words.

use serde_json::json;

use super::{BALANCER, new, with};

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn validate_service_create() {
    let long = "a".repeat(64);
    let source_ranges = "service.beta.kubernetes.io/load-balancer-source-ranges";
    let cases = [
        (
            "invalid selector",
            json!({"selector": {"%": "val"}}),
            "spec.selector: Invalid value: \"%\": name part must consist of",
        ),
        ("missing session affinity", json!({"sessionAffinity": ""}), ""),
        ("missing type", json!({"type": null}), ""),
        ("missing ports", json!({"ports": null}), "spec.ports: Required value"),
        ("missing ports but headless", json!({"ports": null, "clusterIP": "None"}), ""),
        ("empty port[0] name", json!({"ports": [{"port": 1}]}), ""),
        (
            "empty port[1] name",
            json!({"ports": [{"name": "p", "port": 1}, {"port": 2}]}),
            "spec.ports[1].name: Required value",
        ),
        (
            "empty multi-port port[0] name",
            json!({"ports": [{"port": 1}, {"name": "q", "port": 2}]}),
            "spec.ports[0].name: Required value",
        ),
        (
            "invalid port name",
            json!({"ports": [{"name": "INVALID", "port": 1}]}),
            "spec.ports[0].name: Invalid value: \"INVALID\": a lowercase RFC 1123 label",
        ),
        ("missing protocol", json!({"ports": [{"port": 1, "protocol": ""}]}), ""),
        (
            "invalid protocol",
            json!({"ports": [{"port": 1, "protocol": "INVALID"}]}),
            "spec.ports[0].protocol: Unsupported value: \"INVALID\": supported values: \"SCTP\", \"TCP\", \"UDP\"",
        ),
        ("valid SCTP", json!({"ports": [{"port": 1, "protocol": "SCTP"}]}), ""),
        (
            "invalid cluster ip",
            json!({"clusterIP": "invalid"}),
            "spec.clusterIPs[0]: Invalid value: \"invalid\": must be a valid IP address",
        ),
        (
            "missing port",
            json!({"ports": [{"port": 0}]}),
            "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
        ),
        (
            "invalid port",
            json!({"ports": [{"port": 65_536}]}),
            "spec.ports[0].port: Invalid value: 65536: must be between 1 and 65535, inclusive",
        ),
        (
            "invalid TargetPort int",
            json!({"ports": [{"port": 1, "targetPort": 65_536}]}),
            "spec.ports[0].targetPort: Invalid value: 65536: must be between 1 and 65535, inclusive",
        ),
        (
            "valid port headless",
            json!({"ports": [{"port": 11_722, "targetPort": 11_722}], "clusterIP": "None"}),
            "",
        ),
        (
            "invalid publicIPs localhost",
            json!({"externalIPs": ["127.0.0.1"]}),
            "spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)",
        ),
        (
            "invalid publicIPs unspecified",
            json!({"externalIPs": ["0.0.0.0"]}),
            "spec.externalIPs[0]: Invalid value: \"0.0.0.0\": may not be unspecified (0.0.0.0)",
        ),
        (
            "invalid publicIPs host",
            json!({"externalIPs": ["myhost.mydomain"]}),
            "spec.externalIPs[0]: Invalid value: \"myhost.mydomain\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
        ),
        (
            "dup port name",
            json!({"ports": [{"name": "p", "port": 1}, {"name": "p", "port": 2}]}),
            "spec.ports[1].name: Duplicate value: \"p\"",
        ),
        ("valid 1", json!({}), ""),
        (
            "valid external load balancer and non-TCP protocol",
            json!({"type": BALANCER, "ports": [{"port": 1, "protocol": "UDP"}]}),
            "",
        ),
        (
            "LoadBalancer type cannot have None ClusterIP",
            json!({"type": BALANCER, "clusterIP": "None"}),
            "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for LoadBalancer services",
        ),
        (
            "invalid node port with clusterIP None",
            json!({"type": "NodePort", "clusterIP": "None"}),
            "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services",
        ),
        (
            "invalid type",
            json!({"type": "Banana"}),
            "spec.type: Unsupported value: \"Banana\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
        ),
        (
            "valid type - cluster, with node port",
            json!({"ports": [{"port": 1, "nodePort": 30_123}]}),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
        (
            "valid load balancer type 2 ports",
            json!({"type": BALANCER, "ports": [{"name": "a", "port": 1}, {"name": "b", "port": 2}]}),
            "",
        ),
        (
            "duplicate nodeports",
            json!({"type": "NodePort", "ports": [{"name": "q", "port": 1, "nodePort": 30_001}, {"name": "r", "port": 2, "nodePort": 30_001}]}),
            "spec.ports[1].nodePort: Invalid value: 30001: provided port is already allocated",
        ),
        (
            "duplicate nodeports (different protocols)",
            json!({"type": "NodePort", "ports": [{"name": "q", "port": 1, "nodePort": 30_001}, {"name": "r", "port": 1, "nodePort": 30_001, "protocol": "UDP"}]}),
            "",
        ),
        (
            "invalid duplicate ports (with same protocol)",
            json!({"ports": [{"name": "q", "port": 1}, {"name": "r", "port": 1}]}),
            "spec.ports[1]: Duplicate value: {\"",
        ),
        (
            "valid duplicate ports (with different protocols)",
            json!({"ports": [{"name": "q", "port": 1}, {"name": "r", "port": 1, "protocol": "UDP"}]}),
            "",
        ),
        (
            "node port out of range",
            json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 80}]}),
            "spec.ports[0].nodePort: Invalid value: 80: provided port is not in the valid range. The range of valid ports is 30000-32767",
        ),
        (
            "valid LoadBalancer source range annotation",
            json!({"type": BALANCER, "annotations": {source_ranges: "1.0.0.0/8,  5.6.0.0/16"}}),
            "",
        ),
        (
            "empty LoadBalancer source range annotation",
            json!({"type": BALANCER, "annotations": {source_ranges: ""}}),
            "",
        ),
        (
            "invalid LoadBalancer source range annotation (hostname)",
            json!({"type": BALANCER, "annotations": {source_ranges: "foo.bar"}}),
            "metadata.annotations[service.beta.kubernetes.io/load-balancer-source-ranges]: Invalid value: \"foo.bar\": must be a valid CIDR value",
        ),
        (
            "invalid source range for non LoadBalancer type service",
            json!({"loadBalancerSourceRanges": ["1.2.3.4/8"]}),
            "spec.LoadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ),
        (
            "valid LoadBalancer source range",
            json!({"type": BALANCER, "loadBalancerSourceRanges": ["1.0.0.0/8", " 5.6.0.0/16", "fd00::/8"]}),
            "",
        ),
        (
            "invalid LoadBalancer source range",
            json!({"type": BALANCER, "loadBalancerSourceRanges": ["foo.bar"]}),
            "spec.LoadBalancerSourceRanges[0]: Invalid value: \"foo.bar\": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
        ),
        (
            "valid ExternalName",
            json!({"type": "ExternalName", "externalName": "foo.bar.example.com"}),
            "",
        ),
        (
            "valid ExternalName (trailing dot)",
            json!({"type": "ExternalName", "externalName": "foo.bar.example.com."}),
            "",
        ),
        (
            "invalid ExternalName clusterIP (None)",
            json!({"type": "ExternalName", "externalName": "a.b", "clusterIP": "None"}),
            "spec.clusterIPs: Forbidden: may not be set for ExternalName services",
        ),
        (
            "invalid ExternalName (not a DNS name)",
            json!({"type": "ExternalName", "externalName": "-123"}),
            "spec.externalName: Invalid value: \"-123\": a lowercase RFC 1123 subdomain",
        ),
        (
            "missing ExternalName",
            json!({"type": "ExternalName"}),
            "spec.externalName: Required value",
        ),
        (
            "LoadBalancer type cannot have invalid externalTrafficPolicy",
            json!({"type": BALANCER, "externalTrafficPolicy": "invalid"}),
            "spec.externalTrafficPolicy: Unsupported value: \"invalid\": supported values: \"Cluster\", \"Local\"",
        ),
        (
            "nodeport service with external traffic policy local",
            json!({"type": "NodePort", "externalTrafficPolicy": "Local"}),
            "",
        ),
        (
            "clusterIP service with external traffic policy",
            json!({"externalTrafficPolicy": "Local"}),
            "spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services",
        ),
        (
            "clusterIP service with externalIPs and a policy",
            json!({"externalTrafficPolicy": "Local", "externalIPs": ["1.1.1.1"]}),
            "",
        ),
        (
            "invalid internalTraffic field",
            json!({"internalTrafficPolicy": "invalid"}),
            "spec.internalTrafficPolicy: Unsupported value: \"invalid\": supported values: \"Cluster\", \"Local\"",
        ),
        (
            "healthCheckNodePort without Local",
            json!({"type": BALANCER, "healthCheckNodePort": 31_000}),
            "spec.healthCheckNodePort: Invalid value: 31000: may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
        ),
        (
            "negative healthCheckNodePort",
            json!({"type": BALANCER, "externalTrafficPolicy": "Local", "healthCheckNodePort": -1}),
            "failed to allocate requested HealthCheck NodePort -1: provided port is not in the valid range. The range of valid ports is 30000-32767",
        ),
        (
            "invalid timeout field",
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": -1}}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: -1: must be greater than 0 and less than 86400",
        ),
        (
            "too long timeout field",
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86_401}}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 86401: must be greater than 0 and less than 86400",
        ),
        (
            "longest timeout field",
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86_400}}}),
            "",
        ),
        (
            "sessionAffinityConfig can't be set when session affinity is None",
            json!({"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 90}}}),
            "",
        ),
        (
            "invalid session affinity",
            json!({"sessionAffinity": "Cookie"}),
            "spec.sessionAffinity: Unsupported value: \"Cookie\": supported values: \"ClientIP\", \"None\"",
        ),
        (
            "allocateLoadBalancerNodePorts on ClusterIP",
            json!({"allocateLoadBalancerNodePorts": true}),
            "spec.allocateLoadBalancerNodePorts: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ),
        (
            "invalid LoadBalancerClass",
            json!({"type": BALANCER, "loadBalancerClass": "Bad/LoadBalancerClass/x"}),
            "spec.loadBalancerClass: Invalid value: \"Bad/LoadBalancerClass/x\": a valid label key must consist of",
        ),
        (
            "invalid: set LoadBalancerClass when type is not LoadBalancer",
            json!({"loadBalancerClass": "test.com/x"}),
            "spec.loadBalancerClass: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ),
        (
            "invalid AppProtocol",
            json!({"ports": [{"port": 1, "appProtocol": "@"}]}),
            "spec.ports[0].appProtocol: Invalid value: \"@\": name part must consist of",
        ),
        ("valid: trafficDistribution", json!({"trafficDistribution": "PreferSameNode"}), ""),
        (
            "invalid: trafficDistribution",
            json!({"trafficDistribution": "Random"}),
            "spec.trafficDistribution: Unsupported value: \"Random\": supported values: \"PreferClose\", \"PreferSameZone\", \"PreferSameNode\"",
        ),
        (
            "invalid: mismatching topology annotations",
            json!({"annotations": {"service.kubernetes.io/topology-mode": "a", "service.kubernetes.io/topology-aware-hints": "b"}}),
            "metadata.annotations[service.kubernetes.io/topology-mode]: Invalid value: \"a\": must match annotations[service.kubernetes.io/topology-aware-hints] when both are specified",
        ),
        (
            "too long port name",
            json!({"ports": [{"name": long, "port": 1}]}),
            "must be no more than 63 ",
        ),
    ];
    for (name, fields, want) in cases {
        let said = new(&with(&fields)).err().unwrap_or_default();
        assert!(said.contains(want) && said.is_empty() == want.is_empty(), "{name}: {said}");
    }
}
