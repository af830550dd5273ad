//! Packet tables of the tc programs: a packet in, a verdict and a packet out, rows and counters
//! after, by `BPF_PROG_TEST_RUN` on the running kernel. Every table runs for both families.

#[cfg(test)]
#[path = "support/chance.rs"]
mod chance;
#[cfg(test)]
#[path = "support/frame.rs"]
mod frame;
#[cfg(test)]
#[path = "support/kernel.rs"]
mod kernel;
#[cfg(test)]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/runs.rs"]
mod runs;
#[cfg(test)]
#[path = "support/told.rs"]
mod told;

#[cfg(test)]
#[path = "packets/errors.rs"]
mod errors;
#[cfg(test)]
#[path = "packets/events.rs"]
mod events;
#[cfg(test)]
#[path = "packets/fragments.rs"]
mod fragments;
#[cfg(test)]
#[path = "packets/host_ports.rs"]
mod host_ports;
#[cfg(test)]
#[path = "packets/made.rs"]
mod made;
#[cfg(test)]
#[path = "packets/malformed.rs"]
mod malformed;
#[cfg(test)]
#[path = "packets/masquerade.rs"]
mod masquerade;
#[cfg(test)]
#[path = "packets/meeting.rs"]
mod meeting;
#[cfg(test)]
#[path = "packets/mutated.rs"]
mod mutated;
#[cfg(test)]
#[path = "packets/outside.rs"]
mod outside;
#[cfg(test)]
#[path = "packets/plain.rs"]
mod plain;
#[cfg(test)]
#[path = "packets/reading.rs"]
mod reading;
#[cfg(test)]
#[path = "packets/refusals.rs"]
mod refusals;
#[cfg(test)]
#[path = "packets/services.rs"]
mod services;
#[cfg(test)]
#[path = "packets/too_big.rs"]
mod too_big;
