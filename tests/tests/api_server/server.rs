//! A server of the Kubernetes API in the node's network namespace, in processes that can be killed.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use control_plane::{admin::Admin, config::Config};
use serde_json::{Value, json};

use super::{
    manifest::Manifest,
    node::{IP, Node, itself, said_to},
    space::pause,
};

const URL: &str = "https://192.0.2.1:6443";
const ETCD: &str = "http://127.0.0.1:2379";
/// Longest until a server is ready; upstream's makes its first objects before.
const READY: Duration = Duration::from_secs(60);
/// A secret of this test alone: it is good for the time of the test, in a network namespace that nobody reaches.
const ADMIN_TOKEN: &str = "administrator-of-a-test";

/// Whose server.
pub(crate) enum Kind {
    Ours,
    Upstream { kube_apiserver: PathBuf, etcd: PathBuf },
}

impl Kind {
    /// Upstream's. The error names the program that is missing.
    pub(crate) fn upstream() -> Result<Self, String> {
        let kube_apiserver = skip::program("kube-apiserver")?;
        Ok(Self::Upstream { kube_apiserver, etcd: skip::program("etcd")? })
    }
}

/// Our server, until it is killed.
pub(crate) async fn run_ours(folder: &Path) {
    let mut config = Config::new(folder.join("data"));
    config.advertise_address = Some(IP.parse().unwrap());
    let _running = control_plane::run::start(config).await.unwrap();
    std::future::pending().await
}

/// The running server.
pub(crate) struct Server<'a> {
    kind: Kind,
    node: &'a Node,
    processes: Vec<Child>,
}

impl<'a> Server<'a> {
    /// A new one, once it is ready.
    pub(crate) fn start(kind: Kind, node: &'a Node) -> Self {
        let mut server = Self { kind, node, processes: Vec::new() };
        if matches!(server.kind, Kind::Upstream { .. }) {
            let key = rcgen::KeyPair::generate().unwrap();
            fs::write(server.file("accounts.key"), key.serialize_pem()).unwrap();
            fs::write(server.file("accounts.pub"), key.public_key_pem()).unwrap();
            let admin = format!("{ADMIN_TOKEN},admin,admin,system:masters\n");
            fs::write(server.file("tokens.csv"), admin).unwrap();
        }
        server.start_again();
        server
    }

    fn file(&self, name: &str) -> PathBuf {
        self.node.folder.path().join(name)
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        for mut process in self.processes.drain(..) {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// On what the one before has stored, once it is ready.
    pub(crate) fn start_again(&mut self) {
        let commands = match &self.kind {
            Kind::Ours => vec![itself("server", self.node.folder.path())],
            Kind::Upstream { kube_apiserver, etcd } => {
                vec![self.etcd(etcd), self.kube_apiserver(kube_apiserver)]
            }
        };
        for mut command in commands {
            said_to(&mut command, &self.file("server.log"));
            self.processes.push(self.node.spawn(command));
        }
        let start = Instant::now();
        while let Err(why) = self.ready() {
            if start.elapsed() > READY {
                let said = fs::read_to_string(self.file("server.log")).unwrap();
                panic!("the server is not ready: {why}; it said:\n{said}");
            }
            pause(Duration::from_millis(100));
        }
    }

    /// The administrator's kubeconfig.
    pub(crate) fn admin(&self) -> PathBuf {
        self.file("admin.kubeconfig")
    }

    fn ready(&self) -> Result<String, String> {
        let kubeconfig = match self.kind {
            Kind::Ours => {
                let admin = Admin::open(&self.file("data")).map_err(|error| error.to_string())?;
                admin.kubeconfig(Some(URL))
            }
            Kind::Upstream { .. } => {
                let ca = self.file("certificates/apiserver.crt");
                kubeconfig(&ca, &json!({ "token": ADMIN_TOKEN }))
            }
        };
        fs::write(self.admin(), kubeconfig).unwrap();
        self.try_kubectl(&["get", "--raw=/readyz"], "")
    }

    fn etcd(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("--data-dir").arg(self.file("etcd"));
        command.args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
        command.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        command
    }

    fn kube_apiserver(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.args([
            format!("--etcd-servers={ETCD}"),
            format!("--advertise-address={IP}"),
            format!("--cert-dir={}", self.file("certificates").display()),
            format!("--token-auth-file={}", self.file("tokens.csv").display()),
            format!("--service-account-key-file={}", self.file("accounts.pub").display()),
            format!("--service-account-signing-key-file={}", self.file("accounts.key").display()),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            // As the DaemonSet's pods are.
            "--allow-privileged=true".to_owned(),
        ]);
        command
    }

    /// What kubectl printed.
    #[track_caller]
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments, "").unwrap()
    }

    /// Creates objects, from what a user would have in a file.
    #[track_caller]
    pub(crate) fn create(&self, objects: &[Value]) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.try_kubectl(&["create", "-f", "-"], &list.to_string()).unwrap();
    }

    fn try_kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(self.admin());
        command.arg("--cache-dir").arg(self.file("cache")).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.node.spawn(command);
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let ended = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if ended.status.success() { Ok(text(&ended.stdout)) } else { Err(text(&ended.stderr)) }
    }

    /// The agent's kubeconfig: by the manifest's service account and its role, or the administrator's at our own server,
    /// which does not have roles yet.
    pub(crate) fn credentials(&self) -> PathBuf {
        let account = self.file("agent");
        fs::create_dir_all(&account).unwrap();
        let file = account.join("kubeconfig");
        match self.kind {
            Kind::Ours => drop(fs::copy(self.admin(), &file).unwrap()),
            Kind::Upstream { .. } => {
                let manifest = Manifest::read();
                self.create(manifest.documents());
                let name = ["orlop-node-agent", "--namespace", "kube-system"];
                let token = self.kubectl(&[&["create", "token"], &name[..]].concat());
                fs::write(account.join("token"), token).unwrap();
                let ca = self.file("certificates/apiserver.crt");
                fs::copy(ca, account.join("ca.crt")).unwrap();
                fs::write(&file, manifest.kubeconfig(IP, &account)).unwrap();
            }
        }
        file
    }

    /// Makes etcd forget how it came to what it has.
    pub(crate) fn compact(&self) {
        let revision = self.kubectl(&[
            "get",
            "services",
            "third",
            "-o",
            "jsonpath={.metadata.resourceVersion}",
        ]);
        let mut command = Command::new("busybox");
        let ask = json!({ "revision": revision, "physical": true }).to_string();
        let url = format!("{ETCD}/v3/kv/compaction");
        command.args(["wget", "-q", "-O", "-", "--post-data", &ask, &url]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let ended = self.node.spawn(command).wait_with_output().unwrap();
        assert!(ended.status.success(), "{ended:?}");
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

fn kubeconfig(ca: &Path, user: &Value) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "admin",
        "clusters": [{"name": "it", "cluster": {"server": URL, "certificate-authority": ca}}],
        "users": [{"name": "admin", "user": user}],
        "contexts": [{"name": "admin", "context": {"cluster": "it", "user": "admin"}}],
    })
    .to_string()
}
