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
    /// `dm-N`.
    pub kernel_name: String,
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
        Some(Mapper { attachment_id, bytes: bytes_below(sys, &kernel_name)?, kernel_name })
    };
    entries.flatten().filter_map(mapper).collect()
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
        self.is_on_below(Path::new("/sys"), dev_id)
    }

    fn is_on_below(&self, sys: &Path, dev_id: u32) -> bool {
        sys.join(format!("block/ublkb{dev_id}/holders")).join(&self.kernel_name).exists()
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
        };
        make("dm-3", &name_of(id), "2048\n");
        make("dm-4", "vault", "4096\n");
        make("dm-5", "volnode-v-0", "4096\n");
        fs::create_dir_all(block.join("ublkb0/holders/dm-3")).unwrap();
        fs::create_dir_all(block.join("ublkb1/holders")).unwrap();
        let found = all_below(sys.path());
        let expected = Mapper { attachment_id: id, kernel_name: "dm-3".to_owned(), bytes: 1 << 20 };
        assert_eq!(found, std::slice::from_ref(&expected));
        assert!(expected.is_on_below(sys.path(), 0) && !expected.is_on_below(sys.path(), 1));
        assert_eq!(bytes_below(sys.path(), "dm-9"), None);
        assert_eq!(path_of(id).file_name().unwrap().to_str().unwrap(), name_of(id));
    }
}
