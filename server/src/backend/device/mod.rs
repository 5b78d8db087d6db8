//! Volumes over what is somebody else's: an existing block device or raw file, served as it is.
//!
//! Owns: what may be adopted ([`adopt`]), where that is now ([`find`]), and opening it for serving ([`open`]). Never: formats, resizes
//! or deletes it, or writes to it by itself; never takes what is written on it for what it is.
//! Called by: `data_side.rs` (adopt, look, sync) and `gate/opener.rs` (open).
//! Invariants: a device or file is opened once, by a way that no symbolic link has a part in (`path.rs`), and held by that descriptor;
//! whatever else is opened of it is opened of that descriptor. A block device is served under `O_EXCL`, which keeps out mounts, swap,
//! device mapper, MD and other servers; a file under the `flock` that volumes' files have.
//! `identity.rs` says which device it is, `holder.rs` who else has it.

mod holder;
mod identity;
mod path;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use file_lock::lock_alone;
use rustix::fs::{OFlags, ioctl_blksszget};

use super::file::{CacheMode, FileVolume, size_of};
use super::marks::DeviceMarks;
use crate::catalog::{Adopted, AdoptedKind};
use identity::OurOwn;
pub use identity::{Candidate, Place, Sysfs, choose};

/// Sizes of block that a volume may have.
const BLOCK_SIZES_BYTES: [u32; 2] = [512, 4096];
/// A predecessor's last I/O holds its claim for as long as that takes; whoever holds it longer is another.
const CLAIM_LIMIT: Duration = Duration::from_secs(30);
const CLAIM_PAUSE: Duration = Duration::from_millis(50);

/// Why something cannot be adopted, or what was adopted cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// It is no path that can be looked at.
    #[error("{0} is not an absolute path without \".\", \"..\" and empty parts")]
    BadPath(String),
    /// `--adopt-allow` does not name it.
    #[error("{path} is not below what this server's --adopt-allow names ({})", told(.allowed))]
    NotAllowed {
        /// What was to be adopted.
        path: String,
        /// What it may be below.
        allowed: Vec<PathBuf>,
    },
    /// There is a symbolic link on the way.
    #[error("{link} is a symbolic link to {target}, and links are not followed")]
    Link {
        /// The first on the way.
        link: String,
        /// Where it points to.
        target: String,
        /// The same place without links; empty where it leads nowhere.
        instead: String,
    },
    /// It cannot be opened or looked at.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: String,
        /// The system's own error.
        source: io::Error,
    },
    /// It is nothing that can be served.
    #[error("{path} {why}")]
    Unsuitable {
        /// What.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// Something else has it.
    #[error("{path} is in use{by}")]
    InUse {
        /// What.
        path: String,
        /// By whom, as " by ..."; empty where that is not known.
        by: String,
    },
    /// Another volume has it.
    #[error("{path} is adopted already, by the volume {name}")]
    Adopted {
        /// What.
        path: String,
        /// The other volume.
        name: String,
    },
    /// No such device is there.
    #[error("there is no device {identity}, which was at {path}")]
    Missing {
        /// Where it was.
        path: String,
        /// What it is known by.
        identity: String,
    },
    /// Another one is in its place.
    #[error("another device is at {path} now: {found}, not {wanted}")]
    Another {
        /// Where.
        path: String,
        /// What is known of it.
        found: String,
        /// What was adopted.
        wanted: String,
    },
    /// Several have its identity.
    #[error("several devices are {identity}: {paths}")]
    Ambiguous {
        /// What it is known by.
        identity: String,
        /// Where they are.
        paths: String,
    },
    /// The device is smaller than it was.
    #[error(
        "{path} has {found_bytes} bytes, and had {expected_bytes}: what is behind its end is gone, and I/O there fails"
    )]
    Shrunk {
        /// Where.
        path: String,
        /// What it has.
        found_bytes: u64,
        /// What the volume has.
        expected_bytes: u64,
    },
}

fn told(allowed: &[PathBuf]) -> String {
    if allowed.is_empty() {
        return "nothing".to_owned();
    }
    let paths: Vec<String> = allowed.iter().map(|path| path.display().to_string()).collect();
    paths.join(", ")
}

impl AdoptError {
    fn io(action: &'static str, path: &str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    fn unsuitable(path: &str, why: impl Into<String>) -> Self {
        Self::Unsuitable { path: path.to_owned(), why: why.into() }
    }
}

/// What may be adopted, and where the kernel tells of devices.
#[derive(Debug, Clone, Default)]
pub struct Adoptable {
    /// What `--adopt-allow` names.
    pub allowed: Vec<PathBuf>,
    /// Nothing below it is adopted: the server's own.
    pub data_dir: PathBuf,
    /// Where Linux tells of block devices.
    pub sysfs: Sysfs,
}

/// What an adopted volume gets its properties from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// By what it is found again.
    pub adopted: Adopted,
    /// Its size.
    pub size_bytes: u64,
    /// Its logical block size; of a file the smallest there is.
    pub block_size_bytes: u32,
}

/// Looks whether what is at the path can be adopted, and at what that is. Leaves nothing open.
///
/// # Errors
/// [`AdoptError`]
pub fn adopt(adoptable: &Adoptable, path: &str) -> Result<Found, AdoptError> {
    let place = path::resolve(adoptable, path)?;
    let kind = kind_of(&place, path)?;
    let mut found = look_at(adoptable, &place, kind, path)?;
    if kind == AdoptedKind::BlockDevice {
        refuse_our_own(&adoptable.sysfs, &place, path)?;
        let device = place.metadata().map_err(AdoptError::io("look at", path))?.rdev();
        found.adopted.identity = identity::unique(&adoptable.sysfs, device).unwrap_or_default();
    }
    if found.size_bytes == 0 || !found.size_bytes.is_multiple_of(u64::from(found.block_size_bytes)) {
        let why = format!(
            "has {} bytes, which is not a number of whole blocks of {} bytes",
            found.size_bytes, found.block_size_bytes
        );
        return Err(AdoptError::unsuitable(path, why));
    }
    if !BLOCK_SIZES_BYTES.contains(&found.block_size_bytes) {
        let why = format!("has blocks of {} bytes; volumes have 512 or 4096", found.block_size_bytes);
        return Err(AdoptError::unsuitable(path, why));
    }
    claim(adoptable, &place, &found.adopted, Duration::ZERO)?;
    Ok(found)
}

/// Where the volume's device or file is now, and how large. `None` for its size: what has no identity is not known by its size either.
///
/// # Errors
/// [`AdoptError`]: it is not there, or something else is.
pub fn find(
    adoptable: &Adoptable,
    adopted: &Adopted,
    capacity_bytes: Option<u64>,
) -> Result<Found, AdoptError> {
    Ok(place_of(adoptable, adopted, capacity_bytes)?.1)
}

/// Opens the volume's device or file for serving on `ring_count` rings, with no more than one user at a time. Waits for a
/// predecessor's last I/O, on a thread that may wait. The size that it has now is in what is found; it may be larger than it was.
///
/// # Errors
/// [`AdoptError`]
pub fn open(
    adoptable: &Adoptable,
    adopted: &Adopted,
    capacity_bytes: u64,
    block_size_bytes: u32,
    cache: CacheMode,
    ring_count: usize,
) -> Result<(FileVolume, Found), AdoptError> {
    let (place, found) = place_of(adoptable, adopted, Some(capacity_bytes))?;
    let path = found.adopted.path.as_str();
    if found.size_bytes < capacity_bytes {
        let (path, found_bytes) = (path.to_owned(), found.size_bytes);
        return Err(AdoptError::Shrunk { path, found_bytes, expected_bytes: capacity_bytes });
    }
    let again = || reopen(&place, OpenOptions::new().read(true)).map_err(AdoptError::io("open", path));
    // Opened before it is claimed: an error that a predecessor never saw is then reported to us.
    let sync_files = (0..ring_count).map(|_| again()).collect::<Result<_, _>>()?;
    let file = claim(adoptable, &place, &found.adopted, CLAIM_LIMIT)?;
    let volume = match adopted.kind {
        AdoptedKind::RawFile => {
            FileVolume::over_raw_file(file, sync_files, found.size_bytes, block_size_bytes, cache)
        }
        AdoptedKind::BlockDevice => {
            let device = file.metadata().map_err(AdoptError::io("look at", path))?.rdev();
            let marks = identity::marks(&adoptable.sysfs, device, &found.adopted);
            let zeroes_fast = identity::zeroes_fast(&adoptable.sysfs, device);
            FileVolume::over_block_device(
                file,
                sync_files,
                found.size_bytes,
                block_size_bytes,
                marks,
                zeroes_fast,
            )
            .map_err(AdoptError::io("use O_DIRECT on", path))?
        }
    };
    Ok((volume, found))
}

/// What there is to compare of a volume's device or file with what is remembered of it.
#[derive(Debug)]
pub enum ToCompare {
    /// Of a device.
    Device(DeviceMarks),
    /// A raw file, open for reading.
    RawFile(File),
}

/// Where that of the volume is, without a claim: somebody else may be about to serve it.
///
/// # Errors
/// [`AdoptError`]: it is not there, or something else is.
pub fn to_compare(
    adoptable: &Adoptable,
    adopted: &Adopted,
    capacity_bytes: u64,
) -> Result<ToCompare, AdoptError> {
    let (place, found) = place_of(adoptable, adopted, Some(capacity_bytes))?;
    let path = &found.adopted.path;
    if found.adopted.kind == AdoptedKind::RawFile {
        let file = reopen(&place, OpenOptions::new().read(true)).map_err(AdoptError::io("open", path))?;
        return Ok(ToCompare::RawFile(file));
    }
    let device = place.metadata().map_err(AdoptError::io("look at", path))?.rdev();
    Ok(ToCompare::Device(identity::marks(&adoptable.sysfs, device, &found.adopted)))
}

/// Makes what was written to the volume's device or file durable.
///
/// # Errors
/// [`AdoptError`]: it is not there; or the system's: the sync failed.
pub fn sync(
    adoptable: &Adoptable,
    adopted: &Adopted,
    capacity_bytes: u64,
) -> Result<io::Result<()>, AdoptError> {
    let (place, found) = place_of(adoptable, adopted, Some(capacity_bytes))?;
    let file = reopen(&place, OpenOptions::new().read(true));
    let file = file.map_err(AdoptError::io("open", &found.adopted.path))?;
    is_still(&adoptable.sysfs, &file, &found.adopted)?;
    Ok(file.sync_data())
}

/// The same description's inode, opened anew: whatever has its name by now.
fn reopen(place: &File, options: &OpenOptions) -> io::Result<File> {
    options.open(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

fn kind_of(place: &File, path: &str) -> Result<AdoptedKind, AdoptError> {
    let file_type = place.metadata().map_err(AdoptError::io("look at", path))?.file_type();
    if file_type.is_block_device() {
        return Ok(AdoptedKind::BlockDevice);
    }
    if file_type.is_file() {
        return Ok(AdoptedKind::RawFile);
    }
    Err(AdoptError::unsuitable(path, "is neither a block device nor a regular file"))
}

fn look_at(adoptable: &Adoptable, place: &File, kind: AdoptedKind, path: &str) -> Result<Found, AdoptError> {
    let metadata = place.metadata().map_err(AdoptError::io("look at", path))?;
    if kind == AdoptedKind::RawFile {
        let adopted = Adopted { kind, path: path.to_owned(), identity: String::new() };
        return Ok(Found { adopted, size_bytes: metadata.len(), block_size_bytes: BLOCK_SIZES_BYTES[0] });
    }
    let identity = identity::of(&adoptable.sysfs, metadata.rdev()).into_iter().next().unwrap_or_default();
    // Without a claim, and for a moment: the size and the block size are the device's to tell.
    let device = reopen(place, OpenOptions::new().read(true)).map_err(AdoptError::io("open", path))?;
    let size_bytes = size_of(&device).map_err(AdoptError::io("measure", path))?;
    let block_size_bytes =
        ioctl_blksszget(&device).map_err(|errno| AdoptError::io("measure", path)(errno.into()))?;
    let adopted = Adopted { kind, path: path.to_owned(), identity };
    Ok(Found { adopted, size_bytes, block_size_bytes })
}

/// What volnode made itself: a disk of its client, which would wait for itself if it is this server's, or what is another volume's.
fn refuse_our_own(sysfs: &Sysfs, place: &File, path: &str) -> Result<(), AdoptError> {
    let device = place.metadata().map_err(AdoptError::io("look at", path))?.rdev();
    let why = match identity::our_own(sysfs, device) {
        None => return Ok(()),
        Some(OurOwn::ClientsDisk) => "is a disk of volnode's own client on this machine, or made of one",
        Some(OurOwn::ThinVolume) => "is a volume or snapshot of a volnode server's thin pool, or made of one",
    };
    Err(AdoptError::unsuitable(path, why))
}

/// The place of what was adopted, found by what it is known by.
fn place_of(
    adoptable: &Adoptable,
    adopted: &Adopted,
    capacity_bytes: Option<u64>,
) -> Result<(File, Found), AdoptError> {
    let at_path = path::resolve(adoptable, &adopted.path).and_then(|place| {
        let kind = kind_of(&place, &adopted.path)?;
        let found = look_at(adoptable, &place, kind, &adopted.path)?;
        Ok((place, found))
    });
    if adopted.kind == AdoptedKind::RawFile {
        let (place, found) = at_path?;
        if found.adopted.kind != adopted.kind {
            let (path, wanted) = (adopted.path.clone(), "a file".to_owned());
            return Err(AdoptError::Another { path, found: "a block device".to_owned(), wanted });
        }
        return Ok((place, found));
    }
    // Without an identity it is nowhere else, and why it is not there is known best here.
    if at_path.is_err() && adopted.identity.is_empty() {
        return at_path;
    }
    let candidate = at_path.ok().and_then(|(place, found)| {
        let device = place.metadata().ok()?.rdev();
        let identities = match found.adopted.kind {
            AdoptedKind::BlockDevice => identity::of(&adoptable.sysfs, device),
            AdoptedKind::RawFile => Vec::new(),
        };
        let size_bytes = found.size_bytes;
        let is_device = found.adopted.kind == AdoptedKind::BlockDevice;
        Some((Candidate { identities, size_bytes, is_device }, place, found))
    });
    let (at_path, opened) = match candidate {
        Some((candidate, place, found)) => (Some(candidate), Some((place, found))),
        None => (None, None),
    };
    let elsewhere = || identity::named(&adoptable.sysfs, &adopted.identity);
    match choose(adopted, capacity_bytes, at_path.as_ref(), elsewhere)? {
        Place::AtPath => {
            let (place, mut found) = opened.ok_or_else(|| AdoptError::Missing {
                path: adopted.path.clone(),
                identity: adopted.identity.clone(),
            })?;
            // One of several that it has, as it was chosen first.
            found.adopted.identity.clone_from(&adopted.identity);
            Ok((place, found))
        }
        Place::Elsewhere(path) => {
            let place = path::resolve(adoptable, &path)?;
            let mut found = look_at(adoptable, &place, AdoptedKind::BlockDevice, &path)?;
            let device = place.metadata().map_err(AdoptError::io("look at", &path))?.rdev();
            if !identity::of(&adoptable.sysfs, device).contains(&adopted.identity) {
                let wanted = adopted.identity.clone();
                return Err(AdoptError::Another { path, found: found.adopted.identity, wanted });
            }
            found.adopted.identity.clone_from(&adopted.identity);
            Ok((place, found))
        }
    }
}

/// Opens it so that nobody else has it: waits up to so long for a predecessor, and for nobody who is known to be another.
fn claim(
    adoptable: &Adoptable,
    place: &File,
    adopted: &Adopted,
    at_most: Duration,
) -> Result<File, AdoptError> {
    let (path, deadline) = (adopted.path.as_str(), Instant::now() + at_most);
    loop {
        if let Some(file) = try_to_claim(place, adopted.kind).map_err(AdoptError::io("open", path))? {
            is_still(&adoptable.sysfs, &file, adopted)?;
            return Ok(file);
        }
        let by = match adopted.kind {
            AdoptedKind::BlockDevice => {
                let device = place.metadata().map_err(AdoptError::io("look at", path))?.rdev();
                holder::of(&adoptable.sysfs, device)
            }
            AdoptedKind::RawFile => None,
        };
        if by.is_some() || Instant::now() >= deadline {
            let by = by.map(|by| format!(" by {by}")).unwrap_or_default();
            return Err(AdoptError::InUse { path: path.to_owned(), by });
        }
        std::thread::sleep(CLAIM_PAUSE);
    }
}

/// Looks again at what is open now: until then the kernel may have given the number to another device.
fn is_still(sysfs: &Sysfs, opened: &File, adopted: &Adopted) -> Result<(), AdoptError> {
    if adopted.kind == AdoptedKind::RawFile || adopted.identity.is_empty() {
        return Ok(());
    }
    let device = opened.metadata().map_err(AdoptError::io("look at", &adopted.path))?.rdev();
    let identities = identity::of(sysfs, device);
    if identities.contains(&adopted.identity) {
        return Ok(());
    }
    let (path, wanted) = (adopted.path.clone(), adopted.identity.clone());
    let found = identities.into_iter().next().unwrap_or_else(|| "one without an identity".to_owned());
    Err(AdoptError::Another { path, found, wanted })
}

/// All identities of the block device at the path, the best first, without a claim; of a file there are none.
///
/// # Errors
/// [`AdoptError`]: it may not be adopted, or is not there.
pub fn identities_at(adoptable: &Adoptable, path: &str) -> Result<Vec<String>, AdoptError> {
    let place = path::resolve(adoptable, path)?;
    if kind_of(&place, path)? == AdoptedKind::RawFile {
        return Ok(Vec::new());
    }
    let device = place.metadata().map_err(AdoptError::io("look at", path))?.rdev();
    Ok(identity::of(&adoptable.sysfs, device))
}

/// The name that device mapper has for the device of this identity; `None`: it is none of device mapper's, or is not there.
pub fn mapper_name(sysfs: &Sysfs, identity: &str) -> Option<String> {
    identity::mapper_name(sysfs, identity)
}

/// `None`: somebody else has it.
fn try_to_claim(place: &File, kind: AdoptedKind) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if kind == AdoptedKind::BlockDevice {
        options.custom_flags(OFlags::EXCL.bits() as i32);
        return match reopen(place, &options) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(None),
            opened => opened.map(Some),
        };
    }
    let file = reopen(place, &options)?;
    Ok(lock_alone(&file)?.then_some(file))
}

/// Whether the path is one of the server's own, or below one.
fn is_below(path: &Path, dir: &Path) -> bool {
    // One that is not there has nothing below it.
    std::fs::canonicalize(dir).is_ok_and(|dir| path.starts_with(dir))
}
