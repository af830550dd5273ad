//! The child that `bench programming` measures: a dataplane fed from tables in the same process. Effects.
//!
//! Its time begins when the list is there, row by row, and nothing of it in the tables yet: a table that
//! is not synced is programmed too. It ends with the last map write: a row of the endpoint table is
//! written after the services of the round before it, so the second such row that is reported programmed
//! comes after them.

use std::{net::IpAddr, path::Path, time::Instant};

use anyhow::{Context as _, Result, bail, ensure};
use node_agent::{
    dataplane::{self, Handle},
    model::{EndpointSliceRow, LocalEndpoint, ObjectKey, ServiceRow},
    table::Table,
};

use super::{
    kube_proxy,
    orlop::{self, Filled, NodeFlags},
    programming::changed,
    tool::memory,
    traffic::{cpu_ns, say},
};

/// The dataplane under measurement, and the tables that feed it.
struct Rig {
    handle: Handle,
    services: Table<ObjectKey, ServiceRow>,
    slices: Table<ObjectKey, EndpointSliceRow>,
    endpoints: Table<IpAddr, LocalEndpoint>,
    flags: NodeFlags,
    marks: u32,
}

/// The child's life: `cold` programs all services, `change N` changes one endpoint N times, `memory`
/// tells what all of it takes.
///
/// # Errors
/// When the dataplane cannot start; failures of an order are answered as `error …` lines.
pub async fn life(flags: NodeFlags) -> Result<()> {
    let Filled { tables, overlay: _no_overlay } = orlop::fill(std::iter::empty(), vec![mark(0)?]);
    let (services, slices) = (tables.services.clone(), tables.slices.clone());
    let endpoints = tables.endpoints.clone();
    let handle = dataplane::start(orlop::config(None), tables).context("start the dataplane")?;
    let mut rig = Rig { handle, services, slices, endpoints, flags, marks: 0 };
    rig.settle().await?;
    say("ready")?;
    for line in std::io::stdin().lines() {
        let line = line.context("read an order")?;
        let answer = match rig.order(&line).await {
            Ok(answer) => answer,
            Err(error) => format!("error {error:#}"),
        };
        say(&answer)?;
    }
    rig.handle.stop().await;
    Ok(())
}

impl Rig {
    async fn order(&mut self, line: &str) -> Result<String> {
        match line.split_once(' ') {
            None if line == "cold" => self.cold().await,
            None if line == "memory" => memory_now(),
            Some(("change", count)) => self.change(count.parse().context("count")?).await,
            _ => bail!("unknown order {line}"),
        }
    }

    async fn cold(&mut self) -> Result<String> {
        let set = (0..self.flags.services).map(|n| kube_proxy::service(n, self.flags.endpoints));
        let rows = |one| (orlop::key(&one), orlop::slice(&one), orlop::row(&one));
        let list: Vec<(ObjectKey, EndpointSliceRow, ServiceRow)> = set.map(rows).collect();
        let (start, cpu) = (Instant::now(), cpu_ns()?);
        for (key, slice, row) in list {
            self.slices.upsert(key.clone(), slice);
            self.services.upsert(key, row);
        }
        self.slices.mark_synced();
        self.services.mark_synced();
        self.settle().await?;
        let (elapsed, cpu) = (start.elapsed().as_nanos(), cpu_ns()?.saturating_sub(cpu));
        let report = self.handle.report().await.context("the dataplane ended")?;
        ensure!(report.trouble.is_empty(), "{:?}", report.trouble);
        let expected = usize::try_from(self.flags.services).context("services")?;
        ensure!(report.frontends == expected, "{} frontends", report.frontends);
        Ok(format!("{elapsed} {cpu}"))
    }

    async fn change(&mut self, count: u32) -> Result<String> {
        let service = kube_proxy::service(self.flags.services / 2, self.flags.endpoints);
        let (mut times, cpu) = (Vec::new(), cpu_ns()?);
        for turn in 0..count {
            let row = orlop::slice(&changed(&service, turn));
            let start = Instant::now();
            self.slices.upsert(orlop::key(&service), row);
            self.settle().await?;
            times.push(start.elapsed().as_nanos());
        }
        let cpu = cpu_ns()?.saturating_sub(cpu) / u64::from(count.max(1));
        times.sort_unstable();
        let middle = times.get(times.len() / 2).context("at least one change")?;
        Ok(format!("{middle} {cpu}"))
    }

    /// Waits until everything that is in the tables now is in the maps.
    async fn settle(&mut self) -> Result<()> {
        for _round in 0..2 {
            self.marks += 1;
            let row = mark(self.marks)?;
            self.endpoints.upsert(row.ip, row);
            let revision = *self.endpoints.subscribe().borrow();
            let programmed = self.handle.programmed.wait_for(|done| done.revision >= revision);
            tokio::time::timeout(orlop::TIMEOUT, programmed)
                .await
                .context("not programmed in time")?
                .context("the dataplane ended")?;
        }
        Ok(())
    }
}

/// An endpoint on loopback whose row differs from turn to turn.
fn mark(turn: u32) -> Result<LocalEndpoint> {
    let [a, b, c, d] = turn.to_be_bytes();
    orlop::endpoint(&format!(
        "10.244.0.9,1,02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x},02:00:00:00:00:09"
    ))
}

/// Resident memory now and at its peak, and the bytes of all maps of this process.
fn memory_now() -> Result<String> {
    let pid = std::process::id();
    let rss = memory(pid, "VmRSS").context("VmRSS")?;
    let peak = memory(pid, "VmHWM").context("VmHWM")?;
    Ok(format!("{rss} {peak} {}", map_bytes(Path::new("/proc/self/fdinfo"))?))
}

/// What the kernel charges for the maps behind the descriptors, each map once.
fn map_bytes(folder: &Path) -> Result<u64> {
    let mut maps = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir(folder).context("list descriptors")? {
        // A descriptor may be closed while we read.
        let text = std::fs::read_to_string(entry?.path()).unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        if let (Some(_), Some(bytes), Some(id)) =
            (field("map_type:"), field("memlock:"), field("map_id:"))
        {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.values().sum())
}
