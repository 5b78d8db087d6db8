//! A volume that is being served: what is announced of it, and what is known of its losses.
//!
//! Owns: the open volume. Never: does an operation itself (`data/io/ring.rs` does), or touches a socket. One request's way through
//! it is `request.rs`; which storage a client has written to is `incarnation/`.
//! Called by: `data/gate/opener.rs` (opens volumes), `data/gate/run.rs` (shares them with the rings) and `data/io/session_io.rs`.
//! Invariants: after a failed sync nothing is acknowledged as durable until the volume was opened anew; and nobody is told of a
//! failed sync before it is recorded where a killed server does not forget it.

pub mod controls;
pub mod copying;
pub mod diff;
pub mod incarnation;
pub mod rate_limit;
pub mod request;
pub mod snapshot;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use proto::nbd::validate::RequestLimits;
use proto::nbd::{BlockSizes, Negotiated, PAYLOAD_BYTES_MAX_DEFAULT, TransmissionFlags};
use tracing::error;
use uuid::Uuid;

use crate::backend::callback::CallbackBackend;
use crate::backend::file::FileVolume;
use crate::backend::memory::MemoryVolume;
use crate::descriptors::Taken;
use crate::volume::controls::Controls;
use crate::volume::snapshot::copy_before_write::CopyBeforeWrite;

/// Below this, requests make the file system handle parts of a page.
const PREFERRED_BLOCK_BYTES: u32 = 4096;

/// Ways in which this server can be made to fail, for tests only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// FLUSH and FUA are acknowledged although nothing was synced.
    pub skip_flush: bool,
    /// Only this one of each volume's FLUSHes is acknowledged without a sync, counted from 1 when the volume is opened.
    pub skip_one_flush: Option<u64>,
}

impl std::str::FromStr for Faults {
    type Err = String;

    /// Reads the hidden `--fault` option: `skip-flush`, or `skip-flush=N` for the Nth only.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.strip_prefix("skip-flush=").and_then(|number| number.parse().ok());
        match (text, number) {
            ("skip-flush", _) => Ok(Self { skip_flush: true, skip_one_flush: None }),
            (_, Some(number)) => Ok(Self { skip_flush: false, skip_one_flush: Some(number) }),
            (other, None) => {
                Err(format!("unknown fault {other:?}; there are `skip-flush` and `skip-flush=N`"))
            }
        }
    }
}

/// Where a volume's bytes are.
#[derive(Debug)]
pub enum Backend {
    /// A file.
    File(FileVolume),
    /// This process's memory.
    Memory(MemoryVolume),
    /// What completes on threads of its own.
    Callback(Box<dyn CallbackBackend>),
}

/// Records that a volume lost writes, at the first failed sync; false: it could not, and nobody may be told. Must not wait.
pub struct LossRecorder(Box<dyn Fn() -> bool + Send + Sync>);

impl LossRecorder {
    /// One that does this.
    pub fn new(record: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Box::new(record))
    }
}

impl std::fmt::Debug for LossRecorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LossRecorder")
    }
}

/// A volume that is being served.
#[derive(Debug)]
pub struct Volume {
    /// Its identity.
    pub volume_uid: Uuid,
    /// Its size in bytes.
    pub capacity_bytes: u64,
    /// Its bytes.
    pub backend: Backend,
    write_cache_on: bool,
    faults: Faults,
    /// FLUSHes so far; counted only for [`Faults::skip_one_flush`].
    flushes: AtomicU64,
    sync_failed: AtomicBool,
    recorder: LossRecorder,
    /// Whether the loss is recorded; set by the first failed sync.
    is_recorded: OnceLock<bool>,
    /// Whether it was recorded later, where it could not be then.
    is_recorded_since: AtomicBool,
    controls: Arc<Controls>,
    copy_before_write: CopyBeforeWrite,
    /// What it has of the process's open files; behind the backend, which closes them.
    _descriptors: Option<Taken>,
}

impl Volume {
    /// A volume over a backend that is open, and locked if it is a file.
    pub fn new(
        volume_uid: Uuid,
        capacity_bytes: u64,
        backend: Backend,
        write_cache_on: bool,
        faults: Faults,
        recorder: LossRecorder,
    ) -> Self {
        let (flushes, sync_failed, is_recorded) =
            (AtomicU64::new(0), AtomicBool::new(false), OnceLock::new());
        Self {
            volume_uid,
            capacity_bytes,
            backend,
            write_cache_on,
            faults,
            flushes,
            sync_failed,
            recorder,
            is_recorded,
            is_recorded_since: AtomicBool::new(false),
            controls: Arc::default(),
            copy_before_write: CopyBeforeWrite::default(),
            _descriptors: None,
        }
    }

    /// The same, with the descriptors that were counted for it until it is closed.
    #[must_use]
    pub fn with_descriptors(self, descriptors: Taken) -> Self {
        Self { _descriptors: Some(descriptors), ..self }
    }

    /// The same, with what its requests have to heed.
    #[must_use]
    pub fn with_controls(self, controls: Arc<Controls>) -> Self {
        Self { controls, ..self }
    }

    /// What its requests have to heed.
    pub fn controls(&self) -> &Controls {
        &self.controls
    }

    /// What changes to it wait for while it is copied.
    pub fn copy_before_write(&self) -> &CopyBeforeWrite {
        &self.copy_before_write
    }

    /// Whether a sync has failed: what was acknowledged before may be lost.
    pub fn has_lost_writes(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }

    /// The same, once it is recorded or is known not to be: waits for who records it.
    pub fn has_noticed_loss(&self) -> bool {
        self.has_lost_writes() && {
            self.is_loss_recorded();
            true
        }
    }

    /// What requests are checked against and what is announced. `block_size_bytes` is the smallest block that this
    /// export's clients were promised; the backend may need more.
    pub fn limits(&self, read_only: bool, block_size_bytes: u32) -> RequestLimits {
        let alignment_bytes = match &self.backend {
            Backend::File(file) => file.alignment_bytes(),
            Backend::Memory(_) => 1,
            Backend::Callback(backend) => backend.alignment_bytes(),
        };
        let minimum_bytes = alignment_bytes.max(block_size_bytes);
        let mut flags = TransmissionFlags::HAS_FLAGS
            .with(TransmissionFlags::SEND_FUA)
            .with(TransmissionFlags::SEND_TRIM)
            .with(TransmissionFlags::SEND_WRITE_ZEROES)
            .with(TransmissionFlags::SEND_FAST_ZERO)
            .with(TransmissionFlags::SEND_CACHE)
            .with(TransmissionFlags::CAN_MULTI_CONN);
        if self.write_cache_on {
            // Announcing FLUSH is how NBD says that there is a volatile cache.
            flags = flags.with(TransmissionFlags::SEND_FLUSH);
        }
        if read_only {
            flags = flags.with(TransmissionFlags::READ_ONLY);
        }
        if matches!(&self.backend, Backend::File(file) if file.is_rotational()) {
            flags = flags.with(TransmissionFlags::ROTATIONAL);
        }
        let block_sizes = BlockSizes {
            minimum_bytes,
            preferred_bytes: minimum_bytes.max(PREFERRED_BLOCK_BYTES),
            maximum_bytes: PAYLOAD_BYTES_MAX_DEFAULT,
        };
        let negotiated = Negotiated::default();
        RequestLimits { size_bytes: self.capacity_bytes, flags, block_sizes, negotiated }
    }

    /// What the volume's bytes are in, for the log.
    pub fn describe_backend(&self) -> &'static str {
        match &self.backend {
            Backend::File(file) if file.device_marks().is_some() => "block device, past the page cache",
            Backend::File(file) if file.is_direct() => "file, past the page cache",
            Backend::File(_) => "file, through the page cache",
            Backend::Memory(_) => "memory",
            Backend::Callback(backend) => backend.describe(),
        }
    }

    /// The volume's memory, when payloads go straight into and out of it.
    pub fn memory(&self) -> Option<&MemoryVolume> {
        match &self.backend {
            Backend::Memory(memory) => Some(memory),
            Backend::File(_) | Backend::Callback(_) => None,
        }
    }

    /// A sync of the volume's file failed, a client's or another: nothing is acknowledged as durable any more. Records it.
    pub fn report_failed_sync(&self, errno: i32) {
        if !self.sync_failed.swap(true, Ordering::AcqRel) {
            error!(volume_uid = %self.volume_uid, errno, "a sync failed: FLUSH and FUA fail until all clients have left");
        }
        self.is_loss_recorded();
    }

    /// The loss of writes is recorded, perhaps only now: that syncs fail may be told.
    pub fn loss_recorded(&self) {
        self.is_recorded_since.store(true, Ordering::Release);
    }

    fn is_loss_recorded(&self) -> bool {
        *self.is_recorded.get_or_init(|| (self.recorder.0)())
            || self.is_recorded_since.load(Ordering::Acquire)
    }

    /// Whether what a request is about is in part behind the end of an adopted device that has become smaller.
    fn is_cut_off(&self, end_bytes: u64) -> bool {
        matches!(&self.backend, Backend::File(file) if file.is_cut_off(end_bytes))
    }

    fn zeroes_slowly(&self) -> bool {
        matches!(&self.backend, Backend::File(file) if file.zeroes_slowly())
    }

    fn discards(&self) -> bool {
        matches!(&self.backend, Backend::File(file) if file.discards())
    }

    fn is_direct(&self) -> bool {
        matches!(&self.backend, Backend::File(file) if file.is_direct())
    }
}
