//! A volume in a sparse file named by its `volume_uid`.
//!
//! Owns: making, opening, measuring and deleting the file. The I/O itself is the ring's, on the descriptor opened here.
//! Never: reads, modifies and writes part of a sector; that is the client's or the file system's.
//! Called by: the control side ([`create`], [`delete`], [`list_uids`], [`allocated_bytes`]) and `gate/opener.rs` ([`open`]).
//! Invariants: `create` and `delete` are durable when they return; a file is served only under `flock(LOCK_EX)` on the
//! very description that its I/O uses. The kernel keeps that description, and so the lock, until the last operation
//! submitted on it has finished, even if the process was killed: a successor that gets the lock sees no late write.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{Advice, AtFlags, FlockOperation, OFlags, SeekFrom, StatxFlags};
use uuid::Uuid;

use super::background::{Background, Work};
use super::discard::discard;
use super::marks::DeviceMarks;
use super::page_cache::{PageCacheView, is_any_cached};
use crate::backend::reflink;

/// Whether volumes are read and written past the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// `O_DIRECT` where `statx(STATX_DIOALIGN)` says that the file can, else the page cache.
    #[default]
    Auto,
    /// Always through the page cache.
    Buffered,
}

/// Why a backing file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A system call failed.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's own error.
        source: io::Error,
    },
    /// What was written to the file before may be lost.
    #[error("cannot sync {path}: {source}")]
    Sync {
        /// The file.
        path: PathBuf,
        /// The system's own error.
        source: io::Error,
    },
    /// The file is not as long as the catalog says the volume is.
    #[error("{path} has {found_bytes} bytes, the catalog says {expected_bytes}")]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Its length.
        found_bytes: u64,
        /// The volume's capacity.
        expected_bytes: u64,
    },
}

/// A backing file, open and locked (or about to be).
#[derive(Debug)]
pub struct FileVolume {
    file: File,
    /// One description for each ring to sync on; see `sync_groups.rs`. Nothing is written through them.
    sync_files: Vec<File>,
    direct_alignment_bytes: Option<u32>,
    /// `None` where the page cache is passed by, or cannot be looked at.
    page_cache: Option<PageCacheView>,
    is_rotational: bool,
    /// `None` of a file of ours.
    adopted: Option<AdoptedStorage>,
}

/// What is known of storage that is not ours, whose size others change.
#[derive(Debug)]
struct AdoptedStorage {
    /// Where it ended when it was measured last.
    end_bytes: AtomicU64,
    /// `None` of a raw file.
    device: Option<BlockDevice>,
}

#[derive(Debug)]
struct BlockDevice {
    marks: DeviceMarks,
    zeroes_fast: bool,
    background: Background,
}

impl FileVolume {
    /// The descriptor that the I/O uses.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Over a raw file that is open, claimed, and of this size now.
    pub(super) fn over_raw_file(
        file: File,
        sync_files: Vec<File>,
        size_bytes: u64,
        block_size_bytes: u32,
        cache: CacheMode,
    ) -> Self {
        let is_rotational =
            file.metadata().is_ok_and(|found| is_rotational(Path::new(BLOCK_DEVICES_DIR), found.dev()));
        let direct_alignment_bytes = match cache {
            // Its users were promised this block: what cannot be had past the page cache goes through it.
            CacheMode::Auto => use_direct_for_blocks(&file, size_bytes, block_size_bytes),
            CacheMode::Buffered => None,
        };
        let is_buffered = direct_alignment_bytes.is_none();
        let page_cache = if is_buffered { PageCacheView::new(&file, size_bytes).ok() } else { None };
        let adopted = Some(AdoptedStorage { end_bytes: AtomicU64::new(size_bytes), device: None });
        Self { file, sync_files, direct_alignment_bytes, page_cache, is_rotational, adopted }
    }

    /// Over a block device that is open, claimed, and of this size now: always past the page cache.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn over_block_device(
        file: File,
        sync_files: Vec<File>,
        size_bytes: u64,
        block_size_bytes: u32,
        marks: DeviceMarks,
        zeroes_fast: bool,
    ) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags | OFlags::DIRECT)?;
        let is_rotational = is_rotational(Path::new(BLOCK_DEVICES_DIR), file.metadata()?.rdev());
        let device = Some(BlockDevice { marks, zeroes_fast, background: Background::default() });
        let adopted = Some(AdoptedStorage { end_bytes: AtomicU64::new(size_bytes), device });
        let direct_alignment_bytes = Some(block_size_bytes);
        Ok(Self { file, sync_files, direct_alignment_bytes, page_cache: None, is_rotational, adopted })
    }

    /// A file that is taken for a device, for tests that do no I/O on it.
    #[cfg(test)]
    pub(crate) fn as_block_device(file: File, size_bytes: u64) -> Self {
        let marks = DeviceMarks { identity: "test".to_owned(), sysfs_dir: "/nowhere".into() };
        let device = Some(BlockDevice { marks, zeroes_fast: true, background: Background::default() });
        let adopted = Some(AdoptedStorage { end_bytes: AtomicU64::new(size_bytes), device });
        Self {
            file,
            sync_files: Vec::new(),
            direct_alignment_bytes: None,
            page_cache: None,
            is_rotational: false,
            adopted,
        }
    }

    /// What tells whether a block device is what it was; `None` of a file.
    pub fn device_marks(&self) -> Option<&DeviceMarks> {
        Some(&self.adopted.as_ref()?.device.as_ref()?.marks)
    }

    /// Whether it is somebody else's device or file.
    pub fn is_adopted(&self) -> bool {
        self.adopted.is_some()
    }

    /// Whether zeroes that are to keep their space would be written one by one by the kernel, however many they are.
    pub fn zeroes_slowly(&self) -> bool {
        let device = self.adopted.as_ref().and_then(|adopted| adopted.device.as_ref());
        device.is_some_and(|device| !device.zeroes_fast)
    }

    /// Whether space is given back by discards: a device that zeroes by itself has holes.
    pub fn discards(&self) -> bool {
        self.zeroes_slowly()
    }

    /// Gives back what the device can of a range. Waits for it.
    ///
    /// # Errors
    /// The system's; `EOPNOTSUPP`: it cannot.
    pub fn discard(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        discard(&self.file, offset_bytes, length_bytes)
    }

    /// Has something done on a thread of the device's own; dropped where there is none.
    pub fn in_background(&self, work: Work) {
        if let Some(device) = self.adopted.as_ref().and_then(|adopted| adopted.device.as_ref()) {
            device.background.run(work);
        }
    }

    /// Whether a range is in part behind the end of a device or file that has become smaller.
    pub fn is_cut_off(&self, end_bytes: u64) -> bool {
        self.adopted.as_ref().is_some_and(|adopted| end_bytes > adopted.end_bytes.load(Ordering::Relaxed))
    }

    /// How large it is now, in bytes; of a device or file that is adopted, requests are held to it from now on. May wait where a raw
    /// file's file system does.
    ///
    /// # Errors
    /// The system's.
    pub fn measure(&self) -> io::Result<u64> {
        let size_bytes = size_of(&self.file)?;
        if let Some(adopted) = &self.adopted {
            adopted.end_bytes.store(size_bytes, Ordering::Relaxed);
        }
        Ok(size_bytes)
    }

    /// The descriptor that ring number `ring` syncs on.
    ///
    /// # Panics
    /// When the volume was opened for fewer rings.
    pub fn sync_file(&self, ring: usize) -> &File {
        &self.sync_files[ring]
    }

    /// Whether the page cache is passed by.
    pub fn is_direct(&self) -> bool {
        self.direct_alignment_bytes.is_some()
    }

    /// Whether the page cache holds all of a range, so that reading it does not wait. False also where that is not known.
    pub fn is_cached(&self, offset_bytes: u64, length_bytes: u32) -> bool {
        self.page_cache.as_ref().is_some_and(|cache| cache.holds(offset_bytes, length_bytes))
    }

    /// What offsets and lengths of requests have to be multiples of.
    pub fn alignment_bytes(&self) -> u32 {
        self.direct_alignment_bytes.unwrap_or(1)
    }

    /// Whether the disk below turns, so that near offsets are fast one after the other.
    pub fn is_rotational(&self) -> bool {
        self.is_rotational
    }

    /// Has what is read next come from the disk, and not from the page cache.
    ///
    /// # Errors
    /// The page cache keeps some of it (`ResourceBusy`), or the file system's own.
    pub fn drop_page_cache(&self) -> io::Result<()> {
        drop_page_cache(&self.file)
    }

    /// Waits for the lock for as long as a predecessor's process, or its last I/O, holds it. On a thread that may wait.
    ///
    /// # Errors
    /// The file system's own.
    pub fn lock(&self) -> io::Result<()> {
        loop {
            match rustix::fs::flock(&self.file, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Takes the lock if nobody holds it. False: a predecessor's process, or its last I/O, still does.
    ///
    /// # Errors
    /// The file system's own.
    pub fn try_lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Where the file of a volume is.
pub fn path(volumes_dir: &Path, volume_uid: Uuid) -> PathBuf {
    volumes_dir.join(volume_uid.to_string())
}

/// Makes the file of a new volume: sparse, all zeroes, durable when this returns. A file of the right size that is
/// already there is taken over as it is: it can only be what an interrupted call of the same volume left.
///
/// # Errors
/// [`FileError`]: no space for the entry, a capacity that the file system cannot hold (`EFBIG`), or another size.
pub fn create(volumes_dir: &Path, volume_uid: Uuid, capacity_bytes: u64) -> Result<(), FileError> {
    let path = path(volumes_dir, volume_uid);
    let fail = |action| move |path: &Path, source| FileError::Io { action, path: path.into(), source };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|e| fail("cannot make")(&path, e))?;
    let found_bytes = file.metadata().map_err(|e| fail("cannot look at")(&path, e))?.len();
    if found_bytes != 0 && found_bytes != capacity_bytes {
        return Err(FileError::WrongSize { path, found_bytes, expected_bytes: capacity_bytes });
    }
    file.set_len(capacity_bytes).map_err(|e| fail("cannot size")(&path, e))?;
    file.sync_all().map_err(|e| fail("cannot sync")(&path, e))?;
    sync_directory(volumes_dir)
}

/// Makes the file of a volume larger, durably; the new part reads as zeroes. A file of that size or more is a success.
///
/// # Errors
/// [`FileError::Io`], as of [`create`].
pub fn grow(volumes_dir: &Path, volume_uid: Uuid, capacity_bytes: u64) -> Result<(), FileError> {
    let path = path(volumes_dir, volume_uid);
    let fail = |action| move |path: &Path, source| FileError::Io { action, path: path.into(), source };
    let file = OpenOptions::new().write(true).open(&path).map_err(|e| fail("cannot open")(&path, e))?;
    let found_bytes = file.metadata().map_err(|e| fail("cannot look at")(&path, e))?.len();
    if found_bytes < capacity_bytes {
        file.set_len(capacity_bytes).map_err(|e| fail("cannot size")(&path, e))?;
        file.sync_all().map_err(|source| FileError::Sync { path: path.clone(), source })?;
    }
    Ok(())
}

/// Makes what was written to the file of a volume durable. If that fails, the page cache may hold what the disk does not,
/// so it is dropped.
///
/// # Errors
/// [`FileError::Sync`]; [`FileError::Io`]: the file cannot be opened.
pub fn sync(volumes_dir: &Path, volume_uid: Uuid) -> Result<(), FileError> {
    let path = path(volumes_dir, volume_uid);
    let file = File::open(&path).map_err(|source| FileError::Io {
        action: "cannot open",
        path: path.clone(),
        source,
    })?;
    file.sync_data().map_err(|source| {
        // What is left of it in the cache is looked at when the volume is opened anew.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        FileError::Sync { path: path.clone(), source }
    })
}

/// How often the page cache is told to let go of a file, and how long it then has: what is just being read is not dropped.
const DROP_TRIES: u32 = 50;
const DROP_PAUSE: Duration = Duration::from_millis(20);

fn drop_page_cache(file: &File) -> io::Result<()> {
    // Pages that wait to be written are not dropped. A failure has been told already.
    let _ = file.sync_data();
    for _ in 0..DROP_TRIES {
        rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?;
        // Where that cannot be told, nothing more can be done.
        if !is_any_cached(file).unwrap_or(false) {
            return Ok(());
        }
        std::thread::sleep(DROP_PAUSE);
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "the page cache keeps pages of the file"))
}

/// Deletes the file of a volume, durably. One that is not there is a success.
///
/// # Errors
/// [`FileError::Io`]
pub fn delete(volumes_dir: &Path, volume_uid: Uuid) -> Result<(), FileError> {
    let path = path(volumes_dir, volume_uid);
    match std::fs::remove_file(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(FileError::Io { action: "cannot delete", path, source }),
    }
    sync_directory(volumes_dir)
}

/// The volumes that have a file; names that are not of a volume's form are passed over.
///
/// # Errors
/// [`FileError::Io`]
pub fn list_uids(volumes_dir: &Path) -> Result<Vec<Uuid>, FileError> {
    let fail = |source| FileError::Io { action: "cannot list", path: volumes_dir.into(), source };
    let mut uids = Vec::new();
    for entry in std::fs::read_dir(volumes_dir).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        let uid =
            name.to_str().and_then(|text| Uuid::from_str(text).ok().filter(|uid| uid.to_string() == text));
        uids.extend(uid);
    }
    Ok(uids)
}

/// Bytes of storage that the file takes up now; 0 if there is none.
pub fn allocated_bytes(volumes_dir: &Path, volume_uid: Uuid) -> u64 {
    // st_blocks counts units of 512 bytes whatever the file system's block size.
    std::fs::metadata(path(volumes_dir, volume_uid)).map_or(0, |metadata| metadata.blocks() * 512)
}

/// Opens the file of a volume for serving on `ring_count` rings. The caller has to take the lock before any I/O.
///
/// Blocks smaller than the file system's go through the page cache where it can share blocks among files: once a snapshot shares
/// them, XFS takes only whole ones past the page cache, and what clients were promised would not hold any more.
///
/// # Errors
/// [`FileError`]: it is not there, may not be opened, or is not of the volume's size.
pub fn open(
    volumes_dir: &Path,
    volume_uid: Uuid,
    capacity_bytes: u64,
    block_size_bytes: u32,
    cache: CacheMode,
    ring_count: usize,
) -> Result<FileVolume, FileError> {
    let options = OpenOptions::new().read(true).write(true).clone();
    open_with(&options, path(volumes_dir, volume_uid), capacity_bytes, block_size_bytes, cache, ring_count)
}

/// The same of a snapshot, to be read only. It needs no lock: nobody writes to it.
///
/// # Errors
/// As [`open`].
pub fn open_snapshot(
    snapshots_dir: &Path,
    snapshot_uid: Uuid,
    capacity_bytes: u64,
    block_size_bytes: u32,
    cache: CacheMode,
    ring_count: usize,
) -> Result<FileVolume, FileError> {
    let options = OpenOptions::new().read(true).clone();
    let path = path(snapshots_dir, snapshot_uid);
    open_with(&options, path, capacity_bytes, block_size_bytes, cache, ring_count)
}

fn open_with(
    options: &OpenOptions,
    path: PathBuf,
    capacity_bytes: u64,
    block_size_bytes: u32,
    cache: CacheMode,
    ring_count: usize,
) -> Result<FileVolume, FileError> {
    let fail = |action| move |path: &Path, source| FileError::Io { action, path: path.into(), source };
    let file = options.open(&path).map_err(|e| fail("cannot open")(&path, e))?;
    let metadata = file.metadata().map_err(|e| fail("cannot look at")(&path, e))?;
    let found_bytes = metadata.len();
    // A larger one was about to grow when its server died: nobody has been told of the rest.
    if found_bytes < capacity_bytes {
        return Err(FileError::WrongSize { path, found_bytes, expected_bytes: capacity_bytes });
    }
    let is_rotational = is_rotational(Path::new(BLOCK_DEVICES_DIR), metadata.dev());
    // Opened before the lock is taken: an error that a predecessor never saw is then reported to us.
    let open_again = || File::open(&path).map_err(|e| fail("cannot open")(&path, e));
    let sync_files = (0..ring_count).map(|_| open_again()).collect::<Result<_, _>>()?;
    let direct_alignment_bytes = match cache {
        CacheMode::Auto if has_parts_of_shared_blocks(&file, block_size_bytes) => None,
        CacheMode::Auto => use_direct(&file, capacity_bytes),
        CacheMode::Buffered => None,
    };
    let page_cache = match direct_alignment_bytes {
        None => PageCacheView::new(&file, capacity_bytes).ok(),
        Some(_) => None,
    };
    Ok(FileVolume { file, sync_files, direct_alignment_bytes, page_cache, is_rotational, adopted: None })
}

/// Where Linux tells about a block device by its number.
const BLOCK_DEVICES_DIR: &str = "/sys/dev/block";

/// Whether a block device turns; one that is not known (a file system on several devices, or on none) does not.
fn is_rotational(devices_dir: &Path, device: u64) -> bool {
    let device = devices_dir.join(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)));
    // A partition has no queue; the disk's directory is above its own.
    let queues = [device.join("queue/rotational"), device.join("../queue/rotational")];
    queues.iter().find_map(|path| std::fs::read_to_string(path).ok()).is_some_and(|text| text.trim() == "1")
}

/// Largest alignment that is announced; buffers are aligned to pages, so it cannot be more.
const DIRECT_ALIGNMENT_BYTES_MAX: u32 = 4096;

/// Whether such blocks are parts of those that a snapshot may come to share.
fn has_parts_of_shared_blocks(file: &File, block_size_bytes: u32) -> bool {
    reflink::block_bytes(file).is_some_and(|bytes| block_size_bytes < bytes) && reflink::may_share(file)
}

/// Switches the file to `O_DIRECT` where it can; gives the alignment of offsets and lengths.
fn use_direct(file: &File, capacity_bytes: u64) -> Option<u32> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    // Both are 0 where the file cannot do direct I/O at all.
    let (memory_bytes, offset_bytes) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    let usable = told
        && (1..=DIRECT_ALIGNMENT_BYTES_MAX).contains(&memory_bytes)
        && (1..=DIRECT_ALIGNMENT_BYTES_MAX).contains(&offset_bytes)
        && offset_bytes.is_power_of_two()
        && capacity_bytes.is_multiple_of(u64::from(offset_bytes));
    if !usable {
        return None;
    }
    let flags = rustix::fs::fcntl_getfl(file).ok()?;
    rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT).ok()?;
    Some(offset_bytes)
}

/// The same, where what it can do includes blocks of this size.
fn use_direct_for_blocks(file: &File, size_bytes: u64, block_size_bytes: u32) -> Option<u32> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    if stat.stx_dio_offset_align > block_size_bytes { None } else { use_direct(file, size_bytes) }
}

/// How large an open file or block device is now, in bytes.
///
/// # Errors
/// The system's.
pub(super) fn size_of(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_block_device() {
        return Ok(metadata.len());
    }
    // Nobody uses the position.
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

fn sync_directory(directory: &Path) -> Result<(), FileError> {
    File::open(directory).and_then(|opened| opened.sync_all()).map_err(|source| FileError::Io {
        action: "cannot sync",
        path: directory.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct TempDir(PathBuf);

    impl TempDir {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("volnode-file-{}", Uuid::new_v4()));
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn created_files_are_sparse_listed_and_deleted() {
        let dir = TempDir::new();
        let uid = Uuid::new_v4();
        create(&dir.0, uid, 1 << 30).unwrap();
        create(&dir.0, uid, 1 << 30).unwrap();
        assert!(matches!(create(&dir.0, uid, 1 << 20), Err(FileError::WrongSize { .. })));
        assert!(allocated_bytes(&dir.0, uid) < 1 << 20);
        std::fs::write(dir.0.join("lost+found"), "").unwrap();
        assert_eq!(list_uids(&dir.0).unwrap(), [uid]);
        delete(&dir.0, uid).unwrap();
        delete(&dir.0, uid).unwrap();
        assert!(list_uids(&dir.0).unwrap().is_empty());
    }

    #[test]
    fn a_file_is_locked_by_one_description_at_a_time() {
        let dir = TempDir::new();
        let uid = Uuid::new_v4();
        create(&dir.0, uid, 1 << 20).unwrap();
        let first = open(&dir.0, uid, 1 << 20, 4096, CacheMode::Auto, 1).unwrap();
        let second = open(&dir.0, uid, 1 << 20, 4096, CacheMode::Buffered, 1).unwrap();
        assert!(first.try_lock().unwrap());
        assert!(!second.try_lock().unwrap());
        drop(first);
        assert!(second.try_lock().unwrap());
        assert_eq!(second.alignment_bytes(), 1);
    }

    #[test]
    fn a_file_of_another_size_is_not_served() {
        let dir = TempDir::new();
        let uid = Uuid::new_v4();
        create(&dir.0, uid, 1 << 20).unwrap();
        assert!(matches!(
            open(&dir.0, uid, 2 << 20, 4096, CacheMode::Auto, 1),
            Err(FileError::WrongSize { .. })
        ));
        assert!(matches!(open(&dir.0, Uuid::nil(), 1, 4096, CacheMode::Auto, 1), Err(FileError::Io { .. })));
    }

    #[test]
    fn a_disk_turns_as_the_kernel_says_and_so_do_its_partitions() {
        let dir = TempDir::new();
        for (disk, number, rotational) in [("turns", 0, "1\n"), ("still", 16, "0\n")] {
            let queue = dir.0.join(format!("devices/{disk}/queue"));
            std::fs::create_dir_all(&queue).unwrap();
            std::fs::write(queue.join("rotational"), rotational).unwrap();
            std::fs::create_dir(dir.0.join(format!("devices/{disk}/part"))).unwrap();
            let link = |target: String, number: u32| {
                std::os::unix::fs::symlink(target, dir.0.join(format!("8:{number}"))).unwrap();
            };
            link(format!("devices/{disk}"), number);
            link(format!("devices/{disk}/part"), number + 1);
        }
        let answers = [0, 1, 16, 17, 32].map(|minor| is_rotational(&dir.0, rustix::fs::makedev(8, minor)));
        assert_eq!(answers, [true, true, false, false, false]);
    }
}
