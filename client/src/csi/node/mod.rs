//! The CSI Node service: volumes of this machine, as kubelet asks for them.
//!
//! - [`service`]: the calls. [`request`]: what they ask for. [`operations`]: one at a time for each volume.
//! - [`plan`]: what is done next, by what is seen. [`stage`], [`publish`], [`unstage`], [`expand`]: doing it. [`health`]: how volumes are.
//! - [`inner`]: what these share. [`daemon`], [`content`]: the node daemon and the server. [`device`]: the disk, and its mounts.
//! - [`programs`]: mkfs, fsck and their like. [`status`]: errors as gRPC has them.
//!
//! Nothing is remembered from one call to the next but jobs that run: what there is tells how far the call before came.

pub mod content;
pub mod daemon;
pub mod device;
pub mod expand;
pub mod health;
pub mod inner;
pub mod operations;
pub mod plan;
pub mod programs;
pub mod publish;
pub mod request;
pub mod service;
pub mod stage;
pub mod status;
pub mod unstage;
