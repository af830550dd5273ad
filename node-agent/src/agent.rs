//! The wiring, written out by hand: what starts in which order, who is fed with what, how it ends.
//!
//! Start: checks, join, watches, overlay, dataplane, CNI, DNS, runtime, kubelet. A stop (SIGTERM, SIGINT)
//! ends the tasks and nothing else: containers belong to their shims, DNS is a process of its own, maps
//! and programs stay pinned.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use kube::Client;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};
use tracing::{info, warn};

use crate::{
    address,
    chain::chain,
    cni,
    config::{Component, Config},
    dataplane, debug, dns, healthz, join,
    kubelet::{
        Directory, Kubelet, KubeletConfig,
        events::Recorder,
        images::{Images, ImagesConfig},
        lease,
        node::{self, Facts, NodeConfig, STARTING},
        pods,
        runtime::{DnsConfig, Embedded, Runtime as _, RuntimeConfig, binary::SHIM},
        server,
        spec::{NodeContext, parse_resolv_conf},
        tree,
    },
    metrics,
    model::{LocalEndpoint, ObjectKey, PodNetwork},
    overlay, problems,
    readers::Readers,
    readiness, snapshot,
    sys::cgroup::{self, CgroupError},
    table::Table,
    watch::{self as sources, Sources},
    way::Known,
};

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("node-agent run needs root: it makes cgroups, network devices and mounts")]
    NotRoot,
    #[error("pods cannot be run")]
    Cgroups(#[source] CgroupError),
    #[error("cannot join the cluster")]
    Join(#[source] join::JoinError),
    #[error("--node-ip is needed: the way to the server {server} shows no address of this node")]
    NodeIp { server: String },
    #[error("{}", path.display())]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("overlay")]
    Overlay(#[source] overlay::OverlayError),
    #[error("dataplane")]
    Dataplane(#[source] dataplane::LoadError),
    #[error("CNI server")]
    Cni(#[source] cni::StartError),
    #[error("DNS")]
    Dns(#[source] dns::StartError),
    #[error("DNS process")]
    DnsProcess(#[source] std::io::Error),
    #[error("container runtime")]
    Runtime(#[source] crate::kubelet::runtime::RuntimeError),
    #[error("images")]
    Images(#[source] std::io::Error),
    #[error("kubelet server")]
    Server(#[source] server::ServerError),
    #[error("signals")]
    Signals(#[source] std::io::Error),
}

impl AgentError {
    /// 2: wrong input; 3: an environment in which it cannot run; 1: anything else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Join(_) | Self::NodeIp { .. } => 2,
            Self::NotRoot | Self::Cgroups(_) | Self::Dataplane(_) => 3,
            Self::Runtime(error) if error.source.is::<CgroupError>() => 3,
            Self::Runtime(_)
            | Self::Folder { .. }
            | Self::Overlay(_)
            | Self::Cni(_)
            | Self::Dns(_)
            | Self::DnsProcess(_)
            | Self::Images(_)
            | Self::Server(_)
            | Self::Signals(_) => 1,
        }
    }
}

/// What all parts are made from.
struct Base {
    config: Config,
    client: Client,
    server: http::Uri,
    /// The main one first.
    node_ips: Vec<IpAddr>,
    sources: Sources,
    endpoints: Table<IpAddr, LocalEndpoint>,
    pods: Directory,
    trouble: watch::Sender<Option<String>>,
}

/// Handles of the network parts; dropping them stops their tasks.
#[derive(Default)]
struct Network {
    overlay: Option<overlay::Handle>,
    dataplane: Option<dataplane::Handle>,
    cni: Option<cni::Handle>,
    dns: Option<dns::Handle>,
}

/// Runs the agent until a signal, or until its credentials were renewed or its node has another address (the
/// supervisor starts it anew).
///
/// # Errors
/// Whatever keeps it from starting.
pub async fn run(config: Config) -> Result<(), AgentError> {
    if !rustix::process::geteuid().is_root() {
        return Err(AgentError::NotRoot);
    }
    // Before the node joins or anything is made: a node that cannot run pods is not to get any.
    if config.components.contains(&Component::Kubelet) {
        let (state, run) = (config.state_dir.clone(), config.run_dir.clone());
        let root = RuntimeConfig::standard(state, run, Vec::new()).cgroup_root;
        cgroup::require(&root).map_err(AgentError::Cgroups)?;
    }
    if config.components.contains(&Component::Dataplane) {
        dataplane::load::require().map_err(AgentError::Dataplane)?;
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(AgentError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AgentError::Signals)?;
    for path in [&config.state_dir, &config.run_dir] {
        std::fs::create_dir_all(path)
            .map_err(|source| AgentError::Folder { path: path.clone(), source })?;
    }
    let kubeconfig = config.kubeconfig.clone();
    let started = async {
        if let (false, Some(how)) = (kubeconfig.exists(), &config.join) {
            join::join(how, &config.node_name, &kubeconfig).await.map_err(AgentError::Join)?;
        }
        start(config).await
    };
    let (base, network, mut tasks) = tokio::select! {
        started = started => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    info!(node = %base.config.node_name, "agent runs");
    let renewal = join::renew(base.client.clone(), &base.config.node_name, &kubeconfig);
    tokio::select! {
        _ = terminate.recv() => info!("SIGTERM: pods go on without the agent"),
        _ = interrupt.recv() => info!("SIGINT: pods go on without the agent"),
        renewed = renewal => match renewed {
            Ok(()) => info!("client certificate renewed: starting anew with it"),
            Err(error) => return Err(AgentError::Join(error)),
        },
        ips = moved(&base) => info!(?ips, "the node has another address: starting anew with it"),
        Some(ended) = tasks.join_next() => match ended {
            Ok(what) => warn!(what, "a task ended that should not"),
            Err(error) => warn!(%error, "a task failed"),
        },
    }
    tasks.shutdown().await;
    stop(network).await;
    Ok(())
}

/// Waits until the node has another address. One that was given stays, whatever the node has.
async fn moved(base: &Base) -> Vec<IpAddr> {
    if address::are_given(&base.config) {
        return std::future::pending().await;
    }
    address::moved(&base.server, &base.node_ips).await
}

/// In the opposite order of the start; nothing that pods or connections use is taken away.
async fn stop(network: Network) {
    let Network { overlay, dataplane, cni, dns } = network;
    if let Some(handle) = dns {
        handle.stop().await;
    }
    if let Some(handle) = cni {
        handle.stop().await;
    }
    if let Some(handle) = dataplane {
        handle.stop().await;
    }
    if let Some(handle) = overlay {
        handle.stop().await;
    }
}

type Tasks = JoinSet<&'static str>;

async fn start(config: Config) -> Result<(Base, Network, Tasks), AgentError> {
    let (client, api) = join::client(&config.kubeconfig).await.map_err(AgentError::Join)?;
    let server = api.cluster_url.to_string();
    let node_ips =
        address::node_ips(&config, &api.cluster_url).ok_or(AgentError::NodeIp { server })?;
    let (trouble, not_ready) = watch::channel(Some(STARTING.to_owned()));
    let base = Base {
        config,
        client,
        server: api.cluster_url,
        node_ips,
        sources: Sources::default(),
        endpoints: Table::new(),
        pods: Directory::default(),
        trouble,
    };
    let mut tasks = JoinSet::new();
    start_snapshot(&base, &mut tasks);
    let watches = sources::start(&base.client, &base.config.node_name, &base.sources);
    tasks.spawn(async move {
        // The handle lives as long as the agent.
        let _watches = watches;
        std::future::pending().await
    });
    // The node must be there before its pod CIDR can be, and that before the network is ready.
    let registered = start_node(&base, &not_ready, &mut tasks)?;
    let network = start_network(&base)?;
    if base.config.components.contains(&Component::Kubelet) {
        start_kubelet(&base, registered, &mut tasks).await?;
    }
    if let Some(dataplane) = &network.dataplane {
        start_tellers(&base, dataplane, &mut tasks);
    }
    let connects = base.config.components.contains(&Component::Overlay);
    let pods = network.pods().filter(|_| connects);
    tasks.spawn(readiness::follow(base.trouble.clone(), pods, network.trouble()));
    let socket = base.config.run_dir.join("agent.sock");
    let views = debug::Views {
        node: base.config.node_name.to_string(),
        components: base.config.components.iter().map(|component| component.name()).collect(),
        services: base.sources.services.clone(),
        nodes: base.sources.nodes.clone(),
        endpoints: base.endpoints.clone(),
        pods: base.pods.clone(),
        not_ready,
        conditions: network.overlay.as_ref().map(|handle| handle.conditions.clone()),
        readers: start_readers(&base, &network, &mut tasks),
    };
    tasks.spawn(async move {
        if let Err(error) = debug::serve(&socket, views).await {
            warn!(%error, "debug socket not served");
        }
        // Looking into the agent is no reason to end it.
        std::future::pending().await
    });
    Ok((base, network, tasks))
}

/// Tells owners of Services what is wrong with them, and load balancers whether the node is well.
fn start_tellers(base: &Base, dataplane: &dataplane::Handle, tasks: &mut Tasks) {
    for problems in [dataplane.problems.clone(), dataplane.unserved.clone()] {
        let (client, node) = (base.client.clone(), base.config.node_name.to_string());
        tasks.spawn(async {
            problems::tell(client, node, problems).await;
            "problems of services"
        });
    }
    let (address, pulse) = (base.config.healthz_address, dataplane.pulse.clone());
    let node = ObjectKey::new("", &base.config.node_name);
    tasks.spawn(healthz::serve(address, pulse, base.sources.nodes.clone(), node));
}

/// Readers of the kernel's maps, and the door for metrics.
fn start_readers(base: &Base, network: &Network, tasks: &mut Tasks) -> Option<Arc<Readers>> {
    let dataplane = network.dataplane.as_ref()?;
    let pins = dataplane::DataplaneConfig::new(base.node_ip()).pins?;
    let Sources { services, nodes, .. } = base.sources.clone();
    let known = Known { services, endpoints: base.endpoints.clone() };
    let readers = Readers::new(&pins, known, Some(dataplane.reporter()));
    let readers = readers.with_node(Arc::clone(&base.config.node_name), nodes);
    let readers = Arc::new(readers.with_events(dataplane.events.clone()));
    let (address, served) = (base.config.metrics_address, Arc::clone(&readers));
    tasks.spawn(async move {
        if let Err(error) = metrics::serve(address, served).await {
            warn!(%error, %address, "metrics are not served");
        }
        // Metrics are no reason to end the agent.
        std::future::pending().await
    });
    Some(readers)
}

/// What the server said last holds until it speaks again; then what it says is kept for next time.
fn start_snapshot(base: &Base, tasks: &mut Tasks) {
    let path = base.config.state_dir.join(snapshot::FILE);
    match snapshot::restore(&path, &base.sources) {
        Ok(0) => {}
        Ok(services) => info!(services, "network as of the last snapshot until the server answers"),
        Err(error) => {
            warn!(path = %path.display(), error = chain(&error), "network snapshot not used");
        }
    }
    let sources = base.sources.clone();
    tasks.spawn(async move {
        snapshot::keep(&path, &sources).await;
        "network snapshot"
    });
}

impl Base {
    /// The node's main address.
    fn node_ip(&self) -> IpAddr {
        self.node_ips.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    }
}

impl Network {
    fn pods(&self) -> Option<watch::Receiver<Option<PodNetwork>>> {
        self.overlay.as_ref().map(|handle| handle.network.clone())
    }

    fn trouble(&self) -> Option<watch::Receiver<Option<String>>> {
        self.overlay.as_ref().map(|handle| handle.trouble.clone())
    }
}

fn start_network(base: &Base) -> Result<Network, AgentError> {
    let (config, sources) = (&base.config, &base.sources);
    let has = |component| config.components.contains(&component);
    let mut network = Network::default();
    let (mut tunnels, (_, mut device)) = (Table::new(), watch::channel(None));
    let (_, mut pods) = watch::channel(None);
    // Without the overlay only the host device is kept, which the dataplane needs.
    if has(Component::Overlay) || has(Component::Dataplane) {
        let nodes = sources.nodes.clone();
        let wanted = overlay::OverlayConfig::from_config(config, base.node_ips.clone());
        let handle = overlay::start(wanted, nodes).map_err(AgentError::Overlay)?;
        (tunnels, device) = (handle.tunnels.clone(), handle.device.clone());
        pods = handle.network.clone();
        network.overlay = Some(handle);
    }
    if has(Component::Dataplane) {
        let tables = dataplane::Tables {
            services: sources.services.clone(),
            slices: sources.slices.clone(),
            endpoints: base.endpoints.clone(),
            tunnels,
            overlay: device,
        };
        let wanted = dataplane::DataplaneConfig {
            node_ips: base.node_ips.clone(),
            service_cidrs: config.service_cidrs.clone(),
            masquerade: config.masquerade,
            node_ports: config.node_ports,
            devices: config.devices.clone(),
            localhost_node_ports: config.localhost_nodeports,
            xdp: config.xdp,
            node_name: (&*config.node_name).into(),
            waits_for_pods: has(Component::Cni),
            nodes: Some(sources.nodes.clone()),
            ..dataplane::DataplaneConfig::new(base.node_ip())
        };
        let handle = dataplane::start(wanted, tables).map_err(AgentError::Dataplane)?;
        network.dataplane = Some(handle);
    }
    if has(Component::Cni) {
        let programmed = network.dataplane.as_ref().map(|handle| handle.programmed.clone());
        let endpoints = base.endpoints.clone();
        let services = sources.services.clone();
        let inputs = cni::CniInputs { network: pods, endpoints, services, programmed };
        let standard = cni::CniConfig::new(&config.state_dir, &config.run_dir);
        let wanted = cni::CniConfig { node_ips: base.node_ips.clone(), ..standard };
        network.cni = Some(cni::start(wanted, inputs, SHIM).map_err(AgentError::Cni)?);
    }
    if has(Component::Dns) {
        let standard = dns::DnsConfig::new(&config.state_dir, &config.run_dir);
        let mut wanted = standard.map_err(AgentError::DnsProcess)?;
        wanted.args.domain.clone_from(&config.cluster_domain);
        let (services, slices) = (sources.services.clone(), sources.slices.clone());
        network.dns = Some(dns::start(wanted, services, slices).map_err(AgentError::Dns)?);
    }
    Ok(network)
}

/// What the kubelet part waits for: the node's uid once it is registered.
struct Registered {
    images: Arc<Images>,
    node: NodeConfig,
}

/// Registers the node and renews its lease. Without the kubelet the node is somebody else's.
fn start_node(
    base: &Base,
    not_ready: &watch::Receiver<Option<String>>,
    tasks: &mut Tasks,
) -> Result<Registered, AgentError> {
    let config = &base.config;
    let images = Images::new(ImagesConfig {
        dir: config.state_dir.join("images"),
        insecure_registries: config.insecure_registries.clone(),
    });
    let images = Arc::new(images.map_err(AgentError::Images)?);
    let node = NodeConfig {
        name: Arc::clone(&config.node_name),
        ips: base.node_ips.clone(),
        facts: Facts::read(&config.state_dir),
        reserved_cpu_millis: node::RESERVED_CPU_MILLIS,
        reserved_memory_bytes: node::RESERVED_MEMORY_BYTES,
    };
    if config.components.contains(&Component::Kubelet) {
        let (uid, registered) = watch::channel(None);
        let (client, source) = (base.client.clone(), Arc::clone(&images));
        let (own, not_ready) = (node.clone(), not_ready.clone());
        tasks.spawn(async {
            node::run(client, own, source, not_ready, uid).await;
            "node status"
        });
        let (client, name) = (base.client.clone(), Arc::clone(&config.node_name));
        tasks.spawn(async {
            lease::run(client, name, registered).await;
            "lease"
        });
    }
    Ok(Registered { images, node })
}

async fn start_kubelet(base: &Base, own: Registered, tasks: &mut Tasks) -> Result<(), AgentError> {
    let config = &base.config;
    let Registered { images, node } = own;
    let node_ip = base.node_ip();
    let (state, run) = (config.state_dir.clone(), config.run_dir.clone());
    let standard = RuntimeConfig::standard(state, run, base.node_ips.clone());
    let root = standard.cgroup_root.clone();
    let runtime = Embedded::new(standard).await.map_err(AgentError::Runtime)?;
    let allocatable = node.allocatable();
    let (recorder, events) = Recorder::new(base.client.clone(), Arc::clone(&config.node_name));
    tasks.spawn(async {
        events.await;
        "events"
    });
    let kubelet = Arc::new(Kubelet {
        runtime: Arc::new(runtime),
        images,
        client: base.client.clone(),
        recorder,
        config: KubeletConfig {
            node_name: Arc::clone(&config.node_name),
            node_ip,
            state_dir: config.state_dir.clone(),
        },
        node: NodeContext {
            cluster_dns: config.cluster_dns.clone(),
            cluster_domain: config.cluster_domain.clone(),
            host_dns: host_dns(),
            log_dir: PathBuf::from("/var/log/pods"),
            capacity_bytes: node.facts.memory_bytes,
        },
        allocatable,
        services: Some(base.sources.services.clone()),
        directory: base.pods.clone(),
    });
    tasks.spawn(tree::run(root, base.pods.clone(), allocatable));
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), node::KUBELET_PORT);
    let door = server::Door {
        runtime: Arc::clone(&kubelet.runtime),
        directory: base.pods.clone(),
        netns_dir: config.run_dir.join("netns"),
    };
    let from = (&kubelet.config, config.kubeconfig.as_path());
    let served = server::start(door, base.client.clone(), address, from);
    let served = served.await.map_err(AgentError::Server)?;
    tasks.spawn(async {
        served.await;
        "kubelet server"
    });
    let exits = kubelet.runtime.take_events();
    tasks.spawn(async move {
        if let Some(exits) = exits
            && let Err(error) = pods::run(kubelet, exits).await
        {
            warn!(error = chain(&error), "pods cannot be run");
        }
        "pods"
    });
    Ok(())
}

/// The node's own resolvers; none when there is no such file.
fn host_dns() -> DnsConfig {
    parse_resolv_conf(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}
