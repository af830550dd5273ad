//! The doors at which load balancers ask.
//!
//! Tasks: [`checks`] opens and closes a port a Service and tells of those that it cannot open; each
//! open port is a task of its own, as is [`node`]. All end with their owner.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header, header::HeaderValue};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, timeout},
};

use super::{Answer, Check, Checks, Pulse, answer, less, node_answer, plan, rivals, words};
use crate::{dataplane::Problems, model::ObjectKey};

/// How long one connection may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections of one port at a time; others wait in the listen queue.
const CONNECTIONS: usize = 16;
/// Ports that may be open: all node ports. What is more is told to its Service.
const PORTS: usize = 2_768;
/// When a port that could not be opened is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Listens for every Service of `desired` until that ends. A port that cannot be opened is that
/// Service's problem alone; it is tried again.
pub async fn checks(
    mut desired: watch::Receiver<Arc<Checks>>,
    pulse: watch::Receiver<Pulse>,
    problems: watch::Sender<Arc<Problems>>,
) {
    let mut ports = JoinSet::new();
    let mut open: BTreeMap<ObjectKey, (u16, AbortHandle)> = BTreeMap::new();
    loop {
        let now = Arc::clone(&desired.borrow_and_update());
        let mut wrong = rivals(&now);
        let planned = {
            let without = wrong.keys().collect();
            let listening = open.iter().map(|(key, (port, _))| (key.clone(), *port)).collect();
            plan(&less(&now, &without), &listening)
        };
        for key in planned.close {
            if let Some((port, task)) = open.remove(&key) {
                task.abort();
                // The port is free only when its task has gone.
                let _cancelled = ports.join_next().await;
                tracing::debug!(service = %key, port, "health check closed");
            }
        }
        for (key, port) in planned.open {
            let listener = if open.len() < PORTS { listen(port) } else { Err(too_many()) };
            match listener {
                Ok(listener) => {
                    let door = Door::Service(key.clone(), desired.clone(), pulse.clone());
                    tracing::debug!(service = %key, port, "health check opened");
                    open.insert(key, (port, ports.spawn(serve(listener, Arc::new(door)))));
                }
                Err(error) => drop(wrong.insert(key, words(port, error))),
            }
        }
        let has_wrong = !wrong.is_empty();
        tell(&problems, wrong);
        tokio::select! {
            changed = desired.changed() => if changed.is_err() { return },
            () = sleep(RETRY), if has_wrong => {}
        }
    }
}

fn tell(problems: &watch::Sender<Arc<Problems>>, wrong: BTreeMap<ObjectKey, String>) {
    let now: Problems = wrong.into_iter().map(|(key, words)| (key, vec![words])).collect();
    problems.send_if_modified(|told| {
        let differs = **told != now;
        if differs {
            *told = Arc::new(now);
        }
        differs
    });
}

fn too_many() -> io::Error {
    io::Error::other(format!("{PORTS} are open already"))
}

/// At every address of the node, of both families where it has both.
fn listen(port: u16) -> io::Result<TcpListener> {
    bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = match std::net::TcpListener::bind(address) {
        // This node has no IPv6.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
                && address.ip() == Ipv6Addr::UNSPECIFIED =>
        {
            std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port()))?
        }
        other => other?,
    };
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Answers for the node at `address` until cancelled; the unspecified IPv6 address stands for both
/// families. `is_eligible` says whether it may get new traffic.
///
/// # Errors
/// When the address cannot be listened at.
pub async fn node(
    address: SocketAddr,
    pulse: watch::Receiver<Pulse>,
    is_eligible: impl Fn() -> bool + Send + Sync + 'static,
) -> io::Result<()> {
    let listener = bind(address)?;
    let door = Door::Node(pulse, Box::new(is_eligible));
    serve(listener, Arc::new(door)).await;
    Ok(())
}

/// Who is asked about, and where the answer stands.
enum Door {
    Service(ObjectKey, watch::Receiver<Arc<Checks>>, watch::Receiver<Pulse>),
    Node(watch::Receiver<Pulse>, Box<dyn Fn() -> bool + Send + Sync>),
}

impl Door {
    fn answer(&self, path: &str) -> Option<Answer> {
        match self {
            Self::Service(key, checks, pulse) => {
                let endpoints = checks.borrow().get(key).map_or(0, |check: &Check| check.endpoints);
                Some(answer(key, endpoints, is_healthy(pulse)))
            }
            Self::Node(pulse, is_eligible) => {
                let age = Instant::now().saturating_duration_since(pulse.borrow().at);
                let now = jiff::Timestamp::now();
                let updated = jiff::SignedDuration::try_from(age)
                    .map_or(now, |age| now.saturating_sub(age).unwrap_or(now));
                let times = (updated.to_string(), now.to_string());
                node_answer(path, is_healthy(pulse), is_eligible(), (&times.0, &times.1))
            }
        }
    }
}

/// A dataplane that has ended follows nothing any more.
fn is_healthy(pulse: &watch::Receiver<Pulse>) -> bool {
    pulse.has_changed().is_ok() && pulse.borrow().is_healthy(Instant::now())
}

/// Accepts until cancelled; connections that are open then are cut.
async fn serve(listener: TcpListener, door: Arc<Door>) {
    let limit = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    while let Ok(permit) = Arc::clone(&limit).acquire_owned().await {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let door = Arc::clone(&door);
                connections.spawn(async move {
                    serve_one(stream, &door).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "a health check was not accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_one(stream: TcpStream, door: &Door) {
    let answers = service_fn(|request: Request<Incoming>| {
        let response = response(door.answer(request.uri().path()));
        async move { Ok::<_, Infallible>(response) }
    });
    let mut connection = http1::Builder::new();
    connection.keep_alive(false);
    let served = connection.serve_connection(TokioIo::new(stream), answers);
    if !matches!(timeout(PATIENCE, served).await, Ok(Ok(()))) {
        tracing::debug!("a health check was not answered");
    }
}

fn response(answer: Option<Answer>) -> Response<Full<Bytes>> {
    let Some(Answer { is_well, weight, body }) = answer else {
        let mut response = Response::new(Full::new(Bytes::from_static(b"404 page not found\n")));
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    if !is_well {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(weight) = weight {
        let weight = HeaderValue::from(u64::try_from(weight).unwrap_or(u64::MAX));
        headers.insert("x-load-balancing-endpoint-weight", weight);
    }
    response
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU16, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// A port that nobody has, another one each time; and that the kernel gives to nobody by itself, as it is below
    /// those of ip_local_port_range.
    fn free_port() -> u16 {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        // So many for each process that tests beside this one do not meet.
        let first = 10_000 + 8 * u16::try_from(std::process::id() % 2_500).expect("small");
        loop {
            let port = first + NEXT.fetch_add(1, Ordering::Relaxed);
            if std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).is_ok() {
                return port;
            }
        }
    }

    async fn get(to: SocketAddr, path: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(to).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    fn loopback(port: u16) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, port))
    }

    /// What the tests share: the running task and its inputs.
    struct Served {
        desired: watch::Sender<Arc<Checks>>,
        pulse: watch::Sender<Pulse>,
        problems: watch::Receiver<Arc<Problems>>,
        _task: JoinSet<()>,
    }

    impl Served {
        fn start() -> Self {
            let (desired, checked) = watch::channel(Arc::default());
            let (pulse, felt) = watch::channel(Pulse { at: Instant::now(), behind_since: None });
            let (told, problems) = watch::channel(Arc::default());
            let mut task = JoinSet::new();
            task.spawn(checks(checked, felt, told));
            Self { desired, pulse, problems, _task: task }
        }

        fn want(&self, wanted: &[(&str, u16, usize)]) {
            let rows = wanted.iter().map(|(name, port, endpoints)| {
                (ObjectKey::new("d", name), Check { port: *port, endpoints: *endpoints })
            });
            self.desired.send_replace(Arc::new(rows.collect()));
        }

        async fn problem_of(&mut self, name: &str) -> String {
            let key = ObjectKey::new("d", name);
            let told = self.problems.wait_for(|problems| problems.contains_key(&key)).await;
            told.expect("the task runs")[&key].join("; ")
        }
    }

    /// Asks until the port is open: the task opens it after the test wanted it.
    async fn answered(to: SocketAddr) -> String {
        loop {
            if let Ok(text) = get(to, "/any/path").await {
                return text;
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_service_is_answered_for_as_long_as_it_wants_it() {
        let served = Served::start();
        let port = free_port();
        served.want(&[("web", port, 2)]);
        let text = answered(loopback(port)).await;
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        let (head, body) = text.split_once("\r\n\r\n").expect("head and body");
        let head = head.to_lowercase();
        for line in [
            "content-type: application/json",
            "x-content-type-options: nosniff",
            "x-load-balancing-endpoint-weight: 2",
        ] {
            assert!(head.lines().any(|one| one == line), "{line} not in {head}");
        }
        let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
        let service = serde_json::json!({"namespace": "d", "name": "web"});
        assert_eq!((&body["service"], &body["localEndpoints"]), (&service, &2.into()));
        assert_eq!(body["serviceProxyHealthy"], true);
        // The same port, another count: no connection is refused in between.
        served.want(&[("web", port, 0)]);
        let text = get(loopback(port), "/").await.expect("open");
        assert!(text.starts_with("HTTP/1.1 503 ") && text.contains("\"localEndpoints\": 0"));
        let six = get(SocketAddr::from((Ipv6Addr::LOCALHOST, port)), "/").await;
        assert!(six.expect("IPv6, too").starts_with("HTTP/1.1 503 "));
        served.want(&[]);
        while get(loopback(port), "/").await.is_ok() {
            tokio::task::yield_now().await;
        }
        std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).expect("the port is free again");
    }

    #[tokio::test]
    async fn a_dataplane_that_is_late_or_gone_says_so() {
        let served = Served::start();
        let port = free_port();
        served.want(&[("web", port, 1)]);
        assert!(answered(loopback(port)).await.starts_with("HTTP/1.1 200 "));
        let now = Instant::now();
        let Some(long_ago) = now.checked_sub(Duration::from_secs(61)) else { return };
        served.pulse.send_replace(Pulse { at: now, behind_since: Some(long_ago) });
        let text = get(loopback(port), "/").await.expect("open");
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        assert!(text.contains("\"serviceProxyHealthy\": false"), "{text}");
        served.pulse.send_replace(Pulse { at: now, behind_since: None });
        assert!(get(loopback(port), "/").await.expect("open").starts_with("HTTP/1.1 200 "));
        let Served { desired, pulse, _task: task, .. } = served;
        drop(pulse);
        let text = get(loopback(port), "/").await.expect("open");
        assert!(text.starts_with("HTTP/1.1 503 "), "the dataplane has ended: {text}");
        drop((desired, task));
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_one_services_problem_alone() {
        let mut served = Served::start();
        let (port, other) = (free_port(), free_port());
        let taken = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).expect("free");
        served.want(&[("a", port, 1), ("b", other, 1), ("c", other, 1)]);
        let text = answered(loopback(other)).await;
        assert!(text.contains("\"name\": \"b\""), "{text}");
        let words = served.problem_of("a").await;
        assert!(words.starts_with(&format!("spec.healthCheckNodePort {port} is not")), "{words}");
        assert!(served.problem_of("c").await.ends_with("service d/b has it"));
        drop(taken);
        // A change wakes the task before its time; it tries again then.
        served.want(&[("a", port, 3)]);
        assert!(answered(loopback(port)).await.contains("\"localEndpoints\": 3"));
        let told = served.problems.wait_for(|problems| problems.is_empty()).await;
        drop(told.expect("the task runs"));
    }

    #[tokio::test]
    async fn a_slow_asker_does_not_keep_others_out() {
        let served = Served::start();
        let port = free_port();
        served.want(&[("web", port, 1)]);
        answered(loopback(port)).await;
        let mut slow = Vec::new();
        for _ in 1..CONNECTIONS {
            slow.push(TcpStream::connect(loopback(port)).await.expect("open"));
        }
        let text = timeout(PATIENCE / 2, get(loopback(port), "/")).await;
        assert!(text.expect("in time").expect("open").starts_with("HTTP/1.1 200 "));
        drop((slow, served));
    }

    #[tokio::test]
    async fn the_node_answers_at_its_two_paths() {
        let (pulse, felt) = watch::channel(Pulse { at: Instant::now(), behind_since: None });
        let (eligible, is_eligible) = watch::channel(true);
        let address = loopback(free_port());
        let mut task = JoinSet::new();
        task.spawn(async move { node(address, felt, move || *is_eligible.borrow()).await });
        let well = loop {
            if let Ok(text) = get(address, "/healthz").await {
                break text;
            }
            tokio::task::yield_now().await;
        };
        assert!(well.starts_with("HTTP/1.1 200 ") && well.contains("\"nodeEligible\": true"));
        assert!(get(address, "/livez").await.expect("open").starts_with("HTTP/1.1 200 "));
        assert!(get(address, "/").await.expect("open").starts_with("HTTP/1.1 404 "));
        eligible.send_replace(false);
        assert!(get(address, "/healthz").await.expect("open").starts_with("HTTP/1.1 503 "));
        assert!(get(address, "/livez").await.expect("open").starts_with("HTTP/1.1 200 "));
        drop(pulse);
        assert!(get(address, "/livez").await.expect("open").starts_with("HTTP/1.1 503 "));
    }
}
