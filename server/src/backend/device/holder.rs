//! Who else has a device: a file system, swap, or another device that is made of it. For messages: the kernel's word is `O_EXCL`.
//!
//! Called by: `mod.rs`. Source: proc_pid_mountinfo(5), proc_swaps(5), `holders/` in sysfs.

use std::os::unix::fs::MetadataExt as _;

use rustix::fs::{Dev, major, minor};

use super::identity::{self, Sysfs};

/// Who has the device or one of its partitions, for people; `None`: nobody that can be seen from here.
pub(super) fn of(sysfs: &Sysfs, device: Dev) -> Option<String> {
    let holders = identity::holders(sysfs, device);
    if !holders.is_empty() {
        return Some(format!("the device {}", holders.join(", ")));
    }
    let numbers = identity::numbers(sysfs, device);
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let mounted = mount_of(&read("/proc/self/mountinfo"), &numbers, number_of);
    mounted
        .map(|mount| format!("the file system that is mounted at {mount}"))
        .or_else(|| is_swap(&read("/proc/swaps"), &numbers, number_of).then(|| "swap".to_owned()))
}

/// The number of the device with that name.
fn number_of(path: &str) -> Option<String> {
    let device = std::fs::metadata(path).ok().filter(|_| path.starts_with("/dev/"))?.rdev();
    Some(format!("{}:{}", major(device), minor(device)))
}

/// The first mount of one of the devices. File systems on several have a number of their own, and are known by their source.
fn mount_of(
    mountinfo: &str,
    numbers: &[String],
    number_of: impl Fn(&str) -> Option<String>,
) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(2);
        let (number, point) = (fields.next()?, fields.nth(1)?);
        let source = source.split(' ').nth(1).unwrap_or_default();
        let is_it = numbers.iter().any(|one| one == number)
            || number_of(source).is_some_and(|number| numbers.contains(&number));
        is_it.then(|| point.to_owned())
    })
}

fn is_swap(swaps: &str, numbers: &[String], number_of: impl Fn(&str) -> Option<String>) -> bool {
    let paths = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    paths.filter_map(number_of).any(|number| numbers.contains(&number))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw
30 22 0:45 / /srv/btrfs rw,relatime shared:9 - btrfs /dev/sdc rw,space_cache=v2
31 22 0:46 / /proc rw - proc proc rw
";

    fn number(path: &str) -> Option<String> {
        let number = match path {
            "/dev/sda2" => "8:2",
            "/dev/sdc" => "8:32",
            "/dev/sdd1" => "8:49",
            _ => return None,
        };
        Some(number.to_owned())
    }

    #[test]
    fn a_mount_is_known_by_its_device_or_by_its_source() {
        let of = |numbers: &[&str]| {
            let numbers: Vec<String> = numbers.iter().map(|&number| number.to_owned()).collect();
            mount_of(MOUNTINFO, &numbers, number)
        };
        assert_eq!(of(&["8:2"]).as_deref(), Some("/"));
        assert_eq!(of(&["8:0", "8:1", "8:2"]).as_deref(), Some("/"), "a partition of the disk");
        assert_eq!(of(&["8:32"]).as_deref(), Some("/srv/btrfs"));
        assert_eq!(of(&["8:48"]), None);
    }

    #[test]
    fn swap_is_known_by_its_name() {
        let swaps = "Filename Type Size Used Priority\n/dev/sdd1 partition 8 0 -2\n/swapfile file 8 0 -3\n";
        assert!(is_swap(swaps, &["8:48".to_owned(), "8:49".to_owned()], number));
        assert!(!is_swap(swaps, &["8:2".to_owned()], number));
    }
}
