//! What the lab measures: `cost`, `bench_api`, `bench_server`, `scale` and `zero_copy`, a command each. `measurement` and `network` are
//! what they share.

pub(crate) mod bench_api;
pub(crate) mod bench_server;
pub(crate) mod cost;
pub(crate) mod measurement;
mod network;
pub(crate) mod scale;
pub(crate) mod zero_copy;
