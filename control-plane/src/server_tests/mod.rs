//! The server as stock `kubectl` sees it: a real one on loopback, real certificates, a real store.

mod bad_input;
mod bad_pods;
mod describing;
mod dual_stack;
mod identity;
mod services;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Output,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpListener,
    process::Child,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::Networks,
    api::{attributes, bootstrap::bootstrap, core::Api, service_account::Keys},
    pki::{Pki, ServerCert, ServerNames},
    server::{ServerConfig, serve},
    store::{Options, embedded::Embedded},
};

/// How long anything may take here.
const WAIT: Duration = Duration::from_secs(20);

struct Server {
    dir: TempDir,
    address: SocketAddr,
    kubectl: PathBuf,
    shutdown: CancellationToken,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Where a `kubectl` is, or `None` with a word that says what is skipped.
fn kubectl() -> Option<PathBuf> {
    let found = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|dir| dir.join("kubectl")).find(|file| file.exists())
    });
    if found.is_none() {
        skip::because("no kubectl in PATH");
    }
    found
}

async fn server() -> Option<Server> {
    server_with(&["10.96.0.0/16"]).await
}

/// With these service CIDRs.
async fn server_with(cidrs: &[&str]) -> Option<Server> {
    let kubectl = kubectl()?;
    let dir = tempfile::tempdir().unwrap();
    let now = Timestamp::now();
    let pki = Pki::open(dir.path(), now).unwrap();
    let networks = Networks::new(cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect());
    let names = ServerNames::new("10.96.0.1".parse().unwrap(), []);
    let cert = ServerCert::new(&pki.server_cert(&names, now).unwrap()).unwrap();
    let options = Options { class: attributes::class, attributes: attributes::attributes };
    let store = Embedded::open(&dir.path().join("state.db"), options).unwrap();
    let keys = Keys::new(&pki.sa_key_pem).unwrap();
    let api = Arc::new(Api::new(Arc::new(store), networks, Some(keys)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    bootstrap(&api, address.ip(), address.port()).await.unwrap();
    let shutdown = CancellationToken::new();
    let config = ServerConfig {
        listener,
        tls: Arc::new(pki.tls_config(&cert).unwrap()),
        api: Arc::clone(&api),
        kubelets: None,
        shutdown: shutdown.clone(),
    };
    tokio::spawn(async move {
        serve(config).await.unwrap();
        api.store.close().await.unwrap();
    });
    for (name, text) in [
        ("ca.crt", pki.ca_pem()),
        ("admin.crt", &pki.admin.cert_pem),
        ("admin.key", &pki.admin.key_pem),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    Some(Server { dir, address, kubectl, shutdown })
}

impl Server {
    fn spawn(&self, line: &str) -> Child {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        tokio::process::Command::new(&self.kubectl)
            .args(line.split_whitespace())
            .args(["--server", &format!("https://{}", self.address)])
            .args(["--certificate-authority", &path("ca.crt")])
            .args(["--client-certificate", &path("admin.crt")])
            .args(["--client-key", &path("admin.key")])
            .env("HOME", self.dir.path())
            .env("KUBECONFIG", Path::new("/dev/null"))
            .kill_on_drop(true)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    }

    async fn output(&self, line: &str, stdin: &str) -> Output {
        let mut child = self.spawn(line);
        let mut input = child.stdin.take().unwrap();
        input.write_all(stdin.as_bytes()).await.unwrap();
        drop(input);
        child.wait_with_output().await.unwrap()
    }

    /// Standard output of a command that succeeds.
    async fn ok(&self, line: &str, stdin: &str) -> String {
        let output = self.output(line, stdin).await;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "kubectl {line}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Standard error of a command that fails.
    async fn refused(&self, line: &str, stdin: &str) -> String {
        let output = self.output(line, stdin).await;
        assert!(!output.status.success(), "kubectl {line} succeeded");
        String::from_utf8(output.stderr).unwrap()
    }

    async fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("{line} -o json"), "").await).unwrap()
    }
}

const WEB: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: nginx
        image: nginx:1.22
        ports: [{containerPort: 80, name: http}]
        resources: {requests: {cpu: 100m, memory: 32Mi}, limits: {cpu: 200m, memory: 64Mi}}
        readinessProbe: {httpGet: {path: /, port: http}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_of_every_day() {
    let Some(server) = server().await else { return };
    let version = server.ok("version", "").await;
    assert!(version.contains("Server Version: v1.36"), "{version}");
    let made = server.ok("apply -f -", WEB).await;
    assert!(made.contains("deployment.apps/web created"), "{made}");
    assert!(made.contains("service/web created"), "{made}");
    let again = server.ok("apply -f -", WEB).await;
    assert!(again.contains("deployment.apps/web unchanged"), "{again}");
    let more = WEB.replace("replicas: 2", "replicas: 3");
    assert!(server.ok("apply -f -", &more).await.contains("deployment.apps/web configured"));
    let web = server.json("get deploy web").await;
    assert_eq!((&web["spec"]["replicas"], &web["metadata"]["generation"]), (&3.into(), &2.into()));
    assert_eq!(
        web["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"],
        "200m"
    );

    let table = server.ok("get deploy,svc,ns -o wide", "").await;
    assert!(table.contains("READY") && table.contains("0/3"), "{table}");
    assert!(table.contains("80:30086/TCP"), "{table}");
    assert!(table.contains("kube-node-lease"), "{table}");
    let described = server.ok("describe deploy web", "").await;
    assert!(described.contains("25% max unavailable, 25% max surge"), "{described}");
    server.ok("scale deploy web --replicas=5", "").await;
    server.ok("label deploy web tier=front", "").await;
    let web = server.json("get deploy web").await;
    assert_eq!(
        (&web["spec"]["replicas"], &web["metadata"]["labels"]["tier"]),
        (&5.into(), &"front".into())
    );
    let explained = server.ok("explain deployment.spec.replicas", "").await;
    assert!(explained.contains("replicas <integer>"), "{explained}");

    server.ok("create deployment made --image=nginx", "").await;
    server.ok("create namespace other", "").await;
    server.ok("create configmap settings --from-literal=a=b -n other", "").await;
    server.ok("create secret generic hidden --from-literal=a=b -n other", "").await;
    server.ok("run one --image=busybox -n default", "").await;
    let pods = server.ok("get pods", "").await;
    assert!(pods.contains("one") && pods.contains("Pending"), "{pods}");
    let described = server.ok("describe pod one", "").await;
    assert!(described.contains("Status:") && described.contains("Pending"), "{described}");
    assert!(server.ok("auth can-i create pods", "").await.starts_with("yes"));
    assert!(server.ok("auth whoami", "").await.contains("kubernetes-admin"));
    let deleted = server.ok("delete pod one --timeout=20s", "").await;
    assert!(deleted.contains("deleted"), "{deleted}");
    server.ok("delete deploy,svc web --timeout=20s", "").await;
    let gone = server.refused("get deploy web", "").await;
    assert!(
        gone.contains("Error from server (NotFound): deployments.apps \"web\" not found"),
        "{gone}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_in_upstreams_words() {
    let Some(server) = server().await else { return };
    let table = [
        (
            WEB.replace("replicas: 2", "replcas: 2"),
            "Deployment in version \"v1\" cannot be handled as a Deployment: strict decoding error: unknown field \"spec.replcas\"",
        ),
        (
            WEB.replace("replicas: 2", "replicas: two"),
            "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (WEB.replace("cpu: 100m", "cpu: lots"), "quantities must match the regular expression"),
        (
            WEB.replace("replicas: 2", "replicas: -1"),
            "The Deployment \"web\" is invalid: spec.replicas: Invalid value: -1: must be greater than or equal to 0",
        ),
        (
            WEB.replace("labels: {app: web}}\n    spec", "labels: {app: db}}\n    spec"),
            "`selector` does not match template `labels`",
        ),
        (
            WEB.replace("name: http}]", "name: HTTP}]"),
            "spec.template.spec.containers[0].ports[0].name: Invalid value: \"HTTP\"",
        ),
        (
            WEB.replace("name: web, labels", "name: Web, labels"),
            "metadata.name: Invalid value: \"Web\": a lowercase RFC 1123 subdomain must consist of",
        ),
    ];
    for (manifest, want) in table {
        let (manifest, _) = manifest.split_once("---").unwrap();
        let said = server.refused("create --validate=strict -f -", manifest).await;
        assert!(said.contains(want), "{said}\nwanted: {want}");
    }
    let left = server.json("get deploy").await;
    assert_eq!(left["items"].as_array().unwrap().len(), 0, "something was stored");

    server.ok("create -f -", WEB).await;
    let twice = server.refused("create -f -", WEB).await;
    assert!(twice.contains("deployments.apps \"web\" already exists"), "{twice}");
    let stale = WEB.replace("{name: web, labels", "{name: web, resourceVersion: '1', labels");
    let stale = server.refused("replace -f -", &stale).await;
    assert!(
        stale.contains("Operation cannot be fulfilled on deployments.apps \"web\": the object has been modified; please apply your changes to the latest version and try again"),
        "{stale}"
    );
    let moved = WEB.replace("app: web}}", "app: two}}");
    let moved = server.refused("apply -f -", &moved).await;
    assert!(moved.contains("field is immutable"), "{moved}");
    let taken = "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {clusterIP: 10.96.0.10, ports: [{port: 1}]}";
    let taken = server.refused("create -f -", taken).await;
    assert!(
        taken.contains("failed to allocate IP 10.96.0.10: provided IP is already allocated"),
        "{taken}"
    );
    let nowhere = server.refused("create configmap a -n nowhere", "").await;
    assert!(nowhere.contains("namespaces \"nowhere\" not found"), "{nowhere}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_prints_rows_as_they_come() {
    let Some(server) = server().await else { return };
    let line = "get configmaps -w --output-watch-events";
    let mut child = server.spawn(line);
    drop(child.stdin.take());
    let mut rows = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut seen = Vec::new();
    server.ok("create configmap first --from-literal=a=b", "").await;
    while !seen.iter().any(|row: &String| row.contains("first")) {
        let row = timeout(WAIT, rows.next_line()).await.expect("no row").unwrap();
        seen.push(row.expect("kubectl ended"));
    }
    server.ok("label configmap first x=y", "").await;
    server.ok("delete configmap first", "").await;
    while !seen.iter().any(|row| row.contains("DELETED") && row.contains("first")) {
        let row = timeout(WAIT, rows.next_line()).await.expect("no row").unwrap();
        seen.push(row.expect("kubectl ended"));
    }
    assert!(seen.iter().any(|row| row.contains("MODIFIED")), "{seen:?}");
    child.kill().await.unwrap();
}

/// A request of its own, on a connection with the administrator's certificate or none.
async fn get(server: &Server, path: &str, header: &str) -> (u16, Value) {
    let answer = exchange(server, path, header).await;
    let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    (code, serde_json::from_str(body).unwrap_or_else(|_text| Value::String(body.to_owned())))
}

/// Status line and headers.
async fn head(server: &Server, path: &str, header: &str) -> String {
    exchange(server, path, header).await.split_once("\r\n\r\n").unwrap().0.to_owned()
}

async fn exchange(server: &Server, path: &str, header: &str) -> String {
    use tokio::io::AsyncReadExt as _;
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(server.dir.path().join("ca.crt")).unwrap();
    roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let name = ServerName::from(server.address.ip());
    let mut stream =
        tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n{header}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _end = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_known_gets_little() {
    let Some(server) = server().await else { return };
    assert_eq!(get(&server, "/readyz", "").await, (200, "ok".into()));
    assert_eq!(get(&server, "/version", "").await.1["minor"], "36");
    let (code, status) = get(&server, "/api/v1/namespaces/default/pods", "").await;
    assert_eq!((code, &status["reason"]), (403, &"Forbidden".into()));
    assert_eq!(
        status["message"],
        "pods is forbidden: User \"system:anonymous\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    let wrong = "Authorization: Bearer abcdef.0123456789abcdef\r\n";
    let (code, status) = get(&server, "/api/v1/nodes", wrong).await;
    assert_eq!((code, &status["reason"]), (401, &"Unauthorized".into()));
    assert!(
        status["message"].as_str().unwrap().contains("bootstrap token \"abcdef\" is not known")
    );

    let secret = "apiVersion: v1
kind: Secret
metadata: {name: bootstrap-token-abcdef, namespace: kube-system}
type: bootstrap.kubernetes.io/token
stringData: {token-id: abcdef, token-secret: 0123456789abcdef, usage-bootstrap-authentication: 'true'}";
    server.ok("create -f -", secret).await;
    let requests = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    assert_eq!(get(&server, requests, wrong).await.0, 200);
    assert_eq!(get(&server, "/api/v1/nodes", wrong).await.0, 403);
    let token = server.ok("create token default", "").await;
    let bearer = format!("Authorization: Bearer {}\r\n", token.trim());
    assert_eq!(get(&server, "/api", &bearer).await.0, 200);
    let (code, status) = get(&server, "/api/v1/nodes", &bearer).await;
    assert_eq!(code, 403);
    assert!(status["message"].as_str().unwrap().contains("system:serviceaccount:default:default"));
    assert_eq!(get(&server, "/api", "Authorization: Bearer a.b.c\r\n").await.0, 401);
}

/// The Cloud SDK carries a `kubectl.1.NN` a minor version beside its dispatcher; elsewhere there is one only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_versions_of_kubectl_work_too() {
    let Some(mut server) = server().await else { return };
    let home = std::fs::canonicalize(&server.kubectl).unwrap();
    for minor in 31..=36 {
        server.kubectl = home.with_file_name(format!("kubectl.1.{minor}"));
        if !server.kubectl.exists() {
            continue;
        }
        let name = format!("v{minor}");
        server.ok(&format!("create deployment {name} --image=nginx --port=80"), "").await;
        server.ok(&format!("expose deployment {name} --port=80"), "").await;
        server.ok(&format!("rollout restart deployment {name}"), "").await;
        server.ok(&format!("set image deployment/{name} nginx=nginx:2"), "").await;
        let table = server.ok(&format!("get deploy,svc {name}"), "").await;
        assert!(table.contains("0/1"), "1.{minor}: {table}");
        let described = server.ok(&format!("describe svc {name}"), "").await;
        assert!(described.contains("ClusterIP"), "1.{minor}: {described}");
        server.ok(&format!("delete deploy,svc {name} --timeout=20s"), "").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_side_apply_knows_who_wrote_what() {
    let Some(server) = server().await else { return };
    let apply = "apply --server-side --validate=strict -f -";
    let config = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: owned}\ndata: {a: '1'}";
    let made = server.ok(apply, config).await;
    assert!(made.contains("serverside-applied"), "{made}");
    let other = config.replace("'1'", "'2'");
    let clash = server.refused(&format!("{apply} --field-manager=other"), &other).await;
    assert!(clash.contains("conflict with \"kubectl\": .data.a"), "{clash}");
    server.ok(&format!("{apply} --field-manager=other --force-conflicts"), &other).await;
    assert_eq!(server.json("get cm owned").await["data"]["a"], "2");
    let three =
        r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"owned"},"data":{"a":"3"}}"#;
    let place = "/api/v1/namespaces/default/configmaps/owned";
    server.ok(&format!("replace --raw {place} -f -"), three).await;
    let owners = server.json("get cm owned --show-managed-fields").await;
    let owners = owners["metadata"]["managedFields"].as_array().unwrap();
    assert!(
        owners.iter().any(|o| o["manager"] == "kubectl" && o["operation"] == "Update"),
        "{owners:?}"
    );
}
