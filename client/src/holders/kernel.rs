//! Users of a disk inside the kernel: what is made of it, what it is a part of, and what serves it to other machines.
//!
//! None of them has a file descriptor, and some have opened the disk without a claim, so that only what they say of themselves
//! tells of them.
//! Source: Documentation/ABI/testing/sysfs-block and sysfs-fs-btrfs, Documentation/nvme and Documentation/target; fs/jbd2/journal.c
//! `jbd2_stats_proc_init`; Linux 7.3.

use std::fs;
use std::path::{Path, PathBuf};

use super::{BlockDevice, block_device, disk_with_partitions, entries};

/// Devices made of these devices: those that say so in `holders`, and loop devices, which do not.
pub(super) fn stacked_devices(sys: &Path, devices: &[BlockDevice]) -> Vec<String> {
    let mut found = Vec::new();
    for device in devices {
        for (holder, path) in entries(&device.sys_path.join("holders")) {
            let mapped_name = fs::read_to_string(path.join("dm/name")).unwrap_or_default();
            match mapped_name.trim() {
                "" => found.push(format!("used by {holder}")),
                name => found.push(format!("used by {holder} ({name})")),
            }
        }
    }
    for (name, path) in entries(&sys.join("block")) {
        let backing = fs::read_to_string(path.join("loop/backing_file")).unwrap_or_default();
        if devices.iter().any(|device| device.is_at(backing.trim())) {
            found.push(format!("used by {name} (loop device)"));
        }
    }
    found
}

/// The same as devices, with those that are made of them in turn, and with the partitions of all: a file system may be on any of them.
pub(super) fn with_stacked(sys: &Path, devices: &[BlockDevice]) -> Vec<BlockDevice> {
    let mut all = devices.to_vec();
    let mut index = 0;
    while let Some(device) = all.get(index).cloned() {
        index += 1;
        let holders = entries(&device.sys_path.join("holders")).into_iter().map(|(name, _)| name);
        let loops = entries(&sys.join("block")).into_iter().filter(|(_, path)| {
            let backing = fs::read_to_string(path.join("loop/backing_file")).unwrap_or_default();
            device.is_at(backing.trim())
        });
        for name in holders.chain(loops.map(|(name, _)| name)) {
            for found in disk_with_partitions(sys, &name) {
                if all.iter().all(|other| other.name != found.name) {
                    all.push(found);
                }
            }
        }
    }
    all
}

/// All devices of every mounted btrfs that has one of these devices: its mounts name any of them as their source.
pub(super) fn btrfs_members(sys: &Path, devices: &[BlockDevice]) -> Vec<BlockDevice> {
    let of_file_system = |(_, file_system): (String, PathBuf)| {
        let members = entries(&file_system.join("devices"));
        let is_ours = members.iter().any(|(name, _)| devices.iter().any(|device| device.name == *name));
        if is_ours { members } else { Default::default() }
    };
    let members = entries(&sys.join("fs/btrfs")).into_iter().flat_map(of_file_system);
    members.map(|(name, path)| block_device(name, path)).collect()
}

/// Devices that are the external journal of an ext4: it has a folder of statistics under its own name.
pub(super) fn external_journals(proc: &Path, devices: &[BlockDevice]) -> Vec<String> {
    let folder = proc.join("fs/jbd2");
    let journals = devices.iter().filter(|device| folder.join(&device.name).exists());
    journals.map(|device| format!("{} is the external journal of an ext4", device.name)).collect()
}

/// What the kernel's storage targets serve of these devices: NVMe (nvmet) and SCSI (LIO).
pub(super) fn served(configfs: &Path, devices: &[BlockDevice]) -> Vec<String> {
    let is_ours = |text: &str| devices.iter().any(|device| device.is_at(text) || device.name == text);
    let mut found = Vec::new();
    for (name, subsystem) in entries(&configfs.join("nvmet/subsystems")) {
        for (_, namespace) in entries(&subsystem.join("namespaces")) {
            let read = |file| fs::read_to_string(namespace.join(file)).unwrap_or_default();
            if read("enable").trim() == "1" && is_ours(read("device_path").trim()) {
                found.push(format!("served by nvmet ({name})"));
            }
        }
    }
    for (adapter, path) in entries(&configfs.join("target/core")) {
        for (name, object) in entries(&path) {
            // The device's name, or the path of a file, among words that say what they are.
            let info = fs::read_to_string(object.join("info")).unwrap_or_default();
            if info.split_whitespace().any(is_ours) {
                found.push(format!("served by LIO ({adapter}/{name})"));
            }
        }
    }
    found
}
