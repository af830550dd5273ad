//! The XDP programs: packet tables by `BPF_PROG_TEST_RUN`, on the running kernel. Every table runs for both
//! families.

#[cfg(test)]
#[path = "support/driver.rs"]
mod driver;
#[cfg(test)]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/wire.rs"]
mod wire;

#[cfg(test)]
#[path = "xdp/carry.rs"]
mod carry;
#[cfg(test)]
#[path = "xdp/generic.rs"]
mod generic;
#[cfg(test)]
#[path = "xdp/open.rs"]
mod open;
