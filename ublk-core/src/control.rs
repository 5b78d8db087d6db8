//! The control device: adding, configuring, starting, stopping and deleting ublk devices.
//!
//! Owns: `/dev/ublk-control`, the encoding of each control command, and the meaning of its errors. Never: serves I/O;
//! keeps no record of devices (the kernel has it).
//! Called by: `device` here, the client's device process and supervisor.
//! Invariants: every command is bounded in time. Each runs on a thread of its own with a ring of its own
//! (`command`), which is abandoned if the kernel does not let go of the command, so callers never hang and commands
//! may overlap (STOP while START waits).
//! Source: `include/uapi/linux/ublk_cmd.h`, `drivers/block/ublk_drv.c`, Linux 7.3.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::abi::{
    CtrlCmd, CtrlDevInfo, Params, SECTOR_BYTES, UBLK_F_CMD_IOCTL_ENCODE, UBLK_F_NAMES, UBLK_S_DEV_DEAD,
    UBLK_S_DEV_FAIL_IO, UBLK_S_DEV_LIVE, UBLK_S_DEV_QUIESCED, UBLK_U_CMD_ADD_DEV, UBLK_U_CMD_DEL_DEV,
    UBLK_U_CMD_DEL_DEV_ASYNC, UBLK_U_CMD_END_USER_RECOVERY, UBLK_U_CMD_GET_DEV_INFO2,
    UBLK_U_CMD_GET_FEATURES, UBLK_U_CMD_GET_PARAMS, UBLK_U_CMD_GET_QUEUE_AFFINITY, UBLK_U_CMD_SET_PARAMS,
    UBLK_U_CMD_START_DEV, UBLK_U_CMD_START_USER_RECOVERY, UBLK_U_CMD_STOP_DEV, UBLK_U_CMD_TRY_STOP_DEV,
    UBLK_U_CMD_UPDATE_SIZE,
};
use crate::command::{self, CommandError, CpuMask, DevInfo2Buffer};

const CONTROL_PATH: &str = "/dev/ublk-control";
/// Between two tries of START_USER_RECOVERY while the kernel still tidies up after the old daemon, which takes some
/// milliseconds.
const RECOVERY_RETRY_INTERVAL: Duration = Duration::from_millis(5);
/// `ENOTSUPP`: inside the kernel only, but older ublk drivers let it out for commands they do not know.
const ENOTSUPP: i32 = 524;

/// How long the driver may take to stop a device, and to delete one.
pub const STOP_DEADLINE: Duration = Duration::from_secs(120);

/// How long commands may take before they are given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// Commands that only read or write the driver's own state.
    pub command: Duration,
    /// START_DEV and END_USER_RECOVERY: the daemon must fetch every tag, and then the partition scan reads from it.
    pub start: Duration,
    /// STOP_DEV and TRY_STOP_DEV: the daemon must finish what is in flight, dirty pages included.
    pub stop: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { command: Duration::from_secs(10), start: Duration::from_secs(60), stop: STOP_DEADLINE }
    }
}

/// A set of `UBLK_F_*` bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// All of `flags` are set.
    pub const fn contains(self, flags: u64) -> bool {
        self.0 & flags == flags
    }
}

impl fmt::Display for Features {
    /// The names, joined by `|`; bits without a name in hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        let mut separator = "";
        for (flag, name) in UBLK_F_NAMES {
            if rest & flag != 0 {
                write!(f, "{separator}{name}")?;
                separator = "|";
                rest &= !flag;
            }
        }
        if rest != 0 || self.0 == 0 {
            write!(f, "{separator}{rest:#x}")?;
        }
        Ok(())
    }
}

/// What ADD_DEV is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// N of `/dev/ublkbN`; `None`: the lowest free.
    pub dev_id: Option<u32>,
    /// Hardware queues. The kernel lowers it to the number of CPUs.
    pub nr_hw_queues: u16,
    /// Tags of each queue, at most 4096.
    pub queue_depth: u16,
    /// Largest request, bytes; whole pages.
    pub max_io_buf_bytes: u32,
    /// `UBLK_F_*`; all of them must be granted.
    pub flags: u64,
    /// `UBLK_F_*` that are asked for, too; which of them were granted, the answer says.
    pub wished_flags: u64,
    /// The daemon's own 64 bits, kept by the kernel.
    pub ublksrv_flags: u64,
}

/// Where a device is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceState {
    /// No disk: not started yet, or stopped, or its daemon died without recovery.
    Dead,
    /// The disk exists and is served.
    Live,
    /// The daemon is gone; I/O waits for the next one.
    Quiesced,
    /// The daemon is gone; I/O fails until the next one comes.
    FailIo,
    /// A state this crate has no name for.
    Other(u16),
}

/// What a device is, as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevInfo {
    /// N of `/dev/ublkbN` and `/dev/ublkcN`.
    pub dev_id: u32,
    /// Hardware queues.
    pub nr_hw_queues: u16,
    /// Tags of each queue.
    pub queue_depth: u16,
    /// Where it is in its life.
    pub state: DeviceState,
    /// Largest request, bytes.
    pub max_io_buf_bytes: u32,
    /// The daemon's process, as it said itself at START_DEV; negative before.
    pub ublksrv_pid: i32,
    /// `UBLK_F_*` granted, which include some that were not asked for.
    pub flags: Features,
    /// The daemon's own 64 bits.
    pub ublksrv_flags: u64,
}

impl From<CtrlDevInfo> for DevInfo {
    fn from(info: CtrlDevInfo) -> Self {
        let state = match info.state {
            UBLK_S_DEV_DEAD => DeviceState::Dead,
            UBLK_S_DEV_LIVE => DeviceState::Live,
            UBLK_S_DEV_QUIESCED => DeviceState::Quiesced,
            UBLK_S_DEV_FAIL_IO => DeviceState::FailIo,
            other => DeviceState::Other(other),
        };
        Self {
            dev_id: info.dev_id,
            nr_hw_queues: info.nr_hw_queues,
            queue_depth: info.queue_depth,
            state,
            max_io_buf_bytes: info.max_io_buf_bytes,
            ublksrv_pid: info.ublksrv_pid,
            flags: Features(info.flags),
            ublksrv_flags: info.ublksrv_flags,
        }
    }
}

/// Why a control command did not do what was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ControlError {
    /// `/dev/ublk-control` does not exist.
    #[error(
        "no ublk driver: {CONTROL_PATH} is missing; try `modprobe ublk_drv` (Linux 6.0 or later with \
         CONFIG_BLK_DEV_UBLK; Ubuntu keeps the module in linux-modules-extra)"
    )]
    NoDriver,
    /// Opening the control device, or a command, was refused.
    #[error(
        "{what}: permission denied; this needs root (CAP_SYS_ADMIN), and root needs a driver that allows more disks \
         (/sys/module/ublk_drv/parameters/ublks_max)"
    )]
    PermissionDenied {
        /// The path or the command.
        what: &'static str,
    },
    /// Opening the control device failed otherwise.
    #[error("cannot open {CONTROL_PATH}")]
    Open(#[source] io::Error),
    /// The device nodes of ublk devices cannot be listed.
    #[error("cannot list ublk devices")]
    List(#[source] io::Error),
    /// io_uring is forbidden or exhausted.
    #[error(
        "cannot use io_uring for {command}; is it disabled (kernel.io_uring_disabled) or filtered (a container's \
         seccomp profile)?"
    )]
    Ring {
        /// The command.
        command: &'static str,
        /// What io_uring answered.
        #[source]
        source: io::Error,
    },
    /// This process may have no more threads.
    #[error(
        "cannot start a thread for {command}; raise the limit (TasksMax= of the unit, ulimit -u, a container's limit of pids)"
    )]
    Thread {
        /// The command.
        command: &'static str,
        /// What the thread's creation answered.
        #[source]
        source: io::Error,
    },
    /// The kernel did not finish the command. Its thread is left behind; the device may be stuck.
    #[error("{command} on ublk device {dev_id} did not finish within {} s; see the kernel log", after.as_secs_f32())]
    TimedOut {
        /// The command.
        command: &'static str,
        /// The device; `u32::MAX` where the kernel was to choose.
        dev_id: u32,
        /// The deadline.
        after: Duration,
    },
    /// There is no such device (any more).
    #[error("{command}: there is no ublk device {dev_id}")]
    NoSuchDevice {
        /// The command.
        command: &'static str,
        /// The device.
        dev_id: u32,
    },
    /// TRY_STOP_DEV: the disk is open. START_USER_RECOVERY: the old daemon is not gone.
    #[error("{command}: ublk device {dev_id} is busy")]
    Busy {
        /// The command.
        command: &'static str,
        /// The device.
        dev_id: u32,
    },
    /// This kernel does not know the command, or the device lacks the flag it needs.
    #[error("this kernel does not support {command} on ublk device {dev_id}")]
    Unsupported {
        /// The command.
        command: &'static str,
        /// The device.
        dev_id: u32,
    },
    /// ADD_DEV granted less than was asked for; the device has been deleted again.
    #[error("this kernel's ublk driver lacks {}", Features(asked.0 & !got.0))]
    FlagsDropped {
        /// Flags in the specification.
        asked: Features,
        /// Flags the kernel kept.
        got: Features,
    },
    /// Any other answer.
    #[error("{command} on ublk device {dev_id} failed")]
    Failed {
        /// The command.
        command: &'static str,
        /// The device.
        dev_id: u32,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

impl ControlError {
    fn new(error: CommandError, command: &'static str, dev_id: u32, after: Duration) -> Self {
        match error {
            CommandError::Thread(source) => Self::Thread { command, source },
            CommandError::Setup(source) => Self::Ring { command, source },
            CommandError::TimedOut => Self::TimedOut { command, dev_id, after },
            CommandError::Errno(errno) => match errno {
                libc::ENODEV => Self::NoSuchDevice { command, dev_id },
                libc::EBUSY => Self::Busy { command, dev_id },
                libc::EOPNOTSUPP | ENOTSUPP => Self::Unsupported { command, dev_id },
                libc::EACCES | libc::EPERM => Self::PermissionDenied { what: command },
                errno => Self::Failed { command, dev_id, source: io::Error::from_raw_os_error(errno) },
            },
        }
    }
}

/// An open `/dev/ublk-control`. Cheap to clone; may be used from several threads at once.
#[derive(Clone, Debug)]
pub struct ControlDevice {
    file: Arc<File>,
    deadlines: Deadlines,
}

/// One control command on its way: number, name for messages, target, and time allowed.
struct Request {
    cmd_op: u32,
    name: &'static str,
    cmd: CtrlCmd,
    deadline: Duration,
}

impl ControlDevice {
    /// Opens the control device with the default deadlines. Errors: [`ControlError::NoDriver`],
    /// [`ControlError::PermissionDenied`], [`ControlError::Open`].
    pub fn open() -> Result<Self, ControlError> {
        Self::open_with(Deadlines::default())
    }

    /// Opens the control device with deadlines of the caller's.
    pub fn open_with(deadlines: Deadlines) -> Result<Self, ControlError> {
        let file = OpenOptions::new().read(true).write(true).open(CONTROL_PATH);
        let file = file.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ControlError::NoDriver,
            io::ErrorKind::PermissionDenied => ControlError::PermissionDenied { what: CONTROL_PATH },
            // The node is there but nothing is behind it.
            _ if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => ControlError::NoDriver,
            _ => ControlError::Open(error),
        })?;
        Ok(Self { file: Arc::new(file), deadlines })
    }

    /// The flags this kernel's driver knows. [`ControlError::Unsupported`] before Linux 6.5.
    pub fn get_features(&self) -> Result<Features, ControlError> {
        let (_, features) = self.read(
            UBLK_U_CMD_GET_FEATURES,
            "GET_FEATURES",
            CtrlCmd::for_device(u32::MAX),
            Box::new(0u64),
        )?;
        Ok(Features(*features))
    }

    /// Adds a device; `/dev/ublkcN` exists when this returns. The kernel may lower the number of queues: use what the
    /// answer says. [`ControlError::FlagsDropped`] when a flag was not granted, which the kernel itself does in
    /// silence; the device is deleted again then. `EEXIST`: the number is taken.
    pub fn add_dev(&self, spec: &DeviceSpec) -> Result<DevInfo, ControlError> {
        let dev_id = spec.dev_id.unwrap_or(u32::MAX);
        let asked = Features(spec.flags | UBLK_F_CMD_IOCTL_ENCODE);
        let info = Box::new(CtrlDevInfo {
            nr_hw_queues: spec.nr_hw_queues,
            queue_depth: spec.queue_depth,
            max_io_buf_bytes: spec.max_io_buf_bytes,
            dev_id,
            ublksrv_pid: -1,
            flags: asked.0 | spec.wished_flags,
            ublksrv_flags: spec.ublksrv_flags,
            ..CtrlDevInfo::default()
        });
        let (_, info) = self.read(UBLK_U_CMD_ADD_DEV, "ADD_DEV", CtrlCmd::for_device(dev_id), info)?;
        let info = DevInfo::from(*info);
        if !info.flags.contains(asked.0) {
            self.del_dev(info.dev_id)?;
            return Err(ControlError::FlagsDropped { asked, got: info.flags });
        }
        Ok(info)
    }

    /// Sets the parameters of a device that has not been started. `EINVAL`: the driver does not accept them.
    pub fn set_params(&self, dev_id: u32, params: &Params) -> Result<(), ControlError> {
        let cmd = CtrlCmd::for_device(dev_id);
        self.read(UBLK_U_CMD_SET_PARAMS, "SET_PARAMS", cmd, Box::new(*params))?;
        Ok(())
    }

    /// The parameters in force, with the device numbers once it has been started.
    pub fn get_params(&self, dev_id: u32) -> Result<Params, ControlError> {
        let params = Box::new(Params { len: size_of::<Params>() as u32, ..Params::default() });
        let (_, params) =
            self.read(UBLK_U_CMD_GET_PARAMS, "GET_PARAMS", CtrlCmd::for_device(dev_id), params)?;
        Ok(*params)
    }

    /// Makes `/dev/ublkbN` appear, served by process `pid` (the thread group of the queue threads). Blocks until every
    /// tag of every queue has been fetched and the partition table has been read through them, so it must not be
    /// called on a queue's thread.
    pub fn start_dev(&self, dev_id: u32, pid: u32) -> Result<(), ControlError> {
        self.plain(UBLK_U_CMD_START_DEV, "START_DEV", dev_id, u64::from(pid), self.deadlines.start)
    }

    /// Takes `/dev/ublkbN` away, open or not. Blocks until the daemon has finished what is in flight; then every tag
    /// completes with `UBLK_IO_RES_ABORT`. Not on a queue's thread.
    pub fn stop_dev(&self, dev_id: u32) -> Result<(), ControlError> {
        self.plain(UBLK_U_CMD_STOP_DEV, "STOP_DEV", dev_id, 0, self.deadlines.stop)
    }

    /// As [`stop_dev`](Self::stop_dev), but [`ControlError::Busy`] when anything has the disk open, and
    /// [`ControlError::Unsupported`] where the kernel lacks the command (`UBLK_F_SAFE_STOP_DEV`).
    pub fn try_stop_dev(&self, dev_id: u32) -> Result<(), ControlError> {
        self.plain(UBLK_U_CMD_TRY_STOP_DEV, "TRY_STOP_DEV", dev_id, 0, self.deadlines.stop)
    }

    /// Deletes a device, stopping it if need be, and waits until its number is free: which is when the last
    /// descriptor and map of `/dev/ublkcN` are gone, so close the caller's own first.
    pub fn del_dev(&self, dev_id: u32) -> Result<(), ControlError> {
        self.plain(UBLK_U_CMD_DEL_DEV, "DEL_DEV", dev_id, 0, self.deadlines.stop)
    }

    /// As [`del_dev`](Self::del_dev) without waiting for the number. [`ControlError::Unsupported`] before Linux 6.9.
    pub fn del_dev_async(&self, dev_id: u32) -> Result<(), ControlError> {
        self.plain(UBLK_U_CMD_DEL_DEV_ASYNC, "DEL_DEV_ASYNC", dev_id, 0, self.deadlines.stop)
    }

    /// What the device is; `None` when there is none of that number, or only its number is left.
    pub fn get_dev_info2(&self, dev_id: u32) -> Result<Option<DevInfo>, ControlError> {
        let buffer = Box::new(DevInfo2Buffer::new(dev_id));
        let cmd = CtrlCmd { dev_path_len: DevInfo2Buffer::PATH_BYTES, ..CtrlCmd::for_device(dev_id) };
        match self.read(UBLK_U_CMD_GET_DEV_INFO2, "GET_DEV_INFO2", cmd, buffer) {
            Ok((_, buffer)) => Ok(Some(buffer.info.into())),
            Err(ControlError::NoSuchDevice { .. }) => Ok(None),
            // Deleted, and its number kept only until the last descriptor of the character device is closed.
            Err(ControlError::Failed { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The CPUs whose requests go to queue `q_id`, in ascending order.
    pub fn get_queue_affinity(&self, dev_id: u32, q_id: u16) -> Result<Vec<usize>, ControlError> {
        let cmd = CtrlCmd { data: [u64::from(q_id)], ..CtrlCmd::for_device(dev_id) };
        let (_, mask) =
            self.read(UBLK_U_CMD_GET_QUEUE_AFFINITY, "GET_QUEUE_AFFINITY", cmd, Box::new(CpuMask::EMPTY))?;
        Ok(mask.cpus().collect())
    }

    /// Prepares a device, whose daemon is gone, for a new one. While the kernel still tidies up after the old daemon
    /// this retries; [`ControlError::Busy`] when it is not done within the deadline (the old daemon lives on, or its
    /// operations do not end).
    pub fn start_user_recovery(&self, dev_id: u32) -> Result<(), ControlError> {
        let deadline = self.deadlines.command;
        let give_up = Instant::now() + deadline;
        loop {
            let result =
                self.plain(UBLK_U_CMD_START_USER_RECOVERY, "START_USER_RECOVERY", dev_id, 0, deadline);
            match result {
                Err(ControlError::Busy { .. }) if Instant::now() < give_up => {
                    thread::sleep(RECOVERY_RETRY_INTERVAL);
                }
                result => return result,
            }
        }
    }

    /// Resumes a device under process `pid`. Blocks until every tag has been fetched; not on a queue's thread.
    pub fn end_user_recovery(&self, dev_id: u32, pid: u32) -> Result<(), ControlError> {
        let pid = u64::from(pid);
        self.plain(UBLK_U_CMD_END_USER_RECOVERY, "END_USER_RECOVERY", dev_id, pid, self.deadlines.start)
    }

    /// Changes the capacity of a live device to `capacity_bytes`, rounded down to sectors.
    pub fn update_size(&self, dev_id: u32, capacity_bytes: u64) -> Result<(), ControlError> {
        let sectors = capacity_bytes / SECTOR_BYTES;
        self.plain(UBLK_U_CMD_UPDATE_SIZE, "UPDATE_SIZE", dev_id, sectors, self.deadlines.command)
    }

    /// A command with one inline argument and no buffer.
    fn plain(
        &self,
        cmd_op: u32,
        name: &'static str,
        dev_id: u32,
        data: u64,
        deadline: Duration,
    ) -> Result<(), ControlError> {
        let cmd = CtrlCmd { data: [data], ..CtrlCmd::for_device(dev_id) };
        self.run(Request { cmd_op, name, cmd, deadline }, None::<Box<u64>>)?;
        Ok(())
    }

    /// A command with a buffer that the kernel reads, writes, or both.
    fn read<P: command::Payload>(
        &self,
        cmd_op: u32,
        name: &'static str,
        cmd: CtrlCmd,
        payload: Box<P>,
    ) -> Result<(i32, Box<P>), ControlError> {
        let request = Request { cmd_op, name, cmd, deadline: self.deadlines.command };
        let (result, payload) = self.run(request, Some(payload))?;
        let payload =
            payload.ok_or(ControlError::Ring { command: name, source: io::ErrorKind::Other.into() })?;
        Ok((result, payload))
    }

    fn run<P: command::Payload>(
        &self,
        request: Request,
        payload: Option<Box<P>>,
    ) -> Result<(i32, Option<Box<P>>), ControlError> {
        let Request { cmd_op, name, cmd, deadline } = request;
        command::execute(Arc::clone(&self.file), cmd_op, cmd, payload, deadline)
            .map_err(|error| ControlError::new(error, name, cmd.dev_id, deadline))
    }
}

/// Path of the character device that a daemon opens.
pub fn char_device_path(dev_id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{dev_id}"))
}

/// Path of the disk.
pub fn block_device_path(dev_id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{dev_id}"))
}

/// The numbers of all ublk devices of this kernel, ascending. [`ControlError::List`] when sysfs cannot be read.
pub fn list_devices() -> Result<Vec<u32>, ControlError> {
    let entries = match fs::read_dir("/sys/class/ublk-char") {
        Ok(entries) => entries,
        // The class comes with the driver.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(ControlError::List(error)),
    };
    let mut dev_ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(ControlError::List)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("ublkc"));
        if let Some(dev_id) = number.and_then(|number| number.parse().ok()) {
            dev_ids.push(dev_id);
        }
    }
    dev_ids.sort_unstable();
    Ok(dev_ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_flags_are_named() {
        let error = ControlError::FlagsDropped { asked: Features(0b1_1000_0000_0001), got: Features(1) };
        assert_eq!(error.to_string(), "this kernel's ublk driver lacks AUTO_BUF_REG|QUIESCE");
        assert_eq!(Features(1 << 60).to_string(), "0x1000000000000000");
        assert_eq!(Features(0).to_string(), "0x0");
    }

    #[test]
    fn errno_means_what_the_driver_means_by_it() {
        let error =
            |errno| ControlError::new(CommandError::Errno(errno), "TRY_STOP_DEV", 3, Duration::from_secs(1));
        assert!(matches!(error(libc::EBUSY), ControlError::Busy { dev_id: 3, .. }));
        assert!(matches!(error(libc::ENODEV), ControlError::NoSuchDevice { dev_id: 3, .. }));
        assert!(matches!(error(libc::EOPNOTSUPP), ControlError::Unsupported { .. }));
        assert!(matches!(error(ENOTSUPP), ControlError::Unsupported { .. }));
        assert!(matches!(error(libc::EPERM), ControlError::PermissionDenied { .. }));
        assert!(matches!(error(libc::EINVAL), ControlError::Failed { .. }));
    }
}
