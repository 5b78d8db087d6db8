//! Telling a block device that some of its bytes are not needed any more.
//!
//! Called by `file.rs`. Never: says what is read there afterwards. Source: `include/uapi/linux/fs.h`, blkdiscard(8).
#![allow(unsafe_code)] // One ioctl that no library has.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// `_IO(0x12, 119)`
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Waits for the device, which gives back what it can.
///
/// # Errors
/// The system's; `EOPNOTSUPP`: it has no such thing.
pub(super) fn discard(file: &File, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
    let range = [offset_bytes, length_bytes];
    // SAFETY: the descriptor is open as long as the file is borrowed, and the kernel reads two 64-bit numbers there.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
