//! An attachment's folder as the node daemon and a device process would have written it, and a stand-in for the device
//! process: the test's own process holds the folder's claim and answers on its control socket.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use client::contract::{
    AttachmentDir, CONTRACT_VERSION, ControlCommand, ControlRequest, ControlResponse, DeviceSpec,
    DeviceState, DeviceStatus, ExportSpec, SendZc, StallPolicy, boot_id, write_file,
};
use client::node::device_process;
use client::node::target::Target;
use uuid::Uuid;

pub(crate) const SECRET: &str = "abababababababababababababababababababababababababababababababab";

const END_DEADLINE: Duration = Duration::from_secs(60);

/// A folder with a spec and a status, and no process.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) dir: AttachmentDir,
    pub(crate) status: DeviceStatus,
}

impl Folder {
    /// A volume's attachment of the server `server_id`.
    pub(crate) fn of_volume(run_dir: &Path, volume: &str, attachment_id: Uuid, server_id: Uuid) -> Self {
        let export = ExportSpec::Attachment {
            secret: SECRET.to_owned(),
            session_epoch: 3,
            server_id,
            volume_uid: Uuid::from_u128(2),
        };
        Self::write(run_dir, volume, attachment_id, export)
    }

    /// An NBD URI's attachment.
    pub(crate) fn of_uri(run_dir: &Path, uri: &str) -> Self {
        Self::write(run_dir, uri, Uuid::new_v4(), ExportSpec::Nbd { export_name: "x".to_owned() })
    }

    fn write(run_dir: &Path, target: &str, attachment_id: Uuid, export: ExportSpec) -> Self {
        let dir = AttachmentDir::new(run_dir, attachment_id);
        fs::create_dir_all(dir.path()).unwrap();
        let device_link = run_dir.join("dev").join(Target::parse(target).unwrap().link_name(attachment_id));
        let spec = DeviceSpec {
            addresses: vec!["127.0.0.1:9".to_owned()],
            nr_hw_queues: 1,
            nr_connections: 1,
            block_size_bytes: 4096,
            ..DeviceSpec::new(attachment_id, target.to_owned(), export, device_link)
        };
        let status = DeviceStatus {
            format_version: CONTRACT_VERSION,
            boot_id: boot_id().unwrap(),
            pid: std::process::id(),
            attachment_id,
            target: target.to_owned(),
            state: DeviceState::Live,
            state_reason: String::new(),
            state_since_ms: 1,
            // No machine has so many.
            dev_id: Some(4_000_000),
            device_link: spec.device_link.clone(),
            capacity_bytes: 2 << 30,
            block_size_bytes: 4096,
            read_only: false,
            data_path: "mapped".to_owned(),
            data_path_reason: "asked for".to_owned(),
            nr_hw_queues: 1,
            nr_connections: 1,
            queue_depth: 128,
            server_address: "127.0.0.1:9".to_owned(),
            encryption: "none".to_owned(),
            send_zc: SendZc::Off,
            session_epoch: 3,
            on_stall: StallPolicy::Wait,
            on_stall_is_told: false,
            reconnects: 0,
            is_stopping: false,
            session: None,
            program_version: String::new(),
        };
        write_file(&dir.spec(), &spec).unwrap();
        write_file(&dir.status(), &status).unwrap();
        Self { dir, status }
    }

    pub(crate) fn exists(&self) -> bool {
        self.dir.path().exists()
    }
}

/// A device process that answers each `stop` with the next of its answers, and ends after an `Ok`.
#[derive(Debug)]
pub(crate) struct DeviceStandIn {
    ended: Receiver<()>,
}

impl DeviceStandIn {
    pub(crate) fn start(folder: &Folder, answers: Vec<ControlResponse>) -> Self {
        Self::expecting(folder, answers.into_iter().map(|answer| (ControlCommand::Stop, answer)).collect())
    }

    /// The same for other commands.
    pub(crate) fn expecting(folder: &Folder, answers: Vec<(ControlCommand, ControlResponse)>) -> Self {
        let claim = device_process::claim(&folder.dir).unwrap();
        let listener = UnixListener::bind(folder.dir.control_socket()).unwrap();
        let (end, ended) = mpsc::channel();
        std::thread::spawn(move || {
            answer(&listener, answers, claim);
            end.send(()).ok();
        });
        Self { ended }
    }

    /// Every answer was asked for, by now or soon.
    pub(crate) fn join(self) {
        self.ended.recv_timeout(END_DEADLINE).unwrap();
    }
}

fn answer(listener: &UnixListener, answers: Vec<(ControlCommand, ControlResponse)>, claim: File) {
    for (command, answer) in answers {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        let request: ControlRequest = serde_json::from_str(&line).unwrap();
        assert_eq!(request.command, command);
        let mut text = serde_json::to_vec(&answer).unwrap();
        text.push(b'\n');
        stream.write_all(&text).unwrap();
    }
    drop(claim);
}
