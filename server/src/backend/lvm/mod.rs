//! Volumes that are thin logical volumes of an LVM pool: made, grown, snapshotted and removed through LVM's own tools.
//!
//! ```text
//!   volnode-v-<volume_uid>     a volume              volnode-r-<volume_uid>   what is to take its place
//!   volnode-s-<snapshot_uid>   a snapshot            volnode-o-<volume_uid>   what was the volume until then
//! ```
//! Owns what is done with the pool ([`Lvm`]); `metadata.rs` reads where volumes have their bytes in it. Never: does a volume's I/O, or opens its device: that is `device/`'s, which finds it by
//! the UUID that LVM gives to it and serves it past the page cache, alone. So whatever was acknowledged is in the device, and a
//! thin snapshot, for which device mapper stops and flushes it, has all of it.
//! Called by: `data_side.rs`, `gate/opener.rs` and `serve.rs`, on threads that may wait. Invariants: what returns is durable (LVM's
//! metadata and the pool's are); logical volumes without this server's tag are never touched; a pool that serves gives an error when
//! it is full, and does not let writes wait.
//! Source: lvmthin(7), Documentation/admin-guide/device-mapper/thin-provisioning.rst.

mod command;
mod error;
mod map;
mod metadata;
mod report;
#[cfg(test)]
pub(crate) mod stand_in;
mod tool;
mod trouble;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};
use uuid::Uuid;

pub use command::{Call, PoolName, Thin};
pub use error::LvmError;
pub use map::ThinMap;
pub use report::{PoolFill, ThinState, Unreadable};
pub use tool::{RunTools, TakeLine, ToolError};
pub use trouble::PoolTrouble;

use self::metadata::Metadata;
use self::report::PoolState;
use self::tool::{Tools, lock};
use super::device::{self, Adoptable, Sysfs};
use crate::catalog::{Adopted, AdoptedKind};

/// What is told of sizes may be so old: lists ask for one volume after the other.
const LIST_AGE: Duration = Duration::from_secs(5);
/// Percent of data or metadata at which a warning is logged, each once while it is above.
const WARN_PERCENT: [f64; 3] = [80.0, 90.0, 95.0];
/// New snapshots and clones are refused from so many percent on, unless a reserve says otherwise.
const NEW_COPIES_PERCENT: f64 = 90.0;

/// So long writes are held for copies of several volumes: each takes a call of LVM, of some tenths of a second. What LVM is at work at when
/// they are wanted is waited for before that.
const HOLD_LIMIT: Duration = Duration::from_secs(10);

/// The thin pool of one server.
#[derive(Debug)]
pub struct Lvm {
    pool: PoolName,
    /// What this server's logical volumes are marked with.
    tag: String,
    /// How their devices are opened.
    adoptable: Adoptable,
    /// What was told last of sizes, and when.
    listed: Mutex<Option<(Instant, Vec<ThinState>)>>,
    /// The highest step of [`WARN_PERCENT`] that was told.
    warned: Mutex<usize>,
    /// Held while LVM is looked at: once at a time. When the last look failed, and why.
    looking: Mutex<Option<(Instant, String)>>,
    tools: Box<dyn RunTools>,
    metadata: Metadata,
    /// Changes are made one after the other: each takes the group's lock anyway, with a limit of its own.
    changing: Mutex<()>,
}

impl Lvm {
    /// Takes the pool into use: sees that it is one and what it does when full, and finishes what a killed server began.
    ///
    /// # Errors
    /// [`LvmError`]
    pub fn start(pool: PoolName, server_id: Uuid, data_dir: &Path) -> Result<Self, LvmError> {
        Self::start_with(pool, server_id, data_dir, Box::<Tools>::default())
    }

    /// The same with other tools, for tests.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(
        pool: PoolName,
        server_id: Uuid,
        data_dir: &Path,
        tools: Box<dyn RunTools>,
    ) -> Result<Self, LvmError> {
        let adoptable = Adoptable {
            allowed: vec![PathBuf::from("/dev")],
            data_dir: PathBuf::new(),
            sysfs: Sysfs::default(),
        };
        let tag = format!("volnode-{server_id}");
        let lvm = Self::new(pool, tag, adoptable, tools, Metadata::new(data_dir));
        let mut state = match lvm.state() {
            // Of a pool that is not active, LVM does not tell how full it is.
            Err(LvmError::Unreadable(_)) => {
                lvm.change(&lvm.pool.activate_pool())?;
                lvm.state()?
            }
            state => state?,
        };
        if !(state.errors_when_full && state.zeroes) {
            info!(pool = %lvm.pool, "the thin pool is set to give an error when it is full, and to zero what it hands out");
            // Of what is so already, LVM makes an error.
            let calls =
                [(state.errors_when_full, lvm.pool.error_when_full()), (state.zeroes, lvm.pool.zero())];
            for (_, call) in calls.iter().filter(|(is_so, _)| !is_so) {
                lvm.change(call)?;
            }
            state = lvm.state()?;
        }
        for (holds, what) in [(state.errors_when_full, "--errorwhenfull y"), (state.zeroes, "--zero y")] {
            if !holds {
                return Err(LvmError::Setting { pool: lvm.pool, what });
            }
        }
        for calls in left_to_do(&lvm.pool, &lvm.list()?) {
            info!(?calls, "finishing a restore that a former process began");
            // The next is about what this one did. Other volumes do not wait for it.
            if let Err(error) = calls.iter().try_for_each(|call| lvm.change(call)) {
                warn!(?calls, %error, "a restore cannot be finished: it is left to the next start");
            }
        }
        if let Err(error) = lvm.metadata.release_left(lvm.tools.as_ref(), &lvm.pool) {
            warn!(pool = %lvm.pool, %error, "the thin pool may still keep a copy of its metadata for a former process");
        }
        let PoolFill { data_percent, metadata_percent } = state.fill;
        info!(pool = %lvm.pool, data_percent, metadata_percent, "thin pool in use");
        Ok(lvm)
    }

    fn new(
        pool: PoolName,
        tag: String,
        adoptable: Adoptable,
        tools: Box<dyn RunTools>,
        metadata: Metadata,
    ) -> Self {
        let (listed, warned, looking) = (Mutex::default(), Mutex::default(), Mutex::default());
        let changing = Mutex::default();
        Self { pool, tag, adoptable, listed, warned, looking, tools, metadata, changing }
    }

    /// Which pool it is.
    pub fn pool(&self) -> &PoolName {
        &self.pool
    }

    /// How devices of it are opened.
    pub fn adoptable(&self) -> &Adoptable {
        &self.adoptable
    }

    /// Whether a volume that was made in the pool `recorded` is one of this server's.
    ///
    /// # Errors
    /// [`LvmError::OtherPool`]
    pub fn check_pool(&self, recorded: Option<String>) -> Result<(), LvmError> {
        match recorded {
            Some(recorded) if recorded != self.pool.to_string() => {
                Err(LvmError::OtherPool { recorded, pool: self.pool.clone() })
            }
            _ => Ok(()),
        }
    }

    /// By what the device of a logical volume is found, which the kernel has from now on.
    ///
    /// # Errors
    /// [`LvmError::Missing`]; a tool's.
    pub fn locate(&self, thin: Thin) -> Result<Adopted, LvmError> {
        let found = self.find(thin)?;
        let found = match found.device {
            Some(_) => found,
            None => {
                self.change(&self.pool.activate(thin))?;
                self.find(thin)?
            }
        };
        let (uuid, minor) = found.device.ok_or_else(|| self.missing(thin))?;
        let (path, identity) = (format!("/dev/dm-{minor}"), format!("dm-uuid:{uuid}"));
        Ok(Adopted { kind: AdoptedKind::BlockDevice, path, identity })
    }

    /// Whether what was located, and is open by now, still has the logical volume's name: a restore gives it to another.
    ///
    /// # Errors
    /// [`LvmError::Missing`]
    pub fn check_name(&self, thin: Thin, located: &Adopted) -> Result<(), LvmError> {
        let found = device::mapper_name(&self.adoptable.sysfs, &located.identity);
        let is_it = found.is_some_and(|found| found == self.pool.mapper_name(thin));
        if is_it { Ok(()) } else { Err(self.missing(thin)) }
    }

    /// Makes an empty one of at least so many bytes.
    ///
    /// # Errors
    /// A tool's.
    pub fn create(&self, thin: Thin, bytes: u64) -> Result<(), LvmError> {
        self.remove(thin)?;
        self.change(&self.pool.create(thin, bytes, &self.tag))
    }

    /// Makes one with the bytes of another, as they are at one instant, and at least so large. After an error there is none.
    ///
    /// # Errors
    /// [`LvmError::Missing`]; a tool's.
    pub fn copy(&self, of: Thin, thin: Thin, bytes: u64) -> Result<(), LvmError> {
        self.find(of)?;
        self.remove(thin)?;
        let made = self.change(&self.pool.snapshot(of, thin, &self.tag));
        made.and_then(|()| self.grow(thin, bytes)).map_err(|error| {
            if let Err(error) = self.remove(thin) {
                warn!(name = thin.name(), %error, "a copy that could not be made is still to be cleaned up");
            }
            self.explained(error)
        })
    }

    /// Makes copies of volumes, each as large as its source, one after the other while `hold` has nobody write to any of them: they are of one
    /// instant. The hold begins when LVM is at work at nothing else of this server's, so `hold` must call nothing of this; it ends before
    /// this returns. After an error there is none of them.
    ///
    /// # Errors
    /// [`LvmError::Missing`], [`LvmError::TooSlow`]; a tool's; that of `hold`.
    pub fn copy_together<H, E: From<LvmError>>(
        &self,
        copies: &[(Thin, Thin)],
        hold: impl FnOnce() -> Result<H, E>,
        release: impl FnOnce(H) -> Result<(), E>,
    ) -> Result<(), E> {
        self.prepare_copies(copies)?;
        let turn = self.turn();
        let (began, held) = (Instant::now(), hold()?);
        let copied = self.copy_held(&turn, copies, began);
        let released = release(held);
        let hold_time = began.elapsed();
        drop(turn);
        let copied = copied.map_err(|error| E::from(self.explained(error)));
        copied.and(released).inspect_err(|_| {
            for (_, target) in copies {
                if let Err(error) = self.remove(*target) {
                    warn!(name = target.name(), %error, "a copy of a group that could not be made is still to be cleaned up");
                }
            }
        })?;
        info!(copies = copies.len(), ?hold_time, "thin snapshots of one instant are made");
        Ok(())
    }

    /// As soon as LVM does nothing else for this server, and as long as this is there: neither a change, nor a look, which has the group's
    /// lock as well.
    fn turn(&self) -> LvmTurn<'_> {
        // In this order everywhere.
        let changing = lock(&self.changing);
        LvmTurn { _changing: changing, _looking: lock(&self.looking) }
    }

    /// The sources are there, and nothing that a copy would be in the way of.
    fn prepare_copies(&self, copies: &[(Thin, Thin)]) -> Result<(), LvmError> {
        let stored = self.list()?;
        let is_there = |thin: Thin| stored.iter().any(|found| found.thin == thin);
        for (of, thin) in copies {
            if !is_there(*of) {
                return Err(self.missing(*of));
            }
            if is_there(*thin) {
                self.remove(*thin)?;
            }
        }
        Ok(())
    }

    fn copy_held(&self, turn: &LvmTurn<'_>, copies: &[(Thin, Thin)], began: Instant) -> Result<(), LvmError> {
        for (of, thin) in copies {
            let left = HOLD_LIMIT.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(LvmError::TooSlow(HOLD_LIMIT.as_secs()));
            }
            let made = self.change_in(turn, &self.pool.snapshot(*of, *thin, &self.tag).within(left));
            made.map_err(|error| match error {
                LvmError::Tool(error) if error.has_timed_out() => LvmError::TooSlow(HOLD_LIMIT.as_secs()),
                error => error,
            })?;
        }
        Ok(())
    }

    /// Where it has its bytes in the pool, of the first `capacity_bytes` of it; everything that was answered before is in. Takes no longer than
    /// `limit`, and some calls of LVM.
    ///
    /// # Errors
    /// [`LvmError::Missing`]; [`LvmError::Reading`]; [`LvmError::TooManyRuns`]; a tool's; its answer cannot be read.
    pub fn map(&self, thin: Thin, capacity_bytes: u64, limit: Duration) -> Result<ThinMap, LvmError> {
        let deadline = Instant::now() + limit;
        self.of_thin_id(thin, |thin_id| {
            self.metadata.map(self.tools.as_ref(), &self.pool, thin_id, capacity_bytes, deadline)
        })
    }

    /// How much of the pool it has alone, in bytes: what is given back when it goes. Takes no longer than `limit`, and some calls of LVM.
    ///
    /// # Errors
    /// As of [`Self::map`].
    pub fn exclusive_bytes(&self, thin: Thin, limit: Duration) -> Result<u64, LvmError> {
        let deadline = Instant::now() + limit;
        self.of_thin_id(thin, |thin_id| {
            self.metadata.exclusive_bytes(self.tools.as_ref(), &self.pool, thin_id, deadline)
        })
    }

    /// Reads what the pool's metadata have of it. Its number may be another's by the time they are read: the answer is only its own if it still
    /// has that number behind it.
    fn of_thin_id<T>(
        &self,
        thin: Thin,
        read: impl FnOnce(u32) -> Result<T, LvmError>,
    ) -> Result<T, LvmError> {
        let thin_id = self.thin_id(thin)?;
        let found = read(thin_id)?;
        if self.thin_id(thin)? != thin_id { Err(self.missing(thin)) } else { Ok(found) }
    }

    fn thin_id(&self, thin: Thin) -> Result<u32, LvmError> {
        self.find(thin)?.thin_id.ok_or_else(|| self.missing(thin))
    }

    /// Makes it at least so large; one that is so is left.
    ///
    /// # Errors
    /// [`LvmError::Missing`]; a tool's.
    pub fn grow(&self, thin: Thin, bytes: u64) -> Result<(), LvmError> {
        if self.find(thin)?.size_bytes >= bytes {
            return Ok(());
        }
        self.change(&self.pool.extend(thin, bytes))
    }

    /// Removes it, if it is there; of a volume also what it was before a restore that was not finished.
    ///
    /// # Errors
    /// A tool's: somebody has it open, for example.
    pub fn remove(&self, thin: Thin) -> Result<(), LvmError> {
        let stored = self.list()?;
        for thin in removed_with(thin) {
            if stored.iter().any(|found| found.thin == thin) {
                self.change(&self.pool.remove(thin))?;
            }
        }
        Ok(())
    }

    /// What was copied to be restored takes the place of the volume's. Killed in between, the next start goes on ([`Lvm::start`]).
    ///
    /// # Errors
    /// [`LvmError::Missing`]; a tool's. The call may be repeated.
    pub fn replace(&self, volume_uid: Uuid) -> Result<(), LvmError> {
        let (volume, restoring) = (Thin::Volume(volume_uid), Thin::Restoring(volume_uid));
        let stored = self.list()?;
        let is_there = |thin: Thin| stored.iter().any(|found| found.thin == thin);
        if !is_there(restoring) {
            return Err(self.missing(restoring));
        }
        if is_there(volume) {
            self.remove(Thin::Replaced(volume_uid))?;
            self.change(&self.pool.rename(volume, Thin::Replaced(volume_uid)))?;
        }
        if let Err(error) = self.change(&self.pool.rename(restoring, volume)) {
            self.put_back(volume_uid);
            return Err(error);
        }
        if let Err(error) = self.remove(Thin::Replaced(volume_uid)) {
            warn!(%volume_uid, %error, "what the volume was before its restore is still to be removed: the next start does");
        }
        Ok(())
    }

    /// Of a restore that came to nothing: the volume has its former bytes again, unless it has those that were restored.
    fn put_back(&self, volume_uid: Uuid) {
        let put = self.list().and_then(|stored| match put_back(&self.pool, volume_uid, &stored) {
            Some(call) => self.change(&call),
            None => Ok(()),
        });
        if let Err(error) = put {
            warn!(%volume_uid, %error, "what the volume was before its restore cannot be put back yet: the next start does");
        }
    }

    /// All logical volumes of this server.
    ///
    /// # Errors
    /// A tool's.
    pub fn list(&self) -> Result<Vec<ThinState>, LvmError> {
        self.list_in_turn(&mut lock(&self.looking))
    }

    fn list_in_turn(&self, failed: &mut Option<(Instant, String)>) -> Result<Vec<ThinState>, LvmError> {
        let answer = self.look(failed, &self.pool.list())?;
        let found = report::thin_volumes(&answer, &self.pool.pool, &self.tag)?;
        *lock(&self.listed) = Some((Instant::now(), found.clone()));
        Ok(found)
    }

    /// Whoever waited for a turn while a look failed is not to wait for another that fails.
    fn look(&self, failed: &mut Option<(Instant, String)>, call: &Call) -> Result<String, LvmError> {
        if let Some(words) = remembered(failed.as_ref(), Instant::now()) {
            return Err(LvmError::Remembered(words));
        }
        *failed = None;
        let answer = self.tools.run(call);
        Ok(answer.inspect_err(|error| *failed = Some((Instant::now(), error.to_string())))?)
    }

    /// How much of the pool it takes, in bytes, what it shares among it, as it was some seconds ago; 0 where that is not known.
    pub fn allocated_bytes(&self, thin: Thin) -> u64 {
        // One looks, and the others have what it found.
        let mut failed = lock(&self.looking);
        let is_recent = lock(&self.listed).as_ref().is_some_and(|(at, _)| at.elapsed() < LIST_AGE);
        if !is_recent && let Err(error) = self.list_in_turn(&mut failed) {
            warn!(%error, "how much of the thin pool is taken is not known");
            return 0;
        }
        let listed = lock(&self.listed);
        let found = listed.iter().flat_map(|(_, listed)| listed).find(|found| found.thin == thin);
        found.map_or(0, |found| found.allocated_bytes)
    }

    /// How full the pool is.
    ///
    /// # Errors
    /// A tool's; [`LvmError::NoPool`]; [`LvmError::Trouble`]: nothing new can be made in it.
    pub fn fill(&self) -> Result<PoolFill, LvmError> {
        let state = self.state()?;
        match state.trouble() {
            Some(trouble) => Err(self.trouble(trouble)),
            None => Ok(state.fill),
        }
    }

    /// The error of a tool that changes something, as the pool's state has it.
    fn explained(&self, error: LvmError) -> LvmError {
        let LvmError::Tool(ToolError::Failed { said, .. }) = &error else { return error };
        let said = PoolTrouble::said(said);
        match self.state().ok().and_then(|state| state.trouble()).or(said) {
            Some(trouble) => {
                warn!(pool = %self.pool, %error, "the thin pool does not let this be done");
                self.trouble(trouble)
            }
            None => error,
        }
    }

    fn trouble(&self, trouble: PoolTrouble) -> LvmError {
        LvmError::Trouble { pool: self.pool.clone(), trouble }
    }

    /// Looks after the pool: says how full it is when that passes a step, and what is wrong with it.
    pub fn watch(&self) {
        let state = match self.state() {
            Ok(state) => state,
            Err(error) => {
                warn!(pool = %self.pool, %error, "the thin pool cannot be looked after");
                return;
            }
        };
        match state.trouble() {
            Some(trouble) => {
                let next = trouble.next();
                error!(pool = %self.pool, health = state.health, %trouble, next, "the thin pool is in trouble: see lvmthin(7)");
            }
            None if !state.health.is_empty() => {
                error!(pool = %self.pool, health = state.health, "the thin pool is in trouble: see lvmthin(7)");
            }
            None => {}
        }
        if !state.errors_when_full {
            warn!(pool = %self.pool, "somebody set the thin pool to let writes wait when it is full: it is set back");
            if let Err(error) = self.change(&self.pool.error_when_full()) {
                error!(pool = %self.pool, %error, "writes wait when the thin pool is full");
            }
        }
        if let Err(error) = self.metadata.release_unread(self.tools.as_ref(), &self.pool) {
            warn!(pool = %self.pool, %error, "the thin pool still keeps a copy of its metadata");
        }
        let step = step_of(state.fill);
        let told = std::mem::replace(&mut *lock(&self.warned), step);
        if step > told {
            let PoolFill { data_percent, metadata_percent } = state.fill;
            warn!(pool = %self.pool, data_percent, metadata_percent, "the thin pool gets full: extend it (lvextend), or delete snapshots and volumes");
        }
    }

    fn state(&self) -> Result<PoolState, LvmError> {
        let answer = self.look(&mut lock(&self.looking), &self.pool.look_at_pool())?;
        report::pool(&answer)?.ok_or_else(|| LvmError::NoPool(self.pool.clone()))
    }

    fn find(&self, thin: Thin) -> Result<ThinState, LvmError> {
        self.list()?.into_iter().find(|found| found.thin == thin).ok_or_else(|| self.missing(thin))
    }

    fn missing(&self, thin: Thin) -> LvmError {
        LvmError::Missing { name: thin.name(), pool: self.pool.clone() }
    }

    fn change(&self, call: &Call) -> Result<(), LvmError> {
        let _changing = lock(&self.changing);
        self.changed(call)
    }

    /// The same for whoever has its turn.
    fn change_in(&self, _turn: &LvmTurn<'_>, call: &Call) -> Result<(), LvmError> {
        self.changed(call)
    }

    fn changed(&self, call: &Call) -> Result<(), LvmError> {
        let done = self.tools.run(call);
        // After it: what was looked at meanwhile is of before.
        *lock(&self.listed) = None;
        done?;
        Ok(())
    }
}

/// While it is there, LVM does nothing else for this server.
#[derive(Debug)]
struct LvmTurn<'a> {
    _changing: MutexGuard<'a, ()>,
    _looking: MutexGuard<'a, Option<(Instant, String)>>,
}

/// How many of [`WARN_PERCENT`] are passed.
fn step_of(fill: PoolFill) -> usize {
    WARN_PERCENT.iter().filter(|step| fill.percent() >= **step).count()
}

/// Whether the pool is too full for new snapshots and clones: that is, from which percentage on. `reserve_percent`: what is to be kept
/// free.
pub fn too_full(fill: PoolFill, reserve_percent: Option<u8>) -> Option<f64> {
    let most = reserve_percent.map_or(NEW_COPIES_PERCENT, |reserve| 100.0 - f64::from(reserve));
    (fill.percent() >= most).then_some(most)
}

/// What a server that was killed in a restore left to do, by volume, each in order: there was nobody to whom the former bytes were told again, since the
/// incarnation had been raised.
fn left_to_do(pool: &PoolName, stored: &[ThinState]) -> Vec<Vec<Call>> {
    let is_there = |thin: Thin| stored.iter().any(|found| found.thin == thin);
    let mut of_volumes = Vec::new();
    for found in stored {
        let Thin::Replaced(volume_uid) = found.thin else { continue };
        let (volume, restoring) = (Thin::Volume(volume_uid), Thin::Restoring(volume_uid));
        of_volumes.push(match (is_there(volume), is_there(restoring)) {
            (true, _) => vec![pool.remove(found.thin)],
            (false, true) => vec![pool.rename(restoring, volume), pool.remove(found.thin)],
            // It has the volume's former bytes, which are better than none.
            (false, false) => vec![pool.rename(found.thin, volume)],
        });
    }
    of_volumes
}

/// What gives the volume its former bytes back, where it has none.
fn put_back(pool: &PoolName, volume_uid: Uuid, stored: &[ThinState]) -> Option<Call> {
    let (volume, replaced) = (Thin::Volume(volume_uid), Thin::Replaced(volume_uid));
    let is_there = |thin: Thin| stored.iter().any(|found| found.thin == thin);
    (is_there(replaced) && !is_there(volume)).then(|| pool.rename(replaced, volume))
}

/// What goes with it: what is left of a volume would come back as that volume.
fn removed_with(thin: Thin) -> Vec<Thin> {
    match thin {
        Thin::Volume(volume_uid) => vec![Thin::Replaced(volume_uid), thin],
        Thin::Snapshot(_) | Thin::Restoring(_) | Thin::Replaced(_) => vec![thin],
    }
}

/// Why a look failed, for so long as it is not repeated.
fn remembered(failed: Option<&(Instant, String)>, now: Instant) -> Option<String> {
    let (at, words) = failed?;
    (now.saturating_duration_since(*at) < LIST_AGE).then(|| words.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(thin: Thin) -> ThinState {
        ThinState { thin, size_bytes: 1, thin_id: None, allocated_bytes: 0, device: None }
    }

    #[test]
    fn a_restore_that_was_killed_anywhere_is_finished_or_not_begun() {
        let pool: PoolName = "vg/pool".parse().unwrap();
        let uid = Uuid::from_u128(3);
        let (volume, restoring, replaced) = (Thin::Volume(uid), Thin::Restoring(uid), Thin::Replaced(uid));
        let left =
            |stored: &[Thin]| left_to_do(&pool, &stored.iter().map(|thin| state(*thin)).collect::<Vec<_>>());
        let nothing: [Vec<Call>; 0] = [];
        assert_eq!(left(&[volume]), nothing);
        assert_eq!(left(&[volume, restoring]), nothing, "the copy is whoever recovers copies' to remove");
        let finished = [vec![pool.rename(restoring, volume), pool.remove(replaced)]];
        assert_eq!(left(&[restoring, replaced]), finished);
        assert_eq!(left(&[volume, replaced]), [[pool.remove(replaced)]]);
        assert_eq!(left(&[replaced]), [[pool.rename(replaced, volume)]]);
        let other = Thin::Volume(Uuid::from_u128(4));
        assert_eq!(left(&[other, restoring, replaced]), finished, "another volume's is no matter");
    }

    #[test]
    fn a_restore_that_fails_leaves_the_volume_and_a_deleted_volume_leaves_nothing() {
        let pool: PoolName = "vg/pool".parse().unwrap();
        let uid = Uuid::from_u128(3);
        let (volume, restoring, replaced) = (Thin::Volume(uid), Thin::Restoring(uid), Thin::Replaced(uid));
        let back =
            |stored: &[Thin]| put_back(&pool, uid, &stored.iter().copied().map(state).collect::<Vec<_>>());
        assert_eq!(back(&[replaced, restoring]), Some(pool.rename(replaced, volume)));
        assert_eq!(back(&[replaced, volume]), None, "it was done after all");
        assert_eq!(back(&[volume, restoring]), None);
        assert_eq!(removed_with(volume), [replaced, volume], "what it was must not become the volume again");
        assert_eq!(removed_with(replaced), [replaced]);
    }

    #[test]
    fn a_look_that_failed_is_not_repeated_at_once() {
        let now = Instant::now();
        let failed = (now, "lvs failed".to_owned());
        assert_eq!(remembered(Some(&failed), now + LIST_AGE / 2).as_deref(), Some("lvs failed"));
        assert_eq!((remembered(Some(&failed), now + LIST_AGE), remembered(None, now)), (None, None));
    }

    #[test]
    fn a_pool_is_told_of_at_each_step_and_takes_no_copies_when_nearly_full() {
        let fill = |data_percent, metadata_percent| PoolFill { data_percent, metadata_percent };
        let cases = [(79.9, 0), (80.0, 1), (90.0, 2), (94.9, 2), (95.0, 3), (100.0, 3)];
        for (percent, step) in cases {
            assert_eq!(step_of(fill(percent, 1.0)), step, "{percent}");
            assert_eq!(step_of(fill(1.0, percent)), step, "metadata {percent}");
        }
        assert_eq!((too_full(fill(89.9, 0.0), None), too_full(fill(0.0, 90.0), None)), (None, Some(90.0)));
        assert_eq!(
            (too_full(fill(60.0, 0.0), Some(40)), too_full(fill(99.0, 0.0), Some(0))),
            (Some(60.0), None)
        );
    }

    fn started(pool: &stand_in::Pool, data_dir: &Path) -> Lvm {
        let name: PoolName = "vg/pool".parse().unwrap();
        Lvm::start_with(name, Uuid::nil(), data_dir, Box::new(pool.clone())).unwrap()
    }

    fn two_volumes(lvm: &Lvm) -> [(Thin, Thin); 2] {
        [1, 2].map(|number| {
            let uid = Uuid::from_u128(number);
            lvm.create(Thin::Volume(uid), 1 << 20).unwrap();
            (Thin::Volume(uid), Thin::Snapshot(uid))
        })
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn writes_are_held_when_lvm_has_time_for_their_copies_and_not_before() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicBool, Ordering};
        use std::sync::mpsc::channel;

        let dir = tempfile::tempdir().unwrap();
        let pool = stand_in::Pool::new("vg/pool".parse().unwrap(), stand_in::Volumes::new());
        let lvm = started(&pool, dir.path());
        let copies = two_volumes(&lvm);
        let (begun, has_begun) = channel();
        let (go_on, goes_on) = channel::<()>();
        let is_held = Arc::new(AtomicBool::new(false));
        let held = Arc::clone(&is_held);
        // A call that takes its time, before anything is held; and what is done while it is.
        pool.at_change(move |at, _| {
            if at.starts_with("before") && at.contains("--virtualsize") {
                begun.send(()).unwrap();
                goes_on.recv_timeout(LONG).unwrap();
            }
            assert_eq!(held.load(Ordering::SeqCst), at.contains("--snapshot"), "{at}");
        });
        let (lvm, copies, is_held) = (&lvm, &copies[..], &*is_held);
        std::thread::scope(|scope| {
            scope.spawn(|| lvm.create(Thin::Volume(Uuid::from_u128(3)), 1 << 20).unwrap());
            has_begun.recv_timeout(LONG).unwrap();
            let hold = || {
                is_held.store(true, Ordering::SeqCst);
                Ok::<_, LvmError>(())
            };
            let release = |()| {
                is_held.store(false, Ordering::SeqCst);
                Ok(())
            };
            let copying = scope.spawn(move || lvm.copy_together(copies, hold, release));
            std::thread::sleep(Duration::from_millis(100));
            assert!(!is_held.load(Ordering::SeqCst), "writes wait for a call that is not theirs");
            go_on.send(()).unwrap();
            copying.join().unwrap().unwrap();
        });
        let made = pool.volumes();
        assert!(copies.iter().all(|(_, copy)| made.contains_key(&copy.name())), "{:?}", made.keys());
    }

    #[test]
    fn copies_of_several_that_cannot_all_be_made_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let pool = stand_in::Pool::new("vg/pool".parse().unwrap(), stand_in::Volumes::new());
        let lvm = started(&pool, dir.path());
        let copies = two_volumes(&lvm);
        let lost = lvm.copy_together(&copies, || Ok(()), |()| Err(LvmError::NotConfigured)).unwrap_err();
        assert!(matches!(lost, LvmError::NotConfigured), "what the release says is told: {lost}");
        let refused =
            lvm.copy_together(&copies, || Err::<(), _>(LvmError::NotConfigured), |()| Ok(())).unwrap_err();
        assert!(matches!(refused, LvmError::NotConfigured), "{refused}");
        assert_eq!(pool.volumes().len(), copies.len(), "{:?}", pool.volumes().keys());
        // LVM is free for others again.
        lvm.create(Thin::Volume(Uuid::from_u128(3)), 1 << 20).unwrap();
    }

    #[test]
    fn a_number_that_became_anothers_while_it_was_read_tells_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let pool = stand_in::Pool::new("vg/pool".parse().unwrap(), stand_in::Volumes::new());
        let lvm = started(&pool, dir.path());
        let [(volume, _), (other, _)] = two_volumes(&lvm);
        assert!(lvm.map(volume, 1 << 20, LONG).is_ok());
        assert_eq!(lvm.exclusive_bytes(volume, LONG).unwrap(), 65536);
        // A restore, say: the volume is another one, and its former number a third one's.
        let (name, others_name) = (volume.name(), other.name());
        pool.at_read(move |volumes| {
            let taken = volumes[&name].thin_id;
            volumes.get_mut(&name).unwrap().thin_id += 10;
            volumes.get_mut(&others_name).unwrap().thin_id = taken;
        });
        let error = lvm.map(volume, 1 << 20, LONG).unwrap_err();
        assert!(matches!(error, LvmError::Missing { .. }), "{error}");
        let error = lvm.exclusive_bytes(volume, LONG).unwrap_err();
        assert!(matches!(error, LvmError::Missing { .. }), "{error}");
    }

    #[test]
    fn a_pool_that_takes_nothing_new_says_why_and_what_to_do() {
        use crate::volume::copying::CopyError;

        let dir = tempfile::tempdir().unwrap();
        let pool = stand_in::Pool::new("vg/pool".parse().unwrap(), stand_in::Volumes::new());
        let lvm = started(&pool, dir.path());
        let copies = two_volumes(&lvm);
        let (volume, copy) = copies[0];
        pool.refuses("", "Cannot create new thin volume, thin pool vg/pool needs check.");
        let error = lvm.copy(volume, copy, 1 << 20).unwrap_err();
        assert!(matches!(error, LvmError::Trouble { trouble: PoolTrouble::NeedsCheck, .. }), "{error}");
        pool.refuses("metadata_read_only", "device-mapper: message ioctl failed: Operation not supported");
        let errors = [
            lvm.copy(volume, copy, 1 << 20).unwrap_err(),
            lvm.copy_together(&copies, || Ok(()), |()| Ok(())).unwrap_err(),
            lvm.fill().unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, LvmError::Trouble { trouble: PoolTrouble::ReadOnly, .. }), "{error}");
            let CopyError::NotReady { words, next } = error.into() else {
                panic!("the server has not failed")
            };
            assert!(
                words.contains("read-only metadata") && next.contains("docs/operating.md"),
                "{words}; {next}"
            );
        }
        pool.refuses("", "Insufficient free space");
        assert!(
            matches!(lvm.copy(volume, copy, 1 << 20).unwrap_err(), LvmError::Tool(_)),
            "no trouble of the pool"
        );
    }
}
