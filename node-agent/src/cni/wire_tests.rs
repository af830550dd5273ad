//! The specification's examples, and what it says must be refused.

use super::*;

fn envelope(command: &str, version: &str, extra: Value) -> Vec<u8> {
    let mut config = json!({"cniVersion": version, "name": "orlop", "type": "orlop"});
    if let (Value::Object(config), Value::Object(extra)) = (&mut config, extra) {
        config.extend(extra);
    }
    json!({
        "command": command,
        "containerId": "a1b2",
        "netns": "/run/orlop/netns/a1b2",
        "ifname": "eth0",
        "args": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0",
        "config": config,
    })
    .to_string()
    .into_bytes()
}

fn parse(command: &str, version: &str, extra: Value) -> Result<Request, (Version, CniError)> {
    parse_request(&envelope(command, version, extra))
}

fn refused(command: &str, version: &str, extra: Value) -> u32 {
    parse(command, version, extra).unwrap_err().1.code.number()
}

fn pair(ip: &str, gateway: &str) -> (IpAddr, IpAddr) {
    (ip.parse().unwrap(), gateway.parse().unwrap())
}

fn added() -> Added {
    Added {
        ips: vec![pair("10.244.1.5", "169.254.1.1")],
        host_name: "orl0123abcd".to_owned(),
        host_mac: [2, 0, 0, 0, 0, 1],
        pod_mac: [2, 0, 0, 0, 0, 2],
        mtu: 1450,
    }
}

#[test]
fn an_add_request_is_read_with_its_pod() {
    let request = parse("ADD", "1.1.0", json!({})).unwrap();
    assert_eq!(request.command, Command::Add);
    assert_eq!(request.attachment, Attachment::new("a1b2", "eth0"));
    assert_eq!(request.pod, ObjectKey::new("default", "web-0"));
}

#[test]
fn results_have_the_shape_of_the_version_that_was_asked_for() {
    let result = |version| add_result(&parse("ADD", version, json!({})).unwrap(), &added());
    let newest = json!({
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "orl0123abcd", "mac": "02:00:00:00:00:01", "mtu": 1450},
            {"name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1450,
             "sandbox": "/run/orlop/netns/a1b2"},
        ],
        "ips": [{"address": "10.244.1.5/32", "gateway": "169.254.1.1", "interface": 1}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}],
        "dns": {},
    });
    assert_eq!(result("1.1.0"), newest);
    assert_eq!(result("1.0.0")["interfaces"][0].get("mtu"), None);
    assert_eq!(result("1.0.0")["ips"][0].get("version"), None);
    assert_eq!(result("0.3.1")["ips"][0]["version"], "4");
    assert_eq!(result("0.4.0")["cniVersion"], "0.4.0");
}

#[test]
fn a_pod_of_two_families_has_an_address_a_gateway_and_a_route_of_each() {
    let dual = Added { ips: vec![pair("fd00::5", "fe80::1"), added().ips[0]], ..added() };
    let result = |version| add_result(&parse("ADD", version, json!({})).unwrap(), &dual);
    let newest = result("1.1.0");
    assert_eq!(
        newest["ips"],
        json!([
            {"address": "fd00::5/128", "gateway": "fe80::1", "interface": 1},
            {"address": "10.244.1.5/32", "gateway": "169.254.1.1", "interface": 1},
        ])
    );
    let routes =
        json!([{"dst": "::/0", "gw": "fe80::1"}, {"dst": "0.0.0.0/0", "gw": "169.254.1.1"}]);
    assert_eq!(newest["routes"], routes);
    assert_eq!(result("0.4.0")["ips"][0]["version"], "6");
    // A runtime may write the address in full.
    let mut previous = newest;
    previous["ips"][0]["address"] = json!("fd00:0:0:0:0:0:0:5/128");
    let check = parse("CHECK", "1.1.0", json!({"prevResult": previous.clone()})).unwrap();
    assert_eq!(previous_differs(&check, &dual), None);
    previous["ips"][0]["address"] = json!("fd00::5/64");
    let check = parse("CHECK", "1.1.0", json!({"prevResult": previous})).unwrap();
    let difference = previous_differs(&check, &dual);
    assert_eq!(difference, Some("prevResult lacks address fd00::5/128".to_owned()));
}

#[test]
fn what_earlier_plugins_made_stays_in_the_result() {
    let previous = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "lo", "sandbox": "/run/orlop/netns/a1b2"}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}],
        "dns": {"nameservers": ["192.0.2.53"]},
    });
    let request = parse("ADD", "1.1.0", json!({"prevResult": previous})).unwrap();
    check_chain(&request).unwrap();
    let result = add_result(&request, &added());
    let names: Vec<_> =
        result["interfaces"].as_array().unwrap().iter().map(|i| i["name"].clone()).collect();
    assert_eq!(names, ["lo", "orl0123abcd", "eth0"]);
    assert_eq!(result["ips"][0]["address"], "127.0.0.1/8");
    assert_eq!(
        (&result["ips"][1]["address"], &result["ips"][1]["interface"]),
        (&json!("10.244.1.5/32"), &json!(2))
    );
    assert_eq!(result["dns"]["nameservers"][0], "192.0.2.53");

    let taken = json!({"interfaces": [{"name": "eth0", "sandbox": "/run/orlop/netns/a1b2"}]});
    let request = parse("ADD", "1.1.0", json!({"prevResult": taken})).unwrap();
    assert_eq!(check_chain(&request).unwrap_err().code, Code::InvalidConfig);
    assert_eq!(refused("ADD", "1.1.0", json!({"prevResult": []})), 7);
}

#[test]
fn capabilities_are_handed_back_left_alone_or_refused_by_name() {
    let dns = json!({"nameservers": ["192.0.2.53"]});
    let config = json!({
        "dns": {"nameservers": ["192.0.2.1"]},
        "capabilities": {"dns": true, "portMappings": true},
        "runtimeConfig": {"dns": dns, "portMappings": [], "aliases": ["web"]},
    });
    assert_eq!(parse("ADD", "1.1.0", config).unwrap().dns, Some(dns));
    let asked = json!({"runtimeConfig": {"bandwidth": {"ingressRate": 80}}});
    let (_, error) = parse("ADD", "1.1.0", asked.clone()).unwrap_err();
    assert_eq!(error.code, Code::UnsupportedField);
    assert!(error.details.starts_with("runtimeConfig.bandwidth: "), "{}", error.details);
    parse("DEL", "1.1.0", asked).unwrap();
    let mut add: Value = serde_json::from_slice(&envelope("ADD", "1.1.0", json!({}))).unwrap();
    add["args"] = json!("IgnoreUnknown=1;IP=10.244.1.9");
    let (_, error) = parse_request(add.to_string().as_bytes()).unwrap_err();
    assert!(error.code == Code::UnsupportedField && error.details.starts_with("IP:"), "{error}");
}

#[test]
fn what_containerd_writes_is_understood() {
    // By the names of Go's fields, with null for an empty list.
    let request = parse(
        "ADD",
        "1.0.0",
        json!({"runtimeConfig": {
            "dns": {"Servers": ["10.96.0.10"], "Searches": ["svc.cluster.local"], "Options": null},
            "portMappings": [
                {"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "192.0.2.1"}
            ],
        }}),
    )
    .unwrap();
    assert_eq!(request.host_ports[0].to_string(), "192.0.2.1:8080/TCP");
    let told = json!({"nameservers": ["10.96.0.10"], "search": ["svc.cluster.local"]});
    assert_eq!(add_result(&request, &added())["dns"], told);
}

#[test]
fn port_mappings_are_read_and_unusable_ones_are_named() {
    let ports = |list: Value| {
        let asked = json!({"runtimeConfig": {"portMappings": list}});
        parse("ADD", "1.1.0", asked).map(|request| {
            let ports = request.host_ports.iter();
            ports.map(|port| format!("{port} -> {}", port.container_port)).collect::<Vec<_>>()
        })
    };
    let list = json!([
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
        {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "192.0.2.1"},
        {"hostPort": 99, "containerPort": 99, "protocol": "sctp", "hostIP": "::"},
        {"hostPort": 0, "containerPort": 80, "protocol": "tcp"},
    ]);
    let texts = ports(list).unwrap();
    assert_eq!(texts, ["8080/TCP -> 80", "192.0.2.1:53/UDP -> 5353", "99/SCTP -> 99"]);
    for (entry, code) in [
        (json!({"hostPort": 80}), Code::InvalidConfig),
        (json!({"hostPort": 70_000, "containerPort": 80}), Code::InvalidConfig),
        (json!({"hostPort": 80, "containerPort": 80, "protocol": "quic"}), Code::InvalidConfig),
        (json!({"hostPort": 80, "containerPort": 80, "hostIP": "here"}), Code::InvalidConfig),
        (json!({"hostPort": 80, "containerPort": 81, "protocol": "sctp"}), Code::UnsupportedField),
    ] {
        let (_, error) = ports(json!([entry])).unwrap_err();
        assert_eq!(error.code, code, "{entry}");
        assert!(error.details.contains("ort"), "{}", error.details);
    }
}

#[test]
fn errors_have_the_specified_keys_and_codes() {
    let error = CniError::new(Code::TryAgainLater, "not now").with_details("busy");
    let expected = json!({"cniVersion": "1.0.0", "code": 11, "msg": "not now", "details": "busy"});
    assert_eq!(error_result(Version::V1_0_0, &error), expected);
    assert_eq!(error_result(NEWEST, &CniError::new(Code::Io, "x")).get("details"), None);
}

#[test]
fn versions_and_commands_that_do_not_fit_are_refused() {
    assert_eq!(refused("ADD", "0.2.0", json!({})), 1);
    assert_eq!(refused("ADD", "9.9.9", json!({})), 1);
    assert_eq!(refused("CHECK", "0.3.1", json!({"prevResult": {}})), 1);
    assert_eq!(refused("GC", "1.0.0", json!({})), 1);
    assert_eq!(refused("STATUS", "1.0.0", json!({})), 1);
    assert_eq!(refused("MOVE", "1.1.0", json!({})), 4);
}

#[test]
fn fields_that_we_do_not_implement_are_refused_by_name() {
    let (_, error) = parse("ADD", "1.1.0", json!({"ipam": {"type": "host-local"}})).unwrap_err();
    assert_eq!(error.code, Code::UnsupportedField);
    assert!(error.details.starts_with("ipam: "), "{}", error.details);
    assert_eq!(refused("CHECK", "1.1.0", json!({})), 7);
    assert_eq!(refused("GC", "1.1.0", json!({"cni.dev/valid-attachments": [{}]})), 7);
    assert_eq!(refused("ADD", "1.1.0", json!({"name": ""})), 7);
}

#[test]
fn each_missing_or_malformed_variable_is_named() {
    let cases = [
        ("ADD", "containerId", json!(""), "CNI_CONTAINERID"),
        ("ADD", "containerId", json!("../x"), "CNI_CONTAINERID"),
        ("ADD", "ifname", json!("a/b"), "CNI_IFNAME"),
        ("ADD", "ifname", json!("sixteen-bytes-xx"), "CNI_IFNAME"),
        ("ADD", "netns", json!(""), "CNI_NETNS"),
        ("CHECK", "netns", json!("relative"), "CNI_NETNS"),
        ("DEL", "ifname", json!(""), "CNI_IFNAME"),
    ];
    for (command, key, value, variable) in cases {
        let extra = if command == "CHECK" { json!({"prevResult": {}}) } else { json!({}) };
        let mut envelope: Value =
            serde_json::from_slice(&envelope(command, "1.1.0", extra)).unwrap();
        envelope[key] = value;
        let (_, error) = parse_request(envelope.to_string().as_bytes()).unwrap_err();
        assert_eq!(error.code, Code::InvalidEnvironment, "{command} {key}");
        assert!(error.message.contains(variable), "{}", error.message);
    }
}

#[test]
fn del_needs_no_namespace_and_gc_reads_its_list() {
    let mut del: Value = serde_json::from_slice(&envelope("DEL", "1.1.0", json!({}))).unwrap();
    del["netns"] = json!("");
    assert_eq!(parse_request(del.to_string().as_bytes()).unwrap().command, Command::Del);
    let list = json!({"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]});
    let request = parse("GC", "1.1.0", list).unwrap();
    let one = Some(BTreeSet::from([Attachment::new("a", "eth0")]));
    assert_eq!(request.valid, one);
    let old = json!({"cni.dev/attachments": [{"containerID": "a", "ifname": "eth0"}]});
    assert_eq!(parse("GC", "1.1.0", old).unwrap().valid, one);
    let empty = json!({"cni.dev/valid-attachments": null});
    assert_eq!(parse("GC", "1.1.0", empty).unwrap().valid, Some(BTreeSet::new()));
    assert_eq!(parse("GC", "1.1.0", json!({})).unwrap().valid, None);
}

#[test]
fn a_previous_result_of_ours_agrees_and_another_does_not() {
    let add = parse("ADD", "1.1.0", json!({})).unwrap();
    let previous = add_result(&add, &added());
    let check = parse("CHECK", "1.1.0", json!({"prevResult": previous.clone()})).unwrap();
    assert_eq!(previous_differs(&check, &added()), None);
    let other = Added { ips: vec![pair("10.244.1.6", "169.254.1.1")], ..added() };
    assert_eq!(
        previous_differs(&check, &other),
        Some("prevResult lacks address 10.244.1.6/32".to_owned())
    );
}

#[test]
fn rubbish_is_a_decoding_error() {
    for bytes in [&b""[..], b"{", b"[]", b"{\"command\":\"ADD\",\"config\":3}"] {
        assert_eq!(parse_request(bytes).unwrap_err().1.code, Code::Decode);
    }
}
