//! What both sides must understand the same way: selectors, quantities, names. Pure.
#![warn(missing_docs)]

pub mod names;
pub mod quantity;
pub mod selector;
