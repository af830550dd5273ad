//! One Debian node with systemd and the units of `deploy/systemd`, as on a Raspberry Pi. Run by
//! `cargo xtask test --vm` on a cluster of its own.
#![expect(clippy::print_stdout, reason = "measured values are part of the test's report")]
#![expect(clippy::tests_outside_test_module, reason = "an integration test is one module of tests")]

use xtask::{cluster::Cluster, paths::Paths, proof};

fn cluster() -> Cluster {
    let cluster = Cluster::running(&Paths::for_tests())
        .expect("no test cluster runs: use `cargo xtask test --vm`");
    let shell = cluster.server().expect("a server").shell();
    shell.sh("test -d /run/systemd/system").expect("the node must run systemd");
    cluster
}

#[test]
#[ignore = "needs a Debian VM: cargo xtask test --vm"]
fn a_units_run_as_they_are_shipped() {
    let shell = cluster().server().unwrap().shell();
    for unit in ["orlop-control-plane", "orlop-node-agent"] {
        assert_eq!(shell.sh(&format!("systemctl is-active {unit}")).unwrap(), "active", "{unit}");
    }
    let shown = shell.sh("systemctl show -p Delegate -p KillMode orlop-node-agent").unwrap();
    assert!(shown.contains("Delegate=yes") && shown.contains("KillMode=process"), "{shown}");
}

#[test]
#[ignore = "needs a Debian VM: cargo xtask test --vm"]
fn b_sample_answers_and_no_packet_filter_rule_is_made() {
    let cluster = cluster();
    let shown = proof::requests(&cluster).unwrap();
    println!("{shown}");
    assert_eq!(shown.split.len(), 3, "three replicas");
    proof::no_rules(&cluster).unwrap();
}

#[test]
#[ignore = "needs a Debian VM: cargo xtask test --vm"]
fn c_pods_outlive_a_killed_agent() {
    let requests = proof::agent_killed(&cluster()).unwrap();
    println!("kill -9 of the agent: {requests}, all answered");
}

#[test]
#[ignore = "needs a Debian VM: cargo xtask test --vm"]
fn d_pods_outlive_a_restarted_unit() {
    let requests = proof::unit_restarted(&cluster()).unwrap();
    println!("systemctl restart of the agent: {requests}, all answered");
}
