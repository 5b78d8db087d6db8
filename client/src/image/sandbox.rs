//! What a program may do that reads an image which nobody trusts.
//!
//! The image is the program's stdin, opened before by whoever may open it. The program itself may read what it consists of, and nothing
//! else of this machine's files (Landlock, where the kernel has it); makes no connection to anybody (seccomp); writes no
//! file, where it is to read; has no core and an end of its memory; and ends with volctl. Root becomes nobody first.
//! Called in a process that does nothing else, right before it becomes the program: volctl calls itself for that.
//! Source: Linux's Documentation/userspace-api/landlock.rst, seccomp(2).

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, path_beneath_rules,
};
use rustix::process::{Gid, Resource, Rlimit, Signal, Uid};
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// The user that owns nothing, by convention: `nobody`; and the group.
pub const NOBODY: u32 = 65_534;
/// Address space: what qemu-nbd takes for tables of the largest images, and threads' stacks, several times over.
const MEMORY_BYTES_MAX: u64 = 4 << 30;
const FILES_MAX: u64 = 256;
/// Linux's SOCK_TYPE_MASK: the part of socket(2)'s second argument that is the type.
const SOCKET_TYPE_MASK: u64 = 0xf;
/// What a program consists of: itself, libraries, what the loader and its libraries look up.
const PROGRAM_FILES: [&str; 14] = [
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/opt",
    "/nix",
    "/etc/alternatives",
    "/etc/crypto-policies",
    "/etc/gnutls",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
];
/// As of Linux 6.10; older kernels hold to what they know.
const LANDLOCK: ABI = ABI::V5;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Whose rights it has from now on, with [`NOBODY`]'s group; `None`: the caller's.
    pub uid: Option<u32>,
    /// It may write to its stdin.
    pub writes: bool,
    /// It may open any file that its user may open: the image names some, and is trusted.
    pub opens_files: bool,
    /// Process that it ends with.
    pub parent: i32,
}

/// A limit cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The parent has ended already.
    #[error("volctl has ended")]
    Orphan,
    /// A limit of the process.
    #[error("cannot limit the process: {0}")]
    Process(#[from] io::Error),
    /// Landlock.
    #[error("cannot limit its files: {0}")]
    Files(#[from] RulesetError),
    /// seccomp.
    #[error("cannot limit its system calls: {0}")]
    Calls(String),
}

/// Limits this process, of one thread, and whatever it becomes. Its working directory is the one place where it may make a socket.
///
/// # Errors
/// [`SandboxError`], by cause: the program is not to be run then.
pub fn enter(limits: Limits) -> Result<(), SandboxError> {
    let limit = |resource, value: u64| {
        let limit = Rlimit { current: Some(value), maximum: Some(value) };
        rustix::process::setrlimit(resource, limit).map_err(io::Error::from)
    };
    limit(Resource::Core, 0)?;
    limit(Resource::As, MEMORY_BYTES_MAX)?;
    limit(Resource::Nofile, FILES_MAX)?;
    if !limits.writes {
        limit(Resource::Fsize, 0)?;
    }
    if let Some(id) = limits.uid {
        let of = |error: rustix::io::Errno| SandboxError::Process(error.into());
        rustix::thread::set_thread_groups(&[]).map_err(of)?;
        // A file's owner may be somebody whose number is a group's that may do more.
        rustix::thread::set_thread_gid(Gid::from_raw(NOBODY)).map_err(of)?;
        rustix::thread::set_thread_uid(Uid::from_raw(id)).map_err(of)?;
    }
    // Behind the change of user, which takes it back.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)?;
    let parent = rustix::process::getppid().map_or(0, rustix::process::Pid::as_raw_pid);
    if parent != limits.parent {
        return Err(SandboxError::Orphan);
    }
    if !limits.opens_files {
        limit_files(limits.writes)?;
    }
    limit_calls()
}

/// Whether this kernel limits which files a program may open (Landlock).
pub fn kernel_limits_files() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.handle_access(AccessFs::from_all(ABI::V1)).and_then(Ruleset::create).is_ok()
}

fn limit_files(writes: bool) -> Result<(), SandboxError> {
    let image = match writes {
        true => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate,
        false => AccessFs::ReadFile.into(),
    };
    let socket = AccessFs::MakeSock | AccessFs::ReadDir;
    let here = std::env::current_dir()?;
    Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .create()?
        .add_rules(path_beneath_rules(PROGRAM_FILES, AccessFs::from_read(LANDLOCK)))?
        .add_rules(path_beneath_rules(
            [Path::new("/proc/self"), Path::new("/dev/null")],
            AccessFs::ReadFile | AccessFs::ReadDir,
        ))?
        .add_rules(path_beneath_rules([here], socket))?
        .add_rule(PathBeneath::new(io::stdin(), image))?
        .restrict_self()?;
    Ok(())
}

/// No socket but streams of this machine's files, no connection through one, no signal to anybody else, and nothing by which a process gets
/// more than it has.
fn limit_calls() -> Result<(), SandboxError> {
    let of = |error: BackendError| SandboxError::Calls(error.to_string());
    let rule = |argument, operator, value| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value);
        condition.and_then(|condition| SeccompRule::new(vec![condition])).map_err(of)
    };
    let mut other_sockets = vec![rule(0, SeccompCmpOp::Ne, libc::AF_UNIX as u64)?];
    // One that sends datagrams needs no connection to reach somebody. Beside the type there are flags.
    for kind in (0..=SOCKET_TYPE_MASK).filter(|kind| *kind != libc::SOCK_STREAM as u64) {
        other_sockets.push(rule(1, SeccompCmpOp::MaskedEq(SOCKET_TYPE_MASK), kind)?);
    }
    // It becomes the program under the same number; abort(3) and threads need this.
    let other_processes = vec![rule(0, SeccompCmpOp::Ne, u64::from(std::process::id()))?];
    let mut refused: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::from([
        (libc::SYS_socket, other_sockets.clone()),
        (libc::SYS_socketpair, other_sockets),
        (libc::SYS_tgkill, other_processes),
    ]);
    let never = [
        libc::SYS_connect,
        // Its requests are no calls, and are not seen here.
        libc::SYS_io_uring_setup,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_rt_sigqueueinfo,
        libc::SYS_rt_tgsigqueueinfo,
        libc::SYS_pidfd_send_signal,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
    ];
    refused.extend(never.map(|call| (call, Vec::new())));
    let architecture = std::env::consts::ARCH.try_into().map_err(of)?;
    let refusal = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(refused, SeccompAction::Allow, refusal, architecture).map_err(of)?;
    let program: seccompiler::BpfProgram = filter.try_into().map_err(of)?;
    seccompiler::apply_filter(&program).map_err(|error| SandboxError::Calls(error.to_string()))
}
