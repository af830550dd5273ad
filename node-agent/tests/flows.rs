//! A running dataplane as people and load balancers ask it: `flows` over the debug socket while real
//! sockets connect, the health check of a Service, and ports of the node that lead to pods.
//!
//! One test, since a process can be in one cgroup only.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/views.rs"]
mod views;

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read as _, Write as _},
        net::{IpAddr, SocketAddr, TcpListener, TcpStream},
        path::{Path, PathBuf},
        sync::mpsc,
        thread,
        time::{Duration, Instant},
    };

    use ebpf_common::config::{EVENTS, LOOPBACK_PORTS};
    use node_agent::{
        dataplane::{self, DataplaneConfig, Tables, look::Look},
        debug,
        model::{
            EndpointPort, EndpointRow, EndpointSliceRow, Family, HostPort, LocalEndpoint,
            ObjectKey, Protocol, ServiceKind, ServicePort, ServiceRow, TrafficPolicy,
        },
        readers::Readers,
        table::Table,
        way::Known,
    };
    use serde_json::Value;
    use tokio::sync::{oneshot, watch};

    use super::{
        cgroup::TestCgroup,
        place::{ip, is_possible, own_namespaces},
        views,
    };

    const TIMEOUT: Duration = Duration::from_secs(30);
    const NODE: &str = "192.0.2.1";
    const SERVICE: &str = "10.96.0.1:80";
    const EMPTY: &str = "10.96.0.2:80";
    const HEALTH_PORT: u16 = 31_999;

    fn service(ip: &str, health_check_port: u16) -> ServiceRow {
        let port = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 };
        ServiceRow {
            kind: ServiceKind::LoadBalancer,
            cluster_ips: vec![ip.parse().unwrap()],
            ports: vec![port],
            external_policy: TrafficPolicy::Local,
            health_check_port,
            ..ServiceRow::default()
        }
    }

    fn slice(backends: &[SocketAddr]) -> EndpointSliceRow {
        let port = backends.first().map_or(80, SocketAddr::port);
        let endpoint = |at: &SocketAddr| EndpointRow {
            ip: at.ip(),
            node: "n1".into(),
            ..EndpointRow::default()
        };
        EndpointSliceRow {
            service: ObjectKey::new("d", "web"),
            family: Family::V4,
            ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port }],
            endpoints: backends.iter().map(endpoint).collect(),
            rejected: Vec::new().into(),
        }
    }

    /// A dataplane in this thread's namespaces, and its debug socket, until what is returned is dropped.
    struct Agent {
        slices: Table<ObjectKey, EndpointSliceRow>,
        endpoints: Table<IpAddr, LocalEndpoint>,
        pins: PathBuf,
        socket: PathBuf,
        _stop: oneshot::Sender<()>,
    }

    impl Agent {
        fn start(pins: &Path, cgroup: &Path, folder: &Path) -> Self {
            let slices = Table::new();
            let (services, endpoints) = (Table::new(), Table::new());
            services.upsert(ObjectKey::new("d", "web"), service("10.96.0.1", HEALTH_PORT));
            services.upsert(ObjectKey::new("d", "empty"), service("10.96.0.2", 0));
            let (_, overlay) = watch::channel(None);
            let tables = Tables {
                services: services.clone(),
                slices: slices.clone(),
                endpoints: endpoints.clone(),
                tunnels: Table::new(),
                overlay,
            };
            services.mark_synced();
            slices.mark_synced();
            let config = DataplaneConfig {
                cgroup: Some(cgroup.to_owned()),
                pins: Some(pins.to_owned()),
                node_name: "n1".into(),
                waits_for_pods: true,
                ..DataplaneConfig::new(NODE.parse().unwrap())
            };
            let known = Known { services, endpoints: endpoints.clone() };
            let (path, socket) = (pins.to_owned(), folder.join("agent.sock"));
            let (stop, stopped) = oneshot::channel::<()>();
            let served = socket.clone();
            // A thread is in the namespaces of the one that starts it.
            let _agent = thread::spawn(move || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let handle = dataplane::start(config, tables).unwrap();
                    let readers = Readers::new(&path, known, Some(handle.reporter()))
                        .with_node("n1".into(), Table::new())
                        .with_events(handle.events.clone());
                    let serve = debug::serve(&served, views::of("n1", readers));
                    tokio::select! {
                        result = serve => result.unwrap(),
                        _stop = stopped => {}
                    }
                });
            });
            Self { slices, endpoints, pins: pins.to_owned(), socket, _stop: stop }
        }

        fn set_backends(&self, backends: &[SocketAddr]) {
            self.slices.upsert(ObjectKey::new("d", "web-1"), slice(backends));
        }

        /// Makes the backend a pod with ports of the node, or without.
        fn set_host_ports(&self, backend: SocketAddr, host_ports: &[u16]) {
            let port = |number: &u16| HostPort {
                host_ip: None,
                host_port: *number,
                protocol: Protocol::Tcp,
                container_port: backend.port(),
            };
            let row = LocalEndpoint {
                pod: ObjectKey::new("d", "web-0"),
                ip: backend.ip(),
                netns_cookie: 0,
                // A link of nobody's: the pod's packets are none of this test.
                host_ifindex: nix::net::if_::if_nametoindex("pod0").unwrap(),
                host_mac: [0; 6],
                pod_mac: [0; 6],
                host_ports: host_ports.iter().map(port).collect(),
            };
            self.endpoints.upsert(backend.ip(), row);
        }

        fn is_listened(&self) -> bool {
            self.flags() & EVENTS != 0
        }

        /// Flags of the settings; none before there are any.
        fn flags(&self) -> u32 {
            Look::below(&self.pins).config().map_or(0, |config| config.flags)
        }

        /// Follows events by the socket, as the command does.
        fn follow(&self, arguments: &'static str) -> Follower {
            let (sender, lines) = mpsc::channel();
            let socket = self.socket.clone();
            let _reader = thread::spawn(move || {
                let question = format!("flows {arguments}");
                let told = debug::follow(&socket, &question, |line| sender.send(line).is_ok());
                told.unwrap();
            });
            let follower = Follower { lines };
            assert_eq!(follower.line(), serde_json::json!({"listening": true}));
            follower
        }
    }

    /// Lines until the agent or this goes.
    struct Follower {
        lines: mpsc::Receiver<Value>,
    }

    impl Follower {
        fn line(&self) -> Value {
            self.lines.recv_timeout(TIMEOUT).expect("a line in time")
        }

        fn text(&self) -> String {
            self.line()["text"].as_str().expect("an event").to_owned()
        }
    }

    fn await_that(what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < TIMEOUT, "{what}");
            thread::yield_now();
        }
    }

    /// A server that hangs up on everyone.
    fn serve() -> SocketAddr {
        let listener = TcpListener::bind(("127.0.0.2", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let _server = thread::spawn(move || while listener.accept().is_ok() {});
        address
    }

    fn health() -> Option<String> {
        let node: IpAddr = NODE.parse().unwrap();
        let mut stream = TcpStream::connect((node, HEALTH_PORT)).ok()?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: n1\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    }

    fn connections_are_told(agent: &Agent, backend: SocketAddr) {
        assert!(!agent.is_listened(), "nobody does");
        let all = agent.follow("");
        let refused = agent.follow("verdict=refused to=d/empty");
        assert!(agent.is_listened());
        drop(TcpStream::connect(SERVICE).unwrap());
        let wanted =
            format!("opened  TCP    socket  node n1 -> service d/web ({SERVICE}) -> {backend}");
        assert_eq!(all.text(), wanted);
        let error = TcpStream::connect(EMPTY).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        let wanted = format!(
            "refused TCP    socket  node n1 -> service d/empty ({EMPTY})  (service has no ready \
             endpoint)"
        );
        assert_eq!(all.text(), wanted);
        assert_eq!(refused.text(), wanted, "what came before was not wanted here");
        drop(all);
        drop(TcpStream::connect(EMPTY).unwrap_err());
        assert_eq!(refused.text(), wanted, "another's going is nothing to it");
        drop(refused);
        // It says nothing more, but the next event finds that it has gone.
        drop(TcpStream::connect(EMPTY).unwrap_err());
        await_that("nobody listens any more", || !agent.is_listened());
    }

    fn is_open(port: u16) -> bool {
        TcpStream::connect(SocketAddr::new(NODE.parse().unwrap(), port)).is_ok()
    }

    /// A port of the node leads to its pod as long as the pod wants it, and nothing else is left.
    fn ports_of_pods_come_and_go(agent: &Agent, backend: SocketAddr) {
        assert!(!is_open(8080) && !is_open(8081));
        agent.set_host_ports(backend, &[8080, 8081]);
        await_that("both ports lead to the pod", || is_open(8080) && is_open(8081));
        await_that("sockets look at loopback", || agent.flags() & LOOPBACK_PORTS != 0);
        agent.set_host_ports(backend, &[8081]);
        await_that("one port is given up", || !is_open(8080));
        assert!(is_open(8081));
        agent.set_host_ports(backend, &[]);
        await_that("the other too", || !is_open(8081));
        await_that("nobody looks at loopback", || agent.flags() & LOOPBACK_PORTS == 0);
        assert!(TcpStream::connect(SERVICE).is_ok(), "services are untouched");
    }

    #[test]
    fn a_dataplane_tells_of_connections_and_of_its_health() {
        if !is_possible() {
            return;
        }
        let cgroup = TestCgroup::enter("flows");
        let test = || {
            let pins = own_namespaces().join("orlop");
            ip(&format!(
                "addr add {NODE}/32 dev lo
                 route add 10.96.0.0/16 dev lo
                 link add pod0 type veth peer name pod1"
            ));
            let folder = tempfile::tempdir().unwrap();
            let agent = Agent::start(&pins, &cgroup.path, folder.path());
            let backend = serve();
            agent.set_backends(&[backend]);
            agent.endpoints.mark_synced();
            await_that("the health check says that there is one", || {
                health().is_some_and(|text| {
                    text.starts_with("HTTP/1.1 200 ") && text.contains("\"localEndpoints\": 1")
                })
            });
            await_that("the service is programmed", || TcpStream::connect(SERVICE).is_ok());
            await_that("the debug socket is there", || agent.socket.exists());
            connections_are_told(&agent, backend);
            ports_of_pods_come_and_go(&agent, backend);
            // The ports of pods outlive the agent that made them.
            agent.set_host_ports(backend, &[8080]);
            await_that("the port leads to the pod", || is_open(8080));
            // One that is killed while it is listened to leaves the flag, which the next one clears.
            let _listener = agent.follow("");
            assert!(agent.is_listened());
            let socket = agent.socket.clone();
            drop(agent);
            await_that("the agent has gone", || debug::ask(&socket, "status").is_err());
            let agent = Agent::start(&pins, &cgroup.path, folder.path());
            agent.set_backends(&[]);
            await_that("the next one has started", || debug::ask(&socket, "status").is_ok());
            await_that("it clears the flag", || !agent.is_listened());
            assert!(is_open(8080) && agent.flags() & LOOPBACK_PORTS != 0, "its pods are not known");
            agent.endpoints.mark_synced();
            await_that("that pod is none of its own", || !is_open(8080));
            await_that("nobody looks at loopback", || agent.flags() & LOOPBACK_PORTS == 0);
            await_that("the health check says that there is none", || {
                health().is_some_and(|text| text.starts_with("HTTP/1.1 503 "))
            });
        };
        thread::scope(|scope| scope.spawn(test).join()).unwrap();
    }
}
