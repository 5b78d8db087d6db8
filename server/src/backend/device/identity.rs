//! Which device it is, whatever its name: WWID, serial, device mapper's or MD's UUID; of a partition its disk's, its number and PARTUUID.
//!
//! Only reads what sysfs and udev tell, below directories that a test may make, and decides ([`choose`]) without asking more. What is
//! written on a device is never looked at: a copy of a disk has the same file system UUID. PARTUUIDs are in a partition table, but the
//! disk's identity stands before them where it has one.
//! A device has several identities where it can: the first is kept, and is looked for among all of them later, since udev may be there
//! at one time and not at another. Loop devices, network block devices and memory have none: what is below them may be another.
//! Called by: `mod.rs`.
//! Source: Documentation/ABI/stable/sysfs-block; `drivers/scsi/scsi_sysfs.c` (wwid), `drivers/nvme/host/sysfs.c` (wwid),
//! `drivers/block/virtio_blk.c` (serial), `drivers/md/dm-sysfs.c`; udev's files in `/run/udev/data`, lines `E:KEY=VALUE`.

use std::path::{Path, PathBuf};

use rustix::fs::{Dev, major, minor};

use super::AdoptError;
use crate::backend::marks::DeviceMarks;
use crate::catalog::Adopted;

/// Names of disks whose storage may be another under the same name, and what those say of themselves tells nothing.
const WITHOUT_IDENTITY: [&str; 6] = ["loop", "nbd", "ram", "zram", "rbd", "ublkb"];
/// Bytes of an identity at most; the longest that SCSI has is some 250.
const IDENTITY_BYTES_MAX: usize = 512;
/// So far down it is looked at what a device is made of; real ones have less.
const DEVICES_BELOW_MAX: usize = 16;

/// Where the kernel and udev tell of devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysfs {
    /// A link for each block device, named by its number.
    pub devices: PathBuf,
    /// A file for each block device, named `b` and its number.
    pub udev: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self { devices: "/sys/dev/block".into(), udev: "/run/udev/data".into() }
    }
}

impl Sysfs {
    /// Of one device.
    fn of(&self, device: Dev) -> Node {
        let number = format!("{}:{}", major(device), minor(device));
        Node { dir: self.devices.join(&number), udev: self.udev.join(format!("b{number}")) }
    }

    fn all(&self) -> Vec<Node> {
        let Ok(entries) = std::fs::read_dir(&self.devices) else { return Vec::new() };
        let numbers = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        numbers
            .map(|number| Node {
                dir: self.devices.join(&number),
                udev: self.udev.join(format!("b{number}")),
            })
            .collect()
    }
}

/// A device in sysfs, and udev's file of it.
#[derive(Debug)]
struct Node {
    dir: PathBuf,
    udev: PathBuf,
}

impl Node {
    fn word(&self, attribute: &str) -> Option<String> {
        std::fs::read_to_string(self.dir.join(attribute)).ok().as_deref().and_then(word)
    }

    fn uevent(&self, key: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.dir.join("uevent")).ok()?;
        text.lines().find_map(|line| word(line.strip_prefix(key)?.strip_prefix('=')?))
    }

    fn told_by_udev(&self, key: &str) -> Option<String> {
        let text = std::fs::read_to_string(&self.udev).ok()?;
        text.lines().find_map(|line| word(line.strip_prefix("E:")?.strip_prefix(key)?.strip_prefix('=')?))
    }

    fn is_partition(&self) -> bool {
        self.dir.join("partition").exists()
    }

    /// The disk that a partition is of.
    fn disk(&self) -> Option<Self> {
        let number = std::fs::read_to_string(self.dir.join("../dev")).ok()?;
        let udev = self.udev.with_file_name(format!("b{}", number.trim()));
        // The link is followed before the dots are.
        Some(Self { dir: self.dir.join(".."), udev })
    }

    fn identities(&self) -> Vec<String> {
        if self.is_partition() { self.identities_of_partition() } else { self.identities_of_disk() }
    }

    fn identities_of_disk(&self) -> Vec<String> {
        let kept = |kind: &str, found: Option<String>| found.map(|found| format!("{kind}:{found}"));
        if self.dir.join("dm").is_dir() {
            return kept("dm-uuid", self.word("dm/uuid")).into_iter().collect();
        }
        if self.dir.join("md").is_dir() {
            let uuid = self.word("md/uuid").or_else(|| self.told_by_udev("MD_UUID"));
            return kept("md-uuid", uuid).into_iter().collect();
        }
        let name = self.uevent("DEVNAME").unwrap_or_default();
        let kind = name.trim_end_matches(|c: char| c.is_ascii_digit());
        if WITHOUT_IDENTITY.contains(&kind) {
            return Vec::new();
        }
        let of_controller = name.starts_with("nvme");
        let found = [
            // NVMe, and SCSI.
            kept("wwid", self.word("wwid").or_else(|| self.word("device/wwid"))),
            // virtio, and MMC. The serial of an NVMe device is its controller's, which has several.
            kept("serial", self.word("serial")),
            kept("serial", self.word("device/cid").or_else(|| self.word("device/serial")))
                .filter(|_| !of_controller),
            kept("wwn", self.told_by_udev("ID_WWN_WITH_EXTENSION")),
            kept("udev-serial", self.told_by_udev("ID_SERIAL")),
        ];
        let mut identities: Vec<String> = Vec::new();
        for identity in found.into_iter().flatten() {
            if !identities.contains(&identity) {
                identities.push(identity);
            }
        }
        identities
    }

    fn identities_of_partition(&self) -> Vec<String> {
        let Some(number) = self.word("partition") else { return Vec::new() };
        let uuid = self.uevent("PARTUUID").or_else(|| self.told_by_udev("ID_PART_ENTRY_UUID"));
        let uuid = uuid.map(|uuid| uuid.to_ascii_lowercase()).filter(|uuid| !is_of_nameless_table(uuid));
        let mut identities = Vec::new();
        let of_disk = self.disk().map_or_else(Vec::new, |disk| disk.identities_of_disk());
        if let Some(uuid) = &uuid {
            identities.extend(of_disk.iter().map(|disk| format!("{disk}/part{number}/{uuid}")));
        }
        identities.extend(of_disk.iter().map(|disk| format!("{disk}/part{number}")));
        identities.extend(uuid.map(|uuid| format!("partuuid:{uuid}")));
        identities
    }
}

/// What says something, in one word; what many devices say because nobody gave them a number says nothing.
fn word(text: &str) -> Option<String> {
    let word = text.split_whitespace().collect::<Vec<_>>().join("_");
    let number = word.split_once('.').map_or(word.as_str(), |(_, number)| number);
    let says_nothing = number.chars().all(|c| matches!(c, '0' | '-' | ':' | '_'));
    let is_kept =
        !says_nothing && word.len() <= IDENTITY_BYTES_MAX && word.bytes().all(|b| b.is_ascii_graphic());
    is_kept.then_some(word)
}

/// Whether a PARTUUID is of a partition table without a number of its own: many have the same.
fn is_of_nameless_table(uuid: &str) -> bool {
    uuid.rsplit_once('-').is_some_and(|(table, _)| table.chars().all(|c| matches!(c, '0' | '-')))
}

/// All identities of a device, the best first; none where it has nothing of the kind.
pub(super) fn of(sysfs: &Sysfs, device: Dev) -> Vec<String> {
    sysfs.of(device).identities()
}

/// Where the devices of this identity are, as the kernel names them in /dev.
pub(super) fn named(sysfs: &Sysfs, identity: &str) -> Vec<String> {
    let is_it = |node: &Node| node.identities().iter().any(|one| one == identity);
    let name = |node: Node| Some(format!("/dev/{}", node.uevent("DEVNAME")?));
    let mut paths: Vec<String> = sysfs.all().into_iter().filter(is_it).filter_map(name).collect();
    paths.sort();
    paths
}

/// The best identity of a device that no other device has; `None`: there is none.
pub(super) fn unique(sysfs: &Sysfs, device: Dev) -> Option<String> {
    of(sysfs, device).into_iter().find(|identity| named(sysfs, identity).len() == 1)
}

/// The name that device mapper has for the device of this identity.
pub(super) fn mapper_name(sysfs: &Sysfs, identity: &str) -> Option<String> {
    let is_it = |node: &Node| node.identities().iter().any(|one| one == identity);
    sysfs.all().into_iter().find(is_it)?.word("dm/name")
}

/// What volnode itself has made: the device, its disk, or one that it is made of, however far below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OurOwn {
    /// A disk of the client on this machine.
    ClientsDisk,
    /// A volume or snapshot in a thin pool.
    ThinVolume,
}

/// Whether the device is volnode's own.
pub(super) fn our_own(sysfs: &Sysfs, device: Dev) -> Option<OurOwn> {
    our_own_below(sysfs.of(device).dir, DEVICES_BELOW_MAX)
}

fn our_own_below(dir: PathBuf, levels: usize) -> Option<OurOwn> {
    let node = Node { dir, udev: PathBuf::new() };
    let disk = if node.is_partition() { node.disk()? } else { node };
    if disk.uevent("DEVNAME").is_some_and(|name| name.starts_with("ublkb")) {
        return Some(OurOwn::ClientsDisk);
    }
    // Device mapper writes each hyphen of a logical volume's name twice, and one before that name.
    if disk.word("dm/name").is_some_and(|name| name.contains("-volnode--")) {
        return Some(OurOwn::ThinVolume);
    }
    let slaves = disk.dir.join("slaves");
    let below = if levels == 0 { Vec::new() } else { names_in(&slaves) };
    below.into_iter().find_map(|name| our_own_below(slaves.join(name), levels - 1))
}

/// What tells whether the device is what it was.
pub(super) fn marks(sysfs: &Sysfs, device: Dev, adopted: &Adopted) -> DeviceMarks {
    let identity = if adopted.identity.is_empty() { &adopted.path } else { &adopted.identity };
    DeviceMarks { identity: identity.clone(), sysfs_dir: sysfs.of(device).dir }
}

/// Whether the device writes zeroes by itself, and not the kernel page after page.
pub(super) fn zeroes_fast(sysfs: &Sysfs, device: Dev) -> bool {
    let dir = sysfs.of(device).dir;
    // A partition has no queue; its disk has.
    let paths =
        ["queue/write_zeroes_max_bytes", "../queue/write_zeroes_max_bytes"].map(|path| dir.join(path));
    let text = paths.iter().find_map(|path: &PathBuf| std::fs::read_to_string(path).ok());
    text.is_some_and(|text| text.trim() != "0")
}

/// What holds a device or one of its partitions, as sysfs tells: names of devices.
pub(super) fn holders(sysfs: &Sysfs, device: Dev) -> Vec<String> {
    let node = sysfs.of(device);
    let mut names = names_in(&node.dir.join("holders"));
    for partition in partitions(&node.dir) {
        names.extend(names_in(&partition.join("holders")));
    }
    names
}

/// The numbers, as `MAJOR:MINOR`, of the device and of its partitions.
pub(super) fn numbers(sysfs: &Sysfs, device: Dev) -> Vec<String> {
    let of_partitions = partitions(&sysfs.of(device).dir).into_iter();
    let of_partitions = of_partitions.filter_map(|dir| std::fs::read_to_string(dir.join("dev")).ok());
    std::iter::once(format!("{}:{}", major(device), minor(device)))
        .chain(of_partitions.map(|number| number.trim().to_owned()))
        .collect()
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn partitions(dir: &Path) -> Vec<PathBuf> {
    names_in(dir)
        .into_iter()
        .map(|name| dir.join(name))
        .filter(|dir| dir.join("partition").exists())
        .collect()
}

/// What is at the path where the volume's device was last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// All that it is known by.
    pub identities: Vec<String>,
    /// Its size.
    pub size_bytes: u64,
    /// A block device, and not something else.
    pub is_device: bool,
}

/// Where an adopted device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Where it was.
    AtPath,
    /// There.
    Elsewhere(String),
}

/// Decides where the device of a volume of `capacity_bytes` is: by its identity, and where it has none by path and size; `None`:
/// whatever its size. `named` gives the paths of all devices that have the identity.
///
/// # Errors
/// [`AdoptError::Missing`], [`AdoptError::Another`], [`AdoptError::Ambiguous`].
pub fn choose(
    adopted: &Adopted,
    capacity_bytes: Option<u64>,
    at_path: Option<&Candidate>,
    named: impl FnOnce() -> Vec<String>,
) -> Result<Place, AdoptError> {
    let (path, identity) = (adopted.path.clone(), adopted.identity.clone());
    let at_path = at_path.filter(|candidate| candidate.is_device);
    if identity.is_empty() {
        let Some(candidate) = at_path else {
            return Err(AdoptError::Missing { path, identity: "at that path".to_owned() });
        };
        let Some(capacity_bytes) = capacity_bytes.filter(|bytes| *bytes != candidate.size_bytes) else {
            return Ok(Place::AtPath);
        };
        let found = format!("one of {} bytes", candidate.size_bytes);
        return Err(AdoptError::Another { path, found, wanted: format!("one of {capacity_bytes} bytes") });
    }
    let mut paths = named();
    // Of several that say the same of themselves nothing tells which one was adopted.
    if paths.len() <= 1 && at_path.is_some_and(|candidate| candidate.identities.contains(&identity)) {
        return Ok(Place::AtPath);
    }
    match (paths.len(), at_path) {
        (1, _) => Ok(Place::Elsewhere(paths.remove(0))),
        (0, Some(candidate)) => {
            let found =
                candidate.identities.first().cloned().unwrap_or_else(|| "one without an identity".to_owned());
            Err(AdoptError::Another { path, found, wanted: identity })
        }
        (0, None) => Err(AdoptError::Missing { path, identity }),
        _ => Err(AdoptError::Ambiguous { identity, paths: paths.join(", ") }),
    }
}
