//! What a thin pool can have that keeps everything new from it, by what LVM tells, and what to do about it.
//!
//! Used by: `report.rs`, `error.rs` and `mod.rs`.

/// What is wrong with a pool in which nothing new can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PoolTrouble {
    /// Its metadata are to be checked first.
    #[error("needs a check of its metadata")]
    NeedsCheck,
    /// The kernel does not change its metadata any more.
    #[error(
        "has read-only metadata: the kernel could not write them, and changes nothing until they were checked"
    )]
    ReadOnly,
    /// Its metadata are full.
    #[error("is out of metadata space")]
    MetadataFull,
    /// The kernel gives nothing of it any more.
    #[error("has failed: the kernel can neither read nor write its metadata")]
    Failed,
}

impl PoolTrouble {
    /// What to do about it.
    pub fn next(self) -> &'static str {
        match self {
            Self::NeedsCheck | Self::ReadOnly => {
                "look at the disks below the pool; then stop volserver, have the metadata checked, and start it again: \
                 docs/operating.md, \"When the disk below fails\""
            }
            Self::MetadataFull => {
                "extend the pool's metadata (lvextend --poolmetadatasize +SIZE VG/POOL), and where it stays read-only have them checked with \
                 volserver stopped: docs/operating.md, \"When the disk below fails\""
            }
            Self::Failed => {
                "look at the disks below the pool; then stop volserver and repair it (lvconvert --repair VG/POOL): docs/operating.md, \
                 \"When the disk below fails\""
            }
        }
    }

    /// By what a tool of LVM says when it refuses.
    pub(super) fn said(words: &str) -> Option<Self> {
        let words = words.to_lowercase();
        let says = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
        if says(&["out of metadata space", "metadata space is exhausted"]) {
            Some(Self::MetadataFull)
        } else if says(&["needs check", "needs_check", "needs a check", "check needed"]) {
            Some(Self::NeedsCheck)
        } else if says(&["read-only metadata", "metadata_read_only", "metadata is read-only"]) {
            Some(Self::ReadOnly)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lvm_says_of_a_pool_that_refuses_is_understood() {
        for (said, trouble) in [
            ("Cannot create new thin volume, thin pool vg/pool needs check.", Some(PoolTrouble::NeedsCheck)),
            ("Thin pool vg-pool-tpool has read-only metadata.", Some(PoolTrouble::ReadOnly)),
            ("device-mapper: thin: Out of metadata space", Some(PoolTrouble::MetadataFull)),
            ("Failed to find logical volume \"vg/x\"", None),
            ("open failed: Read-only file system", None),
        ] {
            assert_eq!(PoolTrouble::said(said), trouble, "{said}");
        }
    }
}
