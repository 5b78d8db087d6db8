//! Why something cannot be done with a thin pool.
//!
//! Called by: `mod.rs` and `metadata.rs`. Callers of the API are told its words (`data_side/thin.rs`, `gate/opener.rs`).

use std::path::PathBuf;

use super::command::PoolName;
use super::report::Unreadable;
use super::tool::ToolError;
use super::trouble::PoolTrouble;

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
