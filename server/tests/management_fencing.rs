//! What the management API promises of connections, seen from connections: a holder that loses the volume is cut off before
//! the call that takes it is answered, and nobody opens what is not theirs.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod unit_filter;
mod volserver;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use proto::error_reason as reason;
use proto::export_name::{AttachmentExportName, ExportDescription, Secret};
use proto::nbd::ExportInfo;
use proto::nbd::handshake::client::{ClientHandshake, ClientHandshakeError};
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES, SimpleReply};
use proto::v1::{self, management_client::ManagementClient};
use rustix::process::Signal;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;
use volserver::{DEADLINE, Volserver, attach_request, create_request};

/// One NBD connection in its transmission phase.
#[derive(Debug)]
struct Export {
    stream: TcpStream,
    info: ExportInfo,
}

impl Export {
    fn open(address: SocketAddr, name: &str) -> Result<Self, ClientHandshakeError> {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut handshake = ClientHandshake::new(name)?;
        let mut received = [0; 4096];
        loop {
            let length = stream.read(&mut received).unwrap();
            assert_ne!(length, 0, "closed in the handshake");
            let mut answer = Vec::new();
            let done = handshake.handle_bytes(&received[..length], &mut answer)?;
            stream.write_all(&answer).unwrap();
            if let Some(info) = done {
                return Ok(Self { stream, info });
            }
        }
    }

    /// Writes one block; what the server said, or the error of the connection.
    fn write_block(&mut self) -> std::io::Result<SimpleReply> {
        let request = Request {
            flags: CommandFlags(0),
            command: Command::Write,
            cookie: 7,
            offset_bytes: 0,
            length_bytes: 4096,
        };
        self.stream.write_all(&request.encode())?;
        self.stream.write_all(&[0x5a; 4096])?;
        let mut reply = [0; SIMPLE_REPLY_BYTES];
        self.stream.read_exact(&mut reply)?;
        Ok(SimpleReply::decode(&reply).unwrap())
    }

    /// True where the server has closed the connection already: no byte is waited for.
    fn is_closed(&self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let closed = match (&self.stream).read(&mut [0; 1]) {
            Ok(0) => true,
            Ok(_) => panic!("a byte that nothing asked for"),
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
        };
        self.stream.set_nonblocking(false).unwrap();
        closed
    }
}

/// A server with one volume, and whatever arguments.
struct Bench {
    dir: tempfile::TempDir,
    server: Volserver,
    client: ManagementClient<Channel>,
}

impl Bench {
    async fn with_volume(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = volserver::command(&dir.path().join("data"));
        command.args(args);
        let server = Volserver::start_with(command, &dir.path().join("log"));
        let mut client = server.client().await;
        client.create_volume(create_request("vol-1")).await.unwrap();
        Self { dir, server, client }
    }

    async fn attach(&mut self, node_id: &str, force: bool) -> v1::AttachVolumeResponse {
        self.client.attach_volume(attach_request("vol-1", node_id, force)).await.unwrap().into_inner()
    }

    fn open(&self, attached: &v1::AttachVolumeResponse, epoch: u64) -> Result<Export, ClientHandshakeError> {
        let name = AttachmentExportName {
            attachment_id: attached.attachment.as_ref().unwrap().attachment_id.parse().unwrap(),
            secret: Secret::parse(&attached.secret).unwrap(),
            epoch,
            slot: 0,
        };
        Export::open(self.server.data[0], &name.expose())
    }

    async fn attachment(&mut self) -> v1::Attachment {
        let listed =
            self.client.list_attachments(v1::ListAttachmentsRequest::default()).await.unwrap().into_inner();
        let [attachment] = <[_; 1]>::try_from(listed.attachments).unwrap();
        attachment
    }
}

#[tokio::test]
async fn an_attachment_opens_its_volume_and_is_seen_to() {
    let mut bench = Bench::with_volume(&[]).await;
    let attached = bench.attach("node-a", false).await;
    let mut export = bench.open(&attached, 3).unwrap();
    assert_eq!(export.info.size_bytes, 1 << 20);
    assert_eq!(export.write_block().unwrap().error, 0);
    let attachment = bench.attachment().await;
    assert_eq!((attachment.connections, attachment.session_epoch), (1, 3));
    let volume = bench
        .client
        .get_volume(v1::GetVolumeRequest { name: "vol-1".to_owned() })
        .await
        .unwrap()
        .into_inner();
    let description: ExportDescription = export.info.description.unwrap().parse().unwrap();
    assert_eq!(description.incarnation, volume.storage_incarnation, "API and export tell the same");
    assert_eq!(description.server_id.to_string(), attached.server_id);
    assert_eq!(description.volume_uid.to_string(), volume.volume_uid);
}

#[tokio::test]
async fn force_cuts_the_former_holder_off_before_it_is_answered() {
    let mut bench = Bench::with_volume(&[]).await;
    let first = bench.attach("node-a", false).await;
    let mut export = bench.open(&first, 1).unwrap();
    assert_eq!(export.write_block().unwrap().error, 0);
    let second = bench.attach("node-b", true).await;
    assert!(export.is_closed(), "its connection ended before the answer");
    assert!(export.write_block().is_err());
    assert!(
        matches!(bench.open(&first, 2), Err(ClientHandshakeError::Refused { .. })),
        "and it gets no other"
    );
    assert_eq!(bench.open(&second, 1).unwrap().write_block().unwrap().error, 0);
}

#[tokio::test]
async fn detach_cuts_the_holder_off_before_it_is_answered() {
    let mut bench = Bench::with_volume(&[]).await;
    let attached = bench.attach("node-a", false).await;
    let mut export = bench.open(&attached, 1).unwrap();
    let request = v1::DetachVolumeRequest { volume_name: "vol-1".to_owned(), ..Default::default() };
    assert!(bench.client.detach_volume(request).await.unwrap().into_inner().existed);
    assert!(export.is_closed() && export.write_block().is_err());
    assert!(matches!(bench.open(&attached, 2), Err(ClientHandshakeError::Refused { .. })));
    bench.client.delete_volume(v1::DeleteVolumeRequest { name: "vol-1".to_owned() }).await.unwrap();
}

#[tokio::test]
async fn an_attachment_that_is_asked_for_again_is_not_disturbed() {
    let mut bench = Bench::with_volume(&[]).await;
    let attached = bench.attach("node-a", false).await;
    let mut export = bench.open(&attached, 1).unwrap();
    assert!(bench.attach("node-a", false).await.existed);
    assert!(bench.attach("node-a", true).await.existed);
    let refused = bench.client.attach_volume(attach_request("vol-1", "node-b", false)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let refused =
        bench.client.delete_volume(v1::DeleteVolumeRequest { name: "vol-1".to_owned() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(export.write_block().unwrap().error, 0);
}

#[tokio::test]
async fn a_volume_that_is_open_by_name_is_not_deleted() {
    let mut bench = Bench::with_volume(&["--export-by-name"]).await;
    let mut export = Export::open(bench.server.data[0], "vol-1").unwrap();
    let request = v1::DeleteVolumeRequest { name: "vol-1".to_owned() };
    let refused = bench.client.delete_volume(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(refused.get_details_error_info().unwrap().reason, reason::VOLUME_OPEN);
    assert_eq!(export.write_block().unwrap().error, 0, "the refusal changed nothing");
    drop(export);
    // The server notices a closed connection in its own time.
    let deadline = Instant::now() + DEADLINE;
    while let Err(refused) = bench.client.delete_volume(request.clone()).await {
        assert_eq!(refused.get_details_error_info().unwrap().reason, reason::VOLUME_OPEN);
        assert!(Instant::now() < deadline, "{refused}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(matches!(Export::open(bench.server.data[0], "vol-1"), Err(ClientHandshakeError::Refused { .. })));
}

#[tokio::test]
async fn attaching_cuts_off_who_writes_by_name() {
    let mut bench = Bench::with_volume(&["--export-by-name"]).await;
    let mut export = Export::open(bench.server.data[0], "vol-1").unwrap();
    assert_eq!(export.write_block().unwrap().error, 0);
    bench.attach("node-a", false).await;
    assert!(export.is_closed() && export.write_block().is_err());
}

#[tokio::test]
async fn a_stop_closes_idle_exports_and_what_was_acknowledged_is_in_the_file() {
    let mut bench = Bench::with_volume(&["--cache", "writeback"]).await;
    let attached = bench.attach("node-a", false).await;
    let mut export = bench.open(&attached, 1).unwrap();
    assert_eq!(export.write_block().unwrap().error, 0);
    let volume_uid = attached.attachment.unwrap().volume_uid;
    drop(bench.client);
    let began = Instant::now();
    let status = tokio::task::spawn_blocking(move || bench.server.stop(Signal::TERM)).await.unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(began.elapsed() < std::time::Duration::from_secs(9), "{:?}", began.elapsed());
    assert!(export.is_closed());
    let file = std::fs::read(bench.dir.path().join("data/volumes").join(volume_uid)).unwrap();
    assert_eq!(file[..4097], [&[0x5a; 4096][..], &[0]].concat());
}

#[tokio::test]
async fn a_plain_name_opens_nothing_unless_configured() {
    let bench = Bench::with_volume(&[]).await;
    let refused = Export::open(bench.server.data[0], "vol-1");
    assert!(matches!(refused, Err(ClientHandshakeError::Refused { .. })), "{refused:?}");
}

/// Of a clone of the node, or of the node after a reboot.
fn from_boot(boot_id: &str) -> v1::AttachVolumeRequest {
    v1::AttachVolumeRequest { boot_id: boot_id.to_owned(), ..attach_request("vol-1", "node-a", false) }
}

fn reason_of(status: &tonic::Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

/// Two machines with one /etc/machine-id: the second one gets nothing, and the first one's disk goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_does_not_take_the_volume_of_a_machine_that_is_there() {
    let bench = Bench::with_volume(&[]).await;
    let mut client = bench.client.clone();
    let held = client.attach_volume(from_boot("boot-1")).await.unwrap().into_inner();
    let mut export = bench.open(&held, 1).unwrap();
    let refused = client.attach_volume(from_boot("boot-2")).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason_of(&refused).as_str()),
        (Code::FailedPrecondition, reason::OTHER_BOOT)
    );
    // A controller's call is answered, and gives away nothing.
    let told = client.attach_volume(from_boot("")).await.unwrap().into_inner();
    assert!(told.existed && told.secret.is_empty());
    assert_eq!(export.write_block().unwrap().error, 0);
    let again = client.attach_volume(from_boot("boot-1")).await.unwrap().into_inner();
    assert_eq!(
        (again.existed, &again.secret),
        (true, &held.secret),
        "the machine itself may ask as often as it likes"
    );
    let forced = v1::AttachVolumeRequest { force: true, ..from_boot("boot-2") };
    let taken = client.attach_volume(forced).await.unwrap().into_inner();
    assert!(export.is_closed() && taken.secret != held.secret);
}

/// A machine that lost power comes back as another boot, which gets the volume by itself; its former boot, should it still send
/// something, does not. The server was restarted meanwhile, so it has not seen the connections end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_gets_its_volume_after_a_reboot() {
    let mut bench = Bench::with_volume(&[]).await;
    let held = bench.client.attach_volume(from_boot("boot-1")).await.unwrap().into_inner();
    drop(bench.open(&held, 1).unwrap());
    let Bench { dir, server, .. } = bench;
    server.kill();
    let server = Volserver::start(&dir.path().join("data"));
    let client = server.client().await;
    let mut bench = Bench { dir, server, client };
    let began = Instant::now();
    let taken = bench.client.attach_volume(from_boot("boot-2")).await.unwrap().into_inner();
    assert!((15..45).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert!(!taken.existed && taken.secret != held.secret);
    let (was, is) = (held.attachment.as_ref().unwrap(), taken.attachment.as_ref().unwrap());
    assert!(is.generation > was.generation);
    assert_eq!((was.boot_id.as_str(), is.boot_id.as_str()), ("boot-1", "boot-2"));
    assert!(bench.open(&held, 2).is_err(), "the former boot");
    bench.open(&taken, 1).unwrap();
}
