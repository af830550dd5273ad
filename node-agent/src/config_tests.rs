//! What flags and the file become, and what is said of those that are wrong.

use super::*;

fn args() -> RunArgs {
    RunArgs { kubeconfig: Some("/k".into()), ..RunArgs::default() }
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let file: RunArgs = serde_yaml_ng::from_str("node_name: f\ncluster_domain: d\n").expect("keys");
    let flags = RunArgs { node_name: Some("n".to_owned()), ..args() };
    let config = flags.over(file).parse("host").expect("a configuration");
    assert_eq!((&*config.node_name, config.cluster_domain.as_str()), ("n", "d"));
    assert_eq!(config.components.len(), Component::ALL.len());
    assert_eq!(args().parse("Host1").expect("a configuration").node_name, "host1".into());
}

#[test]
fn what_the_dataplane_is_told_is_said_as_in_a_file() {
    let file: RunArgs = serde_yaml_ng::from_str(
        "devices: eth0\nservice_node_port_range: 20000-20999\nlocalhost_nodeports: true\n",
    )
    .expect("keys");
    let config = args().over(file).parse("host").expect("a configuration");
    assert_eq!(
        (&config.devices[..], config.node_ports),
        (&["eth0".to_owned()][..], (20_000, 20_999))
    );
    assert!(config.localhost_nodeports);
    let said = "service_node_port_range: 20000-20999\ndevices: [eth0]\nlocalhost_nodeports: true\n";
    assert!(config.to_string().contains(said), "{config}");
}

#[test]
fn what_is_wrong_is_named_in_one_line() {
    let with = |change: fn(&mut RunArgs)| {
        let mut args = args();
        change(&mut args);
        args.parse("host").expect_err("wrong").to_string()
    };
    type Case = (fn(&mut RunArgs), &'static str);
    let table: [Case; 8] = [
        (
            |args| args.service_node_port_range = Some("32767-30000".to_owned()),
            "--service-node-port-range 32767-30000: want FIRST-LAST, such as 30000-32767",
        ),
        (
            |args| args.service_node_port_range = Some("30000".to_owned()),
            "--service-node-port-range 30000: want FIRST-LAST, such as 30000-32767",
        ),
        (
            |args| args.kubeconfig = None,
            "--kubeconfig FILE is needed (it is written by a join with --server and --token)",
        ),
        (
            |args| args.components = Some(vec!["policy".to_owned()]),
            "unknown component \"policy\"; there are overlay, dataplane, cni, dns, kubelet",
        ),
        (|args| args.server = Some("https://h:1".to_owned()), "--server and --token go together"),
        (
            |args| {
                args.server = Some("http://h:1".to_owned());
                args.token = Some("a.b.c".to_owned());
            },
            "--server http://h:1: want https://HOST:PORT",
        ),
        (
            |args| args.node_name = Some("A_b".to_owned()),
            "--node-name A_b: want lower-case letters, digits, '-' and '.'",
        ),
        (
            |args| args.overlay = Some("x".to_owned()),
            "unknown overlay \"x\"; there are vxlan, l3, auto",
        ),
    ];
    for (change, message) in table {
        assert_eq!(with(change), message);
    }
    let unknown = serde_yaml_ng::from_str::<RunArgs>("colour: red").expect_err("unknown");
    assert!(unknown.to_string().contains("colour"), "{unknown}");
}
