//! The ways a request's data can travel, and the trial of what this kernel really can do.
//!
//! Owns: the names of the data paths, the device flags each needs, and a trial of each that touches no device. Never:
//! trusts a version number, or picks a path the trial did not prove.
//! Called by: the client when it attaches a volume.
//! Invariants: a trial has no effect outside this process and always ends (it transfers bytes that are already in a
//! socket's buffer; a receive on an empty socket would wait).
//! Source: `io_uring/net.c` and `drivers/block/ublk_drv.c`, Linux 7.2 and later for `fused`.
#![allow(unsafe_code)] // Registering a buffer and pushing the trial's SQEs.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::str::FromStr;
use std::time::Duration;

use io_uring::types::{self, SubmitArgs, Timespec};
use thiserror::Error;

use crate::abi::{UBLK_F_AUTO_BUF_REG, UBLK_F_SUPPORT_ZERO_COPY};
use crate::control::Features;
use crate::mapping::Mapping;
use crate::ring::{QueueRing, Sqe, build_queue_ring, recv_fixed, send_fixed};

/// Bytes moved in each direction by the trial: less than a socket buffer holds, more than one page.
const TRIAL_BYTES: usize = 6000;
/// Where in the registered buffer they are put: not at its start, so that a wrong address shows.
const TRIAL_OFFSET_BYTES: usize = 1234;
const TRIAL_BUFFER_BYTES: usize = 16384;
/// The transfers complete at once or never.
const TRIAL_DEADLINE: Duration = Duration::from_secs(2);

/// How a request's data travels between the block layer and the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DataPath {
    /// The request's own pages are the socket operations' buffer; nothing is copied in user space (Linux 7.2).
    Fused,
    /// The driver copies between the request's pages and the daemon's buffer (Linux 6.0).
    Mapped,
}

impl DataPath {
    /// Best first.
    pub const LADDER: [DataPath; 2] = [DataPath::Fused, DataPath::Mapped];

    /// The name in options and output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::Mapped => "mapped",
        }
    }

    /// The `UBLK_F_*` to ask for in ADD_DEV.
    pub const fn device_flags(self) -> u64 {
        match self {
            Self::Fused => UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG,
            Self::Mapped => 0,
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
#[error("unknown data path \"{name}\"; known are fused and mapped")]
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
    /// The trial could not be set up.
    #[error("cannot set up the trial: {0}")]
    Setup(#[source] io::Error),
    /// The operation was refused, or did not complete.
    #[error("{operation} with a registered buffer failed: {source} (Linux 7.2 or later has it)")]
    Refused {
        /// RECV or SEND.
        operation: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// The operation completed, but the bytes are not those that were sent.
    #[error(
        "{operation} with a registered buffer moved {moved} of {TRIAL_BYTES} bytes or not the right ones"
    )]
    WrongBytes {
        /// RECV or SEND.
        operation: &'static str,
        /// What the completion said, bytes.
        moved: usize,
    },
}

/// The outcome of the trial of one path.
#[derive(Debug)]
pub struct Rung {
    /// The path.
    pub data_path: DataPath,
    /// Usable, or why not.
    pub usable: Result<(), DataPathError>,
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
        rung.map_or(Err(&DataPathError::Untried), |rung| rung.usable.as_ref().copied())
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

fn try_data_path(data_path: DataPath, features: Features) -> Result<(), DataPathError> {
    let flags = data_path.device_flags();
    if !features.contains(flags) {
        return Err(DataPathError::Features { missing: Features(flags & !features.0) });
    }
    match data_path {
        DataPath::Fused => try_fixed_transfers(),
        DataPath::Mapped => Ok(()),
    }
}

/// Receives into and sends from a registered buffer over a pair of sockets, and compares the bytes.
fn try_fixed_transfers() -> Result<(), DataPathError> {
    let (near, mut far) = UnixStream::pair().map_err(DataPathError::Setup)?;
    let mut buffer = Mapping::anonymous(TRIAL_BUFFER_BYTES).map_err(DataPathError::Setup)?;
    // Declared after the buffer, so dropped, with its registration, before it.
    let mut ring = build_queue_ring(4, 4).map_err(DataPathError::Setup)?;
    let iovec = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(buffer.address(0) as usize),
        iov_len: buffer.len_bytes(),
    };
    // SAFETY: the buffer is mapped for as long as the ring that it is registered with exists.
    unsafe { ring.submitter().register_buffers(&[iovec]) }.map_err(DataPathError::Setup)?;
    let socket = types::Fd(near.as_raw_fd());
    let address = buffer.address(TRIAL_OFFSET_BYTES);

    let sent = trial_pattern(1);
    far.write_all(&sent).map_err(DataPathError::Setup)?;
    let moved = transfer(&mut ring, "RECV", recv_fixed(socket, 0, address, TRIAL_BYTES as u32, 0))?;
    let mut received = vec![0; TRIAL_BYTES];
    buffer.copy_out(TRIAL_OFFSET_BYTES, &mut received);
    if moved != TRIAL_BYTES || received != sent {
        return Err(DataPathError::WrongBytes { operation: "RECV", moved });
    }

    let sent = trial_pattern(2);
    buffer.copy_in(TRIAL_OFFSET_BYTES, &sent);
    let moved = transfer(&mut ring, "SEND", send_fixed(socket, 0, address, TRIAL_BYTES as u32, 0))?;
    far.set_read_timeout(Some(TRIAL_DEADLINE)).map_err(DataPathError::Setup)?;
    if moved != TRIAL_BYTES || far.read_exact(&mut received).is_err() || received != sent {
        return Err(DataPathError::WrongBytes { operation: "SEND", moved });
    }
    Ok(())
}

fn trial_pattern(seed: usize) -> Vec<u8> {
    (0..TRIAL_BYTES).map(|position| ((position * 31 + seed * 97) >> 2) as u8).collect()
}

/// Submits one transfer and waits for its completion; gives the bytes moved.
fn transfer(ring: &mut QueueRing, operation: &'static str, sqe: Sqe) -> Result<usize, DataPathError> {
    let refused = |source| DataPathError::Refused { operation, source };
    // SAFETY: the SQE names a socket and a registered buffer that outlive the ring.
    let pushed = unsafe { ring.submission().push(&sqe) };
    assert!(pushed.is_ok(), "the ring is empty between transfers");
    let timespec = Timespec::from(TRIAL_DEADLINE);
    ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec)).map_err(refused)?;
    let cqe = ring.completion().next().ok_or_else(|| refused(io::ErrorKind::TimedOut.into()))?;
    usize::try_from(cqe.result()).map_err(|_| refused(io::Error::from_raw_os_error(-cqe.result())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for data_path in DataPath::LADDER {
            assert_eq!(data_path.to_string().parse(), Ok(data_path));
        }
        assert!("fast".parse::<DataPath>().is_err());
    }

    #[test]
    fn a_driver_without_the_flags_is_told_by_their_names() {
        let report = probe(Features(UBLK_F_SUPPORT_ZERO_COPY));
        let error = report.check(DataPath::Fused).unwrap_err().to_string();
        assert_eq!(error, "this kernel's ublk driver lacks AUTO_BUF_REG");
        assert_eq!(report.best(), Some(DataPath::Mapped));
    }

    #[test]
    fn mapped_works_everywhere() {
        assert!(probe(Features(0)).check(DataPath::Mapped).is_ok());
    }
}
