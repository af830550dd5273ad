//! The patch formats: pure functions from an object and a patch to the patched object.

pub mod apply;
pub mod fieldset;
pub mod json;
pub mod merge;
pub mod strategic;

/// Why a patch cannot be carried out. The API server answers 400 `BadRequest` or 422 `Invalid`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// The patch itself is malformed: 400.
    #[error("{0}")]
    Malformed(String),
    /// The patch does not fit the object: 422.
    #[error("{0}")]
    Unfit(String),
}
