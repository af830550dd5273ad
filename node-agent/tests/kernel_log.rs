//! The kernel programs' own lines of text, with the feature `kernel-log`: what they decide for a pod's packets
//! stands in this process's log.
#![cfg(feature = "kernel-log")]

#[cfg(test)]
#[path = "support/cluster.rs"]
#[expect(dead_code, reason = "two nodes and clients outside are for other tests")]
mod cluster;

#[cfg(test)]
mod tests {
    use std::{
        io::{self, ErrorKind, Write},
        net::TcpStream,
        slice::from_ref,
        sync::{Arc, Mutex},
        time::{Duration, Instant},
    };

    use node_agent::{dataplane::XdpMode, overlay::Mode};

    use super::cluster::{
        AT_ONCE, Cluster, Node, SERVICE, SetUp, both_families, make_bridge,
        place::is_possible,
        pod_ip,
        space::{Space, pause},
        tcp,
    };

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        /// Waits for a line of the programs with these words.
        fn has(&self, level: &str, words: &[&str]) {
            let start = Instant::now();
            loop {
                let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
                let mut lines =
                    text.lines().filter(|line| line.contains(&format!("{level} ebpf: ")));
                if lines.any(|line| words.iter().all(|word| line.contains(word))) {
                    return;
                }
                assert!(start.elapsed() < Duration::from_secs(10), "no {words:?} in\n{text}");
                pause(Duration::from_millis(50));
            }
        }
    }

    #[test]
    fn decisions_are_told_in_words() {
        if !is_possible() {
            return;
        }
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .with_max_level(tracing::Level::TRACE)
            .init();
        let lan = Space::new();
        lan.run(make_bridge);
        let mut node = Node::new(1, both_families, &lan);
        for last in [11, 12] {
            node.add_pod(last);
        }
        let cluster = Cluster::with_backends(both_families, &[pod_ip(1, 12)]);
        let pins = Some(node.space.bpf.join("orlop"));
        let set_up = SetUp { mode: Mode::Vxlan, tc: None, cgroup: None, pins, xdp: XdpMode::Off };
        let agent = node.start(&cluster, set_up);
        let client = &node.pods[&11];
        assert_eq!(client.run(|| tcp(SERVICE, 1)).len(), 1);
        let service = "to ::ffff:10.96.0.1 port 80";
        log.has(
            "INFO",
            &[
                "flow opened: ::ffff:10.244.1.11 port ",
                service,
                "goes to ::ffff:10.244.1.12 port 8080",
            ],
        );
        cluster.set_backends(&[]);
        cluster.settle(from_ref(&agent));
        let refused = client.run(|| TcpStream::connect_timeout(&SERVICE.into(), AT_ONCE));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        log.has("WARN", &["packet dropped: ", service, "service has no ready endpoint"]);
        drop(agent);
        node.space.settle();
    }
}
