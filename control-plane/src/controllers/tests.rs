//! The whole loop: controllers and scheduler against an API server in memory, with the kubelets' part
//! played by the test.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Signer,
    json::{integer, items, text},
    model::{
        DEPLOYMENTS, ENDPOINT_SLICES, EVENTS, Key, NAMESPACES, NODES, PODS, REPLICA_SETS,
        SERVICE_ACCOUNTS, SERVICES,
    },
    testing::{self, FakeApi, is_ready, settings},
};
use crate::{
    client::{Client, DeleteOptions, Resource, Write},
    config::ControllerSet,
    pki::Usage,
    scheduler,
};

struct NoSigner;

impl Signer for NoSigner {
    fn sign(&self, _: &str, _: Usage, _: Duration) -> Result<String, String> {
        Err("no signer in this test".to_owned())
    }
}

/// Starts everything beside an API server with `nodes` nodes and the namespace `ns`.
async fn start(nodes: usize) -> (Arc<FakeApi>, DropGuard) {
    let api = FakeApi::new();
    for n in 1..=nodes {
        let mut node = testing::node(&format!("n{n}"));
        node["metadata"]["namespace"] = json!("");
        api.create(NODES, node).await;
    }
    api.create(NAMESPACES, json!({"kind": "Namespace", "metadata": {"name": "ns"}, "spec": {"finalizers": ["kubernetes"]}}))
        .await;
    let stop = CancellationToken::new();
    let client: Arc<dyn Client> = Arc::<FakeApi>::clone(&api);
    let set = ControllerSet::all();
    drop(super::start(Arc::clone(&client), Arc::new(NoSigner), settings(), &set, stop.clone()));
    drop(scheduler::start(client, stop.clone()));
    drop(tokio::spawn(kubelets(Arc::clone(&api), stop.clone())));
    (api, stop.drop_guard())
}

/// Makes assigned pods run and get ready, and lets deleted ones go.
async fn kubelets(api: Arc<FakeApi>, stop: CancellationToken) {
    let mut next = 1;
    while !stop.is_cancelled() {
        for pod in api.list(PODS) {
            let place =
                Key::new(text(&pod, "/metadata/namespace"), text(&pod, "/metadata/name")).at(PODS);
            if !text(&pod, "/metadata/deletionTimestamp").is_empty() {
                let options =
                    DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
                drop(api.write(Write::Delete { object: place, options }).await);
            } else if !text(&pod, "/spec/nodeName").is_empty() && !is_ready(&pod) {
                next += 1;
                let patch = json!({"status": {
                    "phase": "Running", "podIP": format!("10.244.0.{next}"),
                    "conditions": [{"type": "Ready", "status": "True"}],
                }});
                drop(api.write(Write::Patch { object: place, subresource: "status", patch }).await);
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn web(replicas: i64) -> Value {
    let mut value = testing::deployment("web", replicas);
    value["metadata"]["uid"] = Value::Null;
    value
}

fn ready(pods: &[Value], count: usize) -> bool {
    pods.len() == count && pods.iter().all(is_ready)
}

fn endpoints(slices: &[Value]) -> usize {
    slices
        .iter()
        .flat_map(|slice| items(slice, "/endpoints"))
        .filter(|endpoint| endpoint["conditions"]["ready"] == true)
        .count()
}

async fn delete(api: &FakeApi, resource: Resource, name: &str, propagation: &'static str) {
    let namespace = if resource == NAMESPACES { "" } else { "ns" };
    let options = DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() };
    let object = Key::new(namespace, name).at(resource);
    api.write(Write::Delete { object, options }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_becomes_ready_pods_with_endpoints_and_goes_with_all_it_made() {
    let (api, _stop) = start(3).await;
    api.create(SERVICES, testing::service("web")).await;
    api.create(DEPLOYMENTS, web(3)).await;
    let pods = api.wait(PODS, |pods| ready(pods, 3)).await;
    let mut nodes = BTreeMap::new();
    for pod in &pods {
        *nodes.entry(text(pod, "/spec/nodeName").to_owned()).or_insert(0) += 1;
    }
    assert_eq!(nodes.into_values().collect::<Vec<_>>(), [1, 1, 1], "one on each node");
    api.wait(ENDPOINT_SLICES, |slices| endpoints(slices) == 3).await;
    api.wait(DEPLOYMENTS, |all| integer(&all[0], "/status/availableReplicas") == Some(3)).await;
    assert_eq!(api.count("create pods"), 3, "no pod too many");
    assert_eq!(api.count("create replicasets"), 1);
    assert_eq!(api.count("update pods/binding"), 3);
    api.wait(EVENTS, |events| {
        ["ScalingReplicaSet", "SuccessfulCreate", "Scheduled"]
            .iter()
            .all(|reason| events.iter().any(|event| event["reason"] == *reason))
    })
    .await;

    let place = Key::new("ns", "web").at(DEPLOYMENTS);
    api.patch(place, "", json!({"spec": {"replicas": 1}})).await;
    api.wait(PODS, |pods| ready(pods, 1)).await;
    api.wait(ENDPOINT_SLICES, |slices| endpoints(slices) == 1).await;

    delete(&api, DEPLOYMENTS, "web", "Background").await;
    api.wait(REPLICA_SETS, <[Value]>::is_empty).await;
    api.wait(PODS, <[Value]>::is_empty).await;
    api.wait(ENDPOINT_SLICES, |slices| endpoints(slices) == 0).await;
    delete(&api, SERVICES, "web", "Background").await;
    api.wait(ENDPOINT_SLICES, <[Value]>::is_empty).await;
    assert_eq!(api.count("create pods"), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_update_replaces_all_pods_and_keeps_the_old_set_for_a_rollback() {
    let (api, _stop) = start(2).await;
    api.create(DEPLOYMENTS, web(3)).await;
    api.wait(PODS, |pods| ready(pods, 3)).await;
    let place = Key::new("ns", "web").at(DEPLOYMENTS);
    let containers = json!([{"name": "c", "image": "nginx:2"}]);
    let patch = json!({"spec": {"template": {"spec": {"containers": containers}}}});
    api.patch(place, "", patch).await;
    let new = |pod: &Value| text(pod, "/spec/containers/0/image") == "nginx:2";
    api.wait(PODS, |pods| ready(pods, 3) && pods.iter().all(new)).await;
    let done = |all: &[Value]| {
        items(&all[0], "/status/conditions").iter().any(|condition| {
            condition["reason"] == "NewReplicaSetAvailable"
                && integer(&all[0], "/status/observedGeneration") == Some(2)
                && integer(&all[0], "/status/updatedReplicas") == Some(3)
        })
    };
    let deployments = api.wait(DEPLOYMENTS, done).await;
    let revision = "/metadata/annotations/deployment.kubernetes.io~1revision";
    assert_eq!(text(&deployments[0], revision), "2");
    let sets = api.list(REPLICA_SETS);
    let mut sizes: Vec<_> = sets.iter().map(|set| integer(set, "/spec/replicas")).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [Some(0), Some(3)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_creations_are_told_and_made_up_for_without_doubles() {
    let (api, _stop) = start(1).await;
    api.fail_creates(PODS, 4);
    api.create(DEPLOYMENTS, web(3)).await;
    api.wait(PODS, |pods| ready(pods, 3)).await;
    api.wait(EVENTS, |events| events.iter().any(|event| event["reason"] == "FailedCreate")).await;
    api.wait(DEPLOYMENTS, |all| integer(&all[0], "/status/availableReplicas") == Some(3)).await;
    assert_eq!(api.count("create pods"), 3);
    api.wait(REPLICA_SETS, |sets| items(&sets[0], "/status/conditions").is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreground_deletion_takes_the_pods_before_the_deployment() {
    let (api, _stop) = start(1).await;
    api.create(DEPLOYMENTS, web(2)).await;
    api.wait(PODS, |pods| ready(pods, 2)).await;
    delete(&api, DEPLOYMENTS, "web", "Foreground").await;
    api.wait(DEPLOYMENTS, <[Value]>::is_empty).await;
    assert_eq!(api.list(PODS), [] as [Value; 0]);
    assert_eq!(api.list(REPLICA_SETS), [] as [Value; 0]);
    assert_eq!(api.count("create pods"), 2, "nothing was made again on the way");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orphaned_pods_are_adopted_by_a_set_that_matches() {
    let (api, _stop) = start(1).await;
    let mut set = testing::replica_set("web", 2);
    set["metadata"]["uid"] = Value::Null;
    api.create(REPLICA_SETS, set.clone()).await;
    let before = api.wait(PODS, |pods| ready(pods, 2)).await;
    delete(&api, REPLICA_SETS, "web", "Orphan").await;
    api.wait(REPLICA_SETS, <[Value]>::is_empty).await;
    api.wait(PODS, |pods| pods.len() == 2 && pods.iter().all(has_no_owner)).await;
    api.create(REPLICA_SETS, set).await;
    let adopted = |pods: &[Value]| {
        pods.len() == 2 && pods.iter().all(|pod| items(pod, "/metadata/ownerReferences").len() == 1)
    };
    let after = api.wait(PODS, adopted).await;
    let names = |pods: &[Value]| {
        pods.iter().map(|pod| text(pod, "/metadata/name").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&before), names(&after));
    assert_eq!(api.count("create pods"), 2);
}

fn has_no_owner(object: &Value) -> bool {
    items(object, "/metadata/ownerReferences").is_empty()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_the_watch_has_not_told_of_outlives_the_orphaning_of_its_set() {
    let (api, _stop) = start(1).await;
    // All watches have begun once the controllers have furnished the namespace.
    api.wait(SERVICE_ACCOUNTS, |accounts| !accounts.is_empty()).await;
    let set = api.create(REPLICA_SETS, testing::replica_set("web", 0)).await;
    let mut pod = testing::pod("young", "web", "n1", true);
    pod["metadata"]["ownerReferences"][0]["uid"] = set["metadata"]["uid"].clone();
    api.delay_watch(PODS);
    api.create(PODS, pod).await;
    delete(&api, REPLICA_SETS, "web", "Orphan").await;
    let sets = api.wait(REPLICA_SETS, |_| api.count("list pods") > 0).await;
    assert_eq!(sets.len(), 1, "the set waits for what it cannot see");
    api.tell_all();
    api.wait(REPLICA_SETS, <[Value]>::is_empty).await;
    let pods = api.list(PODS);
    assert!(pods.len() == 1 && has_no_owner(&pods[0]), "{pods:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_is_furnished_and_emptied() {
    let (api, _stop) = start(1).await;
    let account =
        |all: &[Value]| all.iter().any(|account| text(account, "/metadata/name") == "default");
    api.wait(SERVICE_ACCOUNTS, account).await;
    api.create(SERVICES, testing::service("web")).await;
    api.create(DEPLOYMENTS, web(2)).await;
    api.wait(PODS, |pods| ready(pods, 2)).await;
    delete(&api, NAMESPACES, "ns", "Background").await;
    api.wait(NAMESPACES, <[Value]>::is_empty).await;
    for resource in [PODS, DEPLOYMENTS, REPLICA_SETS, SERVICES, SERVICE_ACCOUNTS, ENDPOINT_SLICES] {
        assert_eq!(api.list(resource), [] as [Value; 0], "{}", resource.plural);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_get_their_cidr_and_pods_wait_for_room_with_a_reason() {
    let (api, _stop) = start(1).await;
    api.wait(NODES, |nodes| text(&nodes[0], "/spec/podCIDR") == "10.244.0.0/24").await;
    let mut pod = testing::pod("big", "none", "", false);
    pod["metadata"]["ownerReferences"] = json!([]);
    pod["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "6"}});
    api.create(PODS, pod).await;
    let told = |pods: &[Value]| {
        items(&pods[0], "/status/conditions").iter().any(|condition| {
            text(condition, "/message") == "0/1 nodes are available: 1 Insufficient cpu."
                && text(condition, "/reason") == "Unschedulable"
        })
    };
    api.wait(PODS, told).await;
    api.wait(EVENTS, |events| events.iter().any(|event| event["reason"] == "FailedScheduling"))
        .await;
    let mut node = testing::node("large");
    node["metadata"]["namespace"] = json!("");
    node["status"]["allocatable"]["cpu"] = json!("8");
    api.create(NODES, node).await;
    api.wait(PODS, |pods| text(&pods[0], "/spec/nodeName") == "large").await;
    delete_node(&api, "large").await;
    api.wait(PODS, <[Value]>::is_empty).await;
}

async fn delete_node(api: &FakeApi, name: &str) {
    let object = Key::new("", name).at(NODES);
    api.write(Write::Delete { object, options: DeleteOptions::default() }).await.unwrap();
}
