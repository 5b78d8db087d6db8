//! What both sides have to know of volumes' names.
//!
//! Owns: which texts are names, whose name space one is in, and which names look like a partition's. The first partition of the disk `vol-1` is `/dev/volnode/vol-1-part1`, as udev names
//! partitions everywhere, and the disk of a volume of that name would be, too.
//! Called by the server (no new volume gets such a name) and the client (which looks for the other one).

/// Between the name of a tenant and what the volume is called in its name space: `acme+db` is the volume `db` of the tenant `acme`. No
/// other name has one; files, links, udev and URIs take it as it is.
pub const TENANT_MARK: char = '+';
/// Characters of a volume's name at most, the tenant's among them.
pub const VOLUME_NAME_CHARS_MAX: usize = 128;
/// Characters of a tenant's name at most: half of a volume's is left.
pub const TENANT_NAME_CHARS_MAX: usize = 63;

/// Whether it is 1 to `chars_max` letters, digits, '-', '_' and '.', beginning with a letter or digit: the name of a snapshot, of a tenant,
/// or of a volume that is in no name space.
pub fn is_plain_name(text: &str, chars_max: usize) -> bool {
    let is_first = |byte: &u8| byte.is_ascii_alphanumeric();
    let is_other = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    text.len() <= chars_max && text.as_bytes().first().is_some_and(is_first) && text.bytes().all(is_other)
}

/// Whether it can be the name of a tenant.
pub fn is_tenant_name(text: &str) -> bool {
    is_plain_name(text, TENANT_NAME_CHARS_MAX)
}

/// Whether it can be the name of a volume: a plain one, or `TENANT+NAME`.
pub fn is_volume_name(text: &str) -> bool {
    let is_long = text.len() > VOLUME_NAME_CHARS_MAX;
    !is_long
        && match text.split_once(TENANT_MARK) {
            None => is_plain_name(text, VOLUME_NAME_CHARS_MAX),
            Some((tenant, name)) => is_tenant_name(tenant) && is_plain_name(name, VOLUME_NAME_CHARS_MAX),
        }
}

/// The tenant in whose name space the volume is; empty where it is in none. Of a snapshot as it is opened (`VOLUME@SNAPSHOT`) the same.
pub fn tenant_of(name: &str) -> &str {
    name.split_once(TENANT_MARK).map_or("", |(tenant, _)| tenant)
}

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
    fn a_name_is_plain_or_in_one_tenant_s_name_space() {
        let longest = "x".repeat(128);
        for good in ["a", "7", "vol-123", "A_b.c-9", "acme+db", "a.b-c+d.e", &longest] {
            assert!(is_volume_name(good), "{good}");
        }
        let (too_long, long_tenant) = (format!("a+{}", "x".repeat(127)), format!("{}+a", "x".repeat(64)));
        for bad in
            ["", "+", "+a", "a+", "a+b+c", "a+-b", "-a+b", "a/b", "a+b@s", "uid:a+b", &too_long, &long_tenant]
        {
            assert!(!is_volume_name(bad), "{bad:?}");
        }
        assert!(
            !is_tenant_name("") && !is_tenant_name("a+b") && !is_tenant_name("a/b") && is_tenant_name("a.b")
        );
        assert_eq!(["acme+db", "acme+db@s", "db", "@7", ""].map(tenant_of), ["acme", "acme", "", "", ""]);
    }

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
