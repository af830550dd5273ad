//! The reference, and the rig in which loaded programs are compared with it.

pub(crate) mod ageing;
pub(crate) mod asking;
pub(crate) mod case;
#[path = "../support/chance.rs"]
pub(crate) mod chance;
pub(crate) mod driven;
pub(crate) mod flows;
#[expect(dead_code, reason = "packet tables use more of it")]
#[path = "../support/frame.rs"]
pub(crate) mod frame;
pub(crate) mod loaded;
#[path = "../support/pins.rs"]
pub(crate) mod pins;
#[path = "../support/place.rs"]
pub(crate) mod place;
pub(crate) mod random;
pub(crate) mod reference;
pub(crate) mod rig;
pub(crate) mod rules;
pub(crate) mod ruling;
pub(crate) mod running;
pub(crate) mod step;
#[path = "../support/told.rs"]
pub(crate) mod told;
pub(crate) mod tracing;
pub(crate) mod unreachable;
pub(crate) mod way;
pub(crate) mod world;
