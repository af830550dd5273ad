//! The server over real TLS and WebSocket on loopback, with a runtime that runs processes of this host.

use std::{io::Write as _, sync::Mutex, time::Duration};

use futures::{SinkExt as _, StreamExt as _};
use http_body_util::Empty;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};

use super::*;
use crate::kubelet::{
    ContainerView, PodView,
    runtime::{
        ContainerId, ContainerSpec, ExecIo, ExecSpec, PodUid, RuntimeError, RuntimeEvent, Sandbox,
        SandboxSpec, SandboxState, Started,
    },
};

/// Runs every exec as a process of this host and notes what it was asked.
#[derive(Debug, Default)]
struct HostRuntime {
    asked: Mutex<Vec<(String, ExecSpec)>>,
}

fn refused() -> RuntimeError {
    RuntimeError {
        step: "refuse",
        object: "test".to_owned(),
        source: "not part of the test".into(),
    }
}

fn owned_file(end: impl Into<std::os::fd::OwnedFd>) -> tokio::fs::File {
    tokio::fs::File::from_std(std::fs::File::from(end.into()))
}

impl Runtime for HostRuntime {
    async fn ensure_sandbox(&self, _spec: &SandboxSpec) -> Result<Sandbox, RuntimeError> {
        Err(refused())
    }

    async fn start_container(&self, _spec: &ContainerSpec) -> Result<Started, RuntimeError> {
        Err(refused())
    }

    async fn stop_container(
        &self,
        _id: &ContainerId,
        _grace: Duration,
    ) -> Result<(), RuntimeError> {
        Err(refused())
    }

    async fn remove_container(&self, _id: &ContainerId) -> Result<(), RuntimeError> {
        Err(refused())
    }

    async fn remove_sandbox(&self, _uid: &PodUid) -> Result<(), RuntimeError> {
        Err(refused())
    }

    async fn sandboxes(&self) -> Result<Vec<SandboxState>, RuntimeError> {
        Ok(Vec::new())
    }

    async fn exec(&self, id: &ContainerId, spec: &ExecSpec) -> Result<ExecIo, RuntimeError> {
        self.asked.lock().unwrap().push((id.to_string(), spec.clone()));
        if spec.args[0] == "missing" {
            let source = "exec: \"missing\": executable file not found in $PATH".into();
            return Err(RuntimeError { step: "exec", object: id.to_string(), source });
        }
        let mut child = std::process::Command::new(&spec.args[0])
            .args(&spec.args[1..])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("a process");
        let stdin = child.stdin.take().map(owned_file).filter(|_| spec.stdin);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (sender, exit) = tokio::sync::oneshot::channel();
        tokio::task::spawn_blocking(move || {
            let code = child.wait().expect("its end").code().unwrap_or(137);
            sender.send(code).ok()
        });
        let (stdout, stderr) = (stdout.map(owned_file), stderr.map(owned_file));
        Ok(ExecIo { stdin, stdout, stderr, terminal: None, exit })
    }

    fn take_events(&self) -> Option<mpsc::Receiver<RuntimeEvent>> {
        None
    }
}

/// A served directory with one running pod `default/web`, and the CA of its callers.
struct Served {
    address: SocketAddr,
    ca: rcgen::Issuer<'static, rcgen::KeyPair>,
    logs: tempfile::TempDir,
    door: Arc<Door<HostRuntime>>,
    _pki: tempfile::TempDir,
}

async fn serve_one() -> Served {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).unwrap().der().clone();
    let (pki, logs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let names = tls::Names { node: "n1".into(), ip: "127.0.0.1".parse().unwrap() };
    let certificate = tls::Certificate::load(pki.path(), names).unwrap();
    let config = tls::server_config(vec![root], certificate.resolver()).unwrap();
    let directory = Directory::default();
    let pod = json!({"metadata": {"name": "web", "namespace": "default", "uid": "u"}});
    directory.put(PodView {
        pod: Arc::new(serde_json::from_value(pod).unwrap()),
        ips: vec!["127.0.0.1".parse().unwrap()],
        containers: vec![ContainerView {
            name: "c".to_owned(),
            running: Some(ContainerId("id0".into())),
            newest: Some(1),
            waiting: None,
        }],
        log_dir: logs.path().to_owned(),
    });
    let runtime = Arc::new(HostRuntime::default());
    let netns_dir = logs.path().join("netns");
    let door = Arc::new(Door { runtime, directory, netns_dir });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, TlsAcceptor::from(config), Arc::clone(&door)));
    let ca = rcgen::Issuer::new(params, key);
    Served { address, ca, logs, door, _pki: pki }
}

type Stream = tokio_rustls::client::TlsStream<TcpStream>;

impl Served {
    /// Connects with a certificate of the CA for this name; the serving certificate is self-signed, which
    /// the join's verifier for unknown servers accepts.
    async fn connect(&self, name: Option<&str>) -> io::Result<Stream> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(crate::join::any_server());
        let config = match name {
            None => builder.with_no_client_auth(),
            Some(name) => {
                let key = rcgen::KeyPair::generate().unwrap();
                let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
                params.distinguished_name.push(rcgen::DnType::CommonName, name);
                params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
                let certificate = params.signed_by(&key, &self.ca).unwrap();
                let pem = key.serialize_pem();
                let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).unwrap();
                let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("n1").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    async fn get(&self, caller: Option<&str>, path: &str) -> io::Result<(u16, String)> {
        let stream = self.connect(caller).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(connection);
        let request = Request::get(path).header("host", "n1").body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.map_err(io::Error::other)?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    /// Runs a command and returns what came on each channel, the status last.
    async fn exec(&self, query: &str, input: &[Message]) -> (String, String, Value) {
        let stream = self.connect(Some(API)).await.unwrap();
        let uri = format!("wss://n1/exec/default/web/c?{query}");
        let mut request = uri.into_client_request().unwrap();
        let protocol = http::HeaderValue::from_static("v5.channel.k8s.io");
        request.headers_mut().insert("sec-websocket-protocol", protocol);
        let (mut socket, response) =
            tokio_tungstenite::client_async(request, stream).await.unwrap();
        assert_eq!(response.headers()["sec-websocket-protocol"], "v5.channel.k8s.io");
        for message in input {
            socket.send(message.clone()).await.unwrap();
        }
        let (mut out, mut err, mut status) = (Vec::new(), Vec::new(), Value::Null);
        let mut end = None;
        while let Some(Ok(message)) = socket.next().await {
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Close(frame) => {
                    end = frame.map(|frame| u16::from(frame.code));
                    continue;
                }
                Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {
                    continue;
                }
            };
            assert_eq!(status, Value::Null, "nothing follows the status");
            match bytes[0] {
                1 => out.extend_from_slice(&bytes[1..]),
                2 => err.extend_from_slice(&bytes[1..]),
                3 => status = serde_json::from_slice(&bytes[1..]).unwrap(),
                other => panic!("channel {other}"),
            }
        }
        assert_eq!(end, Some(1000), "clients take any other end for an error");
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), status)
    }
}

const API: &str = "kube-apiserver-kubelet-client";

#[tokio::test]
async fn only_the_api_server_may_call() {
    let served = serve_one().await;
    assert!(served.get(None, "/healthz").await.is_err(), "no certificate");
    let (status, words) = served.get(Some("system:node:n2"), "/healthz").await.unwrap();
    assert_eq!((status, words.as_str()), (403, "Forbidden (user=system:node:n2, resource=nodes)"));
    assert_eq!(served.get(Some(API), "/healthz").await.unwrap(), (200, "ok".to_owned()));
    let (status, pods) = served.get(Some(API), "/pods").await.unwrap();
    let pods: Value = serde_json::from_str(&pods).unwrap();
    assert_eq!((status, &pods["items"][0]["metadata"]["name"]), (200, &json!("web")));
}

#[tokio::test]
async fn commands_have_their_streams_and_their_exit_code() {
    let served = serve_one().await;
    let (out, err, status) = served
        .exec(
            "command=sh&command=-c&command=echo+out%3B+echo+err+%3E%262%3B+exit+3&output=1&error=1",
            &[],
        )
        .await;
    assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}));

    let input = [
        Message::Binary(Bytes::from_static(b"\0hello")),
        Message::Binary(Bytes::from_static(&[255, 0])),
    ];
    let (out, _, status) = served.exec("command=cat&input=1&output=1", &input).await;
    assert_eq!((out.as_str(), &status["status"]), ("hello", &json!("Success")));

    let (_, _, status) = served.exec("command=missing", &[]).await;
    assert!(status["message"].as_str().unwrap().contains("executable file not found"), "{status}");
    let asked = served.door.runtime.asked.lock().unwrap();
    assert_eq!((asked.len(), asked[1].0.as_str(), asked[1].1.stdin), (3, "id0", true));
}

#[tokio::test]
async fn logs_are_read_across_rotation_and_cut_as_asked() {
    let served = serve_one().await;
    let folder = served.logs.path().join("c");
    std::fs::create_dir(&folder).unwrap();
    let line = |n: u32| format!("2026-01-01T00:00:0{n}Z stdout F line {n}\n");
    std::fs::write(folder.join("1.log.20260101-000001"), line(1) + &line(2)).unwrap();
    std::fs::write(folder.join("1.log"), line(3)).unwrap();
    std::fs::write(folder.join("0.log"), line(0)).unwrap();
    let table = [
        ("", "line 1\nline 2\nline 3\n"),
        ("?tailLines=2", "line 2\nline 3\n"),
        ("?tailLines=0", ""),
        ("?previous=true", "line 0\n"),
        ("?timestamps=true&tailLines=1", "2026-01-01T00:00:03Z line 3\n"),
        ("?limitBytes=8", "line 1\nl"),
        ("?sinceTime=2026-01-01T00:00:02Z", "line 2\nline 3\n"),
    ];
    for (query, expected) in table {
        let path = format!("/containerLogs/default/web/c{query}");
        let answer = served.get(Some(API), &path).await.unwrap();
        assert_eq!(answer, (200, expected.to_owned()), "{query}");
    }
    let (status, words) = served.get(Some(API), "/containerLogs/default/web/no").await.unwrap();
    assert_eq!((status, words.as_str()), (404, "container \"no\" not found in pod \"web\""));
}

#[tokio::test]
async fn followed_logs_go_on_until_the_container_ends() {
    let served = serve_one().await;
    let folder = served.logs.path().join("c");
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("1.log");
    std::fs::write(&path, "2026-01-01T00:00:00Z stdout F one\n").unwrap();
    let follow = served.get(Some(API), "/containerLogs/default/web/c?follow=true");
    let write = async {
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        // A line that is half there is not shown before its end is.
        write!(file, "2026-01-01T00:00:01Z stdout F tw").unwrap();
        tokio::task::yield_now().await;
        writeln!(file, "o").unwrap();
        let mut view = served.door.directory.find("default", "web").unwrap();
        view.containers[0].running = None;
        served.door.directory.put(view);
    };
    let (answer, ()) = tokio::join!(follow, write);
    assert_eq!(answer.unwrap(), (200, "one\ntwo\n".to_owned()));
}
