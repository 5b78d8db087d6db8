//! Why something cannot be done with a thin pool.
//!
//! Called by: `mod.rs` and `metadata.rs`. Callers of the API are told its words (`data_side/thin.rs`, `gate/opener.rs`).

use std::path::PathBuf;

use super::command::PoolName;
use super::report::Unreadable;
use super::tool::ToolError;

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

/// Why something cannot be done with the pool.
#[derive(Debug, thiserror::Error)]
pub enum LvmError {
    /// A tool did not do it.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The same, of a look a moment ago, which is not repeated yet.
    #[error("{0}")]
    Remembered(String),
    /// A tool's answer cannot be read.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    /// It is something else.
    #[error("{0} is no thin pool; make one with lvcreate --type thin-pool, or give another --lvm")]
    NoPool(PoolName),
    /// It lets writes wait when it is full, or shows what was another volume's, and cannot be told otherwise.
    #[error("{pool} cannot be set to {what}; see lvchange(8)")]
    Setting {
        /// Which.
        pool: PoolName,
        /// To what.
        what: &'static str,
    },
    /// The server has no pool.
    #[error("this server has no thin pool; start volserver with --lvm VG/THINPOOL")]
    NotConfigured,
    /// A volume of another pool.
    #[error(
        "its volume is in the thin pool {recorded}, and this server has {pool}; start volserver with --lvm {recorded}"
    )]
    OtherPool {
        /// Where it is.
        recorded: String,
        /// What the server has.
        pool: PoolName,
    },
    /// Copies of several volumes took longer than writes may wait.
    #[error(
        "LVM has not made the copies of all volumes within {0} s, and writes wait for them: try again, or take fewer at once"
    )]
    TooSlow(u64),
    /// It is in a state in which nothing can be made in it.
    #[error("the thin pool {pool} {trouble}")]
    Trouble {
        /// Which.
        pool: PoolName,
        /// What is wrong.
        trouble: PoolTrouble,
    },
    /// Somebody else of this server reads the pool's metadata, once at a time.
    #[error("the thin pool's metadata are being read for another call; try again when that is done")]
    Reading,
    /// There is no room for its map.
    #[error(
        "its map has more runs of chunks than there is room for: all maps that are compared at a time have at most {0}"
    )]
    TooManyRuns(usize),
    /// The file that says whether the pool keeps its metadata.
    #[error("cannot use {path}: {source}")]
    Mark {
        /// Which.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// No such logical volume.
    #[error("there is no logical volume {name} in {pool}")]
    Missing {
        /// Its name.
        name: String,
        /// Where it should be.
        pool: PoolName,
    },
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
