//! The controllers: pure functions over a cache, run by one thin loop.
//!
//! `model.rs` decodes objects, `world.rs` holds them, `queue.rs` orders the work, `sync.rs` says what
//! an answer is; `run.rs` and `exec.rs` are the loop and the writing. One file per controller beside.

mod adopt;
mod bootstrap;
pub(crate) mod conditions;
mod correlate;
mod csr;
mod deployment;
mod endpointslice;
mod endpointslice_mirroring;
mod exec;
mod gc;
pub(crate) mod json;
pub(crate) mod model;
mod namespace;
mod node_lifecycle;
mod nodeipam;
mod podgc;
mod queue;
pub(crate) mod recorder;
mod replicaset;
mod run;
pub(crate) mod sync;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod world;

use std::sync::Arc;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) use self::run::forward;
use self::{exec::Doors, recorder::Recorder, sync::Controller, world::World};
pub use self::{
    exec::Signer,
    model::{KINDS, Kind},
    world::Settings,
};
use crate::{client::Client, config::ControllerSet};

fn registry() -> [Controller; 15] {
    [
        bootstrap::SERVICE_ACCOUNT,
        bootstrap::ROOT_CA_PUBLISHER,
        bootstrap::SIGNER,
        bootstrap::TOKEN_CLEANER,
        bootstrap::EVENT_TTL_CONTROLLER,
        csr::CONTROLLER,
        deployment::CONTROLLER,
        endpointslice::CONTROLLER,
        endpointslice_mirroring::CONTROLLER,
        gc::CONTROLLER,
        namespace::CONTROLLER,
        node_lifecycle::CONTROLLER,
        nodeipam::CONTROLLER,
        podgc::CONTROLLER,
        replicaset::CONTROLLER,
    ]
}

/// Starts the chosen controllers; the task ends soon after `stop` is cancelled.
pub fn start(
    client: Arc<dyn Client>,
    signer: Arc<dyn Signer>,
    settings: Settings,
    set: &ControllerSet,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let chosen = registry().into_iter().filter(|controller| set.contains(controller.name));
    let recorder = Recorder::start(Arc::clone(&client));
    let doors = Doors { client, signer, recorder };
    tokio::spawn(run::run(World::new(settings), chosen.collect(), doors, stop))
}
