//! The two servers on loopback, and a client of them.

use std::{
    collections::BTreeSet, fs, net::TcpListener, path::Path, process::Stdio, sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use control_plane::{
    admin::Admin,
    config::Config,
    run::{Running, start},
};
use http::{Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use serde_json::Value;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    sync::Mutex,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsConnector;

/// Until a server is ready; upstream's takes seconds.
const READY: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(30);
const TOKEN: &str = "administrator";

/// What is kept until the server is not needed any more.
#[expect(dead_code, reason = "ends with the server")]
enum Life {
    Here(Running),
    Processes(Vec<Child>),
}

pub(super) struct Server {
    port: u16,
    tls: TlsConnector,
    token: Option<&'static str>,
    /// Kept from one request to the next.
    connection: Mutex<Option<SendRequest<Full<Bytes>>>>,
    _life: Life,
    _folder: tempfile::TempDir,
}

/// An answer as it came.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) warnings: BTreeSet<String>,
    pub(super) body: Bytes,
}

/// A port that nobody listens on; the next one who asks may get it too, which the tests' runner makes unlikely.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn connector(ca: &[u8], identity: Option<(&[u8], &[u8])>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = CertificateDer::pem_slice_iter(certificate).map(Result::unwrap).collect();
            let key = PrivateKeyDer::from_pem_slice(key).unwrap();
            config.with_client_auth_cert(chain, key).unwrap()
        }
    };
    TlsConnector::from(Arc::new(config))
}

impl Server {
    /// The whole control plane in this process.
    pub(super) async fn ours() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let mut config = Config::new(data.clone());
        config.bind = "127.0.0.1:0".parse().unwrap();
        let running = start(config).await.unwrap();
        let kubeconfig = Admin::open(&data).unwrap().kubeconfig(None);
        let kubeconfig: Value = serde_yaml_ng::from_str(&kubeconfig).unwrap();
        let bytes = |pointer: &str| {
            STANDARD.decode(kubeconfig.pointer(pointer).unwrap().as_str().unwrap()).unwrap()
        };
        let user = "/users/0/user/client";
        let tls = connector(
            &bytes("/clusters/0/cluster/certificate-authority-data"),
            Some((
                &bytes(&format!("{user}-certificate-data")),
                &bytes(&format!("{user}-key-data")),
            )),
        );
        let port = running.bound.port();
        let server = Self {
            port,
            tls,
            token: None,
            connection: Mutex::default(),
            _life: Life::Here(running),
            _folder: folder,
        };
        // The account without which no pod is taken.
        server.wait_for("/api/v1/namespaces/default/serviceaccounts/default").await;
        server
    }

    pub(super) async fn upstream(kube_apiserver: &Path, etcd: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        let key = rcgen::KeyPair::generate().unwrap();
        fs::write(file("accounts.key"), key.serialize_pem()).unwrap();
        fs::write(file("accounts.pub"), key.public_key_pem()).unwrap();
        fs::write(file("tokens.csv"), format!("{TOKEN},admin,admin,system:masters\n")).unwrap();
        let [clients, peers, port] = [(); 3].map(|()| free_port());
        let store = format!("http://127.0.0.1:{clients}");
        let mut command = Command::new(etcd);
        command.arg("--data-dir").arg(file("etcd"));
        command.args(["--listen-client-urls", &store, "--advertise-client-urls", &store]);
        command.args(["--listen-peer-urls", &format!("http://127.0.0.1:{peers}")]);
        let etcd = spawn(command);
        let mut command = Command::new(kube_apiserver);
        command.args([
            format!("--etcd-servers={store}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--secure-port={port}"),
            format!("--cert-dir={}", file("certificates").display()),
            format!("--token-auth-file={}", file("tokens.csv").display()),
            format!("--service-account-key-file={}", file("accounts.pub").display()),
            format!("--service-account-signing-key-file={}", file("accounts.key").display()),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--allow-privileged=true".to_owned(),
            // Nobody makes the accounts that it asks for.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
        ]);
        let server = spawn(command);
        let certificate = file("certificates/apiserver.crt");
        let begun = Instant::now();
        while fs::metadata(&certificate).is_err() {
            assert!(begun.elapsed() < READY, "kube-apiserver has made no certificate");
            sleep(Duration::from_millis(100)).await;
        }
        // It may be half written.
        sleep(Duration::from_millis(200)).await;
        let tls = connector(&fs::read(&certificate).unwrap(), None);
        let life = Life::Processes(vec![server, etcd]);
        let connection = Mutex::default();
        let server =
            Self { port, tls, token: Some(TOKEN), connection, _life: life, _folder: folder };
        server.wait_for("/readyz").await;
        server.wait_for("/api/v1/namespaces/default").await;
        server
    }

    async fn wait_for(&self, path: &str) {
        let begun = Instant::now();
        loop {
            if let Some(answer) = self.try_ask("GET", path, ("json", "")).await
                && answer.status == 200
            {
                return;
            }
            assert!(begun.elapsed() < READY, "port {}: no {path}", self.port);
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// One request with a body of a kind that `cases.txt` has.
    pub(super) async fn ask(&self, method: &str, path: &str, body: (&str, &str)) -> Answer {
        for _ in 0..2 {
            // The connection may have been closed when it was taken.
            if let Ok(Some(answer)) = timeout(ANSWER, self.try_ask(method, path, body)).await {
                return answer;
            }
        }
        panic!("no answer to {method} {path}")
    }

    async fn connect(&self) -> Option<SendRequest<Full<Bytes>>> {
        let socket = TcpStream::connect(("127.0.0.1", self.port)).await.ok()?;
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = self.tls.connect(name, socket).await.ok()?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.ok()?;
        // Ends with what sends over it.
        drop(tokio::spawn(connection));
        Some(sender)
    }

    async fn try_ask(
        &self,
        method: &str,
        path: &str,
        (kind, body): (&str, &str),
    ) -> Option<Answer> {
        let mut kept = self.connection.lock().await;
        let mut sender = match kept.take().filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        sender.ready().await.ok()?;
        let mut request = Request::builder().method(method).uri(path);
        request = request.header(header::HOST, "127.0.0.1").header(header::USER_AGENT, "test");
        if let Some(media) = media(kind) {
            request = request.header(header::CONTENT_TYPE, media);
        }
        if let Some(token) = self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = Full::new(Bytes::copy_from_slice(body.as_bytes()));
        let response = sender.send_request(request.body(body).unwrap()).await.ok()?;
        let status = response.status().as_u16();
        let warnings = response.headers().get_all(header::WARNING).iter();
        let warnings = warnings.map(|value| value.to_str().unwrap().to_owned()).collect();
        let body = response.into_body().collect().await.ok()?.to_bytes();
        *kept = Some(sender);
        Some(Answer { status, warnings, body })
    }
}

fn media(kind: &str) -> Option<&str> {
    Some(match kind {
        "json" => "application/json",
        "charset" => "application/json; charset=utf-8",
        "yaml" => "application/yaml",
        "protobuf" => "application/vnd.kubernetes.protobuf",
        "merge" => "application/merge-patch+json",
        "strategic" => "application/strategic-merge-patch+json",
        "operations" => "application/json-patch+json",
        "apply" => "application/apply-patch+yaml",
        "text" => "text/plain",
        "none" => return None,
        other => other,
    })
}

fn spawn(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.kill_on_drop(true).spawn().unwrap()
}
