//! What is done next for a volume on this node, by what is seen: no step is remembered, so a call that was cut off goes on where it was.
//!
//! Owns: the decisions of stage, publish, unstage and unpublish. Never: does I/O; `stage`, `publish` and `unstage` look, carry one step out,
//! and ask again. Whatever state a killed plugin left is the beginning of some row here.
//!
//! ```text
//! stage:   attach ─▶ [ block: done ]
//!            └▶ nothing mounted ─▶ content ─▶ device ─▶ new ─▶ set initialising ─▶ make ─┐
//!            │                          ▲         └▶ ours ──────────────────────────┐    │ look again
//!            │                          └───────────────────────────────────────────│────┘
//!            │                                     set written, if not yet ◀────────┘
//!            │                                          └▶ check (ext4) ─▶ mount ─┐
//!            └▶ mounted ─▶ grow ─▶ done  ◀────────────────────────────────────────┘
//! ```

use crate::contract::content::Content;
use crate::csi::blank::{self, Decision, Ends, Found};
use crate::csi::mount_options::FsType;

/// A volume's disk, as the node daemon tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// There is none.
    Absent,
    /// It serves, or will in a moment.
    Serving,
    /// Its server cannot be reached.
    Stalled,
    /// It serves, and is encrypted: what is used of it is not open, because the attach that was to open it was cut short.
    Locked,
    /// It goes away.
    Leaving,
    /// Its device process is gone; another one may take the device on.
    Dead,
    /// It answers EIO for good: fenced, or the server lost writes.
    Failed,
}

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Nothing is mounted there.
    Free,
    /// This volume, as it should be there.
    Volume {
        /// The mount is.
        read_only: bool,
    },
    /// Something else: what, for people.
    Other(String),
}

/// Why a step is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// By the content and what is found on the device.
    #[error(transparent)]
    Content(#[from] blank::Refusal),
    /// The disk does not answer.
    #[error("the volume's storage server cannot be reached; I/O waits: repeat the call when it is back")]
    Stalled,
    /// It will not answer any more.
    #[error(
        "the volume's disk answers with errors for good; end the workloads that use it, so that it is unstaged"
    )]
    Failed,
    /// By force it would be taken from under somebody.
    #[error(
        "the volume's disk cannot be used any more, and is mounted or shown elsewhere on this node; end the workloads that use it, so that it is unpublished there"
    )]
    UsedElsewhere,
    /// What writes to the device does not see what the file system writes, and the other way round.
    #[error(
        "the volume is in use on this node {}; one way at a time: unpublish and unstage it there first", if *.0 { "as a block device" } else { "with its file system mounted" }
    )]
    UsedOtherwise(bool),
    /// Something else is mounted.
    #[error("{0} is mounted at the path; unmount it")]
    Occupied(String),
    /// A file system is to be made, and nothing may be written.
    #[error(
        "there is no file system on the volume, and it is to be read only; stage it for writing once, or use another volume"
    )]
    NothingToRead,
    /// NodeStageVolume was not called, or undone.
    #[error("the volume is not staged at the path; stage it first")]
    NotStaged,
    /// It is shown there in the other way.
    #[error("the volume is published at the path already, {}", if *.0 { "read-only" } else { "writable" })]
    PublishedDifferently(bool),
    /// One workload may have it, and another one has.
    #[error(
        "the volume is published at another path, and its access mode allows one; unpublish that one first"
    )]
    SecondTarget,
    /// A mount does not keep a device from being written to.
    #[error("a block volume is read-only by its access mode alone; use ReadOnlyMany")]
    BlockReadOnly,
}

/// What a volume is used as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// As a device.
    Block,
    /// With this file system.
    FileSystem(FsType),
}

/// How a disk is mounted and shown, wherever that is on this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shown {
    /// Its file system is mounted.
    pub as_file_system: bool,
    /// Its device is bound to a path.
    pub as_device: bool,
}

impl Shown {
    fn is_anywhere(self) -> bool {
        self.as_file_system || self.as_device
    }

    /// Why it cannot be used in this way as well.
    fn refuses(self, is_block: bool) -> Option<Refusal> {
        let is_other = if is_block { self.as_file_system } else { self.as_device };
        is_other.then_some(Refusal::UsedOtherwise(!is_block))
    }
}

/// What is seen for a stage. `None` and `false`: not looked at, or not done, in this call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageView {
    /// As asked.
    pub used_as: Use,
    /// Nothing is to be written.
    pub is_read_only: bool,
    /// Now.
    pub disk: Disk,
    /// The server has allowed the attachment in this call.
    pub is_granted: bool,
    /// The staging path, once there is a disk to compare with.
    pub place: Place,
    /// What is mounted there can be written to by nobody: its superblock is read-only.
    pub is_file_system_read_only: bool,
    /// What is mounted or shown of the disk, on this node.
    pub shown: Shown,
    /// I/O fails in an outage because an unstage or unpublish has asked for it.
    pub fails_by_us: bool,
    /// As the server tells.
    pub content: Option<Content>,
    /// What blkid finds, and what both ends hold.
    pub found: Option<(Found, Ends)>,
    /// The server was asked to let this attachment make the file system that another one began.
    pub has_taken_over: bool,
    /// fsck has found it sound.
    pub is_checked: bool,
    /// The file system is as large as the device.
    pub is_grown: bool,
}

/// The next step of a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StageStep {
    /// Attach, under a grant alone.
    Attach,
    /// Take a disk away that is of no use any more, and that nothing is mounted of.
    Replace,
    /// Have I/O wait in an outage again, as the attach asks for.
    WaitOnStall,
    /// Ask the server what the content is.
    AskContent,
    /// Look what is on the device.
    LookAtDevice,
    /// Say that this attachment makes a file system.
    SetInitialising,
    /// Erase what a killed mkfs left.
    Erase,
    /// Make the file system.
    Make,
    /// Say that there is data from now on.
    SetWritten,
    /// Run fsck.
    Check,
    /// Mount.
    Mount,
    /// Grow the file system.
    Grow,
    /// All is as it should be.
    Done,
    /// It cannot be.
    Refuse(Refusal),
}

/// What a stage does next.
pub fn stage(view: &StageView) -> StageStep {
    match view.disk {
        // Also before a disk is taken away: whoever has no grant changes nothing.
        _ if !view.is_granted => return StageStep::Attach,
        Disk::Failed if view.place != Place::Free => return StageStep::Refuse(Refusal::Failed),
        Disk::Failed if view.shown.is_anywhere() => return StageStep::Refuse(Refusal::UsedElsewhere),
        Disk::Failed => return StageStep::Replace,
        Disk::Absent | Disk::Locked | Disk::Leaving | Disk::Dead => return StageStep::Attach,
        Disk::Stalled if !matches!(view.place, Place::Volume { .. }) => {
            return StageStep::Refuse(Refusal::Stalled);
        }
        Disk::Serving | Disk::Stalled => {}
    }
    if let Some(why) = view.shown.refuses(view.used_as == Use::Block) {
        return StageStep::Refuse(why);
    }
    if view.fails_by_us {
        return StageStep::WaitOnStall;
    }
    let Use::FileSystem(fs_type) = view.used_as else { return StageStep::Done };
    match &view.place {
        Place::Other(what) => StageStep::Refuse(Refusal::Occupied(what.clone())),
        Place::Volume { .. } if view.is_grown || view.is_read_only || view.disk == Disk::Stalled => {
            StageStep::Done
        }
        // Nothing can be grown through it.
        Place::Volume { read_only: true } => StageStep::Done,
        Place::Volume { .. } if view.is_file_system_read_only => StageStep::Done,
        Place::Volume { .. } => StageStep::Grow,
        Place::Free => until_mounted(view, fs_type),
    }
}

fn until_mounted(view: &StageView, fs_type: FsType) -> StageStep {
    let Some(content) = view.content else { return StageStep::AskContent };
    if content == Content::InitialisingElsewhere && !view.has_taken_over && !view.is_read_only {
        return StageStep::SetInitialising;
    }
    let Some((found, ends)) = &view.found else { return StageStep::LookAtDevice };
    match blank::decide(content, found, *ends, fs_type) {
        Decision::Refuse(why) => StageStep::Refuse(why.into()),
        Decision::Make | Decision::MakeAgain if view.is_read_only => {
            StageStep::Refuse(Refusal::NothingToRead)
        }
        Decision::Make if content == Content::NeverWritten => StageStep::SetInitialising,
        Decision::Make => StageStep::Make,
        Decision::MakeAgain => StageStep::Erase,
        Decision::Take if content == Content::InitialisingHere => StageStep::SetWritten,
        // XFS replays its log when it is mounted, and its repair must not run before.
        Decision::Take if fs_type == FsType::Ext4 && !view.is_checked && !view.is_read_only => {
            StageStep::Check
        }
        Decision::Take => StageStep::Mount,
    }
}

/// What is seen for a publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishView {
    /// As a device.
    pub is_block: bool,
    /// Now.
    pub disk: Disk,
    /// The disk itself cannot be written to.
    pub is_disk_read_only: bool,
    /// The staging path; of no meaning for a block volume.
    pub staged: Place,
    /// The target path.
    pub target: Place,
    /// As asked.
    pub is_read_only: bool,
    /// One target at a time.
    pub is_single: bool,
    /// Shown elsewhere, staging apart.
    pub has_other_targets: bool,
    /// What is mounted or shown of the disk, on this node.
    pub shown: Shown,
    /// I/O fails in an outage because an unstage or unpublish has asked for it.
    pub fails_by_us: bool,
}

/// The next step of a publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublishStep {
    /// Have I/O wait in an outage again, as the attach asks for.
    WaitOnStall,
    /// Show it.
    Bind,
    /// It is shown.
    Done,
    /// It cannot be.
    Refuse(Refusal),
}

/// What a publish does next.
pub fn publish(view: &PublishView) -> PublishStep {
    let refuse = PublishStep::Refuse;
    match (&view.disk, &view.target) {
        (Disk::Absent | Disk::Locked | Disk::Leaving, _) => return refuse(Refusal::NotStaged),
        (_, Place::Other(what)) => return refuse(Refusal::Occupied(what.clone())),
        (Disk::Serving | Disk::Stalled, Place::Volume { read_only })
            if *read_only == view.is_read_only && view.fails_by_us =>
        {
            return PublishStep::WaitOnStall;
        }
        (_, Place::Volume { read_only }) if *read_only == view.is_read_only => return PublishStep::Done,
        (_, Place::Volume { read_only }) => return refuse(Refusal::PublishedDifferently(*read_only)),
        (Disk::Dead | Disk::Failed, Place::Free) => return refuse(Refusal::Failed),
        (Disk::Serving | Disk::Stalled, Place::Free) => {}
    }
    match &view.staged {
        _ if view.is_block => {}
        Place::Free => return refuse(Refusal::NotStaged),
        Place::Other(what) => return refuse(Refusal::Occupied(what.clone())),
        Place::Volume { .. } => {}
    }
    if view.is_single && view.has_other_targets {
        return refuse(Refusal::SecondTarget);
    }
    if view.is_block && view.is_read_only && !view.is_disk_read_only {
        return refuse(Refusal::BlockReadOnly);
    }
    if let Some(why) = view.shown.refuses(view.is_block) {
        return refuse(why);
    }
    if view.fails_by_us {
        return PublishStep::WaitOnStall;
    }
    PublishStep::Bind
}

/// What is seen for an unstage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnstageView {
    /// Now.
    pub disk: Disk,
    /// The staging path. A mount of a disk that is gone is the volume's.
    pub place: Place,
    /// I/O fails while the server cannot be reached, rather than waits.
    pub fails_on_stall: bool,
    /// A dead disk was refused for good: nobody will ever take it on.
    pub is_given_up: bool,
    /// The kernel has the disk's device.
    pub has_device: bool,
    /// Mounted or shown at another path as well.
    pub is_elsewhere: bool,
}

/// The next step of an unstage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnstageStep {
    /// Have I/O fail, so that the unmount comes to an end.
    FailOnStall,
    /// Have another device process take the device on, so that what is not written yet is.
    Recover,
    /// Unmount all that is there.
    Unmount,
    /// Detach, by force or not.
    Detach {
        /// Whoever has it open.
        by_force: bool,
    },
    /// All is gone.
    Done,
    /// It cannot be.
    Refuse(Refusal),
}

/// What an unstage does next.
pub fn unstage(view: &UnstageView) -> UnstageStep {
    match (&view.place, view.disk) {
        (Place::Other(what), _) => UnstageStep::Refuse(Refusal::Occupied(what.clone())),
        (Place::Volume { .. }, Disk::Stalled) if !view.fails_on_stall => UnstageStep::FailOnStall,
        // Its I/O waits for the next process; without the device it fails.
        (_, Disk::Dead) if !view.is_given_up => UnstageStep::Recover,
        (Place::Volume { .. }, Disk::Dead) if !view.has_device => UnstageStep::Unmount,
        (_, Disk::Dead) | (Place::Free, Disk::Failed) if view.is_elsewhere => {
            UnstageStep::Refuse(Refusal::UsedElsewhere)
        }
        (_, Disk::Dead) | (Place::Free, Disk::Failed) => UnstageStep::Detach { by_force: true },
        (Place::Volume { .. }, _) => UnstageStep::Unmount,
        (Place::Free, Disk::Absent) => UnstageStep::Done,
        (Place::Free, Disk::Serving | Disk::Stalled | Disk::Locked | Disk::Leaving) => {
            UnstageStep::Detach { by_force: false }
        }
    }
}

/// Whether I/O is to fail before anything is waited for: a mount or an fsck of a former call may wait for a server that is lost, for ever.
/// Not where the volume is in use at another path: then nothing is taken away yet.
pub fn frees_jobs(disk: Disk, fails_on_stall: bool, is_running: bool, is_elsewhere: bool) -> bool {
    disk == Disk::Stalled && !fails_on_stall && is_running && !is_elsewhere
}

#[cfg(test)]
mod tests;
