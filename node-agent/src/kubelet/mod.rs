//! The kubelet: pods of this node, from spec to processes and back to status.
//!
//! Pure: `pod` (the machine of one pod), `probe`, `status`, `admit`, `cgroup`, `plan`, `env`, `quantity`.
//! Effects: `runtime`, `images`, `volumes`, `worker` (one task a pod), `pods` (the set of them), `prober`,
//! `events`, `node`, `lease`, `server`.

pub mod cgroup;
pub mod images;
pub mod pod;
pub mod probe;
pub mod quantity;
pub mod runtime;
