//! Where a passphrase comes from: a file, stdin, or the kernel's keyring; and `volctl passphrase`, which changes one.
//!
//! Owns: reading it, once, into a message that erases it when it goes. Never: takes one from an argument or a variable, which everybody
//! can read in /proc; keeps it; has a core with it in.
// The keyring's system calls have no safe wrapper here.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd as _;
use std::path::Path;

use clap::Args;
use proto::passphrase::PASSPHRASE_BYTES_MAX;
use proto::v1;
use proto::v1::Passphrase;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::connect::{self, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::report::{Report, node_attachment_json};

/// `keyctl(KEYCTL_READ)`; include/uapi/linux/keyctl.h.
const KEYCTL_READ: libc::c_ulong = 11;
/// Where stdin is meant.
const STDIN: &str = "-";

/// Where the passphrase of an encrypted volume is.
#[derive(Debug, Args)]
pub(crate) struct PassphraseArgs {
    /// Of an encrypted volume: the file with its passphrase, without a line feed at its end; - is stdin
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_keyring")]
    pub(crate) passphrase_file: Option<String>,
    /// The same: what the key of this name in the kernel's keyring holds, of the type `user` (keyctl padd user KEY @u)
    #[arg(long, value_name = "KEY")]
    pub(crate) passphrase_keyring: Option<String>,
}

impl PassphraseArgs {
    /// The passphrase, where one is told.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub(crate) fn read(&self) -> Result<Option<Passphrase>, Failure> {
        match (&self.passphrase_file, &self.passphrase_keyring) {
            (Some(file), _) => of_file("--passphrase-file", file).map(Some),
            (None, Some(key)) => of_keyring(key).map(Some),
            (None, None) => Ok(None),
        }
    }
}

/// Of which volume, and what instead of what.
#[derive(Debug, Args)]
pub(crate) struct ChangeArgs {
    /// As for detach
    pub(crate) target: String,
    /// The file with the passphrase that it has, as for attach; - is stdin
    #[arg(long, value_name = "FILE")]
    pub(crate) old_file: String,
    /// The file with the one that it gets
    #[arg(long, value_name = "FILE")]
    pub(crate) new_file: String,
}

/// Changes the passphrase of an encrypted volume that is attached here.
pub(crate) async fn change(socket: &Path, args: ChangeArgs) -> Result<Report, Failure> {
    if args.old_file == STDIN && args.new_file == STDIN {
        let what = "stdin is one file: it cannot have both passphrases";
        return Err(Failure::new(ExitCode::Usage, what, "give a file for one of them"));
    }
    let request = v1::ChangePassphraseRequest {
        target: args.target.clone(),
        old_passphrase: Some(of_file("--old-file", &args.old_file)?),
        new_passphrase: Some(of_file("--new-file", &args.new_file)?),
    };
    let answer = call(connect::node(socket).await?.change_passphrase(request)).await?;
    let attachment = answer.attachment.ok_or_else(|| Failure::incomplete_answer("attachment"))?;
    let text = format!("{}: passphrase changed\n", args.target);
    Ok(Report::new(text, node_attachment_json(&attachment)))
}

fn of_file(option: &str, file: &str) -> Result<Passphrase, Failure> {
    without_cores()?;
    let read = if file == STDIN {
        // Without the buffer of `io::stdin`, which keeps what went through it.
        io::stdin().as_fd().try_clone_to_owned().and_then(|stdin| read_all(&mut File::from(stdin)))
    } else {
        File::open(file).and_then(|mut file| read_all(&mut file))
    };
    let place = if file == STDIN { "stdin" } else { file };
    let passphrase = read.map_err(|error| Failure::other(format!("{option}: {place}: {error}")))?;
    checked(option, without_line_feed(passphrase))
}

fn checked(option: &str, passphrase: Passphrase) -> Result<Passphrase, Failure> {
    match passphrase.check() {
        Ok(()) => Ok(passphrase),
        Err(why) => Err(Failure::new(ExitCode::Usage, format!("{option}: {why}"), "")),
    }
}

/// All of it, up to a byte more than it may have: into one buffer, so that no copy is left behind.
fn read_all(from: &mut impl Read) -> io::Result<Passphrase> {
    let mut passphrase = Passphrase::new(vec![0; PASSPHRASE_BYTES_MAX + 2]);
    let mut length = 0;
    while length < passphrase.value.len() {
        match from.read(&mut passphrase.value[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    passphrase.value.truncate(length);
    Ok(passphrase)
}

/// An editor, and `echo`, put one at the end that is not meant.
fn without_line_feed(mut passphrase: Passphrase) -> Passphrase {
    if passphrase.value.last() == Some(&b'\n') {
        passphrase.value.pop();
    }
    passphrase
}

fn of_keyring(key: &str) -> Result<Passphrase, Failure> {
    without_cores()?;
    let failed = |error: io::Error| {
        Failure::new(
            ExitCode::Other,
            format!("--passphrase-keyring: the key {key:?} of the type user cannot be read: {error}"),
            "see /proc/keys; add it with `keyctl padd user KEY @u`, whose stdin it takes",
        )
    };
    let name = CString::new(key).map_err(|error| failed(error.into()))?;
    // SAFETY: both strings end with a zero and outlive the call, which only reads them.
    let id = unsafe {
        libc::syscall(libc::SYS_request_key, c"user".as_ptr(), name.as_ptr(), std::ptr::null::<u8>(), 0)
    };
    if id < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    let mut passphrase = Passphrase::new(vec![0; PASSPHRASE_BYTES_MAX + 1]);
    let (buffer, size) = (passphrase.value.as_mut_ptr(), passphrase.value.len());
    // SAFETY: the kernel writes at most `size` bytes, which the buffer has.
    let length = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_READ, id, buffer, size) };
    let length = usize::try_from(length).map_err(|_| failed(io::Error::last_os_error()))?;
    // What a longer key holds was not read in full, and is more than a passphrase may have.
    passphrase.value.truncate(length.min(size));
    checked("--passphrase-keyring", passphrase)
}

/// From here on no core of this process is written.
fn without_cores() -> Result<(), Failure> {
    let set = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    set.map_err(|errno| Failure::other(format!("cannot do without a core: {errno}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Passphrase {
        without_line_feed(read_all(&mut &bytes[..]).unwrap())
    }

    #[test]
    fn one_line_feed_at_the_end_is_not_part_of_it() {
        assert_eq!(read(b"horse\n").value, b"horse");
        assert_eq!(read(b"horse").value, b"horse");
        assert_eq!(read(b"horse\n\n").value, b"horse\n");
        assert_eq!(read(b"\0\xff \n").value, b"\0\xff ");
    }

    #[test]
    fn what_is_empty_or_too_long_is_none() {
        for bad in [&b""[..], b"\n", &[b'x'; PASSPHRASE_BYTES_MAX + 1], &[b'x'; PASSPHRASE_BYTES_MAX * 2]] {
            assert_eq!(checked("--x", read(bad)).unwrap_err().exit_code, ExitCode::Usage, "{}", bad.len());
        }
        let longest = [&[b'x'; PASSPHRASE_BYTES_MAX][..], b"\n"].concat();
        assert_eq!(checked("--x", read(&longest)).unwrap().value.len(), PASSPHRASE_BYTES_MAX);
    }

    #[test]
    fn a_key_that_is_not_there_is_told() {
        let failure = of_keyring("volnode-test-of-a-key-that-nobody-has").unwrap_err();
        assert!(failure.what.contains("cannot be read"), "{failure:?}");
        assert!(of_keyring("a\0b").is_err());
    }
}
