//! The whole control plane in this process, spoken to by a real `kubectl` over HTTPS. The kubelets' part
//! (running pods, ending them) is played by the test through the in-process API.

#[cfg(test)]
mod tests {
    use std::{
        path::PathBuf,
        process::{Output, Stdio},
        sync::Arc,
        time::Duration,
    };

    use control_plane::{
        admin::Admin,
        client::{Client, DeleteOptions, ObjectRef, Resource, Write},
        config::Config,
        run::{Running, start},
    };
    use serde_json::{Value, json};
    use tokio::{
        io::AsyncWriteExt as _,
        process::Command,
        time::{Instant, sleep},
    };

    const PODS: Resource = Resource { group: "", version: "v1", plural: "pods" };
    const PATIENCE: Duration = Duration::from_secs(30);

    struct Cluster {
        running: Running,
        dir: tempfile::TempDir,
    }

    impl Cluster {
        async fn start() -> Self {
            Self::start_with(|_| ()).await
        }

        async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let mut config = Config::new(dir.path().join("data"));
            config.bind = "127.0.0.1:0".parse().unwrap();
            change(&mut config);
            let running = start(config).await.unwrap();
            let admin = Admin::open(&dir.path().join("data")).unwrap();
            std::fs::write(dir.path().join("kubeconfig"), admin.kubeconfig(None)).unwrap();
            Self { running, dir }
        }

        fn data_dir(&self) -> PathBuf {
            self.dir.path().join("data")
        }

        /// Runs kubectl with this on its standard input.
        async fn output(&self, arguments: &[&str], input: &str) -> Output {
            let mut child = Command::new("kubectl")
                .arg("--kubeconfig")
                .arg(self.dir.path().join("kubeconfig"))
                .args(["--cache-dir", self.dir.path().join("cache").to_str().unwrap()])
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
            child.wait_with_output().await.unwrap()
        }

        /// What kubectl printed, or what it complained of.
        async fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String, String> {
            let output = self.output(arguments, input).await;
            let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
            if output.status.success() {
                Ok(text(&output.stdout))
            } else {
                Err(text(&output.stderr))
            }
        }

        async fn kubectl(&self, arguments: &[&str]) -> String {
            let answer = self.kubectl_with(arguments, "").await;
            answer.unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
        }

        async fn apply(&self, object: &Value) {
            let answer = self.kubectl_with(&["apply", "-f", "-"], &object.to_string()).await;
            answer.unwrap_or_else(|error| panic!("kubectl apply {object}: {error}"));
        }

        async fn list(&self, plural: &str) -> Vec<Value> {
            let text = self.kubectl(&["get", plural, "-o", "json"]).await;
            let list: Value = serde_json::from_str(&text).unwrap();
            list["items"].as_array().unwrap().clone()
        }

        async fn wait(&self, plural: &str, test: impl Fn(&[Value]) -> bool) -> Vec<Value> {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let objects = self.list(plural).await;
                if test(&objects) {
                    return objects;
                }
                assert!(Instant::now() < deadline, "waited in vain for {plural}: {objects:#?}");
                sleep(Duration::from_millis(50)).await;
            }
        }

        async fn join(&self, name: &str) {
            self.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}))
                .await;
            let status = json!({"status": {
                "allocatable": {"cpu": "2", "memory": "2Gi", "pods": "110"},
                "capacity": {"cpu": "2", "memory": "2Gi", "pods": "110"},
                "conditions": [{
                    "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "up",
                    "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z",
                }],
            }});
            let patch = ["--subresource=status", "--type=merge", "-p", &status.to_string()];
            self.kubectl(&[&["patch", "node", name], &patch[..]].concat()).await;
        }
    }

    fn place(pod: &Value) -> ObjectRef {
        let field = |name: &str| pod["metadata"][name].as_str().unwrap().to_owned();
        ObjectRef { resource: PODS, namespace: field("namespace"), name: field("name") }
    }

    /// Runs assigned pods and ends deleted ones, until the task is aborted.
    async fn kubelets(client: Arc<dyn Client>) {
        use control_plane::client::Event;
        let mut watch = client.watch(PODS);
        let mut next = 1;
        while let Some(event) = watch.recv().await {
            let Event::Applied(pod) = event else { continue };
            if pod["metadata"]["deletionTimestamp"].is_string() {
                let options =
                    DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
                drop(client.write(Write::Delete { object: place(&pod), options }).await);
            } else if pod["spec"]["nodeName"].is_string() && pod["status"]["phase"] == "Pending" {
                next += 1;
                let mut conditions =
                    pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
                conditions.push(json!({"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}));
                let patch = json!({"status": {
                    "phase": "Running", "podIP": format!("10.244.0.{next}"),
                    "podIPs": [{"ip": format!("10.244.0.{next}")}], "conditions": conditions,
                }});
                let object = place(&pod);
                client.write(Write::Patch { object, subresource: "status", patch }).await.unwrap();
            }
        }
    }

    fn web(replicas: i64) -> Value {
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": "web"}},
                "template": {
                    "metadata": {"labels": {"app": "web"}},
                    "spec": {"containers": [{
                        "name": "c", "image": "nginx", "ports": [{"containerPort": 80}],
                        "resources": {"requests": {"cpu": "100m"}},
                    }]},
                },
            },
        })
    }

    fn ready_endpoints(slices: &[Value]) -> usize {
        slices
            .iter()
            .filter(|slice| slice["metadata"]["labels"]["kubernetes.io/service-name"] == "web")
            .flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten())
            .filter(|endpoint| endpoint["conditions"]["ready"] == true)
            .count()
    }

    /// Whether kubectl is there; told when it is not.
    async fn has_kubectl() -> bool {
        let found = Command::new("kubectl").args(["version", "--client"]).output().await;
        if found.is_err() {
            skip::because("no kubectl in PATH");
        }
        found.is_ok()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_deployment_applied_by_kubectl_runs_scales_rolls_and_goes() {
        if !has_kubectl().await {
            return;
        }
        let cluster = Cluster::start().await;
        let kubelets = tokio::spawn(kubelets(Arc::clone(&cluster.running.client)));
        for name in ["n1", "n2", "n3"] {
            cluster.join(name).await;
        }
        let may_have_pods = |node: &Value| {
            node["spec"]["podCIDR"].is_string() && node["spec"]["taints"][0].is_null()
        };
        cluster.wait("nodes", |nodes| nodes.iter().all(may_have_pods)).await;
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
        });
        cluster.apply(&service).await;
        cluster.apply(&web(3)).await;
        cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]).await;
        let pods = cluster.list("pods").await;
        let mut nodes: Vec<_> =
            pods.iter().map(|pod| pod["spec"]["nodeName"].as_str().unwrap()).collect();
        nodes.sort_unstable();
        assert_eq!(nodes, ["n1", "n2", "n3"]);
        cluster.wait("endpointslices", |slices| ready_endpoints(slices) == 3).await;
        let is_told = |event: &Value| event["reason"] == "ScalingReplicaSet";
        cluster.wait("events", |events| events.iter().any(is_told)).await;
        let described = cluster.kubectl(&["describe", "deployment", "web"]).await;
        assert!(described.contains("NewReplicaSetAvailable"), "{described}");
        assert!(described.contains("ScalingReplicaSet"), "{described}");

        cluster.kubectl(&["scale", "deployment/web", "--replicas=1"]).await;
        cluster.wait("pods", |pods| pods.len() == 1).await;
        cluster.wait("endpointslices", |slices| ready_endpoints(slices) == 1).await;

        cluster.kubectl(&["set", "image", "deployment/web", "c=nginx:2"]).await;
        cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]).await;
        let history = cluster.kubectl(&["rollout", "history", "deployment/web"]).await;
        assert!(history.contains("\n2 "), "{history}");
        cluster.kubectl(&["rollout", "undo", "deployment/web"]).await;
        cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]).await;
        let pods = cluster.wait("pods", |pods| pods.len() == 1).await;
        assert_eq!(pods[0]["spec"]["containers"][0]["image"], "nginx");

        cluster.kubectl(&["delete", "deployment", "web"]).await;
        cluster.wait("pods", <[Value]>::is_empty).await;
        cluster.wait("replicasets", <[Value]>::is_empty).await;
        kubelets.abort();
        cluster.running.stop().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_dual_stack_service_has_slices_of_both_families() {
        if !has_kubectl().await {
            return;
        }
        let cluster = Cluster::start_with(|config| {
            config.service_cidrs.push("fd00:10:96::/108".parse().unwrap());
            config.cluster_cidrs.push("fd00:10:244::/56".parse().unwrap());
        })
        .await;
        cluster.join("n1").await;
        let nodes =
            cluster.wait("nodes", |nodes| nodes[0]["spec"]["podCIDRs"][1].is_string()).await;
        assert_eq!(nodes[0]["spec"]["podCIDRs"], json!(["10.244.0.0/24", "fd00:10:244::/64"]));
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}],
                "ipFamilyPolicy": "RequireDualStack"},
        });
        cluster.apply(&service).await;
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "one", "labels": {"app": "web"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "nginx"}]},
        });
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = cluster.kubectl_with(&["apply", "-f", "-"], &pod.to_string()).await {
            assert!(Instant::now() < deadline, "{error}");
            sleep(Duration::from_millis(50)).await;
        }
        let running = json!({"status": {"phase": "Running",
            "podIPs": [{"ip": "10.244.0.9"}, {"ip": "fd00:10:244::9"}],
            "conditions": [{"type": "Ready", "status": "True"}]}});
        let patch = ["--subresource=status", "--type=merge", "-p", &running.to_string()];
        cluster.kubectl(&[&["patch", "pod", "one"], &patch[..]].concat()).await;
        let addresses = |slices: &[Value]| {
            let mut all: Vec<String> = slices
                .iter()
                .filter(|slice| slice["metadata"]["labels"]["kubernetes.io/service-name"] == "web")
                .map(|slice| {
                    format!("{} {}", slice["addressType"], slice["endpoints"][0]["addresses"])
                })
                .collect();
            all.sort();
            all
        };
        let both = [r#""IPv4" ["10.244.0.9"]"#, r#""IPv6" ["fd00:10:244::9"]"#];
        cluster.wait("endpointslices", |slices| addresses(slices) == both).await;
        cluster
            .kubectl(&[
                "patch",
                "service",
                "web",
                "-p",
                r#"{"spec":{"ipFamilyPolicy":"SingleStack"}}"#,
            ])
            .await;
        cluster.wait("endpointslices", |slices| addresses(slices) == both[..1]).await;
        cluster.running.stop().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn endpoints_by_hand_are_mirrored_into_a_slice() {
        if !has_kubectl().await {
            return;
        }
        let cluster = Cluster::start().await;
        let bare = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "bare"},
            "spec": {"ports": [{"name": "p", "port": 80}]}});
        cluster.apply(&bare).await;
        let by_hand = json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "bare"},
            "subsets": [{"addresses": [{"ip": "192.0.2.1"}], "ports": [{"name": "p", "port": 8080}]}]});
        cluster.apply(&by_hand).await;
        let mirrored = |slices: &[Value]| {
            let mut of = slices.iter().filter(|slice| {
                slice["metadata"]["labels"]["kubernetes.io/service-name"] == "bare"
            });
            of.any(|slice| {
                slice["endpoints"][0]["addresses"][0] == "192.0.2.1"
                    && slice["ports"][0]["port"] == 8080
            })
        };
        cluster.wait("endpointslices", mirrored).await;
        cluster.kubectl(&["delete", "endpoints", "bare"]).await;
        cluster.wait("endpointslices", |slices| !mirrored(slices)).await;
        cluster.running.stop().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_pod_that_fits_nowhere_says_why_and_a_namespace_goes_with_its_content() {
        if !has_kubectl().await {
            return;
        }
        let cluster = Cluster::start().await;
        cluster.join("n1").await;
        cluster.kubectl(&["create", "namespace", "shop"]).await;
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "big", "namespace": "shop"},
            "spec": {"containers": [{
                "name": "c", "image": "nginx", "resources": {"requests": {"cpu": "64"}},
            }]},
        });
        let deadline = Instant::now() + PATIENCE;
        // The namespace's default ServiceAccount comes a moment after it.
        while let Err(error) = cluster.kubectl_with(&["apply", "-f", "-"], &pod.to_string()).await {
            assert!(Instant::now() < deadline, "{error}");
            sleep(Duration::from_millis(50)).await;
        }
        let said = "0/1 nodes are available: 1 Insufficient cpu.";
        loop {
            let described = cluster.kubectl(&["describe", "pod", "-n", "shop", "big"]).await;
            if described.contains(said) && described.contains("FailedScheduling") {
                break;
            }
            assert!(Instant::now() < deadline, "{described}");
            sleep(Duration::from_millis(50)).await;
        }
        cluster.kubectl(&["delete", "namespace", "shop", "--timeout=30s"]).await;
        let left = cluster.list("namespaces").await;
        assert!(left.iter().all(|namespace| namespace["metadata"]["name"] != "shop"));
        cluster.running.stop().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_sample_can_be_applied_again() {
        if !has_kubectl().await {
            return;
        }
        let cluster = Cluster::start().await;
        let sample = include_str!("../../deploy/examples/nginx.yaml");
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = cluster.kubectl_with(&["apply", "-f", "-"], sample).await {
            assert!(Instant::now() < deadline, "{error}");
            sleep(Duration::from_millis(50)).await;
        }
        cluster.kubectl_with(&["apply", "-f", "-"], sample).await.unwrap();
        cluster.running.stop().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_kubectl_applied_is_its_own_and_goes_over_to_server_side_apply() {
        if !has_kubectl().await {
            return;
        }
        let cluster = Cluster::start().await;
        cluster.join("n1").await;
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"},
            "spec": {"containers": [{"name": "c", "image": "nginx"}]}});
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
        for object in [pod, service, web(1)] {
            let kind = object["kind"].as_str().unwrap();
            let input = object.to_string();
            let deadline = Instant::now() + PATIENCE;
            while let Err(error) = cluster.kubectl_with(&["apply", "-f", "-"], &input).await {
                assert!(Instant::now() < deadline, "{error}");
                sleep(Duration::from_millis(50)).await;
            }
            let shown = ["get", kind, "web", "--show-managed-fields", "-o", "json"];
            let stored: Value = serde_json::from_str(&cluster.kubectl(&shown).await).unwrap();
            let entries = stored["metadata"]["managedFields"].as_array().unwrap();
            let own = |entry: &&Value| entry["manager"] == "kubectl-client-side-apply";
            let own = entries.iter().find(own).unwrap()["fieldsV1"].to_string();
            assert!(own.contains("f:spec"), "{own}");
            let admitted = "status volumes volumeMounts serviceAccount serviceAccountName tolerations nodeName \
                clusterIP clusterIPs ipFamilies";
            for foreign in admitted.split_whitespace() {
                assert!(!own.contains(&format!("\"f:{foreign}\"")), "{kind}: {foreign} in {own}");
            }
            for _ in 0..2 {
                let output = cluster.output(&["apply", "--server-side", "-f", "-"], &input).await;
                assert!(output.status.success(), "{output:?}");
                assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{kind}");
            }
        }
        cluster.running.stop().await.unwrap();
    }

    /// A request of the node `n9` for its client certificate, PEM in base64.
    fn certificate_request(common_name: &str) -> String {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
        params.distinguished_name.push(rcgen::DnType::CommonName, common_name);
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = params.serialize_request(&key).unwrap().pem().unwrap();
        base64::Engine::encode(&base64::engine::general_purpose::STANDARD, pem)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_node_gets_its_certificate_with_a_join_token_and_nobody_elses() {
        if !has_kubectl().await {
            return;
        }
        let cluster = Cluster::start().await;
        let token = Admin::open(&cluster.data_dir()).unwrap().create_token(None).await.unwrap();
        let (bearer, _) = token.rsplit_once('.').unwrap();
        let server = format!("https://{}", cluster.running.bound);
        let ca = cluster.dir.path().join("ca.crt");
        std::fs::write(&ca, cluster.running.pki.ca_pem()).unwrap();
        for (name, user) in [("good", "system:node:n9"), ("bad", "kubernetes-admin")] {
            let request = json!({
                "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
                "metadata": {"name": name},
                "spec": {
                    "request": certificate_request(user),
                    "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
                    "usages": ["digital signature", "client auth"],
                },
            });
            let mut arguments = vec!["--kubeconfig=/dev/null", "--token", bearer];
            arguments.extend([
                "--server",
                &server,
                "--certificate-authority",
                ca.to_str().unwrap(),
            ]);
            arguments.extend(["create", "--validate=false", "-f", "-"]);
            cluster.kubectl_with(&arguments, &request.to_string()).await.unwrap();
        }
        let signed = |request: &&Value| request["status"]["certificate"].is_string();
        let requests = cluster.wait("csr", |requests| requests.iter().any(|r| signed(&r))).await;
        let names: Vec<_> =
            requests.iter().filter(signed).map(|r| r["metadata"]["name"].clone()).collect();
        assert_eq!(names, ["good"]);
        let shown = cluster.kubectl(&["get", "csr", "good"]).await;
        assert!(shown.contains("Approved,Issued"), "{shown}");
        cluster.running.stop().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_token_is_made_through_the_running_server_and_outlives_a_restart() {
        if !has_kubectl().await {
            return;
        }
        let cluster = Cluster::start().await;
        let admin = Admin::open(&cluster.data_dir()).unwrap();
        let token = admin.create_token(Some(jiff::SignedDuration::from_hours(1))).await.unwrap();
        let parts: Vec<&str> = token.split('.').collect();
        assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [6, 16, 64]);
        let name = format!("bootstrap-token-{}", parts[0]);
        let secret =
            cluster.kubectl(&["get", "secret", "-n", "kube-system", &name, "-o", "name"]).await;
        assert_eq!(secret.trim(), format!("secret/{name}"));
        let Cluster { running, dir } = cluster;
        running.stop().await.unwrap();
        let mut config = Config::new(dir.path().join("data"));
        config.bind = "127.0.0.1:0".parse().unwrap();
        let cluster = Cluster { running: start(config).await.unwrap(), dir };
        let admin = Admin::open(&cluster.data_dir()).unwrap();
        std::fs::write(cluster.dir.path().join("kubeconfig"), admin.kubeconfig(None)).unwrap();
        cluster.kubectl(&["get", "secret", "-n", "kube-system", &name]).await;
        cluster.running.stop().await.unwrap();
    }
}
