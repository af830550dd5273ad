//! HTTP: what the API server takes and gives.

pub mod discovery;
pub mod openapi;
pub mod patch;
pub mod table;
