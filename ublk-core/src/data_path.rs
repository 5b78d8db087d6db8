//! The ways a request's data can travel, and the proof of what this kernel really can do.
//!
//! Owns: the names of the data paths, the device flags each needs, and how each moves bytes to and from a socket.
//! Never: trusts a version number, or picks a path whose trial failed.
//! Called by: the client when it attaches a volume, its node API and `volctl doctor`.
//! Invariants: probing touches no device. What it cannot see is whether ADD_DEV grants the flags; the caller adds the
//! device on the best usable path and goes down the ladder when the driver drops one of them
//! ([`ControlError::FlagsDropped`]).
//! Source: `include/uapi/linux/ublk_cmd.h`, Linux 7.3.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::abi::{UBLK_F_AUTO_BUF_REG, UBLK_F_SUPPORT_ZERO_COPY, UBLK_F_USER_COPY};
use crate::control::{ControlDevice, ControlError, Features};
use crate::transfer::{Transfer, TransferError};

/// How a request's data travels between the block layer and the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DataPath {
    /// The request's own pages are the buffer of the socket's RECV, and of its SEND where the daemon may not copy them; the
    /// driver puts them in the ring's buffer table with FETCH and takes them out with COMMIT (Linux 7.2).
    Fused,
    /// The same pages, moved by READ_FIXED and WRITE_FIXED on the socket, which may stop short (Linux 6.16).
    FixedRw,
    /// The same pages, put in the table and taken out by two more commands for each request (Linux 6.15).
    Registered,
    /// Through the daemon's buffer, which it copies itself by pread and pwrite on the character device (Linux 6.5).
    UserCopy,
    /// Through the daemon's buffer, which the driver copies (Linux 6.0).
    Mapped,
}

impl DataPath {
    /// Best first.
    pub const LADDER: [DataPath; 5] =
        [DataPath::Fused, DataPath::FixedRw, DataPath::Registered, DataPath::UserCopy, DataPath::Mapped];

    /// The name in options and output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::FixedRw => "fixed-rw",
            Self::Registered => "registered",
            Self::UserCopy => "user-copy",
            Self::Mapped => "mapped",
        }
    }

    /// The `UBLK_F_*` to ask for in ADD_DEV.
    pub const fn device_flags(self) -> u64 {
        match self {
            Self::Fused | Self::FixedRw => UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG,
            Self::Registered => UBLK_F_SUPPORT_ZERO_COPY,
            Self::UserCopy => UBLK_F_USER_COPY,
            Self::Mapped => 0,
        }
    }

    /// The `UBLK_F_*` to ask for in ADD_DEV that it can do without: with USER_COPY small payloads can be copied together
    /// with the headers around them.
    pub const fn wished_device_flags(self) -> u64 {
        match self {
            Self::Fused => UBLK_F_USER_COPY,
            _ => 0,
        }
    }

    /// How its bytes may move, best first; each needs proof.
    pub const fn transfers(self) -> &'static [Transfer] {
        match self {
            Self::Fused => &[Transfer::RecvSendFixed],
            Self::FixedRw => &[Transfer::ReadWriteFixed],
            // The first is what makes it differ from `fused` in nothing but the two commands; 6.15 has the second.
            Self::Registered => &[Transfer::RecvSendFixed, Transfer::ReadWriteFixed],
            Self::UserCopy | Self::Mapped => &[Transfer::RecvSend],
        }
    }
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DataPath {
    type Err = UnknownDataPath;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::LADDER.into_iter().find(|path| path.as_str() == name);
        known.ok_or_else(|| UnknownDataPath { name: name.to_owned() })
    }
}

/// No data path has this name.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("unknown data path \"{name}\"; known are {}", DataPath::LADDER.map(DataPath::as_str).join(", "))]
pub struct UnknownDataPath {
    /// The name.
    pub name: String,
}

/// Why a data path cannot be used here.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataPathError {
    /// The report is not from [`probe`], or the path is missing in [`DataPath::LADDER`].
    #[error("this data path was not tried")]
    Untried,
    /// The driver does not know the flags.
    #[error("this kernel's ublk driver lacks {missing}")]
    Features {
        /// What is missing.
        missing: Features,
    },
    /// None of its transfers works; this is why not the last of them.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// The outcome of the trial of one path.
#[derive(Debug)]
pub struct Rung {
    /// The path.
    pub data_path: DataPath,
    /// How its bytes move, or why it cannot be used.
    pub usable: Result<Transfer, DataPathError>,
}

/// The outcomes of all trials, best path first.
#[derive(Debug)]
pub struct ProbeReport {
    /// One for each path of [`DataPath::LADDER`], in its order.
    pub rungs: Vec<Rung>,
}

impl ProbeReport {
    /// The best usable path.
    pub fn best(&self) -> Option<DataPath> {
        self.rungs.iter().find(|rung| rung.usable.is_ok()).map(|rung| rung.data_path)
    }

    /// Whether a path is usable; `Err` says why not, for humans.
    pub fn check(&self, data_path: DataPath) -> Result<(), &DataPathError> {
        let rung = self.rungs.iter().find(|rung| rung.data_path == data_path);
        rung.map_or(Err(&DataPathError::Untried), |rung| rung.usable.as_ref().map(|_| ()))
    }
}

/// Tries every data path on this kernel, after asking its driver what it knows.
///
/// Errors: those of [`ControlDevice::get_features`], but for a driver too old to answer (before Linux 6.5), which has
/// none of the newer features.
pub fn probe_driver(control: &ControlDevice) -> Result<ProbeReport, ControlError> {
    match control.get_features() {
        Err(ControlError::Unsupported { .. }) => Ok(probe(Features(0))),
        features => Ok(probe(features?)),
    }
}

/// Tries every data path on this kernel, whose driver knows `features`.
pub fn probe(features: Features) -> ProbeReport {
    let rungs = DataPath::LADDER
        .into_iter()
        .map(|data_path| Rung { data_path, usable: try_data_path(data_path, features) })
        .collect();
    ProbeReport { rungs }
}

fn try_data_path(data_path: DataPath, features: Features) -> Result<Transfer, DataPathError> {
    let flags = data_path.device_flags();
    if !features.contains(flags) {
        return Err(DataPathError::Features { missing: Features(flags & !features.0) });
    }
    let mut outcome = Err(DataPathError::Untried);
    for &transfer in data_path.transfers() {
        outcome = transfer.prove().map(|()| transfer).map_err(DataPathError::Transfer);
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Features = Features(UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG | UBLK_F_USER_COPY);

    #[test]
    fn names_round_trip() {
        for data_path in DataPath::LADDER {
            assert_eq!(data_path.to_string().parse(), Ok(data_path));
        }
        let error = "fast".parse::<DataPath>().unwrap_err().to_string();
        assert!(error.ends_with("known are fused, fixed-rw, registered, user-copy, mapped"), "{error}");
    }

    #[test]
    fn a_driver_without_the_flags_is_told_by_their_names() {
        let report = probe(Features(UBLK_F_SUPPORT_ZERO_COPY));
        for data_path in [DataPath::Fused, DataPath::FixedRw] {
            let error = report.check(data_path).unwrap_err().to_string();
            assert_eq!(error, "this kernel's ublk driver lacks AUTO_BUF_REG");
        }
        assert_eq!(report.best(), Some(DataPath::Registered));
    }

    #[test]
    fn each_driver_has_its_best_path() {
        assert_eq!(probe(Features(0)).best(), Some(DataPath::Mapped));
        assert_eq!(probe(Features(UBLK_F_USER_COPY)).best(), Some(DataPath::UserCopy));
        // `fused` depends on io_uring alone then, which the machine that runs this may have or not.
        assert!(matches!(probe(ALL).best(), Some(DataPath::Fused | DataPath::FixedRw)));
    }

    #[test]
    fn a_path_moves_bytes_only_in_a_way_that_was_proved() {
        for rung in probe(ALL).rungs {
            if let Ok(transfer) = rung.usable {
                assert!(rung.data_path.transfers().contains(&transfer));
                transfer.prove().unwrap();
            }
        }
    }
}
