//! Which endpoints are made of pods, and how they are put into slices. Packing follows upstream's
//! `TestReconcileEndpointSlices*` (`k8s.io/endpointslice`).

use serde_json::json;

use super::super::testing::{context, node, pod, service, world};
use super::*;
use crate::client::Write;

/// The writes for `ns/web`; the nodes `n1` and `n2` exist.
fn steps(mut objects: Vec<Value>) -> Vec<Write> {
    for name in ["n1", "n2"] {
        if !objects.iter().any(|object| object["metadata"]["name"] == name) {
            objects.push(node(name));
        }
    }
    sync(&world(objects), &Key::new("ns", "web"), &context()).writes()
}

fn stored(write: &Write) -> Value {
    let Write::Create { object, .. } = write else { unreachable!("{write:?}") };
    let mut object = object.clone();
    object["metadata"]["name"] = json!("web-abc");
    object["metadata"]["uid"] = json!("uid-slice");
    object["metadata"]["resourceVersion"] = json!("7");
    object
}

#[test]
fn a_slice_tells_who_is_ready_and_on_which_port() {
    let mut leaving = pod("web-3", "web", "n1", true);
    leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let mut ended = pod("web-4", "web", "n1", true);
    ended["status"]["phase"] = json!("Succeeded");
    let node =
        json!({"kind": "Node", "metadata": {"name": "n1", "uid": "n1", "labels": {ZONE: "z"}}});
    let writes = steps(vec![
        service("web"),
        pod("web-1", "web", "n1", true),
        pod("web-2", "web", "n2", false),
        leaving,
        ended,
        node,
    ]);
    let slice = stored(&writes[0]);
    assert_eq!(writes.len(), 1);
    assert_eq!(slice["metadata"]["labels"][SERVICE_NAME], "web");
    assert_eq!(slice["metadata"]["labels"][MANAGED_BY], US);
    assert_eq!(slice["ports"], json!([{"name": "http", "protocol": "TCP", "port": 80}]));
    let said: Vec<String> = slice["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            let c = &e["conditions"];
            format!(
                "{} {} {} {} {}",
                e["targetRef"]["name"], c["ready"], c["serving"], c["terminating"], e["zone"]
            )
        })
        .collect();
    assert_eq!(
        said,
        [
            "\"web-1\" true true false \"z\"",
            "\"web-2\" false false false null",
            "\"web-3\" false true true \"z\""
        ]
    );
}

#[test]
fn what_is_right_is_left_alone_and_one_change_is_one_patch() {
    let base = vec![service("web"), pod("web-1", "web", "n1", true)];
    let slice = stored(&steps(base.clone())[0]);
    let mut again = base.clone();
    again.push(slice.clone());
    assert_eq!(steps(again.clone()), []);
    again[1] = pod("web-1", "web", "n1", false);
    let writes = steps(again);
    let [Write::Patch { patch, .. }] = writes.as_slice() else { unreachable!("{writes:?}") };
    assert_eq!(patch["endpoints"][0]["conditions"]["ready"], false);
    assert_eq!(patch["metadata"]["resourceVersion"], "7");
}

#[test]
fn a_slice_holds_a_hundred_and_room_is_filled_first() {
    let pods = |count: usize| {
        let mut all = vec![service("web")];
        all.extend((0..count).map(|n| pod(&format!("web-{n:03}"), "web", "n1", true)));
        all
    };
    let writes = steps(pods(101));
    let sizes: Vec<_> =
        writes.iter().map(|w| stored(w)["endpoints"].as_array().unwrap().len()).collect();
    assert_eq!(sizes, [100, 1]);
    let mut next = pods(102);
    next.push(stored(&writes[0]));
    let mut second = stored(&writes[1]);
    second["metadata"]["name"] = json!("web-def");
    second["metadata"]["uid"] = json!("uid-second");
    next.push(second);
    let writes = steps(next);
    let [Write::Patch { object, patch, .. }] = writes.as_slice() else { unreachable!() };
    assert_eq!(object.name, "web-def");
    assert_eq!(patch["endpoints"].as_array().unwrap().len(), 2);
}

#[test]
fn named_ports_are_looked_up_in_each_pod() {
    let mut named = service("web");
    named["spec"]["ports"][0]["targetPort"] = json!("http");
    let mut other = pod("web-2", "web", "n1", true);
    other["spec"]["containers"][0]["ports"][0]["containerPort"] = json!(8080);
    let writes = steps(vec![named, pod("web-1", "web", "n1", true), other]);
    let ports: Vec<_> =
        writes.iter().map(|w| stored(w)["ports"][0]["port"].as_i64().unwrap()).collect();
    assert_eq!(ports, [80, 8080]);
}

#[test]
fn a_service_without_pods_has_one_empty_slice_and_one_without_selector_none() {
    let writes = steps(vec![service("web")]);
    assert_eq!(stored(&writes[0])["endpoints"], json!([]));
    let slice = stored(&writes[0]);
    assert_eq!(steps(vec![service("web"), slice]), []);
    let mut bare = service("web");
    bare["spec"]["selector"] = Value::Null;
    assert_eq!(steps(vec![bare]), []);
}

/// The slices that a store would have after these writes, on top of those it had.
fn after(slices: &[Value], writes: &[Write]) -> Vec<Value> {
    let mut all = slices.to_vec();
    let find = |all: &[Value], name: &str| {
        all.iter().position(|slice| slice["metadata"]["name"] == name).unwrap()
    };
    for write in writes {
        match write {
            Write::Create { object, .. } => {
                let mut object = object.clone();
                let name = format!("web-{}", all.len());
                object["metadata"]["uid"] = json!(format!("uid-{name}"));
                object["metadata"]["name"] = json!(name);
                all.push(object);
            }
            Write::Patch { object, patch, .. } => {
                let at = find(&all, &object.name);
                all[at]["endpoints"] = patch["endpoints"].clone();
                all[at]["ports"] = patch["ports"].clone();
            }
            Write::Delete { object, .. } => drop(all.remove(find(&all, &object.name))),
            Write::Update { .. } | Write::UpdateSub { .. } => unreachable!("{write:?}"),
        }
    }
    all
}

fn sizes(slices: &[Value]) -> Vec<usize> {
    slices.iter().map(|slice| slice["endpoints"].as_array().unwrap().len()).collect()
}

fn some(numbers: impl Iterator<Item = usize>) -> Vec<Value> {
    numbers
        .map(|n| {
            let mut pod = pod(&format!("web-{n:03}"), "web", "n1", true);
            pod["status"]["podIP"] = json!(format!("10.244.{}.{}", 10 + n / 100, 100 + n % 100));
            pod
        })
        .collect()
}

/// The numbers of the pods that there are, from and up to.
type Turn = (usize, usize);

/// Slices after the pods of each turn, and how many writes the last one took.
fn packed(turns: &[Turn]) -> (Vec<usize>, usize) {
    let (mut slices, mut count) = (Vec::new(), 0);
    for (from, to) in turns {
        let mut objects = vec![service("web")];
        objects.extend(some(*from..*to));
        objects.extend(slices.clone());
        let writes = steps(objects);
        slices = after(&slices, &writes);
        count = writes.len();
    }
    (sizes(&slices), count)
}

#[test]
fn reconcile_endpoint_slices_packing() {
    // Turns; sizes in the end and writes of the last turn.
    let cases: [(&[Turn], &[usize], usize); 6] = [
        (&[(0, 250)], &[100, 100, 50], 3),
        // New ones go into the slice that has room.
        (&[(0, 250), (0, 260)], &[100, 100, 60], 1),
        // The one that loses some is written anyway and takes the new ones.
        (&[(0, 250), (20, 270)], &[100, 100, 50], 1),
        // What fits nowhere whole gets a slice of its own, as moving it would write two.
        (&[(0, 180), (0, 230)], &[100, 80, 50], 1),
        (&[(0, 250), (0, 0)], &[0], 3),
        (&[(0, 0), (0, 1)], &[1], 1),
    ];
    for (turns, want, writes) in cases {
        assert_eq!(packed(turns), (want.to_vec(), writes), "{turns:?}");
    }
}

#[test]
fn each_family_has_slices_of_its_own() {
    let mut dual = service("web");
    dual["spec"]["ipFamilies"] = json!(["IPv4", "IPv6"]);
    let mut both = pod("web-1", "web", "n1", true);
    both["status"]["podIPs"] = json!([{"ip": "10.244.0.9"}, {"ip": "fd00::9"}]);
    let objects = vec![dual.clone(), both.clone(), pod("web-2", "web", "n1", true)];
    let slices = after(&[], &steps(objects.clone()));
    let said: Vec<_> = slices
        .iter()
        .map(|s| format!("{} {}", s["addressType"], s["endpoints"].as_array().unwrap().len()))
        .collect();
    assert_eq!(said, ["\"IPv4\" 2", "\"IPv6\" 1"]);
    assert_eq!(slices[1]["endpoints"][0]["addresses"], json!(["fd00::9"]));
    // Back to one family: the other's slices go.
    let mut single = objects;
    single[0]["spec"]["ipFamilies"] = json!(["IPv4"]);
    single.extend(slices);
    let writes = steps(single);
    assert!(
        matches!(&writes[..], [Write::Delete { object, .. }] if object.name == "web-1"),
        "{writes:?}"
    );
}

#[test]
fn hints_name_zone_and_node_of_what_is_ready() {
    let hints = |distribution: &str, ready: bool, zone: &str| {
        let mut near = service("web");
        near["spec"]["trafficDistribution"] = json!(distribution);
        let mut place = node("n1");
        place["metadata"]["labels"][ZONE] = json!(zone);
        let writes = steps(vec![near, pod("web-1", "web", "n1", ready), place]);
        stored(&writes[0])["endpoints"][0]["hints"].to_string()
    };
    let zone = r#"{"forZones":[{"name":"z"}]}"#;
    let cases = [
        ("PreferClose", true, "z", zone),
        ("PreferSameZone", true, "z", zone),
        ("PreferSameZone", true, "", "null"),
        ("PreferSameZone", false, "z", "null"),
        ("PreferSameNode", true, "z", r#"{"forNodes":[{"name":"n1"}],"forZones":[{"name":"z"}]}"#),
        ("PreferSameNode", true, "", r#"{"forNodes":[{"name":"n1"}]}"#),
    ];
    for (distribution, ready, zone, want) in cases {
        assert_eq!(hints(distribution, ready, zone), want, "{distribution} {ready} {zone}");
    }
}

#[test]
fn a_pod_whose_node_is_gone_is_left_out_unless_it_is_published_anyway() {
    let lost = pod("web-1", "web", "n9", true);
    let slices = after(&[], &steps(vec![service("web"), lost.clone()]));
    assert_eq!(sizes(&slices), [0]);
    let mut publish = service("web");
    publish["spec"]["publishNotReadyAddresses"] = json!(true);
    let mut unready = lost;
    unready["status"]["conditions"][0]["status"] = json!("False");
    unready["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let slices = after(&[], &steps(vec![publish, unready]));
    let conditions = &slices[0]["endpoints"][0]["conditions"];
    assert_eq!(*conditions, json!({"ready": true, "serving": false, "terminating": true}));
}

#[test]
fn a_headless_pod_has_its_hostname_and_slices_the_label() {
    let mut headless = service("web");
    headless["spec"]["clusterIP"] = json!("None");
    let mut named = pod("web-1", "web", "n1", true);
    named["spec"]["hostname"] = json!("one");
    named["spec"]["subdomain"] = json!("web");
    let mut other = pod("web-2", "web", "n1", true);
    other["spec"]["hostname"] = json!("two");
    other["spec"]["subdomain"] = json!("elsewhere");
    let slices = after(&[], &steps(vec![headless, named, other]));
    let hostnames: Vec<_> = slices[0]["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| format!("{} {}", e["targetRef"]["name"], e["hostname"]))
        .collect();
    assert_eq!(hostnames, ["\"web-2\" null", "\"web-1\" \"one\""]);
    assert_eq!(slices[0]["metadata"]["labels"][HEADLESS], "");
}

#[test]
fn the_time_of_the_trigger_is_that_of_the_change_or_none() {
    let trigger = |write: &Write| {
        let metadata = match write {
            Write::Create { object, .. } => &object["metadata"],
            Write::Patch { patch, .. } => &patch["metadata"],
            Write::Update { .. } | Write::UpdateSub { .. } | Write::Delete { .. } => unreachable!(),
        };
        metadata["annotations"]["endpoints.kubernetes.io/last-change-trigger-time"].clone()
    };
    let since = |time: &str| {
        let mut pod = pod("web-1", "web", "n1", true);
        pod["status"]["conditions"][0]["lastTransitionTime"] = json!(time);
        pod
    };
    let mut web = service("web");
    web["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:05Z");
    let early = vec![web.clone(), since("2026-01-01T00:00:07Z")];
    let writes = steps(early.clone());
    assert_eq!(trigger(&writes[0]), "2026-01-01T00:00:05Z");
    let slices = after(&[], &writes);
    let mut later = early;
    later[1] = since("2026-01-01T00:01:00Z");
    later[1]["status"]["conditions"][0]["status"] = json!("False");
    later.extend(slices.clone());
    assert_eq!(trigger(&steps(later)[0]), "2026-01-01T00:01:00Z");
    // What goes leaves no time behind.
    let mut two = vec![web, since("2026-01-01T00:00:07Z"), pod("web-2", "web", "n1", true)];
    let both = after(&[], &steps(two.clone()));
    two.pop();
    two.extend(both);
    let writes = steps(two);
    assert!(matches!(&writes[..], [Write::Patch { .. }]));
    assert_eq!(trigger(&writes[0]), Value::Null);
}

#[test]
fn a_slice_of_an_older_service_of_the_name_is_replaced() {
    let objects = vec![service("web"), pod("web-1", "web", "n1", true)];
    let mut foreign = stored(&steps(objects.clone())[0]);
    foreign["metadata"]["ownerReferences"][0]["uid"] = json!("older");
    let mut all = objects;
    all.push(foreign);
    let writes = steps(all);
    assert!(matches!(&writes[..], [Write::Create { .. }, Write::Delete { .. }]), "{writes:?}");
}
