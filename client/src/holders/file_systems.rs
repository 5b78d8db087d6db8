//! The file systems that are mounted of a disk, for somebody who wants to freeze them.
//!
//! A file system is found once, however often it is mounted. It may be on the disk, on a partition, or on what is made of them (LUKS, LVM,
//! md, a loop device), and be mounted in another mount namespace than ours. Source: as of `holders`.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::{
    MountFound, command_name, disk_and_partitions, kernel, mounts_of, process_folders, unescape,
    with_btrfs_members,
};
use crate::freezer::Mount;

/// A file system that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountedFileSystem {
    /// Its device in `mountinfo`, `259:3`.
    pub device: String,
    /// Where it is mounted first, for people.
    pub mount_point: String,
    /// Everywhere it is mounted: ours first, then those of other namespaces.
    pub mounts: Vec<Mount>,
}

/// Everything that is mounted of `/dev/ublkb<dev_id>`, or has a part of itself (a journal, a further disk) on it.
pub fn file_systems_on(dev_id: u32) -> Vec<MountedFileSystem> {
    file_systems_below(Path::new("/proc"), Path::new("/sys"), dev_id)
}

/// Everywhere the file system of that device, `259:3`, is mounted now, in any mount namespace.
pub fn mounts_of_device(device: &str) -> Vec<Mount> {
    let is_it = |line: &&str| line.split(' ').nth(2) == Some(device);
    let mut found = Vec::new();
    for (pid, process) in process_folders(Path::new("/proc")) {
        let mountinfo = fs::read(process.join("mountinfo")).unwrap_or_default();
        for line in String::from_utf8_lossy(&mountinfo).lines().filter(is_it) {
            let mut fields = line.split(' ');
            let (Some(Ok(mount_id)), Some(point)) = (fields.next().map(str::parse), fields.nth(3)) else {
                continue;
            };
            let path =
                PathBuf::from(format!("/proc/{pid}/root")).join(unescape(point).trim_start_matches('/'));
            found.push(Mount { mount_id, device: device.to_owned(), path });
        }
    }
    found
}

fn file_systems_below(proc: &Path, sys: &Path, dev_id: u32) -> Vec<MountedFileSystem> {
    let devices = kernel::with_stacked(sys, &disk_and_partitions(sys, dev_id));
    let devices = with_btrfs_members(sys, &devices);
    let (mut namespaces_seen, mut found) = (HashSet::new(), Vec::<MountedFileSystem>::new());
    let others = process_folders(proc).into_iter().map(|(pid, process)| (Some(pid), process));
    for (pid, process) in [(None, proc.join("self"))].into_iter().chain(others) {
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if namespaces_seen.contains(&namespace) {
            continue;
        }
        // Of a process that has just ended there is nothing: another one of the same namespace tells.
        let mountinfo = fs::read(process.join("mountinfo")).unwrap_or_default();
        if mountinfo.is_empty() {
            continue;
        }
        namespaces_seen.insert(namespace);
        // A path that is not UTF-8 cannot be opened then, which fails the freeze.
        let mountinfo = String::from_utf8_lossy(&mountinfo);
        let sure = mounts_of(&mountinfo, &devices).filter(|found| found.is_sure);
        for MountFound { id, number, point, .. } in sure {
            let device = format!("{}:{}", number.major, number.minor);
            let (path, mount_point) = match pid {
                None => (PathBuf::from(&point), point),
                Some(pid) => {
                    let root = PathBuf::from(format!("/proc/{pid}/root"));
                    let place = format!(" in the mount namespace of pid {pid} ({})", command_name(&process));
                    (root.join(point.trim_start_matches('/')), point + &place)
                }
            };
            let mount = Mount { mount_id: id, device: device.clone(), path };
            match found.iter_mut().find(|known| known.device == device) {
                Some(known) => known.mounts.push(mount),
                None => found.push(MountedFileSystem { device, mount_point, mounts: vec![mount] }),
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn process(proc: &Path, name: &str, namespace: &str, mountinfo: &str) {
        let process = proc.join(name);
        write(process.join("mountinfo"), mountinfo);
        write(process.join("comm"), "pod\n");
        fs::create_dir_all(process.join("ns")).unwrap();
        std::os::unix::fs::symlink(namespace, process.join("ns/mnt")).unwrap();
    }

    #[test]
    fn a_file_system_is_found_once_whatever_is_between_it_and_the_disk() {
        let root = tempfile::tempdir().unwrap();
        let (proc, sys) = (root.path().join("proc"), root.path().join("sys"));
        write(sys.join("block/ublkb7/dev"), "259:7\n");
        write(sys.join("block/ublkb7/ublkb7p1/dev"), "259:8\n");
        write(sys.join("block/ublkb7/ublkb7p1/partition"), "1\n");
        // LUKS on the partition, and LVM on that.
        write(sys.join("block/ublkb7/ublkb7p1/holders/dm-0/x"), "");
        write(sys.join("block/dm-0/dev"), "252:0\n");
        write(sys.join("block/dm-0/holders/dm-1/x"), "");
        write(sys.join("block/dm-1/dev"), "252:1\n");
        write(sys.join("block/dm-2/dev"), "252:2\n");
        let ours = "29 1 252:1 / /srv rw - ext4 /dev/mapper/data rw\n\
                    30 1 252:1 /sub /home rw - ext4 /dev/mapper/data rw\n\
                    31 1 252:2 / /other rw - ext4 /dev/mapper/other rw\n\
                    32 1 0:99 / /tmp/mine rw - tmpfs /dev/ublkb7 rw\n";
        let theirs = "52 1 252:1 / /data rw - ext4 /dev/mapper/data rw\n53 1 259:7 / /raw\\040disk rw - xfs /dev/ublkb7 rw\n";
        process(&proc, "self", "mnt:[1]", ours);
        process(&proc, "1", "mnt:[1]", ours);
        // It has just ended.
        process(&proc, "19", "mnt:[2]", "");
        process(&proc, "20", "mnt:[2]", theirs);
        process(&proc, "30", "mnt:[2]", theirs);
        let found = file_systems_below(&proc, &sys, 7);
        let points: Vec<&str> = found.iter().map(|one| one.mount_point.as_str()).collect();
        assert_eq!(points, ["/srv", "/raw disk in the mount namespace of pid 20 (pod)"]);
        let mounts = |index: usize| {
            let mounts = found[index].mounts.iter();
            mounts.map(|mount| format!("{} {}", mount.mount_id, mount.path.display())).collect::<Vec<_>>()
        };
        assert_eq!(mounts(0), ["29 /srv", "30 /home", "52 /proc/20/root/data"]);
        assert_eq!(mounts(1), ["53 /proc/20/root/raw disk"]);
        assert_eq!(found[1].device, "259:7");
        assert!(file_systems_below(&proc, &sys, 8).is_empty());
    }
}
