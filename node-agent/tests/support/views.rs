//! What the debug socket of an agent shows of which only the dataplane is there.

use std::sync::Arc;

use node_agent::{debug, kubelet::Directory, readers::Readers, table::Table};
use tokio::sync::watch;

pub(crate) fn of(node: &str, readers: Readers) -> debug::Views {
    let (_, not_ready) = watch::channel(None);
    debug::Views {
        node: node.to_owned(),
        components: Vec::new(),
        services: Table::new(),
        nodes: Table::new(),
        endpoints: Table::new(),
        pods: Directory::default(),
        not_ready,
        conditions: None,
        readers: Some(Arc::new(readers)),
    }
}
