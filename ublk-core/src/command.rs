//! One control command through a ring of its own, bounded in time.
//!
//! Owns: the thread, ring and buffer of a command while the kernel has it. Never: knows what commands mean.
//! Called by: `control`.
//! Invariants: the buffer the kernel was told about is freed only after the command's completion; a caller waits at
//! most its deadline plus a grace. A control command runs in a kernel worker and may be stuck there for good (a
//! driver bug, a daemon that never fetches); cancelling it may fail, and even the thread that submitted it cannot
//! exit then. So that thread is never the caller's: it owns everything the command needs, and is left behind.
#![allow(unsafe_code)] // Handing a buffer's address to the kernel and taking the buffer back.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, types};

use crate::abi::{CtrlCmd, CtrlDevInfo, Params};
use crate::ring::{Cqe, Sqe};

const COMMAND: u64 = 1;
const CANCEL: u64 = 2;
/// How long a cancelled command gets to come back.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
/// How much longer the caller waits for the thread than the thread waits for the kernel.
const THREAD_GRACE: Duration = Duration::from_secs(3);
/// The thread calls nothing deep; small, so that locking all memory does not make it costly.
const STACK_BYTES: usize = 128 << 10;

/// Why a command gave no result.
#[derive(Debug)]
pub(crate) enum CommandError {
    /// No thread.
    Thread(io::Error),
    /// No ring.
    Setup(io::Error),
    /// Not done by the deadline.
    TimedOut,
    /// The driver's answer, positive.
    Errno(i32),
}

/// A buffer for a control command.
///
/// # Safety
/// Implementors are plain data: `repr(C)` or primitive, without padding, references or invalid bit patterns, because
/// the kernel reads and writes all their bytes.
pub(crate) unsafe trait Payload: Send + 'static {}

// SAFETY: an integer.
unsafe impl Payload for u64 {}
// SAFETY: `repr(C)`, integers only, and `abi` asserts that its size is the sum of its fields.
unsafe impl Payload for CtrlDevInfo {}
// SAFETY: `repr(C)`, integers and integer arrays only; its only padding is a named field.
unsafe impl Payload for Params {}
// SAFETY: `repr(C)`: 64 bytes, then a `CtrlDevInfo`, which is 8-aligned there.
unsafe impl Payload for DevInfo2Buffer {}
// SAFETY: a transparent array of integers.
unsafe impl Payload for CpuMask {}

/// Buffer of GET_DEV_INFO2: the path of the character device, then the answer.
#[repr(C)]
pub(crate) struct DevInfo2Buffer {
    path: [u8; Self::PATH_BYTES as usize],
    /// The answer.
    pub(crate) info: CtrlDevInfo,
}

impl DevInfo2Buffer {
    /// Bytes of the path, its NULs included.
    pub(crate) const PATH_BYTES: u16 = 64;

    /// An empty answer behind the path of `dev_id`.
    pub(crate) fn new(dev_id: u32) -> Self {
        let mut path = [0; Self::PATH_BYTES as usize];
        let text = format!("/dev/ublkc{dev_id}");
        path[..text.len()].copy_from_slice(text.as_bytes());
        Self { path, info: CtrlDevInfo::default() }
    }
}

/// A set of CPUs, as many as any kernel is built for.
#[repr(transparent)]
pub(crate) struct CpuMask([u64; Self::WORDS]);

impl CpuMask {
    /// 8192 CPUs.
    const WORDS: usize = 128;
    /// No CPU.
    pub(crate) const EMPTY: Self = Self([0; Self::WORDS]);

    /// The members, ascending.
    pub(crate) fn cpus(&self) -> impl Iterator<Item = usize> + '_ {
        (0..Self::WORDS * 64).filter(|cpu| self.0[cpu / 64] & (1 << (cpu % 64)) != 0)
    }
}

/// Runs a command and gives its result (zero or more) and its buffer back. Waits at most `deadline` and a grace.
pub(crate) fn execute<P: Payload>(
    control: Arc<File>,
    cmd_op: u32,
    cmd: CtrlCmd,
    payload: Option<Box<P>>,
    deadline: Duration,
) -> Result<(i32, Option<Box<P>>), CommandError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("ublk-control".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || run(&control, cmd_op, cmd, payload, deadline, &sender))
        .map_err(CommandError::Thread)?;
    receiver.recv_timeout(deadline + CANCEL_GRACE + THREAD_GRACE).unwrap_or(Err(CommandError::TimedOut))
}

type Outcome<P> = Result<(i32, Option<Box<P>>), CommandError>;

/// The thread: submits, waits, tries to cancel, and then waits for as long as the kernel keeps the buffer.
fn run<P: Payload>(
    control: &File,
    cmd_op: u32,
    mut cmd: CtrlCmd,
    payload: Option<Box<P>>,
    deadline: Duration,
    sender: &SyncSender<Outcome<P>>,
) {
    // From here to the completion the buffer belongs to the kernel, so it is held as a raw pointer.
    let payload = payload.map(Box::into_raw);
    if let Some(buffer) = payload {
        cmd.addr = buffer.expose_provenance() as u64;
        cmd.len = size_of::<P>() as u16;
    }
    let mut answer = match submit_and_wait(control, cmd_op, cmd, deadline) {
        Ok(answer) => answer,
        Err(error) => {
            // Not submitted: the kernel never heard of the buffer.
            drop(payload.map(take_back));
            // A caller that has stopped waiting needs no answer, here and below.
            let _ = sender.send(Err(CommandError::Setup(error)));
            return;
        }
    };
    if answer.result.is_none() {
        let _ = sender.send(Err(CommandError::TimedOut));
        answer.wait_for_ever();
    }
    let payload = payload.map(take_back);
    let outcome = match answer.result {
        Some(result) if result >= 0 => Ok((result, payload)),
        Some(errno) if answer.canceled && matches!(-errno, libc::ECANCELED | libc::EINTR) => {
            Err(CommandError::TimedOut)
        }
        Some(errno) => Err(CommandError::Errno(-errno)),
        None => Err(CommandError::TimedOut),
    };
    let _ = sender.try_send(outcome);
}

/// Makes a box of a buffer again that the kernel has let go of.
fn take_back<P: Payload>(buffer: *mut P) -> Box<P> {
    // SAFETY: the pointer came from `Box::into_raw` in `run`, which calls this once, after the completion (or when the
    // command was never submitted); whatever the kernel wrote is a valid `P` by `Payload`'s contract.
    unsafe { Box::from_raw(buffer) }
}

/// A submitted command.
struct Submitted {
    ring: IoUring<Sqe, Cqe>,
    result: Option<i32>,
    canceled: bool,
}

/// Submits the command and waits for it; when the deadline passes, cancels it and waits a little more. An error means
/// that nothing was submitted.
fn submit_and_wait(control: &File, cmd_op: u32, cmd: CtrlCmd, deadline: Duration) -> io::Result<Submitted> {
    let give_up = Instant::now() + deadline;
    let ring = IoUring::<Sqe, Cqe>::builder().build(4)?;
    let mut submitted = Submitted { ring, result: None, canceled: false };
    let sqe = opcode::UringCmd80::new(types::Fd(control.as_raw_fd()), cmd_op).cmd(cmd.to_sqe_cmd()).build();
    submitted.push(&sqe.user_data(COMMAND));
    loop {
        match submitted.ring.submit() {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    submitted.wait_until(give_up);
    if submitted.result.is_none() {
        submitted.canceled = true;
        submitted.push(&Sqe::from(opcode::AsyncCancel::new(COMMAND).build().user_data(CANCEL)));
        submitted.wait_until(Instant::now() + CANCEL_GRACE);
    }
    Ok(submitted)
}

impl Submitted {
    fn push(&mut self, sqe: &Sqe) {
        // SAFETY: the SQE's file is open until the thread ends, and its buffer is held by `run` until the completion.
        let pushed = unsafe { self.ring.submission().push(sqe) };
        assert!(pushed.is_ok(), "a ring of four entries takes a command and its cancellation");
    }

    /// Waits for the command's completion until `give_up`.
    fn wait_until(&mut self, give_up: Instant) {
        while self.result.is_none() {
            let rest = give_up.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return;
            }
            let timespec = Timespec::from(rest);
            // The loop's condition covers every error: expiry, a signal, or a wait that cannot be bounded.
            let waited = self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec));
            if waited.as_ref().is_err_and(|error| !is_expected_wait_error(error)) {
                return;
            }
            self.reap();
        }
    }

    /// Waits for the command's completion without a deadline: the buffer cannot be freed before.
    fn wait_for_ever(&mut self) {
        while self.result.is_none() {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    // The ring cannot tell any more; keep the buffer and this thread rather than risk a late write.
                    thread::park();
                }
                _ => self.reap(),
            }
        }
    }

    fn reap(&mut self) {
        for cqe in self.ring.completion() {
            if cqe.user_data() == COMMAND {
                self.result = Some(cqe.result());
            }
        }
    }
}

fn is_expected_wait_error(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_mask_lists_its_members() {
        let mut mask = CpuMask::EMPTY;
        mask.0[0] = 0b101;
        mask.0[1] = 1 << 63;
        assert_eq!(mask.cpus().collect::<Vec<_>>(), [0, 2, 127]);
    }

    #[test]
    fn a_file_that_takes_no_commands_answers_with_its_errno() {
        let file = Arc::new(File::open("/dev/zero").unwrap());
        let deadline = Duration::from_secs(5);
        let result = execute(file, 1, CtrlCmd::for_device(0), Some(Box::new(7u64)), deadline);
        let Err(CommandError::Errno(errno)) = result.map(|_| ()) else { panic!("/dev/zero took a command") };
        assert!(errno == libc::EOPNOTSUPP || errno == libc::EINVAL, "{errno}");
    }
}
