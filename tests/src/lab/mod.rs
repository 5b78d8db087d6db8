//! The lab: a throw-away virtual machine, put together from this machine's own root file system and Debian's
//! kernels, in which everything that needs `/dev/ublkbN` runs.
//!
//! Read in this order: `workspace` (where things are) → `machine/` (one machine, from its packages to its exit code) → `run/`
//! (what is tested, there and on this machine) → `report` (what came of it), and `measure/` beside that. Each uses only those
//! before it; `run/` has a phase that measures. `programs` builds what runs, `tool` and `interrupt` bound every wait, `progress` speaks meanwhile.

pub(crate) mod interrupt;
pub(crate) mod machine;
pub(crate) mod measure;
pub(crate) mod owned_directory;
pub(crate) mod programs;
pub(crate) mod progress;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod tool;
pub(crate) mod workspace;
