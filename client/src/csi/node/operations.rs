//! One operation at a time on each volume.
//!
//! Owns: who has a volume, and since when. Never: waits; kubelet repeats its call. Called by: `service`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tonic::Status;

/// What runs, by volume.
#[derive(Debug, Default)]
pub struct Operations {
    by_volume: Arc<Mutex<HashMap<String, (&'static str, Instant)>>>,
}

/// The volume is free again when this is dropped.
#[derive(Debug)]
pub struct Operation {
    by_volume: Arc<Mutex<HashMap<String, (&'static str, Instant)>>>,
    volume_id: String,
}

impl Operations {
    /// Takes the volume for a call.
    ///
    /// # Errors
    /// ABORTED: another call has it; which, and since when.
    pub fn begin(&self, volume_id: &str, call: &'static str) -> Result<Operation, Status> {
        let mut running = lock(&self.by_volume);
        if let Some((other, since)) = running.get(volume_id) {
            return Err(Status::aborted(format!(
                "{other} has been running for {} s for this volume; repeat the call when it has ended",
                since.elapsed().as_secs()
            )));
        }
        running.insert(volume_id.to_owned(), (call, Instant::now()));
        Ok(Operation { by_volume: Arc::clone(&self.by_volume), volume_id: volume_id.to_owned() })
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        lock(&self.by_volume).remove(&self.volume_id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn a_volume_has_one_operation_and_others_are_free() {
        let operations = Operations::default();
        let first = operations.begin("v", "NodeStageVolume").unwrap();
        let refused = operations.begin("v", "NodeUnstageVolume").unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
        assert!(refused.message().starts_with("NodeStageVolume has been running for 0 s"), "{refused}");
        let _other = operations.begin("w", "NodeStageVolume").unwrap();
        drop(first);
        operations.begin("v", "NodeUnstageVolume").unwrap();
    }
}
