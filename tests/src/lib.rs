//! End-to-end tests: see the folder `tests` beside this one; traffic that is measured is in `bench`.
