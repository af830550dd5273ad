//! What the agent makes of services is what kube-proxy makes of them: the same objects, by a server of the Kubernetes
//! API, to upstream's `kube-proxy` on one node and to the agent on another, and the same questions by processes of the
//! node and by a client outside. Who answers must be the same.
//!
//! Needs root, eBPF, kubectl, iptables and upstream's programs; says so when it skips.

#[cfg(test)]
#[path = "kube_proxy/asking.rs"]
mod asking;
#[cfg(test)]
#[path = "api_server/manifest.rs"]
mod manifest;
#[cfg(test)]
#[path = "api_server/node.rs"]
#[expect(dead_code, reason = "questions by themselves are for another test")]
mod node;
#[cfg(test)]
#[path = "../../node-agent/tests/support/place.rs"]
mod place;
#[cfg(test)]
#[path = "api_server/server.rs"]
#[expect(dead_code, reason = "servers that come and go are for another test")]
mod server;
#[cfg(test)]
#[path = "kube_proxy/services.rs"]
mod services;
#[cfg(test)]
#[path = "../../node-agent/tests/support/space.rs"]
#[expect(dead_code, reason = "agents here are processes")]
mod space;

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        process::{Child, Command},
        time::{Duration, Instant},
    };

    use super::{
        asking::{Answers, Question, ask_all},
        node::{NAME, Node, addresses, node_object, said_to},
        place::is_possible,
        server::{Kind, Server},
        services::{self, Case},
        space::pause,
    };

    /// Longest until all services are programmed.
    const SOON: Duration = Duration::from_secs(30);

    #[test]
    fn who_answers_is_who_would_by_kube_proxy() {
        if super::node::play(&[("ask", super::asking::play)]) {
            return;
        }
        let mut programs = ["kubectl", "iptables", "kube-proxy"].into_iter();
        let missing = programs.find_map(|name| skip::program(name).err());
        if let Some(why) = missing.or_else(|| Kind::upstream().err()) {
            skip::because(&why);
            return;
        }
        if !is_possible() {
            return;
        }
        let cases = services::cases();
        let questions = services::questions(&cases);
        let proxied = answered(&cases, &questions, false);
        let ours = answered(&cases, &questions, true);
        let differing: Vec<String> = proxied
            .iter()
            .filter(|(about, answers)| ours.get(*about) != Some(*answers))
            .map(|(about, answers)| {
                format!("{about}: kube-proxy {answers:?}, ours {:?}", ours.get(about))
            })
            .collect();
        assert!(proxied.values().any(|answers| answers.len() > 1), "{proxied:?}");
        assert!(differing.is_empty(), "{differing:#?}");
    }

    /// All answers on a node of its own, of the agent or of kube-proxy.
    fn answered(cases: &[Case], questions: &[Question], by_us: bool) -> Answers {
        let node = Node::new();
        let server = Server::start(Kind::upstream().unwrap(), &node);
        server.create(&[node_object()]);
        server.kubectl(&["patch", "node", NAME, "--subresource=status", "-p", &addresses()]);
        server.create(&cases.iter().flat_map(Case::objects).collect::<Vec<_>>());
        for case in cases {
            if let Some(patch) = case.status() {
                let patch = [
                    "patch",
                    "service",
                    case.name,
                    "--subresource=status",
                    "--type=merge",
                    "-p",
                    &patch,
                ];
                server.kubectl(&patch);
            }
        }
        let proxy = (!by_us).then(|| KubeProxy::start(&node, &server.admin()));
        if proxy.is_none() {
            node.start_agent(&server.credentials());
        }
        // The last one is programmed last.
        let last: Vec<Question> = questions.iter().rev().take(1).cloned().collect();
        let start = Instant::now();
        while ask_all(&node, &last).values().all(|answers| answers.contains("nobody")) {
            assert!(start.elapsed() < SOON, "{}", node.agent_said());
            pause(Duration::from_millis(200));
        }
        ask_all(&node, questions)
    }

    /// Upstream's proxy on the node, as long as it lives.
    struct KubeProxy(Child);

    impl KubeProxy {
        fn start(node: &Node, kubeconfig: &Path) -> Self {
            let mut command = Command::new(skip::program("kube-proxy").unwrap());
            command.arg("--kubeconfig").arg(kubeconfig);
            command.arg(format!("--hostname-override={NAME}"));
            command.args(["--proxy-mode=iptables", "--cluster-cidr=10.244.0.0/16"]);
            // Limits of the machine, which a namespace may not set.
            command.args(["--conntrack-max-per-core=0", "--conntrack-min=0"]);
            command.args(["--conntrack-tcp-timeout-established=0s"]);
            command.args(["--conntrack-tcp-timeout-close-wait=0s"]);
            said_to(&mut command, &node.folder.path().join("agent.log"));
            Self(node.spawn(command))
        }
    }

    impl Drop for KubeProxy {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }
}
