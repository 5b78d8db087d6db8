//! How many volumes this machine can have, where nobody says.
//!
//! Owns the rule. Never: asks the driver, which may not be loaded yet. Called by: `serve`, once.
//!
//! Each volume is a ublk disk. Up to Linux 6.14 the driver makes no more disks than its parameter `ublks_max` says, 64 where nobody raised
//! it; later ones bound by it what others than root make (`drivers/block/ublk_drv.c`). What is left then is how many disks a heartbeat
//! tells of.

use std::fs;

use super::told::DISKS_MAX;

/// The driver's parameter.
const PARAMETER: &str = "/sys/module/ublk_drv/parameters/ublks_max";
/// Its value where nobody set it, or the driver is not loaded.
const PARAMETER_DEFAULT: u32 = 64;
/// The first version of Linux whose `ublks_max` is not for root's disks.
const ROOT_IS_FREE_SINCE: (u32, u32) = (6, 15);

/// What this machine can have.
pub(in crate::node) fn of_this_machine() -> u32 {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    limit(&release, fs::read_to_string(PARAMETER).ok().as_deref())
}

/// The same, by the kernel's release and what the parameter's file says.
fn limit(release: &str, parameter: Option<&str>) -> u32 {
    let disks_max = u32::try_from(DISKS_MAX).unwrap_or(u32::MAX);
    if version(release).is_some_and(|version| version >= ROOT_IS_FREE_SINCE) {
        return disks_max;
    }
    let parameter = parameter.and_then(|text| text.trim().parse().ok()).unwrap_or(PARAMETER_DEFAULT);
    // None at all would be no limit, to whoever is told.
    parameter.clamp(1, disks_max)
}

/// The first two numbers of a release, such as `6.12.43+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_parameter_binds_older_kernels_and_the_heartbeat_all() {
        for (release, parameter, expected) in [
            ("6.12.43+deb13-amd64", Some("64\n"), 64),
            ("6.12.43+deb13-amd64", Some("200\n"), 200),
            ("6.12.43+deb13-amd64", Some("100000\n"), 256),
            ("6.12.43+deb13-amd64", Some("0\n"), 1),
            ("6.12.43+deb13-amd64", None, 64),
            ("6.14.0-15-generic", Some("8"), 8),
            ("6.15.0", Some("8"), 256),
            ("7.3.4+deb13-amd64", Some("64\n"), 256),
            ("10.0", None, 256),
            // What cannot be read is an old one.
            ("", None, 64),
            ("linux", Some("nonsense"), 64),
        ] {
            assert_eq!(limit(release, parameter), expected, "{release} {parameter:?}");
        }
        assert!((1..=256).contains(&of_this_machine()));
    }
}
