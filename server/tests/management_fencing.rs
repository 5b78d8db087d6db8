//! What the management API promises of connections, seen from connections: a holder that loses the volume is cut off before
//! the call that takes it is answered, and nobody opens what is not theirs.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod unit_filter;
mod volserver;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use proto::error_reason as reason;
use proto::export_name::ExportDescription;
use proto::nbd::ExportInfo;
use proto::nbd::handshake::client::{ClientHandshake, ClientHandshakeError};
use proto::nbd::transmission::{Command, CommandFlags, Request, SIMPLE_REPLY_BYTES, SimpleReply};
use proto::v1::{self, management_client::ManagementClient};
use rustix::process::Signal;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;
use volserver::{DEADLINE, Volserver, attach_request, create_request, export_name};

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

    /// Reads one block.
    fn read_block(&mut self) -> Vec<u8> {
        let request = Request {
            flags: CommandFlags(0),
            command: Command::Read,
            cookie: 8,
            offset_bytes: 0,
            length_bytes: 4096,
        };
        self.stream.write_all(&request.encode()).unwrap();
        let mut reply = [0; SIMPLE_REPLY_BYTES];
        self.stream.read_exact(&mut reply).unwrap();
        assert_eq!(SimpleReply::decode(&reply).unwrap().error, 0);
        let mut block = vec![0; 4096];
        self.stream.read_exact(&mut block).unwrap();
        block
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
        Export::open(self.server.data[0], &export_name(attached, epoch))
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
        .get_volume(v1::GetVolumeRequest { name: "vol-1".to_owned(), ..Default::default() })
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
    bench
        .client
        .delete_volume(v1::DeleteVolumeRequest { name: "vol-1".to_owned(), ..Default::default() })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_grant_that_is_taken_away_cuts_the_node_off_before_it_is_answered() {
    let mut bench = Bench::with_volume(&[]).await;
    let grant = v1::CreateGrantRequest {
        volume_name: "vol-1".to_owned(),
        node_id: "node-a".to_owned(),
        ..Default::default()
    };
    bench.client.create_grant(grant.clone()).await.unwrap();
    let request =
        v1::AttachVolumeRequest { only_if_granted: true, ..attach_request("vol-1", "node-a", false) };
    let attached = bench.client.attach_volume(request.clone()).await.unwrap().into_inner();
    let mut export = bench.open(&attached, 1).unwrap();
    assert_eq!(export.write_block().unwrap().error, 0);
    // One grant more or less at another node changes nothing here.
    let other = v1::CreateGrantRequest { node_id: "node-b".to_owned(), ..grant };
    let refused = bench.client.create_grant(other).await.unwrap_err();
    assert_eq!(reason_of(&refused), reason::VOLUME_GRANTED);
    let withdraw = |node_id: &str| v1::DeleteGrantRequest {
        volume_name: "vol-1".to_owned(),
        node_id: node_id.to_owned(),
        ..Default::default()
    };
    assert!(!bench.client.delete_grant(withdraw("node-b")).await.unwrap().into_inner().was_attached);
    assert_eq!(export.write_block().unwrap().error, 0);
    assert!(bench.client.delete_grant(withdraw("node-a")).await.unwrap().into_inner().was_attached);
    assert!(export.is_closed() && export.write_block().is_err());
    assert!(matches!(bench.open(&attached, 2), Err(ClientHandshakeError::Refused { .. })));
    let late = bench.client.attach_volume(request).await.unwrap_err();
    assert_eq!(reason_of(&late), reason::VOLUME_NOT_GRANTED);
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
    let refused = bench
        .client
        .delete_volume(v1::DeleteVolumeRequest { name: "vol-1".to_owned(), ..Default::default() })
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(export.write_block().unwrap().error, 0);
}

#[tokio::test]
async fn a_volume_that_is_open_by_name_is_not_deleted() {
    let mut bench = Bench::with_volume(&["--export-by-name"]).await;
    let mut export = Export::open(bench.server.data[0], "vol-1").unwrap();
    let request = v1::DeleteVolumeRequest { name: "vol-1".to_owned(), ..Default::default() };
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

#[tokio::test]
async fn of_several_writers_of_a_shared_volume_one_is_fenced_and_the_others_go_on() {
    let mut bench = Bench::with_volume(&[]).await;
    let shared = v1::CreateVolumeRequest { is_shared: true, ..create_request("shared") };
    assert!(bench.client.create_volume(shared.clone()).await.unwrap().into_inner().is_shared);
    let other = bench.client.create_volume(create_request("shared")).await.unwrap_err();
    assert_eq!((other.code(), reason_of(&other).as_str()), (Code::AlreadyExists, reason::VOLUME_DIFFERS));
    let attach = |volume_name: &str, node_id: &str, mode: v1::AccessMode| v1::AttachVolumeRequest {
        access_mode: mode.into(),
        boot_id: "boot-1".to_owned(),
        ..attach_request(volume_name, node_id, false)
    };
    let writer = |node_id: &str| attach("shared", node_id, v1::AccessMode::MultiNodeMultiWriter);
    let refused = |status: &tonic::Status| (status.code(), reason_of(status));
    let is = |word: &str| (Code::FailedPrecondition, word.to_owned());
    let not_shared = attach("vol-1", "node-a", v1::AccessMode::MultiNodeMultiWriter);
    let status = bench.client.attach_volume(not_shared).await.unwrap_err();
    assert_eq!(refused(&status), is(reason::VOLUME_NOT_SHARED));

    let first = bench.client.attach_volume(writer("node-a")).await.unwrap().into_inner();
    let second = bench.client.attach_volume(writer("node-b")).await.unwrap().into_inner();
    assert_eq!(second.attachment.as_ref().unwrap().access_mode(), v1::AccessMode::MultiNodeMultiWriter);
    let (mut one, mut two) = (bench.open(&first, 1).unwrap(), bench.open(&second, 9).unwrap());
    assert_eq!((one.write_block().unwrap().error, two.write_block().unwrap().error), (0, 0));
    for mode in [v1::AccessMode::SingleNodeWriter, v1::AccessMode::MultiNodeReaderOnly] {
        let status = bench.client.attach_volume(attach("shared", "node-c", mode)).await.unwrap_err();
        assert_eq!(refused(&status), is(reason::VOLUME_ATTACHED), "{mode:?}");
    }
    let nobody = v1::DetachVolumeRequest { volume_name: "shared".to_owned(), ..Default::default() };
    let status = bench.client.detach_volume(nobody.clone()).await.unwrap_err();
    assert_eq!(refused(&status), (Code::InvalidArgument, reason::SEVERAL_HOLDERS.to_owned()));

    // By force from another boot of one of the nodes: from that one alone.
    let forced = v1::AttachVolumeRequest { boot_id: "boot-2".to_owned(), force: true, ..writer("node-a") };
    let third = bench.client.attach_volume(forced).await.unwrap().into_inner();
    assert!(one.is_closed(), "it is fenced");
    assert!(bench.open(&first, 2).is_err());
    assert_eq!(two.write_block().unwrap().error, 0, "it goes on");
    let generation = |attached: &v1::AttachVolumeResponse| attached.attachment.as_ref().unwrap().generation;
    assert!(generation(&third) > generation(&first) && generation(&second) == generation(&first));
    let mut three = bench.open(&third, 1).unwrap();
    assert_eq!(three.write_block().unwrap().error, 0);

    let of_b = v1::DetachVolumeRequest { node_id: "node-b".to_owned(), ..nobody.clone() };
    assert!(bench.client.detach_volume(of_b).await.unwrap().into_inner().existed);
    assert!(two.is_closed());
    assert_eq!(three.write_block().unwrap().error, 0);
    let again = bench.client.attach_volume(writer("node-b")).await.unwrap().into_inner();
    assert!(bench.open(&again, 1).is_ok());
    let alone = v1::AttachVolumeRequest {
        force: true,
        ..attach("shared", "node-c", v1::AccessMode::SingleNodeWriter)
    };
    bench.client.attach_volume(alone).await.unwrap();
    assert!(three.is_closed(), "one who writes alone takes it from all of them");
    assert_eq!(bench.attachment().await.node_id, "node-c");
    let content = v1::SetVolumeContentRequest {
        name: "shared".to_owned(),
        attachment_id: bench.attachment().await.attachment_id,
        content: v1::VolumeContent::Initialising.into(),
    };
    let status = bench.client.set_volume_content(content).await.unwrap_err();
    assert_eq!(refused(&status), is(reason::CONTENT_REFUSED));
    let frozen = v1::CreateSnapshotRequest {
        volume_names: vec!["shared".to_owned()],
        name: "s".to_owned(),
        freeze_id: "00000000-0000-0000-0000-000000000001".to_owned(),
        ..Default::default()
    };
    let status = bench.client.create_snapshot(frozen).await.unwrap_err();
    assert_eq!(refused(&status), is(reason::VOLUME_SHARED));
}

#[tokio::test]
async fn a_renamed_volume_has_its_bytes_and_its_uid_and_nobody_has_it_meanwhile() {
    let mut bench = Bench::with_volume(&["--export-by-name"]).await;
    bench.client.create_volume(create_request("taken")).await.unwrap();
    let old = "vol-1";
    let new = format!("{old}-renamed");
    let by_name = v1::GetVolumeRequest { name: old.to_owned(), ..Default::default() };
    let before = bench.client.get_volume(by_name.clone()).await.unwrap().into_inner();
    let request = |name: &str, new_name: &str| v1::RenameVolumeRequest {
        name: name.into(),
        new_name: new_name.into(),
        ..Default::default()
    };
    let by_uid = format!("uid:{}", before.volume_uid);
    let address = bench.server.data[0];

    let attached = bench.client.attach_volume(attach_request(old, "node-1", false)).await.unwrap();
    let refused = bench.client.rename_volume(request(old, &new)).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason_of(&refused)),
        (Code::FailedPrecondition, reason::VOLUME_ATTACHED.to_owned())
    );
    let attachment_id = attached.into_inner().attachment.unwrap().attachment_id;
    let detach = v1::DetachVolumeRequest { attachment_id, ..Default::default() };
    bench.client.detach_volume(detach).await.unwrap();

    let mut export = Export::open(address, old).unwrap();
    assert_eq!(export.write_block().unwrap().error, 0);
    let refused = bench.client.rename_volume(request(old, &new)).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason_of(&refused)),
        (Code::FailedPrecondition, reason::VOLUME_OPEN.to_owned())
    );
    assert!(!export.is_closed());
    drop(export);
    let begun = Instant::now();
    let renamed = loop {
        // The server may not have seen yet that the connection is gone.
        match bench.client.rename_volume(request(&by_uid, &new)).await {
            Err(open) if reason_of(&open) == reason::VOLUME_OPEN && begun.elapsed() < DEADLINE => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            renamed => break renamed.unwrap().into_inner(),
        }
    };
    assert_eq!((renamed.name.as_str(), &renamed.volume_uid), (new.as_str(), &before.volume_uid));
    assert_eq!(renamed.storage_incarnation, before.storage_incarnation);

    // By uid the call may be repeated; by the old name there is nothing any more, and a new volume may have it.
    let again = bench.client.rename_volume(request(&by_uid, &new)).await.unwrap().into_inner();
    assert_eq!(again.name, new);
    assert_eq!(bench.client.get_volume(by_name).await.unwrap_err().code(), Code::NotFound);
    assert!(matches!(Export::open(address, old), Err(ClientHandshakeError::Refused { .. })));
    assert!(Export::open(address, &new).unwrap().read_block() == [0x5a; 4096]);
    let fresh = bench.client.create_volume(create_request(old)).await.unwrap().into_inner();
    assert_ne!(fresh.volume_uid, before.volume_uid);
    assert!(Export::open(address, old).unwrap().read_block() == [0; 4096]);

    let refused = bench.client.rename_volume(request(&by_uid, "taken")).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason_of(&refused)),
        (Code::AlreadyExists, reason::VOLUME_NAME_TAKEN.to_owned())
    );
    for wrong in ["", "a b", "disk-part1", "uid:x"] {
        let refused = bench.client.rename_volume(request(&by_uid, wrong)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{wrong}");
    }

    let in_memory =
        v1::CreateVolumeRequest { backend: v1::Backend::Memory.into(), ..create_request("mem-1") };
    bench.client.create_volume(in_memory).await.unwrap();
    let refused = bench.client.rename_volume(request("mem-1", "mem-2")).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason_of(&refused)),
        (Code::FailedPrecondition, reason::NAME_FIXED.to_owned())
    );
    let Bench { dir, server, .. } = bench;
    server.kill();
    let mut command = volserver::command(&dir.path().join("data"));
    command.arg("--export-by-name");
    let server = Volserver::start_with(command, &dir.path().join("log"));
    assert!(Export::open(server.data[0], "vol-1-renamed").unwrap().read_block() == [0x5a; 4096]);
}

#[tokio::test]
async fn calls_by_uid_find_a_volume_that_is_renamed_meanwhile() {
    let bench = Bench::with_volume(&[]).await;
    let by_name = v1::GetVolumeRequest { name: "vol-1".to_owned(), ..Default::default() };
    let uid = bench.client.clone().get_volume(by_name).await.unwrap().into_inner().volume_uid;
    let name = format!("uid:{uid}");
    let calls = (0..96).map(|number| {
        let (mut client, name) = (bench.client.clone(), name.clone());
        tokio::spawn(async move {
            let answer = if number % 2 == 0 {
                let new_name = format!("name-{}", number % 3);
                client.rename_volume(v1::RenameVolumeRequest { name, new_name, ..Default::default() }).await
            } else {
                let description = Some(format!("{number}"));
                client
                    .update_volume(v1::UpdateVolumeRequest { name, description, ..Default::default() })
                    .await
            };
            answer.map(|volume| volume.into_inner().volume_uid)
        })
    });
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap().unwrap(), uid);
    }
}
