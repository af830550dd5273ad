//! Naming the step that failed.

use std::fmt::Display;

use shim::wire::Failure;

/// Turns an error into a `Failure` of the step named.
pub(crate) trait At<T> {
    fn at(self, step: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Display> At<T> for Result<T, E> {
    fn at(self, step: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure { step: step(), message: error.to_string() })
    }
}
