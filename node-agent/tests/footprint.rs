//! What 30,000 services with four endpoints each take in the agent's memory: tables, model and plan.

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use node_agent::{
        dataplane::{
            model::Model,
            plan::{Observed, Plan},
        },
        model::{
            EndpointPort, EndpointRow, EndpointSliceRow, ObjectKey, Protocol, ServicePort,
            ServiceRow,
        },
        sys::memory::give_back,
        table::Table,
    };

    const SERVICES: u32 = 30_000;
    const ENDPOINTS: u32 = 4;
    /// The whole agent is to have 60 MB at that size; one without services has 15, most of it the program.
    const MOST: usize = 52 << 20;

    /// Bytes of this process that are resident.
    fn resident() -> usize {
        give_back();
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = status.split_whitespace().nth(1).unwrap().parse().unwrap();
        pages * 4096
    }

    fn fill(services: &Table<ObjectKey, ServiceRow>, slices: &Table<ObjectKey, EndpointSliceRow>) {
        let address = |number: u32| IpAddr::V4(Ipv4Addr::from_bits(0x0a20_0000 + number));
        for number in 0..SERVICES {
            let key = ObjectKey::new("bench", &format!("service-{number}"));
            let endpoint =
                |at| EndpointRow { ip: address(number * ENDPOINTS + at), ..EndpointRow::default() };
            let slice = EndpointSliceRow {
                service: ObjectKey::new("bench", &format!("service-{number}")),
                ports: vec![EndpointPort {
                    name: "http".into(),
                    protocol: Protocol::Tcp,
                    port: 8080,
                }],
                endpoints: (0..ENDPOINTS).map(endpoint).collect(),
                ..EndpointSliceRow::default()
            };
            slices.upsert(key.clone(), slice);
            let port = ServicePort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: 0,
            };
            let row = ServiceRow {
                cluster_ips: vec![address(0x0040_0000 + number)],
                ports: vec![port],
                ..ServiceRow::default()
            };
            services.upsert(key, row);
        }
        services.mark_synced();
        slices.mark_synced();
    }

    #[test]
    #[expect(clippy::print_stdout, reason = "a measurement is worth reading")]
    fn thirty_thousand_services_fit() {
        if std::env::var_os("ORLOP_EMULATED").is_some() {
            skip::because("nothing here asks the kernel, and an emulated processor takes long");
            return;
        }
        let mut last = resident();
        let first = last;
        let mut stage = |name: &str| {
            let now = resident();
            println!("{name}: {} kB", now.saturating_sub(last) / 1024);
            last = now;
        };
        let (services, slices) = (Table::new(), Table::new());
        fill(&services, &slices);
        stage("tables");
        let mut model = Model::new(None);
        let dirty = model.update(services.changes_since(0), slices.changes_since(0));
        model.compact();
        stage("model, and what has changed");
        let (mut observed, mut plan) = (Observed::default(), Plan::default());
        for key in &dirty {
            let desired = model.desired(key);
            observed.plan_service(key, &desired.ports, &mut plan);
        }
        assert_eq!(plan.services.len(), usize::try_from(SERVICES).unwrap());
        drop((dirty, plan));
        observed.compact();
        stage("what is programmed");
        let taken = resident() - first;
        println!("altogether: {} kB", taken / 1024);
        assert!(taken < MOST, "{taken} bytes");
        drop((services, slices, model, observed));
    }
}
