//! The sample's proof, as `up` and `prove` print it, and more.

use xtask::{cluster::Cluster, paths::Paths, proof};

use crate::cluster;

/// Runs a proof as `cargo xtask prove` does.
fn shows(part: fn(&Paths, &Cluster) -> anyhow::Result<String>) {
    let (paths, cluster) = cluster();
    println!("{}", part(&paths, &cluster).unwrap());
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn a_requests_by_name_and_by_node_port_reach_every_replica() {
    let (_, cluster) = cluster();
    let shown = proof::requests(&cluster).unwrap();
    println!("{shown}");
    assert_eq!(shown.split.values().sum::<u32>(), proof::REQUESTS);
    assert_eq!(shown.split.len(), 3, "three replicas");
    let workers: std::collections::BTreeSet<_> = shown.placed.values().collect();
    assert_eq!(workers.len(), 2, "the replicas are spread over the workers: {:?}", shown.placed);
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn b_no_node_has_a_packet_filter_rule() {
    shows(proof::rules);
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn c_busy_loop_is_held_to_a_fifth_of_a_core() {
    shows(proof::cpu);
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn d_pod_past_its_memory_limit_is_oom_killed() {
    shows(proof::memory);
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn f_killed_server_costs_no_request_and_nothing_that_was_stored() {
    let shown = proof::server_killed(&cluster().1).unwrap();
    println!("kill -9 of the control plane: {shown:?}");
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn e_killed_agents_cost_no_request_and_restart_no_container() {
    shows(proof::agents);
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn g_deleted_replica_is_taken_out_in_time_and_replaced() {
    shows(proof::deletion);
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn h_node_ports_of_workers_are_carried_by_xdp_in_the_driver() {
    for carried in proof::carried_by_xdp(&cluster().1).unwrap() {
        println!("{carried:?}");
    }
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn i_killed_agent_leaves_xdp_carrying_every_request() {
    let carried = proof::xdp_outlives_agent(&cluster().1).unwrap();
    println!("kill -9 of a worker's agent, twice: {carried:?}");
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn j_trace_of_a_client_outside_begins_with_xdp() {
    for hops in proof::traced(&cluster().1).unwrap() {
        println!("{hops:?}");
        assert_eq!(hops.first().map(String::as_str), Some("xdp_entry"));
    }
}
