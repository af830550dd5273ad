//! The agent dies before each step of an `ADD` and of a `DEL`, and the next one, or the runtime's next command,
//! makes good what is left.

use std::{io::Write as _, path::Path, process::Command};

use nix::sys::signal::{Signal, kill};
use node_agent::{
    cni::{self, CniInputs},
    kubelet::runtime::binary::SHIM,
    model::PodNetwork,
    table::Table,
};
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};

use super::{
    fixture::{Node, Pod, pod_network, settings},
    steps::{READY, run_to},
};

const NAME: &str = "deaths::a_death_at_any_step_is_made_good_by_the_next_agent";
/// Folder and namespace of a server that this very test is to be, in a process of its own.
const SERVER: &str = "ORLOP_CNI_SERVER";

fn network() -> PodNetwork {
    pod_network(&["10.244.3.0/24", "fd00:3::/64"], 1400)
}

/// The server, until it is killed.
fn serve(place: &str) {
    let (folder, namespace) = place.split_once(' ').unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let network = watch::Sender::new(Some(network()));
        let inputs = CniInputs {
            services: Table::new(),
            network: network.subscribe(),
            endpoints: Table::new(),
            programmed: None,
        };
        let server = cni::start(settings(Path::new(folder), namespace), inputs, SHIM).unwrap();
        writeln!(std::io::stdout(), "{READY}").unwrap();
        std::future::pending::<()>().await;
        drop(server);
    });
}

/// What a runtime does that had no answer.
#[derive(Clone, Copy, Debug)]
enum Then {
    Add,
    Del,
    Gc,
}

/// A node with a pod that is none of the others' business.
struct World {
    node: Node,
    kept: (Pod, Value),
    /// The pod that is added and deleted.
    pod: Pod,
}

impl World {
    async fn new() -> Self {
        let mut node = Node::new("k1");
        node.network.send_replace(Some(network()));
        node.start();
        let (kept, pod) = (Pod::new("k1a"), Pod::new("k1b"));
        let result = node.call("ADD", Some(&kept), json!({})).await.unwrap();
        Self { node, kept: (kept, result), pod }
    }

    /// Has a server that dies before its `step`-th step asked for the command; another one takes its place. If there was
    /// no such step, gives how many there were.
    async fn dies_at(&mut self, step: usize, command: &str) -> Option<usize> {
        self.node.handle.take().unwrap().stop().await;
        let place = format!("{} {}", self.node.folder.path().display(), self.node.namespace.0);
        let mut server = Command::new(std::env::current_exe().unwrap());
        server.args(["--exact", NAME, "--nocapture"]).env(SERVER, place);
        let (ready, is_ready) = oneshot::channel();
        let run = move || run_to(step, server, |process| ready.send(process).unwrap());
        let run = tokio::task::spawn_blocking(run);
        let process = is_ready.await.unwrap();
        let answer = self.node.call(command, Some(&self.pod), json!({})).await;
        // Else it goes on to serve.
        let _dead = kill(process, Signal::SIGKILL);
        let steps = run.await.unwrap();
        let all = (steps < step).then_some(steps);
        assert!(all.is_none() || answer.is_ok(), "{answer:?}");
        self.node.start();
        all
    }

    /// The next agent and the runtime make good what a death has left.
    async fn is_made_good(&self, then: Then, when: &str) {
        let Self { node, kept: (kept, kept_result), pod } = self;
        let when = format!("{when}, then {then:?}");
        assert_eq!(node.check(kept, kept_result).await, Ok(Value::Null), "{when}");
        match then {
            Then::Add => {
                let result = node.call("ADD", Some(pod), json!({})).await.expect(&when);
                assert_eq!(node.check(pod, &result).await, Ok(Value::Null), "{when}");
                for at in [0, 1] {
                    let ip = |result: &Value| -> std::net::IpAddr {
                        let text = result["ips"][at]["address"].as_str().unwrap().to_owned();
                        text.split('/').next().unwrap().parse().unwrap()
                    };
                    let ip_kept = ip(kept_result);
                    assert_ne!(ip(&result), ip_kept, "{when}");
                    assert!(pod.namespace.reaches(&kept.namespace, ip_kept), "{when}");
                }
                assert_eq!((node.links(), node.endpoints.len()), (2, 4), "{when}");
                node.call("DEL", Some(pod), json!({})).await.expect(&when);
            }
            Then::Del => {
                node.call("DEL", Some(pod), json!({})).await.expect(&when);
            }
            Then::Gc => {
                let valid = json!([{"containerID": kept.id, "ifname": "eth0"}]);
                let valid = json!({"cni.dev/valid-attachments": valid});
                node.call("GC", None, valid).await.expect(&when);
            }
        }
        assert_eq!((node.links(), node.endpoints.len()), (1, 2), "{when}");
        let state = node.folder.path().join("state/cni/ipam.json");
        let state = std::fs::read_to_string(state).unwrap();
        assert!(state.contains(&kept.id) && !state.contains(&pod.id), "{when}: {state}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_at_any_step_is_made_good_by_the_next_agent() {
    if let Some(place) = std::env::var_os(SERVER) {
        // A runtime of its own, of one thread.
        let server = std::thread::spawn(move || serve(place.to_str().unwrap()));
        return server.join().unwrap();
    }
    skip_unless_able!();
    let mut world = World::new().await;
    let mut steps = Vec::new();
    // All that a server does takes ten times as long on an emulated processor: every fourth step there.
    let stride = if std::env::var_os("ORLOP_EMULATED").is_some() { 4 } else { 1 };
    for command in ["ADD", "DEL"] {
        for step in (1..).step_by(stride) {
            if command == "DEL" {
                world.node.call("ADD", Some(&world.pod), json!({})).await.unwrap();
            }
            let all = world.dies_at(step, command).await;
            // Neighbouring steps leave nearly the same.
            let then = [Then::Add, Then::Del, Then::Gc][step % 3];
            world.is_made_good(then, &format!("{command} before step {step}")).await;
            if let Some(all) = all {
                steps.push(all);
                break;
            }
        }
    }
    // A pair of devices, two addresses, their routes and neighbours on both sides, a file and an answer; and
    // to undo that, a device, a file and an answer.
    assert!(steps[0] > 15 && steps[1] > 4, "{steps:?}");
}
