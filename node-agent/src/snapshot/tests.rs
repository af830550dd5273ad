//! What is written is read again, and nothing else is.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::model::{
    EndpointPort, EndpointRow, Family, Hints, Protocol, ServiceKind, ServicePort, TrafficPolicy,
};

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("d", name)
}

fn service() -> ServiceRow {
    ServiceRow {
        kind: ServiceKind::LoadBalancer,
        cluster_ips: vec!["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        external_ips: vec!["192.0.2.1".parse().unwrap()].into(),
        ingress_ips: vec!["192.0.2.2".parse().unwrap()].into(),
        external_name: "x.example".into(),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Sctp,
            port: 80,
            node_port: 30_080,
        }],
        publish_not_ready: true,
        affinity_s: 10_800,
        internal_policy: TrafficPolicy::Local,
        external_policy: TrafficPolicy::Local,
        health_check_port: 31_000,
        source_ranges: vec!["10.0.0.0/8".parse().unwrap()].into(),
        is_closed: true,
        created_s: -5,
        unsupported: vec!["spec.a".into()].into(),
        rejected: vec!["spec.b".into()].into(),
    }
}

fn slice(last: u8) -> EndpointSliceRow {
    let hints = Hints { zones: ["a".into()].into(), nodes: ["n".into(), "m".into()].into() };
    EndpointSliceRow {
        service: key("web"),
        family: Family::V4,
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Udp, port: 8080 }],
        endpoints: vec![
            EndpointRow {
                ip: IpAddr::from([10, 0, 0, last]),
                ready: false,
                terminating: true,
                hostname: "h".into(),
                node: "n".into(),
                hints: Some(Box::new(hints)),
                ..EndpointRow::default()
            },
            EndpointRow::default(),
        ],
        rejected: vec!["ports[0]".into()].into(),
    }
}

fn sources() -> Sources {
    let sources = Sources::default();
    sources.services.upsert(key("web"), service());
    sources.services.upsert(key("other"), ServiceRow::default());
    sources.slices.upsert(key("web-1"), slice(1));
    let node = NodeRow {
        internal_ips: vec!["192.168.0.1".parse().unwrap()],
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        ready: true,
        leaving: false,
        labels: [("zone".to_owned(), "z".to_owned())].into(),
    };
    sources.nodes.upsert(ObjectKey::new("", "n"), node);
    sources
}

fn rows(sources: &Sources) -> (usize, usize, usize) {
    (sources.services.len(), sources.slices.len(), sources.nodes.len())
}

#[test]
fn a_reboot_has_every_row_again_and_no_source_is_synced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    let before = sources();
    write(&path, &before).unwrap();
    let after = Sources::default();
    assert_eq!(restore(&path, &after).unwrap(), 2);
    assert_eq!(rows(&after), rows(&before));
    assert_eq!(after.services.row(&key("web")).as_deref(), Some(&service()));
    assert_eq!(after.slices.row(&key("web-1")).as_deref(), Some(&slice(1)));
    let node = ObjectKey::new("", "n");
    assert_eq!(after.nodes.row(&node), before.nodes.row(&node));
    let is_synced = after.services.is_synced() || after.slices.is_synced();
    assert!(!is_synced && !after.nodes.is_synced());
    assert!(!path.with_extension("new").exists());
}

#[test]
fn what_the_server_has_said_already_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    write(&path, &sources()).unwrap();
    let after = Sources::default();
    after.slices.replace([(key("web-1"), slice(9))].into());
    restore(&path, &after).unwrap();
    assert_eq!(after.slices.row(&key("web-1")).as_deref(), Some(&slice(9)));
    assert_eq!(rows(&after), (2, 1, 1));
}

#[test]
fn no_file_is_no_trouble_and_a_bad_one_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    assert_eq!(restore(&path, &Sources::default()).unwrap(), 0);
    write(&path, &sources()).unwrap();
    let good = fs::read(&path).unwrap();
    let decode_error = |bytes: &[u8]| decode(bytes).unwrap_err();
    assert_eq!(decode_error(b"hello, I am a text"), SnapshotError::NoSnapshot);
    let mut other = good.clone();
    other[11] = 9;
    assert_eq!(decode_error(&other), SnapshotError::Version(9));
    for cut in [12, 60, good.len() - 1] {
        assert_eq!(decode_error(&good[..cut]), SnapshotError::Damaged);
    }
    let mut flipped = good;
    *flipped.last_mut().unwrap() ^= 1;
    assert_eq!(decode_error(&flipped), SnapshotError::Damaged);
    fs::write(&path, flipped).unwrap();
    let empty = Sources::default();
    assert!(matches!(restore(&path, &empty), Err(RestoreError::Decode(SnapshotError::Damaged))));
    assert_eq!(rows(&empty), (0, 0, 0));
}

#[tokio::test]
async fn changes_are_written_when_they_have_settled_and_only_from_synced_sources() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    let (sources, target) = (sources(), path.clone());
    let followed = sources.clone();
    let task = tokio::spawn(async move { keep(&target, &followed).await });
    sources.services.mark_synced();
    sources.slices.mark_synced();
    time::sleep(SETTLE + Duration::from_millis(200)).await;
    assert!(!path.exists(), "nodes are not whole yet");
    sources.nodes.mark_synced();
    let written = async {
        while !path.exists() {
            time::sleep(Duration::from_millis(10)).await;
        }
    };
    time::timeout(PAUSE, written).await.unwrap();
    assert_eq!(decode(&fs::read(&path).unwrap()).unwrap().services.len(), 2);
    task.abort();
}

proptest! {
    #[test]
    fn no_bytes_are_trouble(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(decode(&bytes).is_err());
    }
}
