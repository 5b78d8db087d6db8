//! The clear disks that the kernel has: dm-crypt devices that are called by an attachment's id.
//!
//! Reads sysfs, and never a disk. Which disk a clear disk lies on is told by the disk itself (`holders`): the name of one that is gone is
//! used again. Source: Documentation/ABI/testing/sysfs-block and sysfs-block-dm.

use std::fs;
use std::path::{Path, PathBuf};

use uuid::Uuid;

const PREFIX: &str = "volnode-";
/// What sysfs counts sizes in, in bytes.
const SECTOR_BYTES: u64 = 512;

/// A clear disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapper {
    /// Whose it is.
    pub attachment_id: Uuid,
    /// `dm-N`, which is its name in /dev as well.
    pub kernel_name: String,
    /// Major and minor number.
    pub number: (u32, u32),
    /// Its size.
    pub bytes: u64,
}

/// What device mapper calls the clear disk of an attachment.
pub fn name_of(attachment_id: Uuid) -> String {
    format!("{PREFIX}{attachment_id}")
}

/// Where the clear disk of an attachment is, once it is open.
pub fn path_of(attachment_id: Uuid) -> PathBuf {
    Path::new("/dev/mapper").join(name_of(attachment_id))
}

/// The clear disk of an attachment, if it is open.
pub fn find(attachment_id: Uuid) -> Option<Mapper> {
    all().into_iter().find(|mapper| mapper.attachment_id == attachment_id)
}

/// Every clear disk of this machine.
pub fn all() -> Vec<Mapper> {
    all_below(Path::new("/sys"))
}

fn all_below(sys: &Path) -> Vec<Mapper> {
    let Ok(entries) = fs::read_dir(sys.join("block")) else { return Vec::new() };
    let mapper = |entry: fs::DirEntry| {
        let kernel_name = entry.file_name().into_string().ok().filter(|name| name.starts_with("dm-"))?;
        let name = fs::read_to_string(entry.path().join("dm/name")).ok()?;
        let attachment_id = Uuid::try_parse(name.trim().strip_prefix(PREFIX)?).ok()?;
        let number = number_of(&fs::read_to_string(entry.path().join("dev")).ok()?)?;
        Some(Mapper { attachment_id, number, bytes: bytes_below(sys, &kernel_name)?, kernel_name })
    };
    entries.flatten().filter_map(mapper).collect()
}

/// As sysfs has a number: `252:3`.
fn number_of(told: &str) -> Option<(u32, u32)> {
    let (major, minor) = told.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// How large a disk is, in bytes, by the kernel's name of it; `None`: it is not there.
pub fn disk_bytes(kernel_name: &str) -> Option<u64> {
    bytes_below(Path::new("/sys"), kernel_name)
}

fn bytes_below(sys: &Path, kernel_name: &str) -> Option<u64> {
    let sectors = fs::read_to_string(sys.join("block").join(kernel_name).join("size")).ok()?;
    sectors.trim().parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)
}

impl Mapper {
    /// Whether it lies on `/dev/ublkb<dev_id>`.
    pub fn is_on(&self, dev_id: u32) -> bool {
        self.is_on_disk(&format!("ublkb{dev_id}"))
    }

    /// Whether it lies on the disk that the kernel calls so.
    pub fn is_on_disk(&self, kernel_name: &str) -> bool {
        self.is_on_below(Path::new("/sys"), kernel_name)
    }

    /// Whether the disk that it lies on is there; without it all I/O fails.
    pub fn has_disk(&self) -> bool {
        self.has_disk_below(Path::new("/sys"))
    }

    fn is_on_below(&self, sys: &Path, kernel_name: &str) -> bool {
        sys.join("block").join(kernel_name).join("holders").join(&self.kernel_name).exists()
    }

    /// Its own word outlives the disk, whose name may be another's by then: the disk has to say so as well.
    fn has_disk_below(&self, sys: &Path) -> bool {
        let below = fs::read_dir(sys.join("block").join(&self.kernel_name).join("slaves"));
        let mut names = below.into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.any(|name| name.to_str().is_some_and(|name| self.is_on_below(sys, name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clear_disk_is_found_by_its_attachment_and_known_to_lie_on_a_disk_by_that() {
        let sys = tempfile::tempdir().unwrap();
        let block = sys.path().join("block");
        let id = Uuid::from_u128(7);
        let make = |kernel_name: &str, name: &str, sectors: &str| {
            fs::create_dir_all(block.join(kernel_name).join("dm")).unwrap();
            fs::write(block.join(kernel_name).join("dm/name"), format!("{name}\n")).unwrap();
            fs::write(block.join(kernel_name).join("size"), sectors).unwrap();
            fs::write(block.join(kernel_name).join("dev"), kernel_name.replace("dm-", "252:") + "\n")
                .unwrap();
        };
        make("dm-3", &name_of(id), "2048\n");
        make("dm-4", "vault", "4096\n");
        make("dm-5", "volnode-v-0", "4096\n");
        fs::create_dir_all(block.join("ublkb0/holders/dm-3")).unwrap();
        fs::create_dir_all(block.join("ublkb1/holders")).unwrap();
        let found = all_below(sys.path());
        let expected =
            Mapper { attachment_id: id, kernel_name: "dm-3".to_owned(), number: (252, 3), bytes: 1 << 20 };
        assert_eq!(found, std::slice::from_ref(&expected));
        assert!(expected.is_on_below(sys.path(), "ublkb0") && !expected.is_on_below(sys.path(), "ublkb1"));
        assert!(!expected.has_disk_below(sys.path()));
        fs::create_dir_all(block.join("dm-3/slaves/ublkb0")).unwrap();
        assert!(expected.has_disk_below(sys.path()));
        // The name is another disk's by now.
        fs::remove_dir(block.join("ublkb0/holders/dm-3")).unwrap();
        assert!(!expected.has_disk_below(sys.path()));
        assert_eq!(bytes_below(sys.path(), "dm-9"), None);
        assert_eq!(path_of(id).file_name().unwrap().to_str().unwrap(), name_of(id));
    }
}
