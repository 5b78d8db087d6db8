//! The management API of the real volserver: every promise of `proto/volnode/v1/management.proto`.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod unit_filter;
mod volserver;

use proto::error_reason as reason;
use proto::v1::{self, management_client::ManagementClient};
use rustix::process::Signal;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use volserver::{Volserver, attach_request, create_request};

/// A server on a new data directory, and a client of it.
struct Bench {
    dir: tempfile::TempDir,
    server: Volserver,
    client: ManagementClient<Channel>,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = Volserver::start(&dir.path().join("data"));
        let client = server.client().await;
        Self { dir, server, client }
    }

    fn files(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("data/volumes")).unwrap().count()
    }

    async fn create(&mut self, request: v1::CreateVolumeRequest) -> Result<v1::Volume, Status> {
        self.client.create_volume(request).await.map(tonic::Response::into_inner)
    }

    async fn get(&mut self, name: &str) -> Result<v1::Volume, Status> {
        let request = v1::GetVolumeRequest { name: name.to_owned(), ..Default::default() };
        self.client.get_volume(request).await.map(tonic::Response::into_inner)
    }

    async fn delete(&mut self, name: &str) -> Result<bool, Status> {
        let request = v1::DeleteVolumeRequest { name: name.to_owned(), ..Default::default() };
        self.client.delete_volume(request).await.map(|answer| answer.into_inner().existed)
    }

    async fn attach(
        &mut self,
        name: &str,
        node_id: &str,
        force: bool,
    ) -> Result<v1::AttachVolumeResponse, Status> {
        let request = attach_request(name, node_id, force);
        self.client.attach_volume(request).await.map(tonic::Response::into_inner)
    }

    async fn detach(&mut self, name: &str, node_id: &str) -> Result<bool, Status> {
        let request = v1::DetachVolumeRequest {
            volume_name: name.to_owned(),
            node_id: node_id.to_owned(),
            ..Default::default()
        };
        self.client.detach_volume(request).await.map(|answer| answer.into_inner().existed)
    }

    async fn volumes(&mut self, page_size: u32, page_token: &str) -> Result<v1::ListVolumesResponse, Status> {
        let request =
            v1::ListVolumesRequest { page_size, page_token: page_token.to_owned(), ..Default::default() };
        self.client.list_volumes(request).await.map(tonic::Response::into_inner)
    }

    async fn attachments(&mut self, request: v1::ListAttachmentsRequest) -> Vec<v1::Attachment> {
        self.client.list_attachments(request).await.unwrap().into_inner().attachments
    }
}

/// Code, reason and the domain's rule: what programs decide by.
fn reason_of(status: &Status) -> (Code, String) {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, reason::DOMAIN);
    assert!(info.metadata.contains_key(reason::METADATA_NEXT), "{info:?}");
    (status.code(), info.reason)
}

fn fields_of(status: &Status) -> Vec<String> {
    assert_eq!(reason_of(status), (Code::InvalidArgument, reason::INVALID_FIELD.to_owned()));
    let bad_request = status.get_details_bad_request().expect("a BadRequest");
    bad_request.field_violations.into_iter().map(|violation| violation.field).collect()
}

#[tokio::test]
async fn a_volume_is_created_shown_and_deleted() {
    let mut bench = Bench::new().await;
    let request = v1::CreateVolumeRequest {
        block_size_bytes: 512,
        write_cache: v1::WriteCache::Off.into(),
        ..create_request("vol-1")
    };
    let volume = bench.create(request).await.unwrap();
    assert_eq!(
        (volume.name.as_str(), volume.capacity_bytes, volume.block_size_bytes),
        ("vol-1", 1 << 20, 512)
    );
    assert_eq!((volume.backend(), volume.write_cache()), (v1::Backend::File, v1::WriteCache::Off));
    assert!(uuid::Uuid::try_parse(&volume.volume_uid).is_ok(), "{}", volume.volume_uid);
    assert!(volume.allocated_bytes < volume.capacity_bytes, "thin: {}", volume.allocated_bytes);
    assert!(!volume.storage_incarnation.is_empty() && volume.created_at_ms > 0);
    assert_eq!(volume.attachments, []);
    assert_eq!(bench.get("vol-1").await.unwrap(), volume);
    assert_eq!(bench.volumes(0, "").await.unwrap().volumes, [volume]);
    assert_eq!(bench.files(), 1);

    assert!(bench.delete("vol-1").await.unwrap());
    assert_eq!(bench.files(), 0);
    let status = bench.get("vol-1").await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::NotFound, reason::VOLUME_NOT_FOUND.to_owned()));
    assert!(status.message().contains("vol-1"), "{status}");
    assert!(!bench.delete("vol-1").await.unwrap(), "deleting again is a success");
}

#[tokio::test]
async fn whether_a_volume_is_encrypted_is_for_good_and_told_to_who_attaches_it() {
    let mut bench = Bench::new().await;
    let encrypted = |name: &str| v1::CreateVolumeRequest {
        is_encrypted: true,
        capacity_bytes: (16 << 20) + 4096,
        ..create_request(name)
    };
    let volume = bench.create(encrypted("vol-1")).await.unwrap();
    assert!(volume.is_encrypted && volume.capacity_bytes == (16 << 20) + 4096);
    assert_eq!(bench.create(encrypted("vol-1")).await.unwrap(), volume);
    let other = v1::CreateVolumeRequest { is_encrypted: false, ..encrypted("vol-1") };
    let status = bench.create(other).await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::AlreadyExists, reason::VOLUME_DIFFERS.to_owned()));
    assert!(status.message().contains("encryption"), "{status:?}");
    for (field, bad) in [
        ("is_encrypted", v1::CreateVolumeRequest { is_shared: true, ..encrypted("vol-2") }),
        ("capacity_bytes", v1::CreateVolumeRequest { capacity_bytes: 16 << 20, ..encrypted("vol-2") }),
    ] {
        assert_eq!(fields_of(&bench.create(bad).await.unwrap_err()), [field]);
    }
    bench.create(create_request("plain")).await.unwrap();
    for (name, is_encrypted) in [("vol-1", true), ("plain", false)] {
        let request = volserver::attach_request(name, "node-a", false);
        let attached = bench.client.attach_volume(request).await.unwrap().into_inner();
        assert_eq!(attached.is_encrypted, is_encrypted, "{name}");
    }
}

#[tokio::test]
async fn a_deleted_name_makes_another_volume() {
    let mut bench = Bench::new().await;
    let first = bench.create(create_request("vol-1")).await.unwrap();
    bench.delete("vol-1").await.unwrap();
    let second = bench.create(create_request("vol-1")).await.unwrap();
    assert_ne!(first.volume_uid, second.volume_uid);
}

#[tokio::test]
async fn create_is_idempotent_and_other_properties_are_refused() {
    let mut bench = Bench::new().await;
    let volume = bench.create(create_request("vol-1")).await.unwrap();
    let same = v1::CreateVolumeRequest {
        block_size_bytes: 4096,
        backend: v1::Backend::File.into(),
        write_cache: v1::WriteCache::On.into(),
        ..create_request("vol-1")
    };
    assert_eq!(bench.create(same).await.unwrap(), volume, "the defaults spelled out are the same");
    let others = [
        v1::CreateVolumeRequest { capacity_bytes: 2 << 20, ..create_request("vol-1") },
        v1::CreateVolumeRequest { block_size_bytes: 512, ..create_request("vol-1") },
        v1::CreateVolumeRequest { backend: v1::Backend::Memory.into(), ..create_request("vol-1") },
        v1::CreateVolumeRequest { write_cache: v1::WriteCache::Off.into(), ..create_request("vol-1") },
    ];
    for other in others {
        let status = bench.create(other).await.unwrap_err();
        assert_eq!(reason_of(&status), (Code::AlreadyExists, reason::VOLUME_DIFFERS.to_owned()));
    }
    assert_eq!(bench.get("vol-1").await.unwrap(), volume);
}

#[tokio::test]
async fn concurrent_creates_of_one_name_make_one_volume() {
    let mut bench = Bench::new().await;
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..16u32 {
        let mut client = bench.client.clone();
        // Half of them want another size: whichever size comes first, all of the other are refused.
        let capacity_bytes = if index % 2 == 0 { 1 << 20 } else { 2 << 20 };
        let request = v1::CreateVolumeRequest { capacity_bytes, ..create_request("vol-1") };
        tasks.spawn(async move { client.create_volume(request).await.map(tonic::Response::into_inner) });
    }
    let outcomes = tasks.join_all().await;
    let volume = bench.get("vol-1").await.unwrap();
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!((made.len(), refused.len()), (8, 8));
    assert!(made.into_iter().all(|outcome| outcome.unwrap() == volume));
    assert!(refused.into_iter().all(|outcome| outcome.unwrap_err().code() == Code::AlreadyExists));
    assert_eq!(bench.files(), 1);
}

#[tokio::test]
async fn bad_input_is_refused_by_field_and_makes_nothing() {
    let mut bench = Bench::new().await;
    let base = || create_request("vol-1");
    let cases = [
        (create_request(""), "name"),
        (create_request("a/b"), "name"),
        (create_request("../../etc/passwd"), "name"),
        (create_request(&"x".repeat(300)), "name"),
        (v1::CreateVolumeRequest { capacity_bytes: 0, ..base() }, "capacity_bytes"),
        (v1::CreateVolumeRequest { capacity_bytes: 4097, ..base() }, "capacity_bytes"),
        (v1::CreateVolumeRequest { capacity_bytes: 512, ..base() }, "capacity_bytes"),
        (v1::CreateVolumeRequest { capacity_bytes: 1 << 63, ..base() }, "capacity_bytes"),
        (v1::CreateVolumeRequest { block_size_bytes: 1024, ..base() }, "block_size_bytes"),
        (v1::CreateVolumeRequest { backend: 77, ..base() }, "backend"),
        (v1::CreateVolumeRequest { write_cache: -1, ..base() }, "write_cache"),
    ];
    for (request, field) in cases {
        let status = bench.create(request.clone()).await.expect_err(&format!("{request:?}"));
        assert_eq!(fields_of(&status), [field], "{request:?}");
        assert!(status.message().contains(field), "{status}");
    }
    bench.create(base()).await.unwrap();
    assert_eq!(fields_of(&bench.get("a/b").await.unwrap_err()), ["name"]);
    assert_eq!(fields_of(&bench.delete("").await.unwrap_err()), ["name"]);
    let status = bench.attach("a/b", "", false).await.unwrap_err();
    assert_eq!(fields_of(&status), ["volume_name", "node_id"]);
    let status = bench.attach("vol-1", &"n".repeat(257), false).await.unwrap_err();
    assert_eq!(fields_of(&status), ["node_id"]);
    let request = v1::AttachVolumeRequest { access_mode: 9, ..attach_request("vol-1", "node-a", false) };
    assert_eq!(fields_of(&bench.client.attach_volume(request).await.unwrap_err()), ["access_mode"]);
    assert_eq!(fields_of(&bench.detach("", "node-a").await.unwrap_err()), ["attachment_id"]);
    assert_eq!(bench.volumes(0, "").await.unwrap().volumes.len(), 1);
    assert_eq!(bench.files(), 1);
}

#[tokio::test]
async fn volumes_are_listed_in_pages_by_name() {
    let mut bench = Bench::new().await;
    let mut names: Vec<String> = (0..25).map(|index| format!("vol-{}", index * 7 % 25)).collect();
    for name in &names {
        bench.create(create_request(name)).await.unwrap();
    }
    names.sort();
    let mut listed = Vec::new();
    let mut sizes = Vec::new();
    let mut token = String::new();
    loop {
        let page = bench.volumes(10, &token).await.unwrap();
        sizes.push(page.volumes.len());
        listed.extend(page.volumes.into_iter().map(|volume| volume.name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!((listed, sizes), (names.clone(), vec![10, 10, 5]));
    assert_eq!(bench.volumes(25, "").await.unwrap().next_page_token, "", "no page after the last");

    // Volumes that go away between two pages are no reason to miss others.
    let first = bench.volumes(5, "").await.unwrap();
    bench.delete(&names[4]).await.unwrap();
    bench.delete(&names[5]).await.unwrap();
    let second = bench.volumes(1, &first.next_page_token).await.unwrap();
    assert_eq!(second.volumes[0].name, names[6]);
}

#[tokio::test]
async fn a_page_token_that_was_not_given_is_refused() {
    let mut bench = Bench::new().await;
    for name in ["a", "b"] {
        bench.create(create_request(name)).await.unwrap();
        bench.attach(name, "node-a", false).await.unwrap();
    }
    let given = bench.volumes(1, "").await.unwrap().next_page_token;
    assert!(!given.is_empty());
    for bad in ["x", "a", &given[1..], &format!("{given}/")] {
        assert_eq!(fields_of(&bench.volumes(1, bad).await.unwrap_err()), ["page_token"], "{bad}");
    }
    let request = v1::ListAttachmentsRequest { page_token: given, ..Default::default() };
    let status = bench.client.list_attachments(request).await.unwrap_err();
    assert_eq!(fields_of(&status), ["page_token"], "a token of another list");
}

#[tokio::test]
async fn attach_is_idempotent_for_its_node() {
    let mut bench = Bench::new().await;
    let volume = bench.create(create_request("vol-1")).await.unwrap();
    let first = bench.attach("vol-1", "node-a", false).await.unwrap();
    let attachment = first.attachment.clone().unwrap();
    assert_eq!((attachment.volume_name.as_str(), attachment.node_id.as_str()), ("vol-1", "node-a"));
    assert_eq!(attachment.volume_uid, volume.volume_uid);
    assert_eq!(attachment.access_mode(), v1::AccessMode::SingleNodeWriter);
    assert_eq!((attachment.generation, attachment.session_epoch, attachment.connections), (1, 0, 0));
    assert_eq!((first.capacity_bytes, first.block_size_bytes, first.existed), (1 << 20, 4096, false));
    assert!(proto::export_name::Secret::parse(&first.secret).is_some());
    assert_eq!(first.data_addresses, [bench.server.data[0].to_string()]);

    let again = bench.attach("vol-1", "node-a", false).await.unwrap();
    assert_eq!(again, v1::AttachVolumeResponse { existed: true, ..first });
    assert_eq!(bench.get("vol-1").await.unwrap().attachments, [attachment]);
    let status = bench.attach("no-such", "node-a", false).await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::NotFound, reason::VOLUME_NOT_FOUND.to_owned()));
}

#[tokio::test]
async fn another_node_is_refused_unless_it_uses_force() {
    let mut bench = Bench::new().await;
    bench.create(create_request("vol-1")).await.unwrap();
    let first = bench.attach("vol-1", "node-a", false).await.unwrap();
    let status = bench.attach("vol-1", "node-b", false).await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::FailedPrecondition, reason::VOLUME_ATTACHED.to_owned()));
    assert!(status.message().contains("node-a"), "{status}");
    let metadata = status.get_details_error_info().unwrap().metadata;
    assert_eq!(metadata.get("node_id").map(String::as_str), Some("node-a"));

    let second = bench.attach("vol-1", "node-b", true).await.unwrap();
    let (old, new) = (first.attachment.unwrap(), second.attachment.unwrap());
    assert_ne!(old.attachment_id, new.attachment_id);
    assert_ne!(first.secret, second.secret);
    assert_eq!((new.generation, new.node_id.as_str(), second.existed), (old.generation + 1, "node-b", false));
    assert!(!bench.detach("vol-1", "node-a").await.unwrap(), "it holds nothing any more");
    let by_old_id = v1::DetachVolumeRequest { attachment_id: old.attachment_id, ..Default::default() };
    assert!(!bench.client.detach_volume(by_old_id).await.unwrap().into_inner().existed);
    assert_eq!(bench.get("vol-1").await.unwrap().attachments, [new]);
}

#[tokio::test]
async fn another_access_mode_is_refused_unless_forced() {
    let mut bench = Bench::new().await;
    bench.create(create_request("vol-1")).await.unwrap();
    bench.attach("vol-1", "node-a", false).await.unwrap();
    let reader = |force| v1::AttachVolumeRequest {
        access_mode: v1::AccessMode::SingleNodeReaderOnly.into(),
        ..attach_request("vol-1", "node-a", force)
    };
    let status = bench.client.attach_volume(reader(false)).await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::AlreadyExists, reason::ATTACHED_DIFFERENTLY.to_owned()));
    let attached = bench.client.attach_volume(reader(true)).await.unwrap().into_inner();
    assert_eq!(attached.attachment.unwrap().access_mode(), v1::AccessMode::SingleNodeReaderOnly);
}

#[tokio::test]
async fn an_attached_volume_is_not_deleted_and_detach_is_idempotent() {
    let mut bench = Bench::new().await;
    bench.create(create_request("vol-1")).await.unwrap();
    let attached = bench.attach("vol-1", "node-a", false).await.unwrap();
    let status = bench.delete("vol-1").await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::FailedPrecondition, reason::VOLUME_ATTACHED.to_owned()));
    assert!(status.message().contains("node-a"), "{status}");

    assert!(!bench.detach("vol-1", "node-b").await.unwrap(), "another node's");
    let attachment_id = attached.attachment.unwrap().attachment_id;
    let by_id = v1::DetachVolumeRequest { attachment_id, ..Default::default() };
    assert!(bench.client.detach_volume(by_id.clone()).await.unwrap().into_inner().existed);
    assert!(!bench.client.detach_volume(by_id).await.unwrap().into_inner().existed);
    assert!(!bench.detach("vol-1", "").await.unwrap());
    assert!(!bench.detach("no-such", "node-a").await.unwrap());

    let again = bench.attach("vol-1", "node-a", false).await.unwrap();
    assert_ne!(again.secret, attached.secret, "a new attachment has a new secret");
    assert!(bench.detach("vol-1", "").await.unwrap(), "whichever node holds it");
    assert!(bench.delete("vol-1").await.unwrap());
}

#[tokio::test]
async fn attachments_are_listed_by_volume_and_node_in_pages() {
    let mut bench = Bench::new().await;
    for (name, node_id) in [("a", "node-1"), ("b", "node-2"), ("c", "node-1")] {
        bench.create(create_request(name)).await.unwrap();
        bench.attach(name, node_id, false).await.unwrap();
    }
    let names = |attachments: Vec<v1::Attachment>| -> Vec<String> {
        attachments.into_iter().map(|attachment| attachment.volume_name).collect()
    };
    assert_eq!(names(bench.attachments(Default::default()).await), ["a", "b", "c"]);
    let of_node = v1::ListAttachmentsRequest { node_id: "node-1".to_owned(), ..Default::default() };
    assert_eq!(names(bench.attachments(of_node.clone()).await), ["a", "c"]);
    let of_volume = v1::ListAttachmentsRequest { volume_name: "b".to_owned(), ..Default::default() };
    assert_eq!(names(bench.attachments(of_volume).await), ["b"]);
    let first = v1::ListAttachmentsRequest { page_size: 1, ..of_node };
    let page = bench.client.list_attachments(first.clone()).await.unwrap().into_inner();
    let second = v1::ListAttachmentsRequest { page_token: page.next_page_token, ..first };
    let page = bench.client.list_attachments(second).await.unwrap().into_inner();
    assert_eq!((names(page.attachments), page.next_page_token), (vec!["c".to_owned()], String::new()));
}

#[tokio::test]
async fn a_memory_volume_leaves_no_file_and_all_of_them_must_fit_the_machine() {
    let mut bench = Bench::new().await;
    let memory = |name: &str, capacity_bytes| v1::CreateVolumeRequest {
        backend: v1::Backend::Memory.into(),
        capacity_bytes,
        ..create_request(name)
    };
    let volume = bench.create(memory("vol-1", 1 << 20)).await.unwrap();
    assert_eq!((volume.backend(), bench.files()), (v1::Backend::Memory, 0));
    let status = bench.create(memory("vol-2", 1 << 60)).await.unwrap_err();
    assert_eq!(reason_of(&status), (Code::ResourceExhausted, reason::NO_SPACE.to_owned()));
    // Each of them fits the machine by itself.
    let quarter_bytes = (rustix::system::sysinfo().totalram / 4) & !4095;
    let mut made = 0;
    let status = loop {
        match bench.create(memory(&format!("part-{made}"), quarter_bytes)).await {
            Ok(_) => made += 1,
            Err(status) => break status,
        }
        assert!(made < 4, "what four quarters have is not left for a first volume");
    };
    assert_eq!(reason_of(&status), (Code::ResourceExhausted, reason::NO_SPACE.to_owned()));
    assert!(status.message().contains("--memory-max") && status.message().contains("MiB"), "{status:?}");
    assert!(status.message().contains(&format!("volume part-{made}")), "{status:?}");
    for number in 0..made {
        assert!(bench.delete(&format!("part-{number}")).await.unwrap());
    }
    assert!(bench.delete("vol-1").await.unwrap());
    assert_eq!(bench.volumes(0, "").await.unwrap().volumes, []);
    bench.create(memory("vol-1", 1 << 20)).await.unwrap();
}

#[tokio::test]
async fn a_full_file_system_is_said_and_harms_nothing() {
    if !rustix::process::geteuid().is_root() {
        return skip("mounting a small file system needs root");
    }
    let Some(small) = SmallFileSystem::mount() else { return skip("a tmpfs cannot be mounted here") };
    let server = Volserver::start_with(volserver::command(&small.path().join("data")), &small.log());
    let mut client = server.client().await;
    let mut made = 0;
    let status = loop {
        match client.create_volume(create_request(&format!("vol-{made}"))).await {
            Ok(_) => made += 1,
            Err(status) => break status,
        }
        assert!(made < 100, "the file system has 30 inodes");
    };
    assert_eq!(reason_of(&status), (Code::ResourceExhausted, reason::NO_SPACE.to_owned()));
    assert!(made > 0);
    let listed = client.list_volumes(v1::ListVolumesRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.volumes.len(), made, "nothing half-made");
    client
        .delete_volume(v1::DeleteVolumeRequest { name: "vol-0".to_owned(), ..Default::default() })
        .await
        .unwrap();
    client.create_volume(create_request("another")).await.unwrap();
    drop(server);
}

/// Says why a test was not run; where the lab has brought all that it needs, that is a failure.
fn skip(why: &str) {
    assert!(std::env::var_os("VOLNODE_LAB_TOOLS").is_none_or(|value| value != "1"), "cannot run: {why}");
    println!("SKIP {why}");
}

/// A tmpfs with few inodes, unmounted when dropped.
struct SmallFileSystem {
    dir: tempfile::TempDir,
}

impl SmallFileSystem {
    /// `None` where root may not mount, as in many a container.
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mount")).unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m,nr_inodes=30", "small"])
            .arg(dir.path().join("mount"))
            .status()
            .unwrap();
        mounted.success().then_some(Self { dir })
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("mount")
    }

    fn log(&self) -> std::path::PathBuf {
        self.dir.path().join("log")
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("--lazy").arg(self.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} is still mounted", self.path().display());
        }
    }
}

#[tokio::test]
async fn a_restart_keeps_everything() {
    let mut bench = Bench::new().await;
    for name in ["a", "b", "c"] {
        bench.create(create_request(name)).await.unwrap();
    }
    bench.delete("b").await.unwrap();
    let attached = bench.attach("a", "node-a", false).await.unwrap();
    let before = bench.volumes(0, "").await.unwrap();
    let server_id =
        bench.client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner().server_id;

    let Bench { dir, server, client } = bench;
    drop(client);
    assert!(server.stop(Signal::TERM).success());
    let server = Volserver::start(&dir.path().join("data"));
    let client = server.client().await;
    let mut bench = Bench { dir, server, client };
    assert_eq!(bench.volumes(0, "").await.unwrap(), before);
    let info = bench.client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.server_id, info.version.as_str()), (server_id, env!("CARGO_PKG_VERSION")));
    let again = bench.attach("a", "node-a", false).await.unwrap();
    assert_eq!((again.secret, again.attachment), (attached.secret, attached.attachment));
}

#[tokio::test]
async fn no_secret_is_in_the_log_or_in_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let mut command = volserver::command(&data_dir);
    command.args(["--log", "trace"]);
    let server = Volserver::start_with(command, &dir.path().join("log"));
    let mut client = server.client().await;
    client.create_volume(create_request("vol-1")).await.unwrap();
    let first = client.attach_volume(attach_request("vol-1", "node-a", false)).await.unwrap().into_inner();
    let refused = client.attach_volume(attach_request("vol-1", "node-b", false)).await.unwrap_err();
    let second = client.attach_volume(attach_request("vol-1", "node-b", true)).await.unwrap().into_inner();
    // The last call's.
    let log = server.log_with("generation=2");
    assert!(log.contains("TRACE") && log.contains("volume attached"), "the log is as asked for");
    for secret in [&first.secret, &second.secret] {
        assert!(!log.contains(secret.as_str()) && !format!("{refused:?}").contains(secret.as_str()));
    }
    let listed = client.list_attachments(v1::ListAttachmentsRequest::default()).await.unwrap();
    assert!(!format!("{listed:?}").contains(&second.secret));
}

#[tokio::test]
async fn health_is_answered() {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    let bench = Bench::new().await;
    let mut health = HealthClient::new(bench.server.channel().await);
    for service in ["", "volnode.v1.Management"] {
        let answer =
            health.check(HealthCheckRequest { service: service.to_owned() }).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    let status = health.check(HealthCheckRequest { service: "no.such".to_owned() }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

#[tokio::test]
async fn reflection_lists_and_describes_the_api() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

    let bench = Bench::new().await;
    let mut reflection = ServerReflectionClient::new(bench.server.channel().await);
    let requests = [
        MessageRequest::ListServices(String::new()),
        MessageRequest::FileContainingSymbol("volnode.v1.Management.AttachVolume".to_owned()),
    ]
    .map(|message| ServerReflectionRequest { host: String::new(), message_request: Some(message) });
    let mut answers =
        reflection.server_reflection_info(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut next = async || {
        let answer: ServerReflectionResponse =
            answers.message().await.unwrap().expect("an answer for each request");
        answer.message_response.unwrap()
    };
    let MessageResponse::ListServicesResponse(services) = next().await else {
        panic!("not a list of services")
    };
    let mut names: Vec<&str> = services.service.iter().map(|service| service.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "volnode.v1.Management"]
    );
    let MessageResponse::FileDescriptorResponse(file) = next().await else { panic!("not a description") };
    assert!(!file.file_descriptor_proto.is_empty());
}
