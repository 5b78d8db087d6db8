//! What `volclient serve` and a device process tell each other, and where it lies.
//!
//! One folder for each attachment, `<run-dir>/attachments/<attachment-id>/`:
//!
//! | file | written by | what |
//! | --- | --- | --- |
//! | `spec.json` | serve, before it starts the process | [`DeviceSpec`]; holds the secret, mode 0600 |
//! | `status.json` | the device process, by rename | [`DeviceStatus`] |
//! | `control.sock` | the device process | one [`ControlRequest`] line in, one [`ControlResponse`] line out |
//! | `device.lock` | nobody | the device process holds a lock on it for its whole life: that is how serve knows it lives |
//!
//! Every one of them carries a version, because serve and the device processes are upgraded at different times: a
//! reader takes its own version, and refuses a newer one by name. Fixtures of each version are in this file's tests.

pub mod content;
mod encryption;
mod policy;
mod send_zc;
pub mod state_reasons;
pub mod state_word;

use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use proto::export_name::Secret;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::tls_spec::TlsSpec;

pub use encryption::Encryption;
pub use policy::StallPolicy;
pub use send_zc::SendZcMode;

/// Version of [`DeviceSpec`], [`DeviceStatus`] and the control socket's lines.
pub const CONTRACT_VERSION: u32 = 1;
/// Version of a [`DeviceSpec`] with TLS: a program that does not know it must not take it, or it would leave TLS out.
pub const CONTRACT_VERSION_TLS: u32 = 2;

/// With [`SendZcMode::Auto`], the least bytes of a WRITE that leaves from the request's own pages: where that costs less
/// (`docs/performance.md`). More than one buffer of a socket holds, so what the kernel reports of such a WRITE is sure.
pub const SEND_ZC_BYTES_MIN: u32 = 128 << 10;

/// Why a spec, a status or a control line cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContractError {
    /// The file or socket cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The text is not what it should be.
    #[error("{path} is not valid: {source}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Written by a newer program.
    #[error(
        "{path} has format version {version}, this program knows {CONTRACT_VERSION_TLS}: upgrade volclient"
    )]
    Version {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// The folder of one attachment.
#[derive(Debug, Clone)]
pub struct AttachmentDir(PathBuf);

impl AttachmentDir {
    /// Where attachment folders lie under a run directory.
    pub fn parent(run_dir: &Path) -> PathBuf {
        run_dir.join("attachments")
    }

    /// The folder of this attachment; it need not exist.
    pub fn new(run_dir: &Path, attachment_id: Uuid) -> Self {
        Self(Self::parent(run_dir).join(attachment_id.to_string()))
    }

    /// A folder found in the file system or given on a command line.
    pub fn from_path(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where the spec lies.
    pub fn spec(&self) -> PathBuf {
        self.0.join("spec.json")
    }

    /// Where the status lies.
    pub fn status(&self) -> PathBuf {
        self.0.join("status.json")
    }

    /// Where the control socket lies.
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }
}

/// What is opened on the server.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ExportSpec {
    /// An attachment of a volnode server.
    Attachment {
        /// 64 hexadecimal digits.
        secret: String,
        /// Epoch of this process's session: higher than any before.
        session_epoch: u64,
        /// Who must answer.
        server_id: Uuid,
        /// For which volume.
        volume_uid: Uuid,
    },
    /// An export of any NBD server.
    Nbd {
        /// Its name; may be empty (the default export).
        export_name: String,
    },
}

impl std::fmt::Debug for ExportSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Attachment { session_epoch, volume_uid, .. } => {
                write!(f, "Attachment {{ volume_uid: {volume_uid}, session_epoch: {session_epoch}, .. }}")
            }
            Self::Nbd { export_name } => write!(f, "Nbd {{ export_name: {export_name:?} }}"),
        }
    }
}

/// Lets the device process choose the data path.
pub const DATA_PATH_AUTO: &str = "auto";
/// Requests in flight on each queue, where nobody asks for another number.
pub const QUEUE_DEPTH_DEFAULT: u16 = 128;

/// Everything a device process needs to know; it asks nobody else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// [`CONTRACT_VERSION`]; with TLS [`CONTRACT_VERSION_TLS`]
    pub format_version: u32,
    /// Names the folder; its hash is kept in the device's `ublksrv_flags`.
    pub attachment_id: Uuid,
    /// What the user attached: a volume's name or an NBD URI.
    pub target: String,
    /// The server's data addresses, `host:port` or `unix:/path`, tried in order.
    pub addresses: Vec<String>,
    /// What is opened there.
    pub export: ExportSpec,
    /// No writes.
    pub read_only: bool,
    /// [`DATA_PATH_AUTO`], or the name of a data path (`DataPath`).
    pub data_path: String,
    /// Hardware queues; 0: as many as suit this machine and the server, 1 where the server allows one connection only.
    pub nr_hw_queues: u16,
    /// Connections (slots) of the whole attachment, dealt out to the queues; 0: one for each queue.
    #[serde(default)]
    pub nr_connections: u16,
    /// Requests in flight on each queue.
    pub queue_depth: u16,
    /// Logical block size to announce, in bytes; 0 takes what the server tells.
    pub block_size_bytes: u32,
    /// Stable name to make for the device.
    pub device_link: PathBuf,
    /// Whether a server that restarts has forgotten all of the volume, flushed or not.
    #[serde(default)]
    pub is_volatile: bool,
    /// What requests do while the server cannot be reached.
    #[serde(default)]
    pub on_stall: StallPolicy,
    /// Whether somebody has set it since the attachment was made: its time is not stretched then while the server answers probes.
    #[serde(default)]
    pub on_stall_is_told: bool,
    /// For how long after its last event a queue's thread looks for the next without sleeping, in microseconds.
    #[serde(default)]
    pub busy_poll_us: u16,
    /// Whether large WRITEs are to leave from the requests' own pages, for programs that do not know [`Self::send_zc_mode`]:
    /// `true` is [`SendZcMode::On`].
    #[serde(default)]
    pub send_zc: bool,
    /// The same, for those that do; `None` in a spec of one that did not. To be read by [`DeviceSpec::send_zc_mode`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_zc_mode: Option<SendZcMode>,
    /// It was attached under a grant of the server's, and is not attached anew without one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only_if_granted: bool,
    /// What the disk holds is encrypted by this machine, and used through another disk; `None`: it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<EncryptedSpec>,
    /// The device of a process that died, to go on with; `None`: make one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recover: Option<RecoverSpec>,
    /// How TLS is spoken to the server; `None`: it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSpec>,
}

impl DeviceSpec {
    /// The spec of an attachment of which nothing is asked, before its server's addresses are known.
    pub fn new(attachment_id: Uuid, target: String, export: ExportSpec, device_link: PathBuf) -> Self {
        Self {
            format_version: CONTRACT_VERSION,
            attachment_id,
            target,
            addresses: Vec::new(),
            export,
            read_only: false,
            data_path: DATA_PATH_AUTO.to_owned(),
            nr_hw_queues: 0,
            nr_connections: 0,
            queue_depth: QUEUE_DEPTH_DEFAULT,
            block_size_bytes: 0,
            device_link,
            is_volatile: false,
            on_stall: StallPolicy::default(),
            on_stall_is_told: false,
            busy_poll_us: 0,
            send_zc: false,
            send_zc_mode: None,
            only_if_granted: false,
            encrypted: None,
            recover: None,
            tls: None,
        }
    }

    /// The secret, where there is one.
    pub fn secret(&self) -> Option<Secret> {
        match &self.export {
            ExportSpec::Attachment { secret, .. } => Secret::parse(secret),
            ExportSpec::Nbd { .. } => None,
        }
    }

    /// Whether large WRITEs are to leave from the requests' own pages, whoever wrote the spec. Who knew no modes sent nothing so unless
    /// that was asked for.
    pub fn send_zc_mode(&self) -> SendZcMode {
        self.send_zc_mode.unwrap_or(if self.send_zc { SendZcMode::On } else { SendZcMode::Off })
    }
}

/// Of an encrypted volume's disk: what the node daemon has to know of its clear disk, which is called by the attachment's id. A device process
/// knows nothing of it, and neither does a program from before there were any: to it the disk is in use until that one is closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncryptedSpec {
    /// Stable name of the clear disk; [`DeviceSpec::device_link`] is another.
    pub clear_link: PathBuf,
}

/// What a device process has to know of the one before it, whose device it takes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoverSpec {
    /// `N` of /dev/ublkbN.
    pub dev_id: u32,
    /// The device's data path, by name.
    pub data_path: String,
    /// What it was made for.
    pub session: SessionRecord,
}

/// The server's side of a device: what later connections, and later device processes, have to find again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// Storage incarnation; empty for a foreign server.
    pub incarnation: String,
    /// Who encrypts.
    pub encryption: Encryption,
    /// Size of the export in bytes.
    pub export_bytes: u64,
    /// `NBD_FLAG_*` of the export.
    pub export_flags: u16,
    /// Minimum, preferred and maximum block size of the export, in bytes, where the server told them.
    pub export_block_bytes: Option<[u32; 3]>,
    /// Capacity of the disk in bytes.
    pub capacity_bytes: u64,
    /// Logical block size of the disk in bytes.
    pub block_size_bytes: u32,
    /// Largest READ or WRITE, in bytes.
    pub max_io_bytes: u32,
    /// Whether the disk has a volatile cache.
    pub volatile_cache: bool,
    /// No writes.
    pub read_only: bool,
}

impl SessionRecord {
    /// How many bytes at the end of the export are no whole block, and so not on the disk.
    pub fn tail_bytes(&self) -> u64 {
        let block_bytes = u64::from(self.block_size_bytes.max(1));
        self.export_bytes % block_bytes
    }

    /// Whether there can be writes that were acknowledged and are not durable.
    pub fn has_volatile_cache(&self) -> bool {
        self.volatile_cache && !self.read_only
    }
}

/// What the device process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
    /// The device is being made.
    Starting,
    /// It serves I/O.
    Live,
    /// The server cannot be reached: I/O waits, or fails until it is back, as the policy says.
    Stalled,
    /// Nothing brings it back: I/O gets EIO until it is detached.
    Failed,
    /// It goes away.
    Stopping,
}

/// What became of [`DeviceSpec::send_zc_mode`], on the connection that was tried last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SendZc {
    /// It is not to be.
    #[default]
    Off,
    /// The data path has nothing to do with SEND_ZC, or the socket is none of the kernel's TCP in the clear.
    Unsupported,
    /// No large WRITE was sent yet.
    Untried,
    /// Pages leave by reference.
    Used,
    /// The kernel copies them all the same, so it is not used.
    Copied,
}

impl SendZc {
    /// As the node API tells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Unsupported => "unsupported",
            Self::Untried => "untried",
            Self::Used => "used",
            Self::Copied => "copied",
        }
    }
}

/// What a device process tells of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// [`CONTRACT_VERSION`]
    pub format_version: u32,
    /// The boot in which this was written (`/proc/sys/kernel/random/boot_id`); of another one, it means nothing.
    pub boot_id: String,
    /// The device process.
    pub pid: u32,
    /// As in the spec.
    pub attachment_id: Uuid,
    /// As in the spec.
    pub target: String,
    /// What it is doing.
    pub state: DeviceState,
    /// Why, for people; empty when live.
    pub state_reason: String,
    /// Since when, in milliseconds since the Unix epoch.
    pub state_since_ms: i64,
    /// `N` of /dev/ublkbN; `None` before the device exists.
    pub dev_id: Option<u32>,
    /// Stable name.
    pub device_link: PathBuf,
    /// In bytes.
    pub capacity_bytes: u64,
    /// Logical block size in bytes.
    pub block_size_bytes: u32,
    /// No writes.
    pub read_only: bool,
    /// The name of the data path in use (`DataPath`).
    pub data_path: String,
    /// Why it was chosen.
    pub data_path_reason: String,
    /// Hardware queues; while starting, what the spec says.
    pub nr_hw_queues: u16,
    /// Connections of the whole attachment; 0 in a status of a program that made one for each queue.
    #[serde(default)]
    pub nr_connections: u16,
    /// Requests in flight on each queue.
    pub queue_depth: u16,
    /// The data address in use.
    pub server_address: String,
    /// Who encrypts what goes there, for people; empty in a status of a program that knew no encryption.
    #[serde(default)]
    pub encryption: String,
    /// Whether large WRITEs leave from the requests' own pages.
    #[serde(default)]
    pub send_zc: SendZc,
    /// 0 for a foreign server.
    pub session_epoch: u64,
    /// The policy in force.
    #[serde(default)]
    pub on_stall: StallPolicy,
    /// Whether somebody has set it since the attachment was made: its time is not stretched then while the server answers probes.
    #[serde(default)]
    pub on_stall_is_told: bool,
    /// For a process that takes the device on; `None` before there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionRecord>,
    /// Version of the device process's program; empty in a status of one that did not tell.
    #[serde(default)]
    pub program_version: String,
    /// How often the connections were lost and made again.
    #[serde(default)]
    pub reconnects: u64,
    /// Somebody has asked for the device's end, and it is looked whether anybody uses it.
    #[serde(default)]
    pub is_stopping: bool,
}

impl DeviceStatus {
    /// Connections of the whole attachment, whoever wrote the status.
    pub fn connections(&self) -> u16 {
        if self.nr_connections == 0 { self.nr_hw_queues } else { self.nr_connections }
    }
}

/// A line to a device process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlRequest {
    /// [`CONTRACT_VERSION`]
    pub version: u32,
    /// What to do.
    pub command: ControlCommand,
}

/// What a device process can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlCommand {
    /// Tell the status.
    Status,
    /// Stop the device, flush, and end the process; refused while the device is open.
    Stop,
    /// The same, whoever has it open: what is in flight, and all I/O after it, fails. Nothing is flushed.
    ForceStop,
    /// From now on, do this while the server cannot be reached.
    SetStallPolicy(StallPolicy),
    /// From now on, the server's data addresses are these, `host:port`, tried in order.
    SetAddresses(Vec<String>),
}

/// A device process's answer. To `Stop`, [`ControlResponse::Ok`] means that the device is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlResponse {
    /// Done.
    Ok(Box<DeviceStatus>),
    /// Refused: somebody has the device open.
    Busy {
        /// Who, for people, such as "mounted on /mnt/data".
        holders: Vec<String>,
    },
    /// It could not be done.
    Error {
        /// Why, for people.
        message: String,
    },
}

/// A number of the attachment for the device's `ublksrv_flags`, so that a device in the kernel is recognised as this
/// attachment's: the first half of its id, never 0.
pub fn attachment_hash(attachment_id: Uuid) -> u64 {
    attachment_id.as_u64_pair().0.max(1)
}

/// This boot's id.
///
/// # Errors
/// [`ContractError::Io`]: /proc is not there.
pub fn boot_id() -> Result<String, ContractError> {
    let path = PathBuf::from("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(&path).map_err(|source| ContractError::Io { path, source })?;
    Ok(text.trim().to_owned())
}

/// Milliseconds since the Unix epoch, now.
pub fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Reads a spec or a status.
///
/// # Errors
/// [`ContractError`], by cause. A newer version is told before any other fault of the text.
pub fn read_file<T: DeserializeOwned>(path: &Path) -> Result<T, ContractError> {
    let text = std::fs::read(path).map_err(|source| ContractError::Io { path: path.into(), source })?;
    parse(&text, path)
}

fn parse<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T, ContractError> {
    #[derive(Deserialize)]
    struct Versioned {
        format_version: u32,
    }
    let syntax = |source| ContractError::Syntax { path: path.into(), source };
    let Versioned { format_version } = serde_json::from_slice(text).map_err(syntax)?;
    if format_version > CONTRACT_VERSION_TLS {
        return Err(ContractError::Version { path: path.into(), version: format_version });
    }
    serde_json::from_slice(text).map_err(syntax)
}

/// Writes a spec or a status: mode 0600, whole or not at all.
///
/// # Errors
/// [`ContractError::Io`]
pub fn write_file<T: Serialize>(path: &Path, value: &T) -> Result<(), ContractError> {
    let io_error = |source| ContractError::Io { path: path.into(), source };
    let text = serde_json::to_vec_pretty(value).map_err(|e| io_error(io::Error::other(e)))?;
    let new_path = path.with_extension("json.new");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&new_path).map_err(io_error)?;
    io::Write::write_all(&mut file, &text).map_err(io_error)?;
    std::fs::rename(&new_path, path).map_err(io_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC_V1: &str = r#"{
        "format_version": 1, "attachment_id": "00000000-0000-0000-0000-000000000007", "target": "vol-123",
        "addresses": ["127.0.0.1:10809"],
        "export": {"kind": "attachment",
            "secret": "0000000000000000000000000000000000000000000000000000000000000000", "session_epoch": 3,
            "server_id": "00000000-0000-0000-0000-000000000001",
            "volume_uid": "00000000-0000-0000-0000-000000000002"},
        "read_only": false, "data_path": "auto", "nr_hw_queues": 1, "queue_depth": 128, "block_size_bytes": 4096,
        "device_link": "/dev/volnode/vol-123"
    }"#;

    #[test]
    fn spec_of_version_1_is_read() {
        let spec: DeviceSpec = parse(SPEC_V1.as_bytes(), Path::new("spec.json")).unwrap();
        assert!(spec.secret().is_some());
        assert_eq!((spec.queue_depth, spec.nr_connections, spec.busy_poll_us), (128, 0, 0));
        assert_eq!(spec.on_stall, StallPolicy::Wait);
        let again: DeviceSpec = parse(&serde_json::to_vec(&spec).unwrap(), Path::new("spec.json")).unwrap();
        assert_eq!(again, spec);
    }

    const TLS_V2: &str = r#"{"ca": "/etc/volnode/ca.pem", "pair": {"cert": "/c.pem", "key": "/k.pem"},
        "server_name": "storage-1.example"}"#;

    #[test]
    fn spec_of_version_2_has_tls() {
        let text = SPEC_V1.replacen("1,", "2,", 1).replacen('{', &format!("{{\"tls\": {TLS_V2},"), 1);
        let spec: DeviceSpec = parse(text.as_bytes(), Path::new("spec.json")).unwrap();
        let tls = spec.tls.clone().unwrap();
        assert_eq!((tls.server_name.as_str(), tls.user_space_only), ("storage-1.example", false));
        assert!(tls.files.pair.is_some());
        let again: DeviceSpec = parse(&serde_json::to_vec(&spec).unwrap(), Path::new("spec.json")).unwrap();
        assert_eq!(again, spec);
    }

    #[test]
    fn a_spec_without_a_mode_of_send_zc_means_what_it_meant() {
        let read = |text: &str| parse::<DeviceSpec>(text.as_bytes(), Path::new("spec.json")).unwrap();
        let with = |fields: &str| SPEC_V1.replacen('{', &format!("{{{fields},"), 1);
        assert_eq!(read(SPEC_V1).send_zc_mode(), SendZcMode::Off, "a program before SEND_ZC");
        assert_eq!(read(&with(r#""send_zc": false"#)).send_zc_mode(), SendZcMode::Off, "0.1.0");
        assert_eq!(read(&with(r#""send_zc": true"#)).send_zc_mode(), SendZcMode::On, "0.1.0");
        // And what is written now is a spec to 0.1.0, to which `auto` is what it did by itself.
        for (send_zc_mode, send_zc) in [("auto", false), ("on", true), ("off", false)] {
            let text = with(&format!(r#""send_zc": {send_zc}, "send_zc_mode": "{send_zc_mode}""#));
            let spec = read(&text);
            assert_eq!((spec.send_zc_mode().as_str(), spec.send_zc), (send_zc_mode, send_zc));
            let again = String::from_utf8(serde_json::to_vec(&spec).unwrap()).unwrap();
            assert_eq!(read(&again), spec);
            assert!(again.contains(&format!(r#""send_zc":{send_zc}"#)), "{again}");
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let newer = r#"{"format_version": 3, "something": "else"}"#;
        let error = parse::<DeviceSpec>(newer.as_bytes(), Path::new("spec.json")).unwrap_err();
        assert!(matches!(error, ContractError::Version { version: 3, .. }), "{error}");
    }

    #[test]
    fn debug_hides_the_secret() {
        let spec: DeviceSpec = parse(SPEC_V1.as_bytes(), Path::new("spec.json")).unwrap();
        assert!(!format!("{spec:?}").contains(&"0".repeat(64)));
    }

    #[test]
    fn control_lines_of_version_1_are_read() {
        let request: ControlRequest = serde_json::from_str(r#"{"version":1,"command":"stop"}"#).unwrap();
        assert_eq!(request.command, ControlCommand::Stop);
        let policy: ControlRequest =
            serde_json::from_str(r#"{"version":1,"command":{"set_stall_policy":{"fail_after_ms":5000}}}"#)
                .unwrap();
        assert_eq!(policy.command, ControlCommand::SetStallPolicy(StallPolicy::FailAfterMs(5000)));
        let busy: ControlResponse =
            serde_json::from_str(r#"{"busy":{"holders":["mounted on /mnt"]}}"#).unwrap();
        assert_eq!(busy, ControlResponse::Busy { holders: vec!["mounted on /mnt".into()] });
    }
}
