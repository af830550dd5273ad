//! What the server itself writes into a Service between defaulting and validation. Pure.
//!
//! Upstream's order of a write: what the client left out is taken from the stored object (`prepare.rs`), address
//! families follow from policy and ranges (`families.rs`), addresses and node ports are taken (`addresses.rs`,
//! `ports.rs`), and what the new type has no use for is let go (`prepare.rs`).

use serde_json::Value;

use crate::schema::FieldError;

mod addresses;
mod families;
pub(crate) mod fields;
mod networks;
mod ports;
mod prepare;

#[cfg(test)]
mod tests;

pub use networks::{Allocated, Family, Networks, Taken, nth};

/// Why a Service gets nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    /// The object is at fault: 422.
    Fields(Vec<FieldError>),
    /// A range is full, or the ports contradict each other: upstream's 500.
    Internal(String),
}

impl From<FieldError> for Refusal {
    fn from(error: FieldError) -> Self {
        Self::Fields(vec![error])
    }
}

/// Completes a new (`old` is `None`) or changed Service. `taken` is what all others hold.
///
/// # Errors
/// What cannot be given, in upstream's words; the object is then half done and of no use.
pub fn complete(
    networks: &Networks,
    taken: &Taken<'_>,
    service: &mut Value,
    old: Option<&Value>,
) -> Result<(), Refusal> {
    prepare::tidy(service);
    if let Some(old) = old {
        prepare::patch_allocated(service, old);
    }
    prepare::normalize_cluster_ips(service, old);
    families::init(networks, service, old)?;
    addresses::assign(networks, taken, service, old)?;
    ports::assign(networks, taken, service, old)?;
    if let Some(old) = old {
        prepare::drop_type_dependent(service, old);
    }
    Ok(())
}
