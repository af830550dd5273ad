//! `kubectl exec`, `cp`, `port-forward` and `logs` by real clients, through a whole control plane in this
//! process to a kubelet's server. Only the runtime is the test's: it runs processes of this host.

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, SocketAddr},
        os::fd::OwnedFd,
        path::{Path, PathBuf},
        process::Stdio,
        sync::Arc,
        time::Duration,
    };

    use control_plane::{admin::Admin, config::Config, run::start};
    use node_agent::{
        join,
        kubelet::{
            ContainerView, Directory, KubeletConfig, PodView,
            runtime::{
                ContainerId, ContainerSpec, ExecIo, ExecSpec, PodUid, Runtime, RuntimeError,
                RuntimeEvent, Sandbox, SandboxSpec, SandboxState, Started,
            },
            server,
        },
    };
    use serde_json::json;
    use tokio::{
        fs::File,
        io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
        net::{TcpListener, TcpStream},
        process::Command,
        sync::{mpsc, oneshot},
    };

    /// Where the clients of each version lie; only the default one must be there.
    const CLIENTS: [&str; 4] = ["kubectl", "kubectl.1.31", "kubectl.1.32", "kubectl.1.33"];
    const VERSIONS_DIR: &str = "/usr/lib/google-cloud-sdk/bin";
    const PATIENCE: Duration = Duration::from_secs(60);

    #[derive(Debug)]
    struct HostRuntime;

    fn refused() -> RuntimeError {
        let source = "not part of the test".into();
        RuntimeError { step: "refuse", object: "test".to_owned(), source }
    }

    fn owned(end: impl Into<OwnedFd>) -> File {
        File::from_std(std::fs::File::from(end.into()))
    }

    impl Runtime for HostRuntime {
        async fn ensure_sandbox(&self, _: &SandboxSpec) -> Result<Sandbox, RuntimeError> {
            Err(refused())
        }

        async fn start_container(&self, _: &ContainerSpec) -> Result<Started, RuntimeError> {
            Err(refused())
        }

        async fn stop_container(&self, _: &ContainerId, _: Duration) -> Result<(), RuntimeError> {
            Err(refused())
        }

        async fn remove_container(&self, _: &ContainerId) -> Result<(), RuntimeError> {
            Err(refused())
        }

        async fn remove_sandbox(&self, _: &PodUid) -> Result<(), RuntimeError> {
            Err(refused())
        }

        async fn sandboxes(&self) -> Result<Vec<SandboxState>, RuntimeError> {
            Ok(Vec::new())
        }

        async fn exec(&self, _: &ContainerId, spec: &ExecSpec) -> Result<ExecIo, RuntimeError> {
            let mut command = std::process::Command::new(&spec.args[0]);
            command.args(&spec.args[1..]);
            command.stdin(if spec.stdin { Stdio::piped() } else { Stdio::null() });
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().map_err(|source| RuntimeError {
                step: "exec",
                object: spec.args[0].clone(),
                source: source.into(),
            })?;
            let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
            let stderr = child.stderr.take();
            let (sender, exit) = oneshot::channel();
            tokio::task::spawn_blocking(move || {
                let code = child.wait().expect("its end").code().unwrap_or(137);
                sender.send(code).ok()
            });
            Ok(ExecIo {
                stdin: stdin.map(owned),
                stdout: stdout.map(owned),
                stderr: stderr.map(owned),
                terminal: None,
                exit,
            })
        }

        fn take_events(&self) -> Option<mpsc::Receiver<RuntimeEvent>> {
            None
        }
    }

    struct Cluster {
        dir: tempfile::TempDir,
        directory: Directory,
        _running: control_plane::run::Running,
    }

    impl Cluster {
        /// A control plane, a joined node on a loopback address of its own, and one pod `web` on it.
        async fn start(octet: u8) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let data = dir.path().join("data");
            let mut config = Config::new(&data);
            config.bind = "127.0.0.1:0".parse().unwrap();
            let running = start(config).await.unwrap();
            let admin = Admin::open(&data).unwrap();
            std::fs::write(dir.path().join("kubeconfig"), admin.kubeconfig(None)).unwrap();
            let cluster = Self { dir, directory: Directory::default(), _running: running };

            // The kubelet's port is fixed, so each test has an address.
            let [a, b, ..] = std::process::id().to_le_bytes();
            let node_ip = Ipv4Addr::new(127, octet, a, b.max(1));
            let token = admin.create_token(None).await.unwrap();
            let server = format!("https://{}", cluster._running.bound);
            let how = join::Join { server, token: token.parse().unwrap() };
            let node_kubeconfig = cluster.dir.path().join("node");
            join::join(&how, "n1", &node_kubeconfig).await.unwrap();
            cluster.apply_node(node_ip).await;
            let (client, _) = join::client(&node_kubeconfig).await.unwrap();
            let door = server::Door {
                runtime: Arc::new(HostRuntime),
                directory: cluster.directory.clone(),
                netns_dir: cluster.dir.path().join("netns"),
            };
            let config = KubeletConfig {
                node_name: "n1".into(),
                node_ip: node_ip.into(),
                state_dir: cluster.dir.path().join("state"),
            };
            let address = SocketAddr::new(node_ip.into(), 10250);
            let from = (&config, node_kubeconfig.as_path());
            tokio::spawn(server::start(door, client, address, from).await.unwrap());
            let certificate = config.state_dir.join("pki/kubelet-serving.pem");
            wait_for("the serving certificate", || certificate.exists()).await;
            cluster
        }

        async fn apply_node(&self, ip: Ipv4Addr) {
            let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}});
            self.apply(&node).await;
            // The names that its serving certificate is signed for.
            let addresses = json!([
                {"type": "InternalIP", "address": ip.to_string()},
                {"type": "Hostname", "address": "n1"},
            ]);
            let status = json!({"status": {"addresses": addresses}}).to_string();
            let patch = ["patch", "node", "n1", "--subresource=status", "--type=merge", "-p"];
            self.kubectl(&[&patch[..], &[&status]].concat()).await;
            // In the node's own namespace: that is where the test's port is.
            let pod = json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"},
                "spec": {"nodeName": "n1", "hostNetwork": true, "containers": [{"name": "c", "image": "x"}]},
            });
            self.apply(&pod).await;
            let pod = self.kubectl(&["get", "pod", "web", "-o", "json"]).await.stdout;
            self.directory.put(PodView {
                pod: Arc::new(serde_json::from_slice(&pod).unwrap()),
                ips: vec![ip.into()],
                containers: vec![ContainerView {
                    name: "c".to_owned(),
                    running: Some(ContainerId("id0".into())),
                    newest: Some(0),
                    waiting: None,
                }],
                log_dir: self.dir.path().join("logs"),
            });
            let running = r#"{"status":{"phase":"Running"}}"#;
            let patch = ["patch", "pod", "web", "--subresource=status", "--type=merge", "-p"];
            self.kubectl(&[&patch[..], &[running]].concat()).await;
        }

        fn command(&self, client: &Path) -> Command {
            let mut command = Command::new(client);
            command.arg("--kubeconfig").arg(self.dir.path().join("kubeconfig"));
            command.arg("--cache-dir").arg(self.dir.path().join("cache"));
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.kill_on_drop(true);
            command
        }

        async fn apply(&self, object: &serde_json::Value) {
            let file = self.dir.path().join("object.json");
            std::fs::write(&file, object.to_string()).unwrap();
            let answer = self.kubectl(&["apply", "-f", file.to_str().unwrap()]).await;
            assert!(answer.status.success(), "{answer:?}");
        }

        async fn kubectl(&self, arguments: &[&str]) -> std::process::Output {
            self.run(Path::new("kubectl"), arguments, b"").await
        }

        async fn run(
            &self,
            client: &Path,
            arguments: &[&str],
            input: &[u8],
        ) -> std::process::Output {
            let mut command = self.command(client);
            let mut child = command.args(arguments).stdin(Stdio::piped()).spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            let feed = async {
                // A command that does not read its input closes it.
                let _closed = stdin.write_all(input).await;
                drop(stdin);
            };
            let both = async { tokio::join!(child.wait_with_output(), feed).0 };
            let ended = tokio::time::timeout(PATIENCE, both).await;
            ended.unwrap_or_else(|_| panic!("kubectl {arguments:?} does not end")).unwrap()
        }
    }

    async fn wait_for(what: &str, test: impl Fn() -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !test() {
            assert!(tokio::time::Instant::now() < deadline, "waited in vain for {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn clients() -> Vec<PathBuf> {
        let versions = CLIENTS.iter().map(|name| Path::new(VERSIONS_DIR).join(name));
        let mut found: Vec<PathBuf> = versions.filter(|path| path.exists()).collect();
        if found.is_empty() {
            found.push("kubectl".into());
        }
        found
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn kubectl_streams_end_as_the_command_does() {
        let cluster = Cluster::start(100).await;
        for client in clients() {
            let shell = |script: &'static str| ["exec", "web", "--", "sh", "-c", script];
            let about = |what: &str| format!("{}: {what}", client.display());

            let answer = cluster.run(&client, &shell("echo out; echo err >&2"), b"").await;
            let (out, err) = (text(&answer.stdout), text(&answer.stderr));
            let code = answer.status.code();
            assert_eq!((code, &*out, &*err), (Some(0), "out\n", "err\n"), "{}", about("output"));

            let answer = cluster.run(&client, &shell("exit 7"), b"").await;
            let words = "command terminated with exit code 7\n";
            let (code, err) = (answer.status.code(), text(&answer.stderr));
            assert_eq!((code, &*err), (Some(7), words), "{}", about("exit code"));

            let big = vec![b'x'; 8 << 20];
            let arguments = ["exec", "-i", "web", "--", "cat"];
            let answer = cluster.run(&client, &arguments, &big).await;
            let err = text(&answer.stderr);
            let same = answer.stdout == big;
            assert_eq!(
                (answer.status.code(), same, &*err),
                (Some(0), true, ""),
                "{}",
                about("8 MiB")
            );

            copy(&cluster, &client).await;
        }
        hang_up(&cluster).await;
    }

    /// `cp` both ways: `tar` beside the pod's container, which here is the host.
    async fn copy(cluster: &Cluster, client: &Path) {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(dir.path().join("here"), &content).unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let pod = |name: &str| format!("web:{}", path(name));
        for (from, to) in [(path("here"), pod("there")), (pod("there"), path("back"))] {
            let answer = cluster.run(client, &["cp", &from, &to], b"").await;
            assert!(answer.status.success(), "{} {from} {to}: {answer:?}", client.display());
        }
        for name in ["there", "back"] {
            assert!(std::fs::read(dir.path().join(name)).unwrap() == content, "{name}");
        }
    }

    /// A client that goes away ends the command.
    async fn hang_up(cluster: &Cluster) {
        let ready = cluster.dir.path().join("pid");
        let script = format!("echo $$ > {}; exec cat", ready.display());
        let mut command = cluster.command(Path::new("kubectl"));
        command.args(["exec", "-i", "web", "--", "sh", "-c", &script]).stdin(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let read =
            || std::fs::read_to_string(&ready).ok().and_then(|s| s.trim().parse::<u32>().ok());
        wait_for("the command's start", || read().is_some()).await;
        let process = PathBuf::from(format!("/proc/{}", read().unwrap()));
        assert!(process.exists());
        child.kill().await.unwrap();
        // Its input ended; a runtime that owns the process would have killed it as well.
        wait_for("the command's end", || !process.exists()).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn kubectl_forwards_ports() {
        let cluster = Cluster::start(101).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    tokio::io::copy(&mut read, &mut write).await.unwrap();
                    write.shutdown().await.unwrap();
                });
            }
        });
        for client in clients() {
            let mut command = cluster.command(&client);
            let mut child =
                command.args(["port-forward", "web", &format!(":{port}"), ":1"]).spawn().unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let mut ports = Vec::new();
            while ports.len() < 2 {
                let line =
                    tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap();
                let Some(line) = line else {
                    panic!("{}: {:?}", client.display(), child.wait_with_output().await.unwrap());
                };
                let rest = line.strip_prefix("Forwarding from 127.0.0.1:");
                ports.extend(rest.and_then(|rest| rest.split(' ').next()?.parse::<u16>().ok()));
            }
            // Several connections at a time, each with more than fits into any buffer on the way.
            let echoes = (0_u8..4).map(|n| echo(ports[0], n));
            for echo in echoes.map(tokio::spawn).collect::<Vec<_>>() {
                let echoed = tokio::time::timeout(PATIENCE, echo).await;
                echoed.unwrap_or_else(|_| panic!("{}: no echo", client.display())).unwrap();
            }
            // Nobody listens on port 1: the client says so.
            let mut refused = TcpStream::connect(("127.0.0.1", ports[1])).await.unwrap();
            assert_eq!(refused.read(&mut [0]).await.unwrap_or(0), 0);
            let mut words = BufReader::new(child.stderr.take().unwrap()).lines();
            loop {
                let line =
                    tokio::time::timeout(PATIENCE, words.next_line()).await.unwrap().unwrap();
                let line = line.expect("words about the refused connection");
                if line.contains("error forwarding port 1 to pod web") {
                    assert!(line.contains("onnection refused"), "{line}");
                    break;
                }
            }
            child.kill().await.unwrap();
        }
    }

    async fn echo(port: u16, byte: u8) {
        let sent = vec![byte; 2 << 20];
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let (mut read, mut write) = stream.into_split();
        let copy = sent.clone();
        let up = tokio::spawn(async move {
            write.write_all(&copy).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut back = Vec::new();
        read.read_to_end(&mut back).await.unwrap();
        up.await.unwrap();
        assert_eq!((back.len(), back == sent), (sent.len(), true));
    }
}
