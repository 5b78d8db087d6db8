//! The kernel series the product is tested on, named as the user names them: `7` and `6.12`.
//!
//! Called by the lab (which kernel to fetch and boot) and by the VM tests (which tests apply). A series is
//! a promise about features, not a version: `7` is the newest 7.x Debian ships (zero copy over sockets),
//! `6.12` the long-term kernel that has only the copying ways.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use ublk_core::DataPath;

/// One series of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
pub enum KernelSeries {
    /// The newest 7.x.
    #[value(name = "7")]
    #[serde(rename = "7")]
    V7,
    /// The newest 6.12.x.
    #[value(name = "6.12")]
    #[serde(rename = "6.12")]
    V6_12,
}

impl KernelSeries {
    /// Every series, in the order in which they are tested.
    pub const ALL: [KernelSeries; 2] = [KernelSeries::V7, KernelSeries::V6_12];

    /// The name used on command lines and in reports.
    pub fn name(self) -> &'static str {
        match self {
            KernelSeries::V7 => "7",
            KernelSeries::V6_12 => "6.12",
        }
    }

    /// The series called `name`, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|series| series.name() == name)
    }

    /// The data paths that work on it, best first.
    pub fn data_paths(self) -> &'static [DataPath] {
        match self {
            KernelSeries::V7 => &DataPath::LADDER,
            KernelSeries::V6_12 => &[DataPath::UserCopy, DataPath::Mapped],
        }
    }

    /// True if `release` (as `uname -r` prints it) is a kernel of this series.
    pub fn contains_release(self, release: &str) -> bool {
        release.strip_prefix(self.name()).is_some_and(|rest| rest.starts_with('.'))
    }

    /// The series whose tests fit a machine's own kernel: sockets take registered buffers since 7.2, and
    /// every older kernel has what 6.12 has or less.
    pub fn nearest_to_release(release: &str) -> Self {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version >= (7, 2) { KernelSeries::V7 } else { KernelSeries::V6_12 }
    }
}

impl fmt::Display for KernelSeries {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::KernelSeries;

    #[test]
    fn a_release_belongs_to_the_series_it_starts_with() {
        assert!(KernelSeries::V7.contains_release("7.3.4+deb13-amd64"));
        assert!(KernelSeries::V6_12.contains_release("6.12.107+deb13-amd64"));
        assert!(!KernelSeries::V7.contains_release("6.7.9"));
        assert!(!KernelSeries::V7.contains_release("70.1.0"));
        assert!(!KernelSeries::V6_12.contains_release("6.1.0-49-amd64"));
    }

    #[test]
    fn a_kernel_before_7_2_counts_as_the_copying_series() {
        assert_eq!(KernelSeries::nearest_to_release("7.2.11+deb13-amd64"), KernelSeries::V7);
        assert_eq!(KernelSeries::nearest_to_release("7.1.13+deb13-amd64"), KernelSeries::V6_12);
        assert_eq!(KernelSeries::nearest_to_release("6.18.44-fc"), KernelSeries::V6_12);
        assert_eq!(KernelSeries::nearest_to_release("8.0.1"), KernelSeries::V7);
    }
}
