//! What is on a block device: blkid's low-level search, and a look of our own at both ends.
//!
//! Owns: blkid's command line and exit codes, the reads, and the erasing of what a killed mkfs left. Never: decides; `blank` does. The device is the descriptor
//! that the caller holds, whatever name it has meanwhile. blkid says 2 for "nothing" and for "cannot be read" alike, so a device
//! that it finds nothing on is read here as well. Called by: the Node service.
//! Source: blkid(8), util-linux 2.38: exit codes 0, 2, 4 and 8; the superblocks of ext4 (fs/ext4/ext4.h) and XFS
//! (fs/xfs/libxfs/xfs_format.h), Linux 7.3.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Output, Stdio};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::blank::{Ends, Found};
use super::mount_options::FsType;

/// At each end, in bytes: more than any superblock, partition table or header of LUKS2's two copies.
const END_BYTES: u64 = 4 << 20;
/// Of one read, in bytes.
const READ_BYTES: usize = 1 << 20;
/// How much of what blkid says a message shows, in characters.
const SHOWN_CHARACTERS_MAX: usize = 300;
/// Where XFS's superblock says that mkfs is at work; its last write clears it.
const XFS_IN_PROGRESS_AT: usize = 126;
/// Where ext4's superblock begins, in bytes.
const EXT4_SUPERBLOCK_AT: usize = 1024;
/// Of ext4's features without which nobody may mount it: blocks have 64-bit numbers.
const EXT4_FEATURE_64BIT: u32 = 0x80;
/// As much as both superblocks take, in bytes.
const HEAD_BYTES: usize = 4096;
/// What stdin is to a program that opens its device by a path.
pub const DEVICE_ON_STDIN: &str = "/proc/self/fd/0";

/// blkid, asked about the device that is its stdin.
///
/// # Errors
/// The system's, if the descriptor cannot be duplicated.
pub fn blkid_command(device: impl AsFd) -> io::Result<Command> {
    let device: OwnedFd = device.as_fd().try_clone_to_owned()?;
    let mut command = Command::new("blkid");
    // No cache, no configuration, and the device itself rather than what udev remembers of it.
    command.args(["--probe", "--output", "export", DEVICE_ON_STDIN]).stdin(Stdio::from(device));
    command.env("LC_ALL", "C").env("BLKID_FILE", "/dev/null");
    Ok(command)
}

/// Reads what blkid said.
pub fn found(output: &Output) -> Found {
    let said = String::from_utf8_lossy(&output.stdout);
    let value = |key: &str| {
        said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned)
    };
    match output.status.code() {
        Some(0) => {
            let kind = value("TYPE");
            // A file system below a partition table, or the other way round.
            if let Some(table) = value("PTTYPE") {
                return match kind {
                    Some(kind) => {
                        Found::Unclear(format!("it has both {kind} and a partition table ({table})"))
                    }
                    None => Found::Other(format!("a partition table ({table})")),
                };
            }
            match (kind, value("USAGE").as_deref()) {
                (Some(kind), Some("filesystem")) => Found::FileSystem(kind),
                (Some(kind), _) => Found::Other(kind),
                (None, _) => Found::Unclear("blkid found something that it has no name for".to_owned()),
            }
        }
        Some(2) => Found::Nothing,
        Some(8) => Found::Unclear("blkid finds more than one thing on it".to_owned()),
        code => {
            let why: String =
                String::from_utf8_lossy(&output.stderr).trim().chars().take(SHOWN_CHARACTERS_MAX).collect();
            let code = code.map_or("a signal".to_owned(), |code| code.to_string());
            Found::Unclear(format!("blkid ended with {code}: {why}"))
        }
    }
}

/// The same with what blkid does not look at: whether mkfs came to its end. (ext4's writes the superblock last.) Waits for as long as
/// the device does.
///
/// # Errors
/// The device's.
pub fn with_unfinished(device: impl AsFd, found: Found) -> io::Result<Found> {
    match found {
        Found::FileSystem(name) if name == FsType::Xfs.name() => {
            let is_unfinished = head(device)?[XFS_IN_PROGRESS_AT] != 0;
            Ok(if is_unfinished { Found::Unfinished(name) } else { Found::FileSystem(name) })
        }
        found => Ok(found),
    }
}

/// How large the file system is by its superblock, and the unit of that, in bytes; `None`: it is another, or damaged.
///
/// # Errors
/// The device's.
pub fn file_system_bytes(device: impl AsFd, fs_type: FsType) -> io::Result<Option<(u64, u64)>> {
    Ok(bytes_by_superblock(&head(device)?, fs_type))
}

fn bytes_by_superblock(head: &[u8; HEAD_BYTES], fs_type: FsType) -> Option<(u64, u64)> {
    let word = |at: usize| -> [u8; 4] { std::array::from_fn(|index| head[at + index]) };
    let (blocks, block_bytes) = match fs_type {
        FsType::Ext4 => {
            let number = |at: usize| u32::from_le_bytes(word(EXT4_SUPERBLOCK_AT + at));
            if head[EXT4_SUPERBLOCK_AT + 0x38..][..2] != [0x53, 0xef] {
                return None;
            }
            let high = if number(0x60) & EXT4_FEATURE_64BIT == 0 { 0 } else { number(0x150) };
            let block_bytes = 1024_u64.checked_shl(number(0x18))?;
            (u64::from(high) << 32 | u64::from(number(0x4)), block_bytes)
        }
        FsType::Xfs => {
            if head[..4] != *b"XFSB" {
                return None;
            }
            let blocks =
                u64::from(u32::from_be_bytes(word(8))) << 32 | u64::from(u32::from_be_bytes(word(12)));
            (blocks, u64::from(u32::from_be_bytes(word(4))))
        }
    };
    Some((blocks.checked_mul(block_bytes)?, block_bytes))
}

/// How large the device is, in bytes.
///
/// # Errors
/// The device's.
pub fn device_bytes(device: impl AsFd) -> io::Result<u64> {
    Ok(seek(device, SeekFrom::End(0))?)
}

/// The beginning; zeros behind the end of what is shorter.
fn head(device: impl AsFd) -> io::Result<[u8; HEAD_BYTES]> {
    let (device, mut head, mut at) = (device.as_fd(), [0; HEAD_BYTES], 0);
    while at < HEAD_BYTES {
        match rustix::io::pread(device, &mut head[at..], at as u64) {
            Ok(0) => break,
            Ok(read) => at += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(head)
}

/// Writes zeros over both ends, and has them on the device. Only where the server says that nobody's bytes are in it.
///
/// # Errors
/// The device's.
pub fn erase_ends(device: impl AsFd) -> io::Result<()> {
    let device = device.as_fd();
    let bytes = device_bytes(device)?;
    let head = 0..bytes.min(END_BYTES);
    let tail = bytes.saturating_sub(END_BYTES).max(head.end)..bytes;
    let zeros = vec![0; READ_BYTES];
    for range in [head, tail] {
        let mut at = range.start;
        while at < range.end {
            let wanted = (range.end - at).min(READ_BYTES as u64) as usize;
            at += rustix::io::retry_on_intr(|| rustix::io::pwrite(device, &zeros[..wanted], at))? as u64;
        }
    }
    Ok(rustix::fs::fsync(device)?)
}

/// Reads both ends: all of the device, where it is no longer than two ends. Waits for as long as the device does.
///
/// # Errors
/// The device's; one that is empty or ends early is [`io::ErrorKind::UnexpectedEof`].
pub fn ends(device: impl AsFd) -> io::Result<Ends> {
    let device = device.as_fd();
    let bytes = seek(device, SeekFrom::End(0))?;
    if bytes == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the device has no bytes"));
    }
    let head = 0..bytes.min(END_BYTES);
    let tail = bytes.saturating_sub(END_BYTES).max(head.end)..bytes;
    let mut buffer = vec![0; READ_BYTES];
    for range in [head, tail] {
        let mut at = range.start;
        while at < range.end {
            let wanted = (range.end - at).min(READ_BYTES as u64) as usize;
            let read = match rustix::io::pread(device, &mut buffer[..wanted], at) {
                Err(Errno::INTR) => continue,
                read => read?,
            };
            if read == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("the device ends at byte {at}"),
                ));
            }
            if buffer[..read].iter().any(|byte| *byte != 0) {
                return Ok(Ends::Data);
            }
            at += read as u64;
        }
    }
    Ok(Ends::Zeros)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    fn output(code: i32, said: &str) -> Output {
        Output { status: ExitStatus::from_raw(code << 8), stdout: said.into(), stderr: "why".into() }
    }

    #[test]
    fn blkids_codes_are_told_apart() {
        let named = |name: &str| Found::FileSystem(name.to_owned());
        assert_eq!(found(&output(0, "DEVNAME=/x\nTYPE=ext4\nUSAGE=filesystem\n")), named("ext4"));
        assert_eq!(
            found(&output(0, "TYPE=crypto_LUKS\nUSAGE=crypto\n")),
            Found::Other("crypto_LUKS".to_owned())
        );
        assert_eq!(found(&output(0, "PTTYPE=gpt\n")), Found::Other("a partition table (gpt)".to_owned()));
        assert_eq!(found(&output(2, "")), Found::Nothing);
        let killed = Output { status: ExitStatus::from_raw(9), stdout: Vec::new(), stderr: Vec::new() };
        let both = "TYPE=ext4\nUSAGE=filesystem\nPTTYPE=dos\n";
        // A label may say whatever its owner likes.
        let label = "LABEL=x\\nTYPE=ext4\n";
        for unclear in [
            output(4, ""),
            output(8, ""),
            output(1, ""),
            output(0, ""),
            output(0, both),
            output(0, label),
            killed,
        ] {
            assert!(matches!(found(&unclear), Found::Unclear(_)), "{unclear:?}");
        }
    }

    #[test]
    fn one_byte_in_either_end_is_data() {
        const MIB: u64 = 1 << 20;
        for bytes in [512, 4 * MIB, 5 * MIB, 8 * MIB, 20 * MIB + 512] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            assert_eq!(ends(&file).unwrap(), Ends::Zeros, "{bytes}");
            for at in [0, bytes / 2, bytes - 1] {
                file.write_all_at(&[1], at).unwrap();
                let is_looked_at = at < END_BYTES || at >= bytes.saturating_sub(END_BYTES);
                let expected = if is_looked_at { Ends::Data } else { Ends::Zeros };
                assert_eq!(ends(&file).unwrap(), expected, "{at} of {bytes}");
                file.write_all_at(&[0], at).unwrap();
            }
        }
    }

    #[test]
    fn erased_ends_are_zeros_and_the_middle_stays() {
        const MIB: u64 = 1 << 20;
        for bytes in [512, 5 * MIB, 20 * MIB + 512] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            for at in [0, bytes / 2, bytes - 1] {
                file.write_all_at(&[1], at).unwrap();
            }
            erase_ends(&file).unwrap();
            assert_eq!(ends(&file).unwrap(), Ends::Zeros, "{bytes}");
            assert_eq!(file.metadata().unwrap().len(), bytes);
            let mut middle = [0];
            file.read_exact_at(&mut middle, bytes / 2).unwrap();
            assert_eq!(middle, [u8::from(bytes > 8 * MIB)]);
        }
    }

    #[test]
    fn an_xfs_whose_mkfs_was_killed_is_told_apart() {
        let named = |name: &str| Found::FileSystem(name.to_owned());
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        file.write_all_at(b"XFSB", 0).unwrap();
        assert_eq!(with_unfinished(&file, named("xfs")).unwrap(), named("xfs"));
        file.write_all_at(&[1], 126).unwrap();
        assert_eq!(with_unfinished(&file, named("xfs")).unwrap(), Found::Unfinished("xfs".to_owned()));
        // That is within the boot sector of any other.
        for found in [named("ext4"), Found::Nothing, Found::Other("xfs".to_owned())] {
            assert_eq!(with_unfinished(&file, found.clone()).unwrap(), found);
        }
    }

    #[test]
    fn a_file_system_has_the_size_of_its_superblock() {
        let mut head = [0; HEAD_BYTES];
        assert_eq!(bytes_by_superblock(&head, FsType::Ext4), None);
        assert_eq!(bytes_by_superblock(&head, FsType::Xfs), None);
        head[..4].copy_from_slice(b"XFSB");
        head[4..8].copy_from_slice(&4096_u32.to_be_bytes());
        head[8..16].copy_from_slice(&(1_u64 << 33).to_be_bytes());
        assert_eq!(bytes_by_superblock(&head, FsType::Xfs), Some((1 << 45, 4096)));
        head[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
        assert_eq!(bytes_by_superblock(&head, FsType::Xfs), None);
        if Command::new("mkfs.ext4").arg("-V").output().is_err() {
            println!("SKIP no mkfs.ext4");
            return;
        }
        for (features, block_bytes) in [("64bit", 1024), ("^64bit", 4096)] {
            let named = tempfile::NamedTempFile::new().unwrap();
            named.as_file().set_len(16 << 20).unwrap();
            let made = Command::new("mkfs.ext4")
                .args(["-q", "-O", features, "-b", &block_bytes.to_string()])
                .arg(named.path())
                .status();
            assert!(made.unwrap().success());
            let told = file_system_bytes(named.as_file(), FsType::Ext4).unwrap();
            assert_eq!(told, Some((16 << 20, block_bytes)), "{features}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_not_blank() {
        assert_eq!(ends(tempfile::tempfile().unwrap()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(512).unwrap();
        let write_only = File::options().write(true).open(named.path()).unwrap();
        assert!(ends(write_only).is_err());
    }

    #[test]
    fn blkid_is_asked_about_the_descriptor() {
        let is_there = |tool: &str| Command::new(tool).arg("-V").output().is_ok();
        if !is_there("blkid") || !is_there("mkfs.ext4") {
            println!("SKIP no blkid or mkfs.ext4");
            return;
        }
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(16 << 20).unwrap();
        let ask = || found(&blkid_command(named.as_file()).unwrap().output().unwrap());
        assert_eq!(ask(), Found::Nothing);
        let made = Command::new("mkfs.ext4").arg("-q").arg(named.path()).status().unwrap();
        assert!(made.success());
        assert_eq!(ask(), Found::FileSystem("ext4".to_owned()));
        // Wherever the file goes.
        std::fs::remove_file(named.path()).unwrap();
        assert_eq!(ask(), Found::FileSystem("ext4".to_owned()));
    }
}
