//! The dataplane: services and backends into eBPF maps; programs loaded, attached and pinned.

mod object;

pub use object::object;
