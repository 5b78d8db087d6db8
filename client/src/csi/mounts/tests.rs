//! Mounts of loop devices, in a mount namespace of the test's thread that goes with it.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

use super::*;
use crate::csi::mount_options::FsType;
use crate::csi::targets::{KubeletDir, TargetKind};

/// A loop device over a file, detached at its end.
struct Loop(PathBuf);

impl Loop {
    fn new(image: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(image).output().ok()?;
        let path = String::from_utf8(made.stdout).ok()?.trim().to_owned();
        (made.status.success() && !path.is_empty()).then(|| Self(path.into()))
    }

    fn open(&self) -> File {
        File::open(&self.0).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

struct Place {
    kubelet: KubeletDir,
    root: PathBuf,
    dir: PathBuf,
}

impl Place {
    fn target(&self, name: &str, kind: TargetKind) -> Target {
        let target = self.kubelet.target(&format!("{}/{name}", self.root.display())).unwrap();
        target.create(kind).unwrap();
        target
    }

    /// A device with a file system of this kind.
    fn device(&self, fs_type: FsType) -> Option<Loop> {
        let image = self.dir.join(format!("{}.img", fs_type.name()));
        let bytes = if fs_type == FsType::Xfs { 320 << 20 } else { 16 << 20 };
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let made = Command::new(format!("mkfs.{}", fs_type.name())).arg("-q").arg(&image).status();
        if !made.is_ok_and(|made| made.success()) {
            println!("SKIP no mkfs.{}", fs_type.name());
            return None;
        }
        let device = Loop::new(&image);
        if device.is_none() {
            println!("SKIP no loop device");
        }
        device
    }
}

/// Runs a test whose mounts nobody else sees; not at all where that cannot be.
fn in_own_namespace(test: impl FnOnce(&Place) + Send) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP mounting needs root");
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: this thread alone sees other mounts from here on.
            if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) } {
                println!("SKIP no mount namespace: {error}");
                return;
            }
            // One by one, because a root that was changed into is no mount.
            for mount in mountinfo::read().unwrap() {
                let _ = mount_change(&mount.mount_point, MountPropagationFlags::PRIVATE);
            }
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("kubelet");
            fs::create_dir(&root).unwrap();
            let place = Place { kubelet: KubeletDir::open(&root).unwrap(), root, dir: dir.path().to_owned() };
            test(&place);
        });
        thread.join().unwrap();
    });
}

fn options(fs_type: FsType, flags: &[&str]) -> MountOptions {
    let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
    MountOptions::parse(fs_type, &flags).unwrap()
}

/// Whether the kernel has the file system; a container's may not.
fn is_known(fs_type: FsType) -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap();
    let is_known = known.lines().any(|line| line.trim_start_matches("nodev").trim() == fs_type.name());
    if !is_known {
        println!("SKIP this kernel has no {}", fs_type.name());
    }
    is_known
}

#[test]
fn a_file_system_is_mounted_with_its_options_and_unmounted() {
    in_own_namespace(|place| {
        for fs_type in [FsType::Ext4, FsType::Xfs] {
            let Some(device) = is_known(fs_type).then(|| place.device(fs_type)).flatten() else { continue };
            let target = place.target("staging, \"1\"", TargetKind::Directory);
            let options = options(fs_type, &["noatime,nosuid", "nodev"]);
            mount_file_system(device.open(), &device.0, &options, &target).unwrap();
            let mounts = mounts_at(&target).unwrap();
            let number = fstat(device.open()).unwrap().st_rdev;
            assert_eq!(mounts.len(), 1);
            assert_eq!(mounts[0].device, (rustix::fs::major(number), rustix::fs::minor(number)));
            assert_eq!(mounts[0].fs_type, fs_type.name());
            assert!(!mounts[0].is_read_only);
            let line = fs::read_to_string("/proc/thread-self/mounts").unwrap();
            let source = format!("{} ", device.0.display());
            let line = line.lines().find(|line| line.starts_with(&source)).unwrap();
            for attribute in ["noatime", "nosuid", "nodev"] {
                assert!(line.contains(attribute), "{line}");
            }
            assert_eq!(line.contains("nouuid"), fs_type == FsType::Xfs, "{line}");
            assert!(target.remove().is_err());
            assert_eq!(unmount_all(&target).unwrap(), 1);
            assert_eq!(unmount_all(&target).unwrap(), 0);
            target.remove().unwrap();
        }
    });
}

#[test]
fn a_bind_is_read_only_from_its_first_moment_and_its_source_stays_writable() {
    in_own_namespace(|place| {
        let Some(device) = is_known(FsType::Ext4).then(|| place.device(FsType::Ext4)).flatten() else {
            return;
        };
        let staging = place.target("staging", TargetKind::Directory);
        mount_file_system(device.open(), &device.0, &options(FsType::Ext4, &[]), &staging).unwrap();
        let read_only = place.target("read-only", TargetKind::Directory);
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOATIME;
        bind(staging.open().unwrap(), attributes, &read_only).unwrap();
        let writable = place.target("writable", TargetKind::Directory);
        bind(staging.open().unwrap(), MountAttrFlags::empty(), &writable).unwrap();
        assert!(mounts_at(&read_only).unwrap()[0].is_read_only);
        assert!(!mounts_at(&writable).unwrap()[0].is_read_only);
        fs::write(place.root.join("writable/file"), "data").unwrap();
        assert_eq!(fs::read(place.root.join("read-only/file")).unwrap(), b"data");
        let refused = fs::write(place.root.join("read-only/file"), "").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
        for target in [&read_only, &writable, &staging] {
            assert_eq!(unmount_all(target).unwrap(), 1);
            target.remove().unwrap();
        }
    });
}

#[test]
fn a_device_is_shown_over_a_file() {
    in_own_namespace(|place| {
        let Some(device) = place.device(FsType::Ext4) else { return };
        let target = place.target("block", TargetKind::File);
        bind(device.open(), MountAttrFlags::empty(), &target).unwrap();
        let shown = fstat(File::open(place.root.join("block")).unwrap()).unwrap();
        assert_eq!(shown.st_rdev, fstat(device.open()).unwrap().st_rdev);
        assert_eq!(target.kind().unwrap(), Some(TargetKind::File));
        assert_eq!(unmount_all(&target).unwrap(), 1);
        target.remove().unwrap();
        assert!(device.0.exists());
    });
}

#[test]
fn another_device_of_that_name_is_not_mounted() {
    in_own_namespace(|place| {
        let Some(device) = is_known(FsType::Ext4).then(|| place.device(FsType::Ext4)).flatten() else {
            return;
        };
        let target = place.target("staging", TargetKind::Directory);
        let other = File::open("/dev/null").unwrap();
        let link = place.dir.join("link");
        symlink(&device.0, &link).unwrap();
        let ext4 = options(FsType::Ext4, &[]);
        for outcome in [
            mount_file_system(other, &device.0, &ext4, &target),
            mount_file_system(device.open(), &link, &ext4, &target),
            mount_file_system(device.open(), Path::new("/dev/no-such-disk"), &ext4, &target),
        ] {
            assert!(matches!(outcome, Err(MountError::OtherDevice { .. })), "{outcome:?}");
        }
        assert_eq!(mounts_at(&target).unwrap(), []);
    });
}

#[test]
fn all_that_is_stacked_goes() {
    in_own_namespace(|place| {
        let source = place.target("source", TargetKind::Directory);
        let target = place.target("target", TargetKind::Directory);
        for _ in 0..3 {
            bind(source.open().unwrap(), MountAttrFlags::empty(), &target).unwrap();
        }
        assert_eq!(unmount_all(&target).unwrap(), 3);
        assert_eq!(mounts_at(&target).unwrap(), []);
        target.remove().unwrap();
    });
}

#[test]
fn the_uppermost_mount_is_the_one_that_the_path_ends_on() {
    in_own_namespace(|place| {
        let target = place.target("target", TargetKind::Directory);
        let sources = ["first", "second"].map(|name| place.target(name, TargetKind::Directory));
        for source in &sources {
            bind(source.open().unwrap(), MountAttrFlags::empty(), &target).unwrap();
        }
        let mounts = mounts_at(&target).unwrap();
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[1].mount_id, mountinfo::mount_id(target.open().unwrap()).unwrap());
        assert!(mounts[1].root.ends_with("second"), "{mounts:?}");
        assert_eq!(unmount_all(&target).unwrap(), 2);
    });
}

#[test]
fn a_mount_below_a_shared_directory_is_seen_outside() {
    in_own_namespace(|place| {
        let source = place.target("source", TargetKind::Directory);
        let directory = place.target("pods", TargetKind::Directory);
        bind(source.open().unwrap(), MountAttrFlags::empty(), &directory).unwrap();
        assert!(!is_seen_outside(directory.open().unwrap()).unwrap());
        mount_change(place.root.join("pods"), MountPropagationFlags::SHARED).unwrap();
        assert!(is_seen_outside(directory.open().unwrap()).unwrap());
        assert_eq!(unmount_all(&directory).unwrap(), 1);
    });
}

#[test]
fn what_is_in_use_stays_mounted_and_is_told() {
    in_own_namespace(|place| {
        let source = place.target("source", TargetKind::Directory);
        let target = place.target("target", TargetKind::Directory);
        bind(source.open().unwrap(), MountAttrFlags::empty(), &target).unwrap();
        fs::write(place.root.join("target/file"), "data").unwrap();
        let user = File::open(place.root.join("target/file")).unwrap();
        let error = unmount_all(&target).unwrap_err();
        assert!(
            matches!(&error, MountError::Kernel { source, .. } if source.kind() == io::ErrorKind::ResourceBusy),
            "{error}"
        );
        assert_eq!(mounts_at(&target).unwrap().len(), 1);
        drop(user);
        assert_eq!(unmount_all(&target).unwrap(), 1);
        assert!(matches!(source.remove(), Err(TargetError::NotEmpty { .. })));
    });
}

#[test]
fn a_target_that_becomes_a_link_unmounts_nothing_elsewhere() {
    in_own_namespace(|place| {
        let source = place.target("source", TargetKind::Directory);
        let other = place.target("other", TargetKind::Directory);
        bind(source.open().unwrap(), MountAttrFlags::empty(), &other).unwrap();
        let target = place.target("target", TargetKind::Directory);
        target.remove().unwrap();
        symlink(place.root.join("other"), place.root.join("target")).unwrap();
        assert_eq!(unmount_all(&target).unwrap(), 0);
        assert!(bind(source.open().unwrap(), MountAttrFlags::empty(), &target).is_err());
        assert_eq!(unmount_all(&other).unwrap(), 1);
    });
}

#[test]
fn the_file_system_itself_says_what_is_wrong() {
    in_own_namespace(|place| {
        let Some(device) = is_known(FsType::Ext4).then(|| place.device(FsType::Ext4)).flatten() else {
            return;
        };
        let target = place.target("staging", TargetKind::Directory);
        // More than 32 bits.
        let options = options(FsType::Ext4, &["commit=9999999999"]);
        let error = mount_file_system(device.open(), &device.0, &options, &target).unwrap_err();
        assert!(matches!(error, MountError::Kernel { .. }), "{error}");
        assert!(error.to_string().contains("Bad value for 'commit'"), "{error}");
        assert_eq!(mounts_at(&target).unwrap(), []);
    });
}
