//! The measuring program behind `cargo xtask bench`: a benchmark each, and the roles of its children.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Result;
use bench::{agent, lb, orlop, overlay, packets, program, programming, source, traffic};
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Flags {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Traffic through services on one node.
    Lb(lb::Wish),
    /// The part of it without sockets.
    Packets(packets::Wish),
    /// From the list of services to the last write.
    Programming(programming::Wish),
    /// Traffic between two nodes.
    Overlay(overlay::Wish),
    /// A whole agent beside a control plane.
    Agent(agent::Wish),
    /// A child that makes services through the API.
    AgentLoad(agent::LoadFlags),
    /// A child that is one of two nodes.
    OverlayNode(overlay::NodeFlags),
    /// A child that echoes.
    Server,
    /// A child that echoes datagrams.
    UdpEcho {
        #[arg(long)]
        address: Ipv4Addr,
    },
    /// A child that has had an answer by every flow of the packet source.
    Prime,
    /// A child that holds a program on a device, and sends frames out of it.
    Hold(source::HoldFlags),
    /// A child that is a node's dataplane.
    Node(orlop::NodeFlags),
    /// A child that is a dataplane to be programmed.
    Program(orlop::NodeFlags),
    /// A child that asks.
    Client {
        #[arg(long)]
        target: SocketAddrV4,
        #[arg(long)]
        cgroup: Option<String>,
    },
}

fn main() -> Result<()> {
    match Flags::parse().role {
        Role::Lb(wish) => lb::run(&wish),
        Role::Packets(wish) => packets::alone(&wish),
        Role::Programming(wish) => programming::run(&wish),
        Role::Overlay(wish) => overlay::run(&wish),
        Role::Agent(wish) => agent::run(&wish),
        Role::AgentLoad(flags) => orlop::run(agent::load(flags)),
        Role::OverlayNode(flags) => orlop::run(overlay::life(flags)),
        Role::Program(flags) => orlop::run(program::life(flags)),
        Role::Node(flags) => orlop::run(orlop::node(flags)),
        Role::UdpEcho { address } => source::udp_echo(address),
        Role::Prime => source::prime(),
        Role::Hold(flags) => source::hold(&flags),
        Role::Server => traffic::server(traffic::SERVER_PORT),
        Role::Client { target, cgroup } => traffic::client(target, cgroup.as_deref()),
    }
}
