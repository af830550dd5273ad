//! Shared vocabulary of both sides: quantities, selectors, names. Pure.
#![warn(missing_docs)]
