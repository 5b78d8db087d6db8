//! The command lines of the programs that make, check and grow file systems, and what their exit codes mean.
//!
//! Never: forces anything, or gives a program a path that could be another disk's by now: the device is its stdin. Called by: `stage`,
//! `expand`.
//! Source: mke2fs(8), e2fsck(8), resize2fs(8) of e2fsprogs 1.47; mkfs.xfs(8), xfs_growfs(8) of xfsprogs 6.1.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tonic::Status;

use crate::csi::mount_options::FsType;
use crate::csi::probe::DEVICE_ON_STDIN;

/// How much of what a program says is shown, in characters.
const SHOWN_CHARACTERS_MAX: usize = 500;

fn on_device(program: impl AsRef<OsStr>, device: impl AsFd) -> io::Result<Command> {
    let mut command = Command::new(program);
    command.stdin(Stdio::from(device.as_fd().try_clone_to_owned()?)).env("LC_ALL", "C");
    Ok(command)
}

/// Makes a file system. What is not zero yet may be left so only where all of the volume is zeros.
///
/// # Errors
/// The system's.
pub fn make(fs_type: FsType, device: impl AsFd, is_zeros: bool) -> io::Result<Command> {
    let mut command = on_device(format!("mkfs.{}", fs_type.name()), device)?;
    match fs_type {
        FsType::Ext4 => {
            let lazy = if is_zeros { "1" } else { "0" };
            let extended = format!("nodiscard,lazy_itable_init={lazy},lazy_journal_init={lazy}");
            command.args(["-q", "-m", "0", "-E", &extended]);
        }
        FsType::Xfs => {
            command.args(["-q", "-K"]);
        }
    }
    command.arg(DEVICE_ON_STDIN);
    Ok(command)
}

/// Checks an ext4, and mends what can be mended without a question.
///
/// # Errors
/// The system's.
pub fn check_ext4(device: impl AsFd) -> io::Result<Command> {
    let mut command = on_device("e2fsck", device)?;
    command.args(["-p", DEVICE_ON_STDIN]);
    Ok(command)
}

/// Grows a mounted file system to the size of its device. One that has it is a success.
///
/// # Errors
/// The system's.
pub fn grow(fs_type: FsType, device: impl AsFd, mount_point: &Path) -> io::Result<Command> {
    Ok(match fs_type {
        FsType::Ext4 => {
            let mut command = on_device("resize2fs", device)?;
            command.arg(DEVICE_ON_STDIN);
            command
        }
        FsType::Xfs => {
            let mut command = on_device("xfs_growfs", device)?;
            command.arg("-d").arg(mount_point);
            command
        }
    })
}

/// Whether the program did its work.
///
/// # Errors
/// INTERNAL, with its last words.
pub fn succeeded(program: &str, output: &Output) -> Result<(), Status> {
    if output.status.success() {
        return Ok(());
    }
    Err(Status::internal(format!("{program} failed ({}): {}", output.status, last_words(output))))
}

/// Whether the file system may be mounted: it was sound, or is now.
///
/// # Errors
/// FAILED_PRECONDITION: somebody has to look at it.
pub fn is_sound(output: &Output) -> Result<(), Status> {
    match output.status.code() {
        Some(0 | 1) => Ok(()),
        _ => Err(Status::failed_precondition(format!(
            "e2fsck -p cannot mend the file system by itself ({}): {}; take a snapshot, attach the volume and run e2fsck by hand",
            output.status,
            last_words(output)
        ))),
    }
}

fn last_words(output: &Output) -> String {
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said: Vec<char> = String::from_utf8_lossy(&said).trim().chars().collect();
    let shown = &said[said.len().saturating_sub(SHOWN_CHARACTERS_MAX)..];
    shown.iter().map(|letter| if letter.is_control() { ' ' } else { *letter }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    fn output(raw: i32, said: &str) -> Output {
        Output { status: ExitStatus::from_raw(raw), stdout: said.into(), stderr: "why".into() }
    }

    #[test]
    fn fsck_may_have_mended_something_and_nothing_else() {
        for sound in [0, 1] {
            is_sound(&output(sound << 8, "")).unwrap();
        }
        // Reboot, errors left, operational error, usage, cancelled, a library's; and a signal.
        for unsound in [2 << 8, 3 << 8, 4 << 8, 8 << 8, 16 << 8, 32 << 8, 128 << 8, 9] {
            let status = is_sound(&output(unsound, "UNEXPECTED INCONSISTENCY")).unwrap_err();
            assert_eq!(status.code(), tonic::Code::FailedPrecondition);
            assert!(status.message().contains("INCONSISTENCYwhy"), "{status}");
        }
    }

    #[test]
    fn the_last_words_are_short_and_plain() {
        let long = format!("{}\n\u{1b}[1mthe end", "x".repeat(10_000));
        let status = succeeded("mkfs.ext4", &output(1 << 8, &long)).unwrap_err();
        assert!(status.message().len() < 700 && status.message().contains("the end"), "{status}");
        assert!(!status.message().chars().any(char::is_control));
        succeeded("mkfs.ext4", &output(0, "")).unwrap();
    }

    #[test]
    fn nothing_is_forced() {
        let device = tempfile::tempfile().unwrap();
        for fs_type in [FsType::Ext4, FsType::Xfs] {
            let commands = [
                make(fs_type, &device, true).unwrap(),
                make(fs_type, &device, false).unwrap(),
                check_ext4(&device).unwrap(),
                grow(fs_type, &device, Path::new("/x")).unwrap(),
            ];
            for command in commands {
                let arguments: Vec<_> = command.get_args().map(|argument| argument.to_owned()).collect();
                for force in ["-f", "-F", "-y"] {
                    assert!(!arguments.iter().any(|argument| argument == force), "{arguments:?}");
                }
            }
        }
    }
}
