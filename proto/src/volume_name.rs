//! What both sides have to know of volumes' names.
//!
//! Owns: which names look like a partition's. The first partition of the disk `vol-1` is `/dev/volnode/vol-1-part1`, as udev names
//! partitions everywhere, and the disk of a volume of that name would be, too.
//! Called by the server (no new volume gets such a name) and the client (which looks for the other one).

/// The disk and the partition's number, where a name is what udev would call a partition of another disk.
pub fn partition_of(name: &str) -> Option<(&str, u32)> {
    let (disk, number) = name.rsplit_once("-part")?;
    let is_number = !number.starts_with('0') && number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse().ok().filter(|_| is_number)?;
    (!disk.is_empty()).then_some((disk, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_udev_would_call_a_partition_is_one() {
        assert_eq!(partition_of("vol-1-part1"), Some(("vol-1", 1)));
        assert_eq!(partition_of("a-part2-part15"), Some(("a-part2", 15)));
        for other in [
            "vol-1",
            "vol-part",
            "vol-parts",
            "vol-part1a",
            "vol-part01",
            "vol-part0",
            "part1",
            "-part1",
            "vol.part1",
        ] {
            assert_eq!(partition_of(other), None, "{other}");
        }
    }
}
