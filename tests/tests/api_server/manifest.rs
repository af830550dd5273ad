//! What `deploy/daemonset.yaml` says of the agent: permissions, credentials and flags.

use std::path::Path;

use clap::Parser;
use node_agent::config::RunArgs;
use serde::Deserialize as _;
use serde_json::Value;

/// Where a pod has its service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

pub(crate) struct Manifest {
    documents: Vec<Value>,
}

impl Manifest {
    pub(crate) fn read() -> Self {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/daemonset.yaml");
        let text = std::fs::read_to_string(file).unwrap();
        let documents = serde_yaml_ng::Deserializer::from_str(&text);
        Self { documents: documents.map(|one| Value::deserialize(one).unwrap()).collect() }
    }

    fn of(&self, kind: &str) -> &Value {
        self.documents.iter().find(|one| one["kind"] == kind).unwrap()
    }

    /// All of it, for `kubectl apply`.
    pub(crate) fn documents(&self) -> &[Value] {
        &self.documents
    }

    /// The kubeconfig, for the server at this address and a service account whose files are in `account`.
    pub(crate) fn kubeconfig(&self, address: &str, account: &Path) -> String {
        let text = self.of("ConfigMap")["data"]["kubeconfig"].as_str().unwrap();
        assert!(text.contains("KUBERNETES_SERVER") && text.contains(ACCOUNT), "{text}");
        text.replace("KUBERNETES_SERVER", address).replace(ACCOUNT, account.to_str().unwrap())
    }

    /// The flags for a node. No runtime asks here for pods, so that nothing is installed for one.
    pub(crate) fn flags(&self, kubeconfig: &Path, (name, ip): (&str, &str)) -> Flags {
        let container = &self.of("DaemonSet")["spec"]["template"]["spec"]["containers"][0];
        let kubeconfig = kubeconfig.to_str().unwrap();
        let flags = container["args"].as_array().unwrap().iter().map(|flag| {
            let flag = flag.as_str().unwrap().replace("/etc/orlop/kubeconfig", kubeconfig);
            let flag = flag.replace("$(NODE_NAME)", name).replace("$(NODE_IP)", ip);
            flag.strip_suffix(",cni").map(str::to_owned).unwrap_or(flag)
        });
        Flags::parse_from(flags)
    }
}

/// `run` and its flags.
#[derive(Debug, Parser)]
pub(crate) struct Flags {
    #[command(flatten)]
    pub(crate) run: RunArgs,
}
