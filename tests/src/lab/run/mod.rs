//! What the lab runs that passes or fails: `test_run` (the phases of `cargo lab test`), in them `host_tests` and `vm_tests`; and
//! by commands of their own `fresh`, `fuzz` and `soak`.

pub(crate) mod fresh;
pub(crate) mod fuzz;
pub(crate) mod host_tests;
pub(crate) mod soak;
pub(crate) mod test_run;
pub(crate) mod vm_tests;
