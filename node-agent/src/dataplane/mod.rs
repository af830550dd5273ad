//! Filled by the landings that follow.
