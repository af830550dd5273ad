//! The Orlop control plane: API server, store, scheduler and controllers in one process.

pub mod admin;
pub mod admission;
pub mod api;
pub mod client;
pub mod config;
pub mod controllers;
pub mod pki;
pub mod run;
pub mod scheduler;
pub mod schema;
pub mod server;
#[cfg(test)]
mod server_tests;
pub mod store;
