//! Who has a block device open: what a refused detach tells the user.
//!
//! Looks, never touches: reads /proc and /sys. A user of the disk or of one of its partitions is a mount (in any mount
//! namespace), a stacked device (device mapper, md, bcache, loop), a storage target, a swap area, or a process with a file
//! descriptor. The kernel decides whether a device is in use, as far as it can be asked (`safe_stop`); this puts names to it, so
//! everything that cannot be read (a process that just ended, a namespace that is not ours to see) is passed over.
//! Called by: `safe_stop`, and `take_away` for what is to be unmounted.
//! Source: proc(5) `mountinfo`, `swaps`, `fd`; Documentation/ABI/testing/sysfs-block, Linux 7.3.

mod file_systems;
mod kernel;

pub use file_systems::{MountedFileSystem, file_systems_on, mounts_of_device};

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};

/// Processes named at most; the rest are counted.
const PROCESSES_NAMED_MAX: usize = 8;

/// Major and minor number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct DeviceNumber {
    major: u32,
    minor: u32,
}

impl DeviceNumber {
    /// Reads `259:3`, as sysfs `dev` files and mountinfo have it.
    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

/// The disk or one of its partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
struct BlockDevice {
    /// Kernel name, such as `ublkb0p1`.
    name: String,
    /// `None` once the kernel has removed the disk (its mounts may outlive it).
    number: Option<DeviceNumber>,
    /// Its folder in sysfs.
    sys_path: PathBuf,
}

impl BlockDevice {
    /// Whether a path that a table names (`/dev/ublkb0`, or a link to it) is this device.
    fn is_at(&self, path: &str) -> bool {
        let Some(in_dev) = path.strip_prefix("/dev/") else { return false };
        in_dev == self.name || (self.number.is_some() && block_device_number(Path::new(path)) == self.number)
    }
}

/// What a device is to a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The file system lies on it, on others too perhaps.
    FileSystem,
    /// The journal lies on it (XFS, `logdev=`).
    Journal,
    /// Files' data lies on it (XFS, `rtdev=`).
    RealTime,
}

impl Role {
    /// What of the mount point the device is, for people.
    fn words(self) -> &'static str {
        match self {
            Self::FileSystem => "mounted on",
            Self::Journal => "the journal of",
            Self::RealTime => "the real-time section of",
        }
    }
}

/// Who uses `/dev/ublkb<dev_id>` or a partition of it, for people: "mounted on /mnt/data", "used by dm-0 (vault)",
/// "swap area /dev/ublkb0p2", "open by pid 123 (fio)". Empty when nobody is seen.
pub fn holders(dev_id: u32) -> Vec<String> {
    holders_of_disk(&format!("ublkb{dev_id}"))
}

/// The same of any disk, by the kernel's name of it.
pub fn holders_of_disk(disk: &str) -> Vec<String> {
    holders_below(Path::new("/proc"), Path::new("/sys"), disk)
}

/// The mounts in this process's mount namespace that need `/dev/ublkb<dev_id>` or a partition of it, the last one first.
pub(super) fn mounted_on(dev_id: u32) -> Vec<PathBuf> {
    let sys = Path::new("/sys");
    // Of an encrypted disk they are of the one above it.
    let devices = with_btrfs_members(sys, &kernel::with_stacked(sys, &disk_and_partitions(sys, dev_id)));
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<PathBuf> =
        mount_points(&mountinfo, &devices).map(|(_, point)| PathBuf::from(point)).collect();
    points.reverse();
    points
}

fn holders_below(proc: &Path, sys: &Path, disk: &str) -> Vec<String> {
    let devices = disk_with_partitions(sys, disk);
    let mut found = mounts(proc, &with_btrfs_members(sys, &devices));
    found.extend(kernel::external_journals(proc, &devices));
    found.extend(kernel::stacked_devices(sys, &devices));
    // As the machine has it mounted: a device process sees few mounts, and none that came after it.
    found.extend(kernel::served(&proc.join("1/root/sys/kernel/config"), &devices));
    let swaps = fs::read_to_string(proc.join("swaps")).unwrap_or_default();
    found.extend(swap_areas(&swaps, &devices));
    found.extend(processes(proc, &devices));
    found
}

fn with_btrfs_members(sys: &Path, devices: &[BlockDevice]) -> Vec<BlockDevice> {
    let mut all = devices.to_vec();
    all.extend(kernel::btrfs_members(sys, devices));
    all
}

fn disk_and_partitions(sys: &Path, dev_id: u32) -> Vec<BlockDevice> {
    disk_with_partitions(sys, &format!("ublkb{dev_id}"))
}

fn disk_with_partitions(sys: &Path, name: &str) -> Vec<BlockDevice> {
    let sys_path = sys.join("block").join(name);
    let mut devices = vec![block_device(name.to_owned(), sys_path.clone())];
    for (name, path) in entries(&sys_path) {
        if path.join("partition").exists() {
            devices.push(block_device(name, path));
        }
    }
    devices
}

fn block_device(name: String, sys_path: PathBuf) -> BlockDevice {
    let number = fs::read_to_string(sys_path.join("dev")).ok().and_then(|text| DeviceNumber::parse(&text));
    BlockDevice { name, number, sys_path }
}

/// Mounts in every mount namespace that some process is in; each namespace is read once. That of process 1, which is
/// the one people mean, comes first and is not named: a device process is in one of its own.
fn mounts(proc: &Path, devices: &[BlockDevice]) -> Vec<String> {
    let mut namespaces_seen = HashSet::new();
    let mut found = Vec::new();
    for (pid, process) in process_folders(proc) {
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if !namespaces_seen.insert(namespace) {
            continue;
        }
        let place = match pid {
            1 => String::new(),
            _ => format!(" in the mount namespace of pid {pid} ({})", command_name(&process)),
        };
        let mountinfo = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        let words = |(role, point): (Role, String)| format!("{} {point}{place}", role.words());
        found.extend(mount_points(&mountinfo, devices).map(words));
    }
    found
}

/// The mount points of these devices in a `mountinfo` text, and what the devices are to them. A file system that has a device
/// number of its own (btrfs) is recognised by its source.
fn mount_points<'a>(
    mountinfo: &'a str,
    devices: &'a [BlockDevice],
) -> impl Iterator<Item = (Role, String)> + 'a {
    mounts_of(mountinfo, devices).map(|found| (found.role, found.point))
}

/// A mount that needs one of some devices, as `mountinfo` has it.
struct MountFound {
    id: u64,
    number: DeviceNumber,
    point: String,
    role: Role,
    /// Its file system says so, or its device number; not only its source, which may be any text that whoever mounted it has chosen.
    is_sure: bool,
}

fn mounts_of<'a>(mountinfo: &'a str, devices: &'a [BlockDevice]) -> impl Iterator<Item = MountFound> + 'a {
    mountinfo.lines().filter_map(move |line| {
        let mut fields = line.split(' ');
        let id = fields.next()?.parse().ok()?;
        let number = DeviceNumber::parse(fields.nth(1)?)?;
        let point = unescape(fields.nth(1)?);
        // File system, source, options of the file system.
        let mut fields = line.split_once(" - ")?.1.split(' ');
        let kind = fields.next()?;
        let (source, options) = (unescape(fields.next()?), fields.next().unwrap_or_default());
        let is_at = |path: &str| devices.iter().any(|device| device.is_at(path));
        let has_number = devices.iter().any(|device| device.number == Some(number));
        if has_number || is_at(&source) {
            // A btrfs has numbers of its own.
            let is_sure = has_number || kind == "btrfs";
            return Some(MountFound { id, number, point, role: Role::FileSystem, is_sure });
        }
        let role = options.split(',').find_map(|option| match option.split_once('=')? {
            ("logdev", path) if is_at(&unescape(path)) => Some(Role::Journal),
            ("rtdev", path) if is_at(&unescape(path)) => Some(Role::RealTime),
            _ => None,
        });
        role.map(|role| MountFound { id, number, point, role, is_sure: kind == "xfs" })
    })
}

/// Undoes the kernel's `\040` for a space, `\011` for a tab, `\012` for a line feed, `\134` for a backslash.
fn unescape(field: &str) -> String {
    let mut text = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        text.push_str(before);
        match escape.get(1..4).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                text.push(char::from(byte));
                rest = &escape[4..];
            }
            None => {
                text.push('\\');
                rest = &escape[1..];
            }
        }
    }
    text.push_str(rest);
    text
}

fn swap_areas(swaps: &str, devices: &[BlockDevice]) -> Vec<String> {
    let paths = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let ours = paths.filter(|path| devices.iter().any(|device| device.is_at(path)));
    ours.map(|path| format!("swap area {path}")).collect()
}

/// Processes with a file descriptor on one of the devices.
fn processes(proc: &Path, devices: &[BlockDevice]) -> Vec<String> {
    let numbers: Vec<DeviceNumber> = devices.iter().filter_map(|device| device.number).collect();
    if numbers.is_empty() {
        return Vec::new();
    }
    let has_open = |process: &Path| {
        entries(&process.join("fd"))
            .into_iter()
            .any(|(_, fd)| block_device_number(&fd).is_some_and(|number| numbers.contains(&number)))
    };
    let holding: Vec<(u32, PathBuf)> =
        process_folders(proc).into_iter().filter(|(_, process)| has_open(process)).collect();
    let named = holding.iter().take(PROCESSES_NAMED_MAX);
    let mut found: Vec<String> =
        named.map(|(pid, process)| format!("open by pid {pid} ({})", command_name(process))).collect();
    if holding.len() > PROCESSES_NAMED_MAX {
        found.push(format!("open by {} more processes", holding.len() - PROCESSES_NAMED_MAX));
    }
    found
}

/// The number of the block device at `path`, links followed; `None` if it is anything else. Asks no network file
/// system, which might not answer.
fn block_device_number(path: &Path) -> Option<DeviceNumber> {
    let stat = rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let is_block = FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::BlockDevice;
    is_block.then_some(DeviceNumber { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor })
}

fn command_name(process: &Path) -> String {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

/// `/proc/<pid>` of every process, in order of pid.
fn process_folders(proc: &Path) -> Vec<(u32, PathBuf)> {
    let folders = entries(proc);
    let mut found: Vec<(u32, PathBuf)> =
        folders.into_iter().filter_map(|(name, path)| Some((name.parse().ok()?, path))).collect();
    found.sort_unstable();
    found
}

/// Names and paths in a folder, sorted; none if it cannot be read.
fn entries(folder: &Path) -> BTreeSet<(String, PathBuf)> {
    let Ok(read) = fs::read_dir(folder) else { return BTreeSet::new() };
    read.flatten().filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, major: u32, minor: u32) -> BlockDevice {
        let number = Some(DeviceNumber { major, minor });
        BlockDevice { name: name.into(), number, sys_path: PathBuf::from("/nonexistent") }
    }

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_mount_is_found_by_number_and_by_source() {
        let mountinfo = "\
            29 1 259:3 / /mnt/my\\040data rw,relatime shared:1 - ext4 /dev/ublkb0 rw\n\
            30 1 259:4 / /mnt/other rw - ext4 /dev/ublkb1 rw\n\
            31 1 0:55 /sub /mnt/tree rw,relatime - btrfs /dev/ublkb0p1 rw\n\
            32 1 0:56 / /tmp rw - tmpfs tmpfs rw\n";
        let devices = [device("ublkb0", 259, 3), device("ublkb0p1", 259, 9)];
        let found: Vec<String> = mount_points(mountinfo, &devices).map(|(_, point)| point).collect();
        assert_eq!(found, ["/mnt/my data", "/mnt/tree"]);
    }

    #[test]
    fn a_journal_or_a_real_time_section_is_found_in_the_options() {
        let mountinfo = "\
            29 1 8:1 / /mnt/x rw - xfs /dev/sda1 rw,attr2,logdev=/dev/ublkb0,rtdev=/dev/ublkb0p1,noquota\n\
            30 1 8:2 / /mnt/y rw - xfs /dev/sda2 rw,logdev=/dev/ublkb1,rtdev=/dev/ublkb0p1\n\
            31 1 8:3 / /mnt/z rw - xfs /dev/sda3 rw,logdev=/dev/ublkb1\n";
        let devices = [device("ublkb0", 259, 3), device("ublkb0p1", 259, 9)];
        let found: Vec<(Role, String)> = mount_points(mountinfo, &devices).collect();
        let expected = [(Role::Journal, "/mnt/x".to_owned()), (Role::RealTime, "/mnt/y".to_owned())];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_mount_of_a_removed_disk_is_found_by_its_source() {
        let devices = [BlockDevice { number: None, ..device("ublkb0", 0, 0) }];
        let mountinfo =
            "29 1 259:3 / /mnt rw - ext4 /dev/ublkb0 rw\n29 1 259:3 / /a rw - ext4 /dev/ublkb01 rw\n";
        let found: Vec<String> = mount_points(mountinfo, &devices).map(|(_, point)| point).collect();
        assert_eq!(found, ["/mnt"]);
    }

    #[test]
    fn octal_escapes_are_undone_and_others_kept() {
        assert_eq!(unescape(r"a\040b\134c"), r"a b\c");
        assert_eq!(unescape(r"end\04"), r"end\04");
        assert_eq!(unescape(r"\x\"), r"\x\");
    }

    #[test]
    fn swap_areas_are_found() {
        let swaps =
            "Filename Type Size Used Priority\n/dev/ublkb3p2 partition 1 0 -2\n/swapfile file 1 0 -3\n";
        let devices = [device("ublkb3", 259, 0), device("ublkb3p2", 259, 2)];
        assert_eq!(swap_areas(swaps, &devices), ["swap area /dev/ublkb3p2"]);
        assert!(swap_areas(swaps, &devices[..1]).is_empty());
    }

    #[test]
    fn every_kind_of_user_is_found_and_each_namespace_read_once() {
        let root = tempfile::tempdir().unwrap();
        let (proc, sys) = (root.path().join("proc"), root.path().join("sys"));
        write(sys.join("block/ublkb7/dev"), "259:7\n");
        write(sys.join("block/ublkb7/ublkb7p1/dev"), "259:8\n");
        write(sys.join("block/ublkb7/ublkb7p1/partition"), "1\n");
        write(sys.join("block/ublkb7/holders/dm-0/dm/name"), "vault\n");
        write(sys.join("block/ublkb7/ublkb7p1/holders/md0/x"), "");
        write(sys.join("block/loop0/loop/backing_file"), "/dev/ublkb7\n");
        write(sys.join("block/loop1/loop/backing_file"), "/var/image\n");
        write(sys.join("fs/btrfs/1234/devices/ublkb7/dev"), "259:7\n");
        write(sys.join("fs/btrfs/1234/devices/sdx/dev"), "8:16\n");
        write(sys.join("fs/btrfs/5678/devices/sdy/dev"), "8:32\n");
        write(proc.join("fs/jbd2/ublkb7p1/info"), "");
        write(proc.join("fs/jbd2/ublkb7-8/info"), "");
        let config = proc.join("1/root/sys/kernel/config");
        for (name, path, enable) in
            [("a", "/dev/ublkb7", "1\n"), ("b", "/dev/ublkb7", "0\n"), ("c", "/dev/sdx", "1\n")]
        {
            let namespace = config.join("nvmet/subsystems").join(name).join("namespaces/1");
            write(namespace.join("device_path"), path);
            write(namespace.join("enable"), enable);
        }
        write(
            config.join("target/core/iblock_0/one/info"),
            "Status: ACTIVATED\niBlock device: ublkb7p1  UDEV PATH: \n",
        );
        write(
            config.join("target/core/fileio_1/two/info"),
            "TCM FILEIO ID: 0  File: /dev/ublkb7  Size: 4096\n",
        );
        write(
            config.join("target/core/fileio_1/three/info"),
            "TCM FILEIO ID: 0  File: /srv/image  Size: 4096\n",
        );
        let mounted =
            "29 1 259:8 / /srv rw - ext4 /dev/ublkb7p1 rw\n30 1 0:50 / /tree rw - btrfs /dev/sdx rw\n";
        for (pid, namespace) in [(1, "mnt:[1]"), (20, "mnt:[1]"), (30, "mnt:[2]")] {
            let process = proc.join(pid.to_string());
            write(process.join("mountinfo"), mounted);
            write(process.join("comm"), "pod\n");
            fs::create_dir_all(process.join("ns")).unwrap();
            std::os::unix::fs::symlink(namespace, process.join("ns/mnt")).unwrap();
        }
        write(proc.join("swaps"), "Filename\n");
        let found = holders_below(&proc, &sys, "ublkb7");
        let expected = [
            "mounted on /srv",
            "mounted on /tree",
            "mounted on /srv in the mount namespace of pid 30 (pod)",
            "mounted on /tree in the mount namespace of pid 30 (pod)",
            "ublkb7p1 is the external journal of an ext4",
            "used by dm-0 (vault)",
            "used by md0",
            "used by loop0 (loop device)",
            "served by nvmet (a)",
            "served by LIO (fileio_1/two)",
            "served by LIO (iblock_0/one)",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_device_that_nobody_uses_has_no_holders() {
        assert!(holders(u32::MAX).is_empty());
    }
}
