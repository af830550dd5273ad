//! Events as the programs write them, and the lines that come of them.

use ebpf_common::{
    conntrack::{FlowKey, REVERSE},
    event::{OPENED, PACKET},
};

use super::*;
use crate::model::{Protocol, ServicePort};

fn peer(text: &str) -> Peer {
    let address: SocketAddr = text.parse().unwrap();
    let port = address.port().to_be_bytes();
    Peer { addr: Addr::from(address.ip()), port, reserved: [0; 2] }
}

fn key(src: &str, dst: &str) -> FlowKey {
    let (src, dst) = (peer(src), peer(dst));
    FlowKey {
        src: src.addr,
        dst: dst.addr,
        sport: src.port,
        dport: dst.port,
        proto: 6,
        ..FlowKey::default()
    }
}

/// What a packet's event holds: client, asked, source, backend.
fn packet(kind: u8, [client, asked, source, backend]: [&str; 4]) -> Event {
    Event {
        key: key(client, asked),
        source: peer(source),
        to: peer(backend),
        kind,
        path: PACKET,
        ..Event::default()
    }
}

const NOBODY: &str = "[::]:0";

fn names() -> Names {
    let pod = |ip: &str, name: &str, netns_cookie| {
        Arc::new(LocalEndpoint {
            pod: ObjectKey::new("d", name),
            ip: ip.parse().unwrap(),
            netns_cookie,
            host_ifindex: 1,
            host_mac: [0; 6],
            pod_mac: [0; 6],
            host_ports: [].into(),
        })
    };
    let pods = [pod("10.244.1.7", "client", 7), pod("10.244.1.8", "web-0", 8)];
    let port =
        ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: 30_080 };
    let row = ServiceRow {
        cluster_ips: vec!["10.96.0.1".parse().unwrap()],
        ports: vec![port],
        ..ServiceRow::default()
    };
    let mut names = Names::new(&pods, &[(ObjectKey::new("d", "web"), Arc::new(row))]);
    names.set_node(1, "n1");
    names
}

#[test]
fn a_flow_is_told_with_the_names_of_its_ends() {
    let pod = ["10.244.1.7:40000", "10.96.0.1:80", "10.244.1.7:40000", "10.244.1.8:8080"];
    let outside = ["198.51.100.9:5000", "192.168.0.1:30080", "10.244.1.1:1024", "10.244.2.9:8080"];
    assert_eq!(
        line(&packet(OPENED, pod), &names()).text(),
        "opened  TCP    packet  pod d/client (10.244.1.7:40000) -> service d/web (10.96.0.1:80) \
         -> pod d/web-0 (10.244.1.8:8080)"
    );
    assert_eq!(
        line(&packet(CLOSED, outside), &names()).text(),
        "closed  TCP    packet  198.51.100.9:5000 as 10.244.1.1:1024 -> service d/web \
         (192.168.0.1:30080) -> 10.244.2.9:8080"
    );
}

#[test]
fn an_end_told_by_the_answers_row_is_the_same_line() {
    let forward =
        packet(CLOSED, ["10.244.1.7:4000", "10.96.0.1:80", "10.244.1.1:1024", "10.244.1.8:8080"]);
    // The row of answers: from the backend to the source, turned into asked to client.
    let reverse = Event {
        direction: REVERSE,
        ..packet(CLOSED, ["10.244.1.8:8080", "10.244.1.1:1024", "10.96.0.1:80", "10.244.1.7:4000"])
    };
    assert_eq!(line(&forward, &names()), line(&reverse, &names()));
}

#[test]
fn a_socket_is_known_by_its_namespace() {
    let mut event = packet(OPENED, [NOBODY, "10.96.0.1:80", NOBODY, "10.244.1.8:8080"]);
    (event.path, event.netns) = (SOCKET, 7);
    assert_eq!(
        line(&event, &names()).text(),
        "opened  TCP    socket  pod d/client -> service d/web (10.96.0.1:80) -> pod d/web-0 \
         (10.244.1.8:8080)"
    );
    event.netns = 1;
    assert!(line(&event, &names()).text().contains("node n1 -> service d/web"));
    event.netns = 99;
    assert!(line(&event, &names()).text().contains("socket  ? -> service d/web"));
}

#[test]
fn drops_and_refusals_have_reasons_and_what_could_not_be_read_says_so() {
    let ends = ["10.244.1.7:40000", "10.96.0.1:80", NOBODY, NOBODY];
    let with = |reason: DropReason, path| {
        let reason = u8::try_from(u32::try_from(reason as usize).unwrap()).unwrap();
        line(&Event { reason, path, ..packet(DROPPED, ends) }, &names())
    };
    let refused = with(DropReason::NoBackend, PACKET);
    assert_eq!(
        (refused.verdict, refused.reason),
        (Verdict::Refused, Some("service has no ready endpoint"))
    );
    assert!(refused.text().ends_with("(10.96.0.1:80)  (service has no ready endpoint)"));
    assert_eq!(with(DropReason::ConntrackFull, PACKET).verdict, Verdict::Dropped);
    assert_eq!(with(DropReason::SourceRange, SOCKET).verdict, Verdict::Refused);
    let event = Event { kind: DROPPED, path: PACKET, reason: 3, ..Event::default() };
    let mut unread = event;
    (unread.key.src, unread.key.dst) = (Addr::ANY_V6, Addr::ANY_V6);
    (unread.source, unread.to) = (peer(NOBODY), peer(NOBODY));
    assert!(line(&unread, &names()).text().contains("? -> ?  (packet too short"));
    assert_eq!(line(&packet(OPENED, ends), &names()).reason, None, "only a drop has a reason");
}

#[test]
fn filters_take_what_they_name() {
    let ends = ["10.244.1.7:40000", "10.96.0.1:80", "10.244.1.1:1024", "10.244.1.8:8080"];
    let line = line(&packet(OPENED, ends), &names());
    let takes = |pairs: &[(&str, &str)]| {
        Filter::parse(&pairs.iter().copied().collect()).unwrap().takes(&line)
    };
    for wanted in [
        &[][..],
        &[("from", "d/client")],
        &[("from", "10.244.1.7")],
        &[("from", "10.244.1.1:1024")],
        &[("to", "d/web")],
        &[("to", "10.244.1.8:8080")],
        &[("to", "d/web-0"), ("from", "10.244.1.7:40000")],
        &[("service", "d/web"), ("verdict", "opened")],
    ] {
        assert!(takes(wanted), "{wanted:?}");
    }
    for unwanted in [
        ("from", "client"),
        ("from", "d/web"),
        ("to", "10.244.1.7"),
        ("to", "d/client"),
        ("service", "d/web-0"),
        ("service", "web"),
        ("verdict", "closed"),
    ] {
        assert!(!takes(&[unwanted]), "{unwanted:?}");
    }
    let both = [("from", "d/client"), ("verdict", "closed")];
    assert!(!takes(&both), "all must hold");
    let wrong = Filter::parse(&BTreeMap::from([("verdict", "lost")])).unwrap_err();
    assert_eq!(wrong, "unknown verdict \"lost\"; there are opened, closed, dropped, refused");
}

#[test]
fn a_node_is_named_without_a_namespace_and_json_has_every_part() {
    let mut event = packet(OPENED, [NOBODY, "10.96.0.1:80", NOBODY, "10.244.1.8:8080"]);
    (event.path, event.netns) = (SOCKET, 1);
    let line = line(&event, &names());
    let filter = Filter::parse(&BTreeMap::from([("from", "n1")])).unwrap();
    assert!(filter.takes(&line));
    let json = line.json("then");
    assert_eq!((&json["time"], &json["client"]["kind"]), (&json!("then"), &json!("node")));
    assert_eq!(
        (&json["asked"]["name"], &json["asked"]["kind"]),
        (&json!("d/web"), &json!("service"))
    );
    assert_eq!((&json["verdict"], &json["source"]), (&json!("opened"), &Value::Null));
    assert_eq!(json["backend"]["address"], "10.244.1.8:8080");
}
