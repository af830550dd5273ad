//! The dataplane: services and backends into eBPF maps; programs loaded, attached and pinned.

pub mod load;
pub mod maps;
pub mod model;
mod object;
pub mod plan;

pub use object::object;
