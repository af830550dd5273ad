//! Maps that grow under flows and services: no flow is lost, whoever dies in between.

#[cfg(test)]
#[path = "support/frame.rs"]
#[expect(dead_code, reason = "the packet tables use all of it")]
mod frame;
#[cfg(test)]
#[path = "support/pins.rs"]
mod pins;
#[cfg(test)]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/rows.rs"]
mod rows;
#[cfg(test)]
#[path = "support/space.rs"]
mod space;

#[cfg(test)]
#[path = "grow/agent.rs"]
mod agent;
#[cfg(test)]
#[path = "grow/steps.rs"]
mod steps;
