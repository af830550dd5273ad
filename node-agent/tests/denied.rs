//! A kernel that denies BPF: the agent says so in one line and ends, before it asks to join.

#[cfg(test)]
#[path = "support/place.rs"]
#[expect(dead_code, reason = "shared with tests that need more of it")]
mod place;

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind,
        net::TcpListener,
        path::Path,
        process::{Command, ExitStatus, Stdio},
        thread,
        time::{Duration, Instant},
    };

    use super::place::{is_possible, own_namespaces};

    /// What `capabilities(7)` has for loading programs.
    const BPF: &str = "-bpf,-sys_admin,-perfmon";
    /// Longer than the agent takes to its first request on a busy machine under emulation.
    const SLOW: Duration = Duration::from_secs(60);

    /// An agent that would join at `port` of loopback, started by `before`.
    fn agent(before: &[&str], state: &Path, port: u16) -> Command {
        let line = [before, &[env!("CARGO_BIN_EXE_node-agent"), "run"]].concat();
        let mut agent = Command::new(line[0]);
        agent.args(&line[1..]).args(["--components", "dataplane,overlay,cni", "--node-name", "n"]);
        agent.arg("--server").arg(format!("https://127.0.0.1:{port}"));
        agent.args(["--token", &format!("abcdef.0123456789abcdef.{}", "0".repeat(64))]);
        agent.arg("--kubeconfig").arg(state.join("kubeconfig"));
        agent.arg("--state-dir").arg(state).arg("--run-dir").arg(state.join("run"));
        agent
    }

    #[expect(clippy::disallowed_methods, reason = "a plain test thread may sleep")]
    /// Runs `agent` until its end, or until it asks `server` for something; which of both, and what it said.
    fn run(agent: &mut Command, server: &TcpListener) -> (Option<ExitStatus>, String) {
        let mut child = agent.stderr(Stdio::piped()).spawn().unwrap();
        let start = Instant::now();
        let ended = loop {
            // In this order: what it asked for right before its end is seen.
            let ended = child.try_wait().unwrap();
            match server.accept() {
                Ok(_) => break None,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            if ended.is_some() {
                break ended;
            }
            assert!(start.elapsed() < SLOW, "neither asks nor ends within {SLOW:?}");
            thread::sleep(Duration::from_millis(10));
        };
        child.kill().unwrap();
        let said = child.wait_with_output().unwrap();
        (ended, String::from_utf8(said.stderr).unwrap())
    }

    #[test]
    fn kernel_that_denies_bpf_is_named_before_the_node_joins() {
        if !is_possible() {
            return;
        }
        let _bpf = own_namespaces();
        let folder = tempfile::tempdir().unwrap();
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        server.set_nonblocking(true).unwrap();
        let port = server.local_addr().unwrap().port();

        let bounds = [format!("--bounding-set={BPF}"), format!("--inh-caps={BPF}")];
        let state = folder.path().join("denied");
        let (ended, said) =
            run(&mut agent(&["setpriv", &bounds[0], &bounds[1]], &state, port), &server);
        let ended = ended.unwrap_or_else(|| panic!("it asked to join: {said}"));
        assert_eq!(ended.code(), Some(3), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("CAP_BPF") && said.contains("CAP_PERFMON"), "{said}");
        assert!(!state.exists(), "it made its folders");

        // The same with these capabilities gets to asking, so that nothing else was in the way.
        let allowed = folder.path().join("allowed");
        let (ended, said) = run(&mut agent(&[], &allowed, port), &server);
        assert_eq!(ended, None, "{said}");
    }
}
