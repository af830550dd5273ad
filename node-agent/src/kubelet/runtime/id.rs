//! Names of container instances.

use super::ContainerId;

/// A container id that nobody had: 64 random hex digits.
///
/// # Errors
/// When the kernel has no random numbers to give.
pub fn random_id() -> Result<ContainerId, String> {
    let mut bytes = [0_u8; 32];
    let random = rustls::crypto::ring::default_provider().secure_random;
    random.fill(&mut bytes).map_err(|_no_entropy| "no random numbers to be had".to_owned())?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(ContainerId(hex.into()))
}
