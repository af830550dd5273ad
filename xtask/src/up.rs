//! `up`: from nothing to a cluster of VMs with the proven sample. A second call finds the cluster running
//! and only proves it again.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    cluster::{Cluster, Plan, Role},
    down, image, kernel,
    kubectl::{Kubectl, wait_for},
    oci,
    paths::Paths,
    proof, rootfs,
    setup::{self, Need},
    step,
    stop::wrong_input,
    vm,
};

/// What was asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Wish {
    /// Number of nodes; the first is the server.
    #[arg(long, default_value_t = 3)]
    pub nodes: u8,
    /// Architecture of the nodes.
    #[arg(long, default_value = "amd64")]
    pub arch: String,
    /// Kernel: a Debian series (6.1, 6.12) or a file.
    #[arg(long, default_value = kernel::DEFAULT)]
    pub kernel: String,
    /// Folder of the modules that belong to a kernel file.
    #[arg(long)]
    pub modules: Option<PathBuf>,
    /// Boots the VMs alone, without Orlop on them.
    #[arg(long)]
    pub bare: bool,
    /// The nodes run Debian with systemd and the units of deploy/systemd; needs root for mmdebstrap.
    #[arg(long)]
    pub debian: bool,
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            nodes: 3,
            arch: "amd64".into(),
            kernel: kernel::DEFAULT.into(),
            modules: None,
            bare: false,
            debian: false,
        }
    }
}

/// Makes the cluster of optimised programs, deploys the sample, proves it and says what to try.
///
/// # Errors
/// Exit code 2 for wrong flags, 3 for a machine that cannot do it; else the step that failed.
pub fn up(paths: &Paths, wish: &Wish) -> Result<()> {
    let began = Instant::now();
    let Some(ready) = make(paths, wish, image::Profile::Fast)? else { return Ok(()) };
    step("prove the sample by requests");
    print!("{}", proof::requests(&ready.cluster)?);
    println!("\n{}", ready.after(began));
    println!("Try:");
    println!("  kubectl get nodes,pods,svc -o wide");
    println!("  kubectl exec client -- wget -qO- http://nginx");
    println!("  kubectl delete pod -l app=nginx --wait=false && kubectl get pods -w");
    println!(
        "  cargo xtask prove      # limits, deletion under load, killed agents: a minute or so"
    );
    println!("export KUBECONFIG={}", ready.cluster.kubeconfig.display());
    Ok(())
}

/// As `up`, with the programs of the tests' build: eight minutes less to build, half a minute more until it is ready.
/// The sample runs; its proof is the tests'.
///
/// # Errors
/// As `up`.
pub(crate) fn up_for_tests(paths: &Paths, wish: &Wish) -> Result<()> {
    let began = Instant::now();
    if let Some(ready) = make(paths, wish, image::Profile::Dev)? {
        println!("{}", ready.after(began));
    }
    Ok(())
}

/// A cluster on which the sample runs.
struct Ready {
    cluster: Cluster,
    /// When its programs were there.
    built: Instant,
}

impl Ready {
    /// How long it took, in a line.
    fn after(&self, began: Instant) -> String {
        let (total, after) = (began.elapsed().as_secs(), self.built.elapsed().as_secs());
        let Cluster { nodes, kernel, .. } = &self.cluster;
        let count = nodes.len();
        format!("ready in {total} s ({after} s after the build): {count} nodes, kernel {kernel}")
    }
}

/// Makes the cluster, or finds it running, and deploys the sample; `None` for bare VMs.
fn make(paths: &Paths, wish: &Wish, profile: image::Profile) -> Result<Option<Ready>> {
    if !(1..=9).contains(&wish.nodes) {
        return Err(wrong_input(format!("--nodes {}: expected 1 to 9", wish.nodes)));
    }
    image::check_arch(&wish.arch)?;
    setup::ensure(paths, &[Need::Ebpf, Need::Vm, Need::Packages, Need::Kubectl])?;
    if wish.debian {
        setup::ensure(paths, &[Need::Debian])?;
    }
    if wish.bare {
        return bare(paths, wish).map(|()| None);
    }
    let programs = image::programs(paths, profile)?;
    let built = Instant::now();
    let fingerprint = fingerprint(paths, wish, &programs)?;
    let cluster = match Cluster::running(paths) {
        Some(cluster) if cluster.fingerprint == fingerprint => {
            step("the cluster is running already");
            cluster
        }
        other => {
            if other.is_some() {
                step("the running cluster was made from something else: replacing it");
            }
            down_quietly(paths)?;
            let contents = contents(paths, wish, &programs)?;
            let cluster = boot(paths, wish, &contents, fingerprint)?;
            join(&cluster)?;
            cluster
        }
    };
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    wait_ready(&cluster, kubectl)?;
    deploy(paths, &cluster, kubectl)?;
    Ok(Some(Ready { cluster, built }))
}

/// VMs that run init and nothing else, for work on the VMs themselves.
fn bare(paths: &Paths, wish: &Wish) -> Result<()> {
    down_quietly(paths)?;
    let contents = rootfs::Contents { debian: wish.debian, ..rootfs::Contents::default() };
    let cluster = boot(paths, wish, &contents, "bare".into())?;
    for node in &cluster.nodes {
        println!("{} {}: shell on 127.0.0.1:{}", node.name, node.ip, node.shell_port);
    }
    Ok(())
}

fn down_quietly(paths: &Paths) -> Result<()> {
    Cluster::end(paths)?;
    down::remove(paths)
}

fn contents(paths: &Paths, wish: &Wish, programs: &image::Programs) -> Result<rootfs::Contents> {
    step("make the sample's images");
    let images = image::sample(paths, programs)?;
    let programs = [&programs.node_agent, &programs.control_plane, &programs.load];
    Ok(rootfs::Contents {
        programs: programs.map(Clone::clone).into(),
        images,
        debian: wish.debian,
    })
}

/// A digest of what the VMs are made from.
fn fingerprint(paths: &Paths, wish: &Wish, programs: &image::Programs) -> Result<String> {
    let mut text = format!("{wish:?}");
    let deploy = |name: &str| paths.root.join("deploy").join(name);
    for file in [
        programs.node_agent.clone(),
        programs.control_plane.clone(),
        programs.load.clone(),
        deploy("vm/init"),
        deploy("vm/initramfs-init"),
        deploy("vm/debian-setup"),
        deploy("systemd/orlop-node-agent.service"),
        deploy("systemd/orlop-control-plane.service"),
        deploy("images/nginx/nginx.conf"),
    ] {
        let bytes = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        text.push_str(&oci::hex(&bytes));
    }
    Ok(oci::hex(text.as_bytes()))
}

fn boot(
    paths: &Paths,
    wish: &Wish,
    contents: &rootfs::Contents,
    fingerprint: String,
) -> Result<Cluster> {
    let kernel = kernel::get(paths, &wish.kernel, wish.modules.as_deref())?;
    step("make the nodes' disks");
    fs::create_dir_all(&paths.cluster).context("make the cluster's folder")?;
    let initramfs = rootfs::initramfs(paths, &kernel)?;
    let disk = rootfs::disk(paths, &kernel, contents)?;
    let accel = vm::accel(paths, &kernel.image, &initramfs)?;
    step(&format!("boot {} VMs with {}", wish.nodes, kernel.name));
    let began = Instant::now();
    let plan = Plan {
        nodes: wish.nodes,
        kernel: &kernel.image,
        initramfs: &initramfs,
        disk: &disk,
        accel,
        kernel_name: kernel.name.clone(),
        fingerprint,
        bare: wish.bare,
    };
    let cluster = Cluster::boot(paths, &plan)?;
    println!("    all VMs answer after {:.1} s", began.elapsed().as_secs_f64());
    Ok(cluster)
}

/// Waits for the API server, writes the kubeconfig, hands the workers a join token.
fn join(cluster: &Cluster) -> Result<()> {
    let server = cluster.server()?;
    step("wait for the API server");
    let data = "--data-dir /var/lib/orlop/control-plane";
    let kubeconfig =
        wait_for("control-plane kubeconfig on the server VM", Duration::from_secs(60), || {
            server.shell().sh(&format!("control-plane kubeconfig {data} 2>&1")).map(Some)
        })
        .with_context(|| why(server, "control-plane"))?;
    let local = format!("https://127.0.0.1:{}", server.api_port);
    let text = replace_server(&kubeconfig, &local);
    fs::write(&cluster.kubeconfig, text)
        .with_context(|| format!("write {}", cluster.kubeconfig.display()))?;
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    wait_for("the API server's /readyz", Duration::from_secs(60), || {
        kubectl.run(&["get", "--raw", "/readyz"]).map(Some)
    })
    .with_context(|| why(server, "control-plane"))?;
    let token = wait_for("a join token", Duration::from_secs(30), || {
        server.shell().sh("cat /var/lib/orlop/token").map(Some)
    })?;
    for node in cluster.nodes.iter().filter(|node| node.role == Role::Worker) {
        let write =
            "cat > /var/lib/orlop/token.new && mv /var/lib/orlop/token.new /var/lib/orlop/token";
        node.shell().sh(&format!("echo '{token}' | ( {write} )"))?;
    }
    Ok(())
}

/// The kubeconfig with the address at which the host reaches the server.
fn replace_server(kubeconfig: &str, url: &str) -> String {
    let mut text = String::new();
    for line in kubeconfig.lines() {
        match line.split_once("server:") {
            Some((indent, _)) if indent.trim().is_empty() => {
                text.push_str(&format!("{indent}server: {url}\n"));
            }
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

/// What a node's program said last, for an error.
fn why(node: &crate::cluster::Node, program: &str) -> String {
    let log = node.log(program, 15).unwrap_or_else(|error| {
        format!("{error:#}; the end of its console:\n{}", node.console_tail())
    });
    format!("{program} on {} said last:\n{log}", node.name)
}

/// Whether a node is ready, and the taint of one that is not is off: it goes later, by another controller.
fn may_have_pods(node: &Value) -> bool {
    let is_own = |taint: &Value| {
        taint["key"].as_str().is_some_and(|key| key.starts_with("node.kubernetes.io/"))
    };
    let is_tainted = node["spec"]["taints"].as_array().into_iter().flatten().any(is_own);
    proof::condition(node, "Ready").is_some_and(|status| status == "True") && !is_tainted
}

fn wait_ready(cluster: &Cluster, kubectl: Kubectl<'_>) -> Result<()> {
    step("wait until all nodes are ready");
    for node in &cluster.nodes {
        wait_for(&format!("node {} to be Ready", node.name), Duration::from_secs(120), || {
            let object = kubectl.json(&["get", "node", &node.name])?;
            Ok(may_have_pods(&object).then_some(()))
        })
        .with_context(|| why(node, "node-agent"))?;
        println!("    {} is ready", node.name);
    }
    Ok(())
}

/// Taints the server, so that the replicas go to the workers, and applies the sample.
fn deploy(paths: &Paths, cluster: &Cluster, kubectl: Kubectl<'_>) -> Result<()> {
    step("apply deploy/examples/nginx.yaml");
    if cluster.nodes.len() > 1 {
        let taint = "node-role.kubernetes.io/control-plane=:NoSchedule";
        kubectl.run(&["taint", "nodes", "server", taint, "--overwrite"])?;
    }
    apply_file(paths, kubectl, "nginx.yaml")?;
    wait_for("the Deployment's replicas to be ready", Duration::from_secs(120), || {
        let object = kubectl.json(&["get", "deployment", "nginx"])?;
        Ok((object["status"]["readyReplicas"] == object["spec"]["replicas"]).then_some(()))
    })
    .with_context(|| pods(kubectl))?;
    wait_for("the client pod to be ready", Duration::from_secs(60), || {
        let object = kubectl.json(&["get", "pod", "client"])?;
        Ok(proof::condition(&object, "Ready").filter(|status| status == "True"))
    })
    .with_context(|| pods(kubectl))?;
    Ok(())
}

/// Applies a file of `deploy/examples`.
pub(crate) fn apply_file(paths: &Paths, kubectl: Kubectl<'_>, name: &str) -> Result<()> {
    let file: PathBuf = Path::new("deploy/examples").join(name);
    kubectl.run(&["apply", "-f", &paths.root.join(file).to_string_lossy()])?;
    Ok(())
}

/// What an operator would look at first.
fn pods(kubectl: Kubectl<'_>) -> String {
    let shown = |args: &[&str]| kubectl.run(args).unwrap_or_else(|error| format!("{error:#}"));
    format!("{}\n{}", shown(&["get", "pods", "-o", "wide"]), shown(&["get", "events"]))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn node_may_have_pods_when_it_is_ready_and_not_tainted_for_being_new() {
        let node = |ready: &str, key: &str| {
            json!({
                "spec": { "taints": [{ "key": key, "effect": "NoSchedule" }] },
                "status": { "conditions": [{ "type": "Ready", "status": ready }] },
            })
        };
        assert!(may_have_pods(&node("True", "node-role.kubernetes.io/control-plane")));
        assert!(!may_have_pods(&node("True", "node.kubernetes.io/not-ready")));
        assert!(!may_have_pods(&node("False", "node-role.kubernetes.io/control-plane")));
    }

    #[test]
    fn only_the_server_line_of_a_kubeconfig_is_replaced() {
        let before =
            "clusters:\n- cluster:\n    server: https://10.0.2.15:6443\n  name: server:x\n";
        assert_eq!(
            replace_server(before, "https://127.0.0.1:1"),
            "clusters:\n- cluster:\n    server: https://127.0.0.1:1\n  name: server:x\n"
        );
    }
}
