//! Containers of the embedded runtime on this machine: real shims, namespaces, cgroups and logs.
//!
//! Needs root and a cgroup v2 tree, in which each test works below a folder of its own. Controllers are
//! left out here, as a build machine may have none in v2: limits are tested in VMs.

#[cfg(test)]
#[path = "support/pod.rs"]
mod pod;

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read as _, Write as _},
        path::Path,
        time::{Duration, Instant},
    };

    use node_agent::kubelet::runtime::{
        ContainerId, ExecSpec, Mount, Runtime as _, RuntimeEvent, User,
    };
    use tokio::{io::AsyncReadExt as _, sync::mpsc, time::timeout};

    use super::pod::{Node, SLOW, log, start};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_container_runs_in_its_own_world_and_leaves_nothing() {
        let Some(mut node) = Node::new().await else { return };
        let script = "
            echo pid $$; hostname; echo $GREETING $HOME; cat /etc/layer; echo; pwd
            cat /etc/hosts /etc/resolv.conf; cat /proc/self/oom_score_adj
            echo error >&2; echo -n done > /dev/termination-log; exit 3";
        let spec = node.container(script);
        let (exit, log) = node.run(&spec).await;
        assert_eq!((exit.code, exit.signal, exit.oom_killed), (3, 0, false), "{log}");
        assert_eq!(exit.message, "done");
        for line in [
            "pid 1",
            "web-host",
            "hello /root",
            "top",
            "/",
            "10.244.9.9\tweb-host",
            "192.0.2.7\talias",
            "nameserver 10.96.0.10",
            "7",
            "error",
        ] {
            assert!(log.lines().any(|found| found == line), "no {line:?} in {log}");
        }
        let known = node.runtime.sandboxes().await.unwrap();
        let known = known.first().unwrap();
        assert_eq!(known.ips, ["10.244.9.9".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(known.containers.first().unwrap().exit.as_ref(), Some(&exit));
        node.runtime.remove_container(&spec.id).await.unwrap();
        node.runtime.remove_container(&spec.id).await.unwrap();
        assert!(node.runtime.sandboxes().await.unwrap().first().unwrap().containers.is_empty());

        let calls = fs::canonicalize(node.dir.path().join("calls")).unwrap();
        let added = fs::read_to_string(&calls).unwrap();
        assert!(added.starts_with(&format!("ADD {} eth0 ", node.uid)), "{added}");
        assert!(added.contains("K8S_POD_NAME=web"), "{added}");
        let keep = tempfile::tempdir().unwrap();
        let kept = keep.path().join("calls");
        fs::hard_link(&calls, &kept).unwrap();
        node.finish().await;
        let all = fs::read_to_string(kept).unwrap();
        assert_eq!(all.lines().filter(|line| line.starts_with("DEL ")).count(), 1, "{all}");
        assert!(all.contains("prevResult"), "{all}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_container_cannot_reach_the_node() {
        let Some(mut node) = Node::new().await else { return };
        let script = "
            mount -t tmpfs none /tmp 2>/dev/null && echo mounted
            unshare -U true 2>/dev/null && echo unshared
            echo x > /proc/sys/kernel/panic 2>/dev/null && echo sysctl
            touch /sys/x 2>/dev/null && echo sysfs
            head -c1 /proc/kcore 2>/dev/null | grep -q . && echo kcore
            ls /sys/firmware | grep -q . && echo firmware
            mknod /dev/sneaky c 1 3 && cat /dev/sneaky 2>/dev/null && echo device
            mknod /tmp/sneaky c 1 3 && cat /tmp/sneaky 2>/dev/null && echo device
            cat /dev/null || echo nonull
            grep -q . /proc/1/cgroup && grep -v ':/$' /proc/self/cgroup | grep '^0:' && echo cgroup
            grep CapBnd /proc/self/status; grep Seccomp: /proc/self/status; ls /outside; id";
        let spec = node.container(script);
        let outside = node.dir.path().join("secret");
        fs::write(&outside, "secret").unwrap();
        let (_, text) = node.run(&spec).await;
        for word in [
            "mounted", "unshared", "sysctl", "sysfs", "kcore", "firmware", "device", "nonull",
            "cgroup",
        ] {
            assert!(!text.lines().any(|line| line.ends_with(word)), "{word}: {text}");
        }
        // The 14 default capabilities as a mask.
        assert!(text.contains("CapBnd:\t00000000a80425fb"), "{text}");
        assert!(text.contains("Seccomp:\t2"), "{text}");

        // A mount whose destination is behind a link of the image lands inside the container.
        let mut spec = node.container("cat /outside/file; touch /outside/file; id -u; id -G; touch /x; grep Cap /proc/self/status");
        spec.mounts = vec![Mount {
            source: Some(outside),
            destination: "/etc/link/file".into(),
            read_only: true,
        }];
        spec.user = User { uid: 33, gid: 34, additional_gids: vec![50] };
        spec.read_only_root = true;
        spec.capabilities.drop = vec!["ALL".to_owned()];
        spec.no_new_privileges = true;
        let (_, text) = node.run(&spec).await;
        assert!(text.contains("secret"), "{text}");
        assert_eq!(text.matches("Read-only file system").count(), 2, "{text}");
        // What is said as an error may stand between what is said.
        assert!(text.contains("33\n") && text.contains("34 50\n"), "{text}");
        assert!(text.contains("CapBnd:\t0000000000000000"), "{text}");
        assert!(!Path::new("/outside").exists());
        node.finish().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_program_that_cannot_start_is_named() {
        let Some(node) = Node::new().await else { return };
        node.runtime.ensure_sandbox(&node.sandbox()).await.unwrap();
        for (program, words) in [
            ("ghost", "exec: \"ghost\": executable file not found in $PATH"),
            ("/ghost", "exec: \"/ghost\": stat /ghost: no such file or directory"),
            ("/etc/plain", "exec: \"/etc/plain\": permission denied"),
        ] {
            let mut spec = node.container("");
            spec.args = vec![program.to_owned()];
            let error = node.runtime.start_container(&spec).await.unwrap_err();
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.ends_with(words), "{source}");
        }
        assert!(node.runtime.sandboxes().await.unwrap().first().unwrap().containers.is_empty());
        assert_eq!(fs::read_dir(node.config.state_dir.join("containers")).unwrap().count(), 0);
        node.finish().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_container_outlives_the_agent_and_its_end_is_not_missed() {
        let Some(mut node) = Node::new().await else { return };
        node.runtime.ensure_sandbox(&node.sandbox()).await.unwrap();
        let stays = node.container("trap 'exit 9' TERM; while :; do sleep 0.1; done");
        let gate = node.dir.path().join("gate");
        let mut ends = node.container("while test ! -e /gate/open; do sleep 0.05; done; exit 5");
        fs::create_dir(&gate).unwrap();
        ends.mounts = vec![Mount {
            source: Some(gate.clone()),
            destination: "/gate".into(),
            read_only: true,
        }];
        let started = node.runtime.start_container(&stays).await.unwrap();
        node.runtime.start_container(&ends).await.unwrap();

        // The agent dies, one container ends, a new agent comes.
        let config = node.config.clone();
        let (spare, unused) = mpsc::channel(1);
        drop(spare);
        drop(std::mem::replace(&mut node.events, unused));
        fs::write(gate.join("open"), "").unwrap();
        let state =
            config.run_dir.join("shim").join(&*node.uid.0).join(format!("{}.state.json", ends.id));
        let deadline = Instant::now() + SLOW;
        while !fs::read_to_string(&state).is_ok_and(|text| text.contains("\"code\":5")) {
            assert!(Instant::now() < deadline, "the exit was not written");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        (node.runtime, node.events) = start(&config).await;
        let known = node.runtime.sandboxes().await.unwrap();
        let known = &known.first().unwrap().containers;
        let find = |id: &ContainerId| known.iter().find(|known| known.id == *id).unwrap();
        assert_eq!(find(&ends.id).exit.as_ref().unwrap().code, 5);
        assert_eq!(find(&stays.id).exit, None);
        assert_eq!((find(&stays.id).pid, find(&stays.id).started_at), (started.pid, started.at));
        assert_eq!(node.runtime.start_container(&stays).await.unwrap(), started);

        node.runtime.stop_container(&stays.id, SLOW).await.unwrap();
        assert_eq!(node.exit(&stays.id).await.code, 9);
        node.finish().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_container_that_ignores_the_signal_is_killed_with_its_children_after_the_grace() {
        let Some(mut node) = Node::new().await else { return };
        node.runtime.ensure_sandbox(&node.sandbox()).await.unwrap();
        let spec =
            node.container("trap '' TERM; sleep 1000 & echo up; while :; do sleep 1000; done");
        let started = node.runtime.start_container(&spec).await.unwrap();
        let before = Instant::now();
        let grace = Duration::from_millis(300);
        node.runtime.stop_container(&spec.id, grace).await.unwrap();
        let exit = node.exit(&spec.id).await;
        assert_eq!((exit.code, exit.signal), (137, 9));
        assert!(before.elapsed() >= grace);
        assert!(!Path::new(&format!("/proc/{}", started.pid)).exists());
        let procs = node
            .config
            .cgroup_root
            .join(format!("burstable/pod{}/{}/cgroup.procs", node.uid, spec.id));
        assert_eq!(fs::read_to_string(procs).unwrap(), "");
        node.finish().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_shim_that_dies_is_told_and_its_pod_can_be_removed() {
        let Some(mut node) = Node::new().await else { return };
        node.runtime.ensure_sandbox(&node.sandbox()).await.unwrap();
        let spec = node.container("sleep 1000");
        let started = node.runtime.start_container(&spec).await.unwrap();
        let procs =
            node.config.cgroup_root.join(format!("burstable/pod{}/shim/cgroup.kill", node.uid));
        fs::write(procs, "1").unwrap();
        let event = timeout(SLOW, node.events.recv()).await.unwrap().unwrap();
        assert_eq!(event, RuntimeEvent::SandboxLost { pod: node.uid.clone() });
        let deadline = Instant::now() + SLOW;
        while Path::new(&format!("/proc/{}", started.pid)).exists() {
            assert!(Instant::now() < deadline, "the container runs on unseen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let known = node.runtime.sandboxes().await.unwrap();
        let known = known.first().unwrap().containers.first().unwrap().exit.clone();
        assert_eq!(known.unwrap().code, 137);
        node.finish().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn exec_runs_beside_the_container_with_pipes_or_a_terminal() {
        let Some(node) = Node::new().await else { return };
        node.runtime.ensure_sandbox(&node.sandbox()).await.unwrap();
        let spec = node.container("sleep 1000");
        node.runtime.start_container(&spec).await.unwrap();
        let exec = |script: &str, tty| ExecSpec {
            args: ["sh", "-c", script].map(str::to_owned).into(),
            stdin: true,
            tty,
        };
        let script = "cat; echo $GREETING; cat /proc/1/cmdline; grep Seccomp: /proc/self/status; echo no >&2; exit 4";
        let mut io = node.runtime.exec(&spec.id, &exec(script, false)).await.unwrap();
        let mut stdin = io.stdin.take().unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stdin, b"typed\n").await.unwrap();
        tokio::io::AsyncWriteExt::flush(&mut stdin).await.unwrap();
        drop(stdin);
        let mut text = String::new();
        io.stdout.unwrap().read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("typed\nhello\n") && text.contains("Seccomp:\t2"), "{text}");
        assert!(text.contains("sleep\u{0}1000"), "{text}");
        let mut text = String::new();
        io.stderr.unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "no\n");
        assert_eq!(timeout(SLOW, io.exit).await.unwrap().unwrap(), 4);

        let io = node.runtime.exec(&spec.id, &exec("tty; exit 6", true)).await.unwrap();
        assert!(io.terminal.is_some() && io.stderr.is_none());
        let mut master = fs::File::from(io.terminal.unwrap());
        let mut space = [0; 64];
        let count = tokio::task::spawn_blocking(move || {
            master.read(&mut space).map(|count| space[..count].to_vec())
        });
        let said =
            String::from_utf8(timeout(SLOW, count).await.unwrap().unwrap().unwrap()).unwrap();
        assert!(said.starts_with("/dev/pts/"), "{said}");
        assert_eq!(timeout(SLOW, io.exit).await.unwrap().unwrap(), 6);

        let error = node
            .runtime
            .exec(&spec.id, &ExecSpec { args: vec!["ghost".to_owned()], stdin: false, tty: false })
            .await
            .unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("executable file not found in $PATH"), "{source}");

        // Nobody wants it any more: the program is killed.
        let io =
            node.runtime.exec(&spec.id, &exec("echo $$; exec sleep 1000", false)).await.unwrap();
        let procs = node
            .config
            .cgroup_root
            .join(format!("burstable/pod{}/{}/cgroup.procs", node.uid, spec.id));
        let running = || fs::read_to_string(&procs).unwrap().lines().count();
        assert_eq!(running(), 2);
        drop(io);
        let deadline = Instant::now() + SLOW;
        while running() != 1 {
            assert!(Instant::now() < deadline, "the program runs on");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        node.finish().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_pod_on_the_nodes_network_can_be_privileged() {
        let Some(mut node) = Node::new().await else { return };
        let mut sandbox = node.sandbox();
        sandbox.host_network = true;
        let made = node.runtime.ensure_sandbox(&sandbox).await.unwrap();
        assert_eq!(made.ips, node.config.node_ips);
        let mut spec = node.container(
            "hostname; mount -t tmpfs none /tmp && echo mounted; stat -L -c net:%i /proc/self/ns/net
             grep Seccomp: /proc/self/status; exec mknod /tmp/null c 1 3",
        );
        spec.privileged = true;
        node.runtime.start_container(&spec).await.unwrap();
        let exit = node.exit(&spec.id).await;
        let text = log(&spec.log_path);
        assert_eq!(exit.code, 0, "{text}");
        let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert!(text.starts_with(&own), "{text}");
        assert!(text.contains("mounted\n") && text.contains("Seccomp:\t0"), "{text}");
        let net = fs::read_link("/proc/self/ns/net").unwrap();
        let net = net.to_str().unwrap().trim_matches(|c: char| !c.is_ascii_digit()).to_owned();
        assert!(text.contains(&format!("net:{net}\n")), "{text} is not {net}");
        assert!(!node.dir.path().join("calls").exists(), "CNI was called");
        fs::create_dir_all(node.config.run_dir.join("netns")).unwrap();
        node.finish().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_pod_without_a_network_is_refused_and_can_be_removed() {
        let Some(node) = Node::new().await else { return };
        fs::remove_file(node.config.cni_conf_dir.join("10-test.conflist")).unwrap();
        let error = node.runtime.ensure_sandbox(&node.sandbox()).await.unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.starts_with("cni plugin not initialized"), "{source}");
        node.finish().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_container_with_a_terminal_logs_what_it_shows() {
        let Some(mut node) = Node::new().await else { return };
        let mut spec = node.container("tty; echo $TERM; sleep 0.1; echo last");
        spec.tty = true;
        spec.stdin = true;
        let (exit, text) = node.run(&spec).await;
        assert_eq!(exit.code, 0);
        assert_eq!(text.replace('\r', ""), "/dev/pts/0\nxterm\nlast\n");
        node.finish().await;
    }

    /// Prints the time from the request to a running program; compared with crun by hand.
    #[tokio::test(flavor = "multi_thread")]
    async fn starting_is_quick() {
        let Some(mut node) = Node::new().await else { return };
        node.runtime.ensure_sandbox(&node.sandbox()).await.unwrap();
        let mut times = Vec::new();
        for _ in 0..20 {
            let spec = node.container("exit 0");
            let before = Instant::now();
            node.runtime.start_container(&spec).await.unwrap();
            times.push(before.elapsed());
            assert_eq!(node.exit(&spec.id).await.code, 0);
            node.runtime.remove_container(&spec.id).await.unwrap();
        }
        times.sort();
        let (quickest, median) = (times[0], times[times.len() / 2]);
        writeln!(std::io::stderr(), "create and start: median {median:?}").unwrap();
        // The quickest of twenty had the machine to itself; an emulated processor is ten times slower.
        let emulated = std::env::var_os("ORLOP_EMULATED").is_some();
        let limit = Duration::from_millis(if emulated { 5_000 } else { 500 });
        assert!(quickest < limit && median < limit * 10, "{times:?}");
        node.finish().await;
    }
}
