//! Node ports of a Service, that of its health check among them. Pure.
//!
//! Follows upstream's `initNodePorts`, `updateNodePorts` and `updateHealthCheckNodePort`
//! (`pkg/registry/core/service/storage/alloc.go`). A number belongs to one Service, whatever the protocol.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{
    Networks, Refusal, Taken,
    fields::{health_number, kind, needs_health_port, needs_node_port, node_port, node_ports},
    networks::free_port,
};
use crate::schema::{FieldError, Path};

/// Gives every port the node port that its Service's type asks for.
pub(super) fn assign(
    networks: &Networks,
    taken: &Taken<'_>,
    service: &mut Value,
    old: Option<&Value>,
) -> Result<(), Refusal> {
    let mut pool = Pool { range: networks.node_ports, taken, own: BTreeSet::new() };
    if needs_node_port(service) {
        match old {
            None => init(&mut pool, service)?,
            Some(old) => update(&mut pool, service, old)?,
        }
    }
    let had = old.is_some_and(needs_health_port);
    if had || !needs_health_port(service) {
        return Ok(());
    }
    let number = match health_number(service) {
        0 => pool.any().map_err(|why| {
            Refusal::Internal(format!("failed to allocate a HealthCheck NodePort 0: {why}"))
        })?,
        asked => pool.take(asked).map_err(|why| {
            let what = "failed to allocate requested HealthCheck NodePort";
            Refusal::Internal(format!("{what} {asked}: {why}"))
        })?,
    };
    service["spec"]["healthCheckNodePort"] = json!(number);
    Ok(())
}

/// The node ports, with what this write took.
struct Pool<'a> {
    range: (u16, u16),
    taken: &'a Taken<'a>,
    own: BTreeSet<u16>,
}

impl Pool<'_> {
    fn is_used(&self, port: u16) -> bool {
        self.taken.has_port(port) || self.own.contains(&port)
    }

    fn take(&mut self, asked: i64) -> Result<u16, String> {
        let (low, high) = self.range;
        let port = u16::try_from(asked).ok().filter(|port| (low..=high).contains(port));
        let port = port.ok_or_else(|| {
            format!(
                "provided port is not in the valid range. The range of valid ports is {low}-{high}"
            )
        })?;
        if self.is_used(port) {
            return Err("provided port is already allocated".to_owned());
        }
        self.own.insert(port);
        Ok(port)
    }

    fn any(&mut self) -> Result<u16, &'static str> {
        let port = free_port(self.range, |port| self.is_used(port)).ok_or("range is full")?;
        self.own.insert(port);
        Ok(port)
    }

    fn any_node_port(&mut self) -> Result<u16, Refusal> {
        self.any().map_err(|why| Refusal::Internal(format!("failed to allocate a nodePort: {why}")))
    }
}

fn should_allocate(service: &Value) -> bool {
    kind(service) == "NodePort" || service["spec"]["allocateLoadBalancerNodePorts"] != false
}

fn refused(index: usize, asked: i64, why: String) -> Refusal {
    let path = Path::new("spec.ports").index(index).child("nodePort");
    FieldError::invalid(&path, &json!(asked), why).into()
}

fn list(service: &mut Value) -> &mut [Value] {
    let ports = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
    ports.map_or(&mut [], Vec::as_mut_slice)
}

/// A new Service's. Ports of one number and several protocols share one node port.
fn init(pool: &mut Pool<'_>, service: &mut Value) -> Result<(), Refusal> {
    let allocate = should_allocate(service);
    let number = |port: &Value| port["port"].as_i64().unwrap_or(0);
    let mut requested: BTreeMap<i64, i64> = BTreeMap::new();
    for port in list(service).iter().filter(|port| node_port(port) != 0) {
        requested.entry(number(port)).or_insert_with(|| node_port(port));
    }
    let mut given: BTreeMap<i64, i64> = BTreeMap::new();
    for (index, port) in list(service).iter_mut().enumerate() {
        let asked = node_port(port);
        if asked == 0 && !allocate {
            continue;
        }
        let shared = given.get(&number(port)).copied();
        let chosen = match (shared, requested.get(&number(port)).copied()) {
            (Some(shared), _) if asked == 0 || asked == shared => shared,
            (Some(_), _) => i64::from(pool.take(asked).map_err(|why| refused(index, asked, why))?),
            (None, Some(wanted)) => {
                i64::from(pool.take(wanted).map_err(|why| refused(index, wanted, why))?)
            }
            (None, None) => i64::from(pool.any_node_port()?),
        };
        given.entry(number(port)).or_insert(chosen);
        port["nodePort"] = json!(chosen);
    }
    Ok(())
}

/// A changed Service's: it keeps its own numbers and takes new ones.
fn update(pool: &mut Pool<'_>, service: &mut Value, old: &Value) -> Result<(), Refusal> {
    let allocate = should_allocate(service);
    // Those that go are given back only when the write is done, so the old ones are not given anew.
    let before: BTreeSet<i64> = node_ports(old).map(i64::from).collect();
    pool.own.extend(node_ports(old));
    let mut seen: BTreeSet<(String, i64)> = BTreeSet::new();
    let mut allocated: BTreeSet<i64> = BTreeSet::new();
    for (index, port) in list(service).iter_mut().enumerate() {
        let asked = node_port(port);
        if asked == 0 && !allocate {
            continue;
        }
        if asked == 0 {
            port["nodePort"] = json!(pool.any_node_port()?);
        } else if !before.contains(&asked) && !allocated.contains(&asked) {
            pool.take(asked).map_err(|why| refused(index, asked, why))?;
            allocated.insert(asked);
        }
        let protocol = port["protocol"].as_str().unwrap_or("TCP").to_owned();
        let held = (protocol, node_port(port));
        if seen.contains(&held) {
            return Err(Refusal::Internal(format!(
                "duplicate nodePort: {{{} {}}}",
                held.0, held.1
            )));
        }
        seen.insert(held);
    }
    Ok(())
}
