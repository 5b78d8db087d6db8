//! Etags (AIP-154): by which a caller says that a change is meant for what it has seen.
//!
//! An etag is made of what it stands for, so that it outlives a restart, and a program that knows nothing of it cannot forget to change
//! it. Pure, but for the look at what there is; called by `management/` with the volume's name locked, and by `nodes.rs`.

use std::fmt::Write as _;

use serde_json::json;

use super::{DataSide, Lifecycle, LifecycleError, SettingsError};
use crate::catalog::{NodeRecord, VolumeRecord};

/// Of the digest, so many bytes are told: two settings of one volume do not meet by chance.
const ETAG_BYTES: usize = 16;

/// The etag of what users see and set of a volume itself; nothing of its bytes, its content and who has it.
pub fn volume_etag(volume: &VolumeRecord) -> String {
    let (settings, limits) = (&volume.settings, &volume.settings.limits);
    etag(&json!([
        "volume",
        volume.volume_uid.to_string(),
        volume.name,
        volume.capacity_bytes,
        settings.labels,
        settings.description,
        settings.is_protected,
        settings.is_read_only,
        limits.read_iops,
        limits.write_iops,
        limits.read_bytes_per_second,
        limits.write_bytes_per_second,
        limits.burst_seconds,
    ]))
}

/// The etag of what a node has said of itself when it registered.
pub fn node_etag(node: &NodeRecord) -> String {
    let facts = &node.facts;
    etag(&json!(["node", facts.node_id, facts.boot_id, facts.version, facts.labels, node.registered_at_ms]))
}

/// JSON keeps the parts from running into each other.
fn etag(parts: &serde_json::Value) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, parts.to_string().as_bytes());
    digest.as_ref().iter().take(ETAG_BYTES).fold(String::new(), |mut text, byte| {
        // A `String` takes all that is written to it.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl<D: DataSide> Lifecycle<D> {
    /// Refuses where the volume is not as the etag says; an empty one is any, and no volume is for the call to tell.
    ///
    /// # Errors
    /// [`SettingsError::Changed`]; the catalog's failure.
    pub fn require_etag(&self, name: &str, wanted: &str) -> Result<(), LifecycleError> {
        if wanted.is_empty() {
            return Ok(());
        }
        match self.volume(name) {
            Err(LifecycleError::VolumeNotFound(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(volume) => {
                let etag = volume_etag(&volume);
                let name = volume.name;
                if etag == wanted { Ok(()) } else { Err(SettingsError::Changed { name, etag }.into()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::catalog::{BackendKind, Content, NodeFacts, VolumeLimits, VolumeSettings};

    fn volume() -> VolumeRecord {
        VolumeRecord {
            name: "v".to_owned(),
            volume_uid: Uuid::from_u128(7),
            capacity_bytes: 4096,
            block_size_bytes: 4096,
            backend: BackendKind::File,
            write_cache_on: true,
            incarnation: 1,
            created_at_ms: 1,
            settings: VolumeSettings::default(),
        }
    }

    fn with(change: impl FnOnce(&mut VolumeRecord)) -> String {
        let mut changed = volume();
        change(&mut changed);
        volume_etag(&changed)
    }

    #[test]
    fn whatever_users_set_changes_the_etag_and_what_happens_by_itself_does_not() {
        let limits = |limits: VolumeLimits| with(|volume| volume.settings.limits = limits);
        let none = VolumeLimits::default();
        let mut etags = vec![
            volume_etag(&volume()),
            with(|volume| volume.name = "w".to_owned()),
            with(|volume| volume.volume_uid = Uuid::from_u128(8)),
            with(|volume| volume.capacity_bytes = 8192),
            with(|volume| volume.settings.description = "d".to_owned()),
            with(|volume| drop(volume.settings.labels.insert("d".to_owned(), String::new()))),
            with(|volume| volume.settings.is_protected = true),
            with(|volume| volume.settings.is_read_only = true),
            limits(VolumeLimits { read_iops: 1, ..none }),
            limits(VolumeLimits { write_iops: 1, ..none }),
            limits(VolumeLimits { read_bytes_per_second: 1, ..none }),
            limits(VolumeLimits { write_bytes_per_second: 1, ..none }),
            limits(VolumeLimits { burst_seconds: 1, ..none }),
        ];
        let count = etags.len();
        etags.sort();
        etags.dedup();
        assert_eq!(etags.len(), count, "each is another one");
        let same = with(|volume| (volume.incarnation, volume.settings.content) = (2, Content::NeverWritten));
        assert_eq!(same, volume_etag(&volume()));
    }

    #[test]
    fn a_node_that_registers_anew_has_another_etag() {
        let facts = NodeFacts { node_id: "n".to_owned(), ..NodeFacts::default() };
        let node = NodeRecord { facts, registered_at_ms: 1 };
        let rebooted =
            NodeRecord { facts: NodeFacts { boot_id: "b".to_owned(), ..node.facts.clone() }, ..node.clone() };
        let again = NodeRecord { registered_at_ms: 2, ..node.clone() };
        assert!(node_etag(&node) != node_etag(&rebooted) && node_etag(&node) != node_etag(&again));
        assert_eq!(node_etag(&node).len(), 2 * ETAG_BYTES);
    }
}
