//! Whether a volume's storage is what it was when it was last open: the decision, and what has to be remembered for it.
//!
//! Plain values and one function: no I/O, no clock; `storage.rs` looks at the storage, `mod.rs` keeps the records, and the
//! simulator drives the same rules. What is noticed raises the volume's incarnation, and clients that have unflushed writes are
//! told by it.

use serde::{Deserialize, Serialize};

/// How [`Record::superblock`] begins where there is no file system below, but an adopted device.
pub(super) const DISK: &str = "disk/";

/// How far the sessions of a volume have come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionMark {
    /// Whose; empty where the volume is not attached.
    pub attachment_id: String,
    /// Its session epoch.
    pub epoch: u64,
}

/// What is remembered of a volume while this boot lasts, outside of its own file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The highest that anybody may have been told.
    pub incarnation: u64,
    /// The volume's attach generation when it was last opened.
    pub attach_generation: u64,
    /// The mounted file system, where that can be told apart from what is mounted after it; or an adopted device's disk, as it appeared
    /// this time.
    pub superblock: Option<String>,
    /// The file: its place, and when it was made; or the device's identity.
    pub file: String,
    /// When it was last written to, or how much was written to the device; known only of a volume whose server has ended in order.
    pub modified: Option<String>,
    /// The attachment and its session epoch when the server ended in order: where they have moved on, another server of ours has
    /// served the volume since, such as an older version, which keeps no records.
    #[serde(default)]
    pub session: Option<SessionMark>,
    /// A sync failed since it was opened. What the page cache has of the file may not be on the disk, and what was acknowledged
    /// after the failure, to clients that had been told of it, may be gone as well.
    pub lost_writes: bool,
}

impl Record {
    /// Of a volume of which it is not known any more what was remembered: the worst.
    pub fn unknown() -> Self {
        Self {
            incarnation: 0,
            attach_generation: 0,
            superblock: None,
            file: "unknown".to_owned(),
            modified: None,
            session: None,
            lost_writes: true,
        }
    }

    /// Of a volume as it is seen, and what that means.
    pub fn of(seen: Seen, verdict: &Verdict, lost_writes: bool) -> Self {
        let Seen { attach_generation, superblock, file, .. } = seen;
        Self {
            incarnation: verdict.incarnation,
            attach_generation,
            superblock,
            file,
            modified: None,
            session: None,
            lost_writes,
        }
    }
}

/// What is seen of a volume as it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// As the catalog has it.
    pub incarnation: u64,
    /// As the catalog has it.
    pub attach_generation: u64,
    /// See [`Record::superblock`].
    pub superblock: Option<String>,
    /// See [`Record::file`].
    pub file: String,
    /// When it was last written to.
    pub modified: String,
    /// See [`Record::session`].
    pub session: SessionMark,
    /// The file system could not write something back, and nobody has been told.
    pub write_back_failed: bool,
}

/// Why acknowledged, unflushed writes may be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// The catalog is older than what is remembered.
    #[error("the catalog was rolled back to an older one")]
    CatalogRolledBack,
    /// The file system was mounted anew.
    #[error("the file system was mounted anew")]
    Remounted,
    /// The device was taken away, and has come back.
    #[error("the device was taken away and has come back")]
    DeviceCameBack,
    /// The file is another one, such as a copy on another disk.
    #[error("the file was replaced by another")]
    FileReplaced,
    /// Somebody else wrote to the file.
    #[error("the file was written to while no server had it open")]
    Modified,
    /// The kernel could not write pages back.
    #[error("the file system failed to write something back")]
    WriteBackFailed,
    /// A sync of the volume had failed.
    #[error("a sync had failed")]
    SyncFailed,
}

impl Loss {
    /// Not only what was unflushed may be gone: the volume is another than its holder knows, who must not go on with it.
    pub fn is_roll_back(self) -> bool {
        matches!(self, Self::CatalogRolledBack | Self::Modified)
    }
}

/// What follows for a volume that is being opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// To be told from now on.
    pub incarnation: u64,
    /// Why it is higher than it was.
    pub loss: Option<Loss>,
    /// What the page cache has of the file may not be on the disk, and is to be dropped before anybody reads it.
    pub drops_cache: bool,
}

/// Compares what is remembered (`None`: nothing, of this boot) with what is seen.
pub fn judge(record: Option<&Record>, seen: &Seen) -> Verdict {
    let loss = record.and_then(|record| difference(record, seen));
    let loss = loss.or(seen.write_back_failed.then_some(Loss::WriteBackFailed));
    let known = record.map_or(0, |record| record.incarnation).max(seen.incarnation);
    Verdict {
        incarnation: known + u64::from(loss.is_some()),
        loss,
        drops_cache: loss == Some(Loss::WriteBackFailed) || record.is_some_and(|record| record.lost_writes),
    }
}

fn difference(record: &Record, seen: &Seen) -> Option<Loss> {
    let superblocks = record.superblock.as_ref().zip(seen.superblock.as_ref());
    let (was, is) = (record.session.as_ref(), &seen.session);
    let is_older = was.is_some_and(|was| was.attachment_id == is.attachment_id && was.epoch > is.epoch);
    let is_comparable = was.is_none_or(|was| was == is);
    if record.attach_generation > seen.attach_generation || is_older {
        Some(Loss::CatalogRolledBack)
    } else if superblocks.is_some_and(|(before, now)| before != now) {
        // A time of writing that did not reach the disk says nothing.
        let is_device = seen.superblock.as_ref().is_some_and(|now| now.starts_with(DISK));
        Some(if is_device { Loss::DeviceCameBack } else { Loss::Remounted })
    } else if is_comparable && record.modified.as_ref().is_some_and(|modified| *modified != seen.modified) {
        Some(Loss::Modified)
    } else if record.file != seen.file {
        Some(Loss::FileReplaced)
    } else if record.lost_writes {
        Some(Loss::SyncFailed)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(attachment_id: &str, epoch: u64) -> SessionMark {
        SessionMark { attachment_id: attachment_id.to_owned(), epoch }
    }

    fn seen() -> Seen {
        Seen {
            incarnation: 3,
            attach_generation: 2,
            superblock: Some("xfs/sda1:7".to_owned()),
            file: "1:2:3".to_owned(),
            modified: "100.5".to_owned(),
            session: session("a", 4),
            write_back_failed: false,
        }
    }

    fn record() -> Record {
        let Seen { incarnation, attach_generation, superblock, file, .. } = seen();
        Record {
            incarnation,
            attach_generation,
            superblock,
            file,
            modified: None,
            session: None,
            lost_writes: false,
        }
    }

    fn verdict(incarnation: u64, loss: Option<Loss>, drops_cache: bool) -> Verdict {
        Verdict { incarnation, loss, drops_cache }
    }

    #[test]
    fn what_is_as_it_was_keeps_its_incarnation() {
        let same = verdict(3, None, false);
        assert_eq!(judge(Some(&record()), &seen()), same, "killed");
        let closed = Record { modified: Some("100.5".to_owned()), ..record() };
        assert_eq!(judge(Some(&closed), &seen()), same, "stopped in order");
        assert_eq!(judge(None, &seen()), same, "after a reboot, or another version");
        let unknown = Record { superblock: None, ..record() };
        assert_eq!(judge(Some(&unknown), &seen()), same, "where mounts cannot be told apart");
        let newer = Seen { attach_generation: 5, incarnation: 4, ..seen() };
        assert_eq!(judge(Some(&record()), &newer), verdict(4, None, false));
    }

    #[test]
    fn whatever_is_noticed_raises_it_once() {
        let noticed = |record: Record, seen: Seen| judge(Some(&record), &seen);
        let other = |text: &str| text.to_owned();
        let cases = [
            (noticed(Record { attach_generation: 3, ..record() }, seen()), Loss::CatalogRolledBack),
            (noticed(record(), Seen { superblock: Some(other("xfs/sda1:8")), ..seen() }), Loss::Remounted),
            (
                noticed(
                    Record { superblock: Some(other("disk/7")), ..record() },
                    Seen { superblock: Some(other("disk/8")), ..seen() },
                ),
                Loss::DeviceCameBack,
            ),
            (noticed(record(), Seen { file: other("1:2:4"), ..seen() }), Loss::FileReplaced),
            (noticed(Record { modified: Some(other("99.0")), ..record() }, seen()), Loss::Modified),
            (noticed(record(), Seen { write_back_failed: true, ..seen() }), Loss::WriteBackFailed),
            (judge(None, &Seen { write_back_failed: true, ..seen() }), Loss::WriteBackFailed),
        ];
        for (given, loss) in cases {
            assert_eq!(given, verdict(4, Some(loss), loss == Loss::WriteBackFailed));
        }
        let moved = Seen { file: other("9:2:4"), superblock: Some(other("ext4/sdb:9")), ..seen() };
        let closed = Record { modified: Some(other("100.5")), ..record() };
        let loss = judge(Some(&closed), &moved).loss.unwrap();
        assert!(!loss.is_roll_back(), "what was moved after an orderly stop is what it was");
        let older = Seen { modified: other("90.0"), ..seen() };
        assert!(judge(Some(&closed), &older).loss.unwrap().is_roll_back());
    }

    #[test]
    fn what_another_server_of_ours_wrote_in_between_is_no_roll_back() {
        let closed = Record { modified: Some("90.0".to_owned()), session: Some(session("a", 4)), ..record() };
        assert!(judge(Some(&closed), &seen()).loss.unwrap().is_roll_back());
        for session in [session("a", 5), session("b", 1)] {
            assert_eq!(judge(Some(&closed), &Seen { session, ..seen() }).loss, None);
        }
        let catalog_is_older = Seen { session: session("a", 3), ..seen() };
        assert_eq!(judge(Some(&closed), &catalog_is_older).loss, Some(Loss::CatalogRolledBack));
    }

    #[test]
    fn what_was_raised_and_not_yet_in_the_catalog_is_not_forgotten() {
        let raised = Record { incarnation: 5, lost_writes: true, ..record() };
        assert_eq!(judge(Some(&raised), &seen()), verdict(6, Some(Loss::SyncFailed), true));
        let elsewhere = Seen { superblock: Some("xfs/sda1:8".to_owned()), ..seen() };
        assert_eq!(judge(Some(&raised), &elsewhere), verdict(6, Some(Loss::Remounted), true));
    }
}
