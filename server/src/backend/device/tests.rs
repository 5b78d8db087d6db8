//! Which device it is and where, with trees as sysfs and udev make them.

use std::os::unix::fs::symlink;

use rustix::fs::makedev;

use super::*;

/// A sysfs and udev's files in a directory of the test's.
struct Tree {
    dir: tempfile::TempDir,
    sysfs: Sysfs,
}

impl Tree {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sysfs = Sysfs { devices: dir.path().join("dev/block"), udev: dir.path().join("udev") };
        std::fs::create_dir_all(&sysfs.devices).unwrap();
        std::fs::create_dir_all(&sysfs.udev).unwrap();
        Self { dir, sysfs }
    }

    /// A device at this place below `devices`, with attributes; gives its number.
    fn device(&self, place: &str, number: (u32, u32), attributes: &[(&str, &str)]) -> u64 {
        let dir = self.dir.path().join("devices").join(place);
        let name = place.rsplit('/').next().unwrap();
        let (major, minor) = number;
        let of_all =
            [("dev", format!("{major}:{minor}\n")), ("uevent", format!("MAJOR={major}\nDEVNAME={name}\n"))];
        let of_all = of_all.iter().map(|(attribute, text)| (*attribute, text.as_str()));
        for (attribute, text) in of_all.chain(attributes.iter().copied()) {
            let path = dir.join(attribute);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let before = std::fs::read_to_string(&path).unwrap_or_default();
            std::fs::write(path, if attribute == "uevent" { before + text } else { text.to_owned() })
                .unwrap();
        }
        symlink(&dir, self.sysfs.devices.join(format!("{major}:{minor}"))).unwrap();
        makedev(major, minor)
    }

    fn udev(&self, number: &str, text: &str) {
        std::fs::write(self.sysfs.udev.join(format!("b{number}")), text).unwrap();
    }

    fn identities(&self, device: u64) -> Vec<String> {
        identity::of(&self.sysfs, device)
    }
}

#[test]
fn a_disk_is_known_by_what_its_kind_has() {
    let tree = Tree::new();
    let none: &[&str] = &[];
    let cases: [(u64, &[&str]); 9] = [
        (
            tree.device(
                "nvme0n1",
                (259, 0),
                &[("wwid", "eui.0025385b71b0a1c2\n"), ("device/serial", "S4EV\n")],
            ),
            &["wwid:eui.0025385b71b0a1c2"],
        ),
        (
            tree.device("sda", (8, 0), &[("device/wwid", "t10.ATA     QEMU HARDDISK   QM00001 \n")]),
            &["wwid:t10.ATA_QEMU_HARDDISK_QM00001"],
        ),
        (tree.device("vda", (254, 0), &[("serial", "disk-7\n")]), &["serial:disk-7"]),
        (
            tree.device("dm-3", (253, 3), &[("dm/uuid", "LVM-abcDEF\n"), ("dm/name", "vg-lv\n")]),
            &["dm-uuid:LVM-abcDEF"],
        ),
        (tree.device("dm-4", (253, 4), &[("dm/uuid", "\n"), ("serial", "7")]), none),
        (tree.device("md0", (9, 0), &[("md/uuid", "de-ad\n")]), &["md-uuid:de-ad"]),
        (tree.device("loop5", (7, 5), &[("loop/backing_file", "/x\n"), ("serial", "1234\n")]), none),
        (
            tree.device("sdz", (65, 144), &[("device/wwid", "naa.0000000000000000\n"), ("serial", "0000\n")]),
            none,
        ),
        (tree.device("vdz", (254, 400), &[("serial", "\n")]), none),
    ];
    for (device, expected) in cases {
        assert_eq!(tree.identities(device), expected, "{device:x}");
    }
    assert_eq!(tree.identities(makedev(8, 99)), none, "there is none such");
}

#[test]
fn what_the_kernel_does_not_tell_udev_does() {
    let tree = Tree::new();
    let md = tree.device("md1", (9, 1), &[("md/level", "raid1\n")]);
    tree.udev("9:1", "I:1\nE:MD_UUID=f00\nE:ID_SERIAL=no\n");
    assert_eq!(tree.identities(md), ["md-uuid:f00"]);
    let disk = tree.device("sdb", (8, 16), &[]);
    tree.udev("8:16", "E:ID_SERIAL=ACME_Disk_1\nE:ID_SERIAL_SHORT=1\nE:ID_WWN_WITH_EXTENSION=0x5000\n");
    assert_eq!(tree.identities(disk), ["wwn:0x5000", "udev-serial:ACME_Disk_1"]);
}

#[test]
fn a_partition_is_its_disks_with_number_and_partuuid() {
    let tree = Tree::new();
    tree.device("sda", (8, 0), &[("device/wwid", "naa.5\n")]);
    let by_kernel = tree.device("sda/sda1", (8, 1), &[("partition", "1\n"), ("uevent", "PARTUUID=AA-1\n")]);
    assert_eq!(tree.identities(by_kernel), ["wwid:naa.5/part1/aa-1", "wwid:naa.5/part1", "partuuid:aa-1"]);
    let by_udev = tree.device("sda/sda2", (8, 2), &[("partition", "2\n")]);
    assert_eq!(tree.identities(by_udev), ["wwid:naa.5/part2"]);
    tree.udev("8:2", "E:ID_PART_ENTRY_UUID=aa-2\n");
    assert_eq!(tree.identities(by_udev)[0], "wwid:naa.5/part2/aa-2");
    tree.device("loop1", (7, 1), &[]);
    let of_nameless =
        tree.device("loop1/loop1p1", (259, 9), &[("partition", "1\n"), ("uevent", "PARTUUID=bb\n")]);
    assert_eq!(tree.identities(of_nameless), ["partuuid:bb"]);
    let of_zeroes = [("partition", "2\n"), ("uevent", "PARTUUID=00000000-02\n")];
    let of_zeroes = tree.device("loop1/loop1p2", (259, 10), &of_zeroes);
    assert_eq!(tree.identities(of_zeroes), [""; 0], "a table that nobody gave a number");
}

#[test]
fn an_identity_that_several_have_is_nobodys() {
    let tree = Tree::new();
    let first = tree.device("sda", (8, 0), &[("device/wwid", "naa.5\n"), ("serial", "one\n")]);
    assert_eq!(identity::unique(&tree.sysfs, first).as_deref(), Some("wwid:naa.5"));
    let second = tree.device("sdb", (8, 16), &[("device/wwid", "naa.5\n")]);
    assert_eq!(identity::unique(&tree.sysfs, first).as_deref(), Some("serial:one"));
    assert_eq!(identity::unique(&tree.sysfs, second), None);
}

#[test]
fn what_volnode_made_itself_is_seen_through_what_is_made_of_it() {
    let tree = Tree::new();
    let below = |of: &str, place: &str| {
        let slaves = tree.dir.path().join("devices").join(of).join("slaves");
        std::fs::create_dir_all(&slaves).unwrap();
        let name = place.rsplit('/').next().unwrap();
        symlink(tree.dir.path().join("devices").join(place), slaves.join(name)).unwrap();
    };
    tree.device("ublkb0", (259, 0), &[]);
    let partition = tree.device("ublkb0/ublkb0p1", (259, 1), &[("partition", "1\n")]);
    let lower = tree.device("dm-0", (253, 0), &[("dm/name", "vg-lv\n")]);
    let upper = tree.device("dm-1", (253, 1), &[("dm/name", "secret\n")]);
    below("dm-0", "ublkb0/ublkb0p1");
    below("dm-1", "dm-0");
    for device in [partition, lower, upper] {
        assert_eq!(identity::our_own(&tree.sysfs, device), Some(OurOwn::ClientsDisk), "{device:x}");
    }
    let thin = tree.device("dm-2", (253, 2), &[("dm/name", "vg-volnode--v--0\n")]);
    let over = tree.device("md0", (9, 0), &[("md/uuid", "1\n")]);
    below("md0", "dm-2");
    for device in [thin, over] {
        assert_eq!(identity::our_own(&tree.sysfs, device), Some(OurOwn::ThinVolume), "{device:x}");
    }
    tree.device("sda", (8, 0), &[]);
    let other = tree.device("dm-3", (253, 3), &[("dm/name", "volnode--vg-lv\n"), ("dm/uuid", "LVM-a\n")]);
    below("dm-3", "sda");
    // Not made by any kernel, and no reason to never come back.
    below("dm-3", "dm-3");
    assert_eq!(identity::our_own(&tree.sysfs, other), None);
    assert_eq!(identity::mapper_name(&tree.sysfs, "dm-uuid:LVM-a").as_deref(), Some("volnode--vg-lv"));
}

#[test]
fn devices_are_found_by_identity_under_any_name() {
    let tree = Tree::new();
    tree.device("sdq", (65, 0), &[("device/wwid", "naa.5\n")]);
    tree.device("sdq/sdq1", (65, 1), &[("partition", "1\n")]);
    tree.device("sdr", (65, 16), &[("device/wwid", "naa.6\n")]);
    assert_eq!(identity::named(&tree.sysfs, "wwid:naa.5"), ["/dev/sdq"]);
    assert_eq!(identity::named(&tree.sysfs, "wwid:naa.5/part1"), ["/dev/sdq1"]);
    tree.device("sds", (65, 32), &[("device/wwid", "naa.6\n")]);
    assert_eq!(identity::named(&tree.sysfs, "wwid:naa.6"), ["/dev/sdr", "/dev/sds"], "two paths to one disk");
    assert!(identity::named(&tree.sysfs, "wwid:naa.7").is_empty());
}

#[test]
fn holders_are_a_disks_and_its_partitions() {
    let tree = Tree::new();
    let disk = tree.device("sda", (8, 0), &[("holders/.keep", "")]);
    std::fs::remove_file(tree.dir.path().join("devices/sda/holders/.keep")).unwrap();
    let partition = tree.device("sda/sda1", (8, 1), &[("partition", "1\n"), ("holders/dm-0", "")]);
    for device in [disk, partition] {
        assert_eq!(identity::holders(&tree.sysfs, device), ["dm-0"]);
        assert_eq!(holder::of(&tree.sysfs, device).as_deref(), Some("the device dm-0"));
    }
    assert_eq!(identity::numbers(&tree.sysfs, disk), ["8:0", "8:1"]);
}

fn adopted(identity: &str) -> Adopted {
    Adopted { kind: AdoptedKind::BlockDevice, path: "/dev/sda".to_owned(), identity: identity.to_owned() }
}

fn candidate(identities: &[&str], size_bytes: u64) -> Candidate {
    let identities = identities.iter().map(|&one| one.to_owned()).collect();
    Candidate { identities, size_bytes, is_device: true }
}

#[test]
fn a_device_with_an_identity_is_found_by_nothing_else() {
    let wanted = adopted("wwid:1");
    let elsewhere = |paths: &[&str]| paths.iter().map(|&path| path.to_owned()).collect::<Vec<_>>();
    let same = candidate(&["serial:9", "wwid:1"], 7);
    assert_eq!(choose(&wanted, Some(8), Some(&same), || elsewhere(&["/dev/sda"])).unwrap(), Place::AtPath);
    let copied = choose(&wanted, Some(8), Some(&same), || elsewhere(&["/dev/sda", "/dev/sdb"]));
    assert!(matches!(copied, Err(AdoptError::Ambiguous { .. })), "which one was adopted?");
    let other = candidate(&["wwid:2"], 8);
    let moved = choose(&wanted, Some(8), Some(&other), || elsewhere(&["/dev/sdb"])).unwrap();
    assert_eq!(moved, Place::Elsewhere("/dev/sdb".to_owned()));
    let error = choose(&wanted, Some(8), Some(&other), Vec::new).unwrap_err().to_string();
    assert_eq!(error, "another device is at /dev/sda now: wwid:2, not wwid:1");
    let nameless = choose(&wanted, Some(8), Some(&candidate(&[], 8)), Vec::new);
    assert!(matches!(nameless, Err(AdoptError::Another { .. })));
    assert!(matches!(choose(&wanted, Some(8), None, Vec::new), Err(AdoptError::Missing { .. })));
    let several = choose(&wanted, Some(8), None, || elsewhere(&["/dev/sdb", "/dev/sdc"]));
    assert!(matches!(several, Err(AdoptError::Ambiguous { .. })));
}

#[test]
fn a_device_without_an_identity_is_the_one_at_its_path_of_its_size() {
    let wanted = adopted("");
    let never = || panic!("not looked for");
    assert_eq!(choose(&wanted, Some(8), Some(&candidate(&[], 8)), never).unwrap(), Place::AtPath);
    for size_bytes in [7, 9] {
        let found = choose(&wanted, Some(8), Some(&candidate(&[], size_bytes)), never);
        assert!(matches!(found, Err(AdoptError::Another { .. })));
    }
    assert_eq!(choose(&wanted, None, Some(&candidate(&[], 9)), never).unwrap(), Place::AtPath, "of any size");
    let file = Candidate { is_device: false, ..candidate(&[], 8) };
    for at_path in [None, Some(&file)] {
        assert!(matches!(choose(&wanted, Some(8), at_path, never), Err(AdoptError::Missing { .. })));
    }
}
