//! What is on a block device: blkid's low-level search, and a look of our own at both ends.
//!
//! Owns: blkid's command line and exit codes, and the reads. Never: writes, or decides; `blank` does. The device is the descriptor
//! that the caller holds, whatever name it has meanwhile. blkid says 2 for "nothing" and for "cannot be read" alike, so a device
//! that it finds nothing on is read here as well. Called by: the Node service.
//! Source: blkid(8), util-linux 2.38: exit codes 0, 2, 4 and 8.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Output, Stdio};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::blank::{Ends, Found};

/// At each end, in bytes: more than any superblock, partition table or header of LUKS2's two copies.
const END_BYTES: u64 = 4 << 20;
/// Of one read, in bytes.
const READ_BYTES: usize = 1 << 20;
/// How much of what blkid says a message shows, in characters.
const SHOWN_CHARACTERS_MAX: usize = 300;
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
