//! Every call of the API by every sort of certificate, spoken to the real volserver over TLS: the table of `management/authorization.rs`.
//!
//! There are three subjects: something in the tenant's name space, something in another's, and something that is not there. Who may make a
//! call gets an answer about its own; what is outside is answered, word for word, as what is not there.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod tls_rig;
mod unit_filter;
mod volserver;

use std::fmt::Debug;

use proto::v1;
use proto::v1::management_client::ManagementClient;
use rustix::process::Signal;
use server::catalog::{Catalog, NewSnapshot};
use server::management::authorization::{Allowed, Call, Holder};
use tls_rig::{Rig, is_forbidden};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};
use uuid::Uuid;
use volserver::{Volserver, attach_request, create_request};

type Client = ManagementClient<Channel>;

/// What calls are about.
#[derive(Debug, Clone)]
struct Subject {
    /// Also of its volumes: `TENANT+db`, which is attached, granted, protected and has a snapshot `s`; and `TENANT+free`.
    tenant: &'static str,
    node: &'static str,
    volume_uid: String,
    snapshot_uid: String,
    attachment_id: String,
    freeze_id: Uuid,
}

impl Subject {
    fn named(tenant: &'static str, node: &'static str, freeze_id: u128) -> Self {
        let freeze_id = Uuid::from_u128(freeze_id);
        let [volume_uid, snapshot_uid, attachment_id] = [1, 2, 3].map(|n| Uuid::from_u128(n).to_string());
        Self { tenant, node, volume_uid, snapshot_uid, attachment_id, freeze_id }
    }

    fn of(&self, name: &str) -> String {
        format!("{}+{name}", self.tenant)
    }

    /// What was said about it, with nothing in it by which it could be told from another.
    fn unnamed(&self, text: &str) -> String {
        let names = [
            (self.tenant.to_owned() + "+", "TENANT+"),
            (format!("tenant {}", self.tenant), "tenant TENANT"),
            (self.node.to_owned(), "NODE"),
            (self.volume_uid.clone(), "VOLUME"),
            (self.snapshot_uid.clone(), "SNAPSHOT"),
            (self.attachment_id.clone(), "ATTACHMENT"),
            (self.freeze_id.to_string(), "FREEZE"),
        ];
        names.into_iter().fold(text.to_owned(), |text, (name, word)| text.replace(&name, word))
    }
}

/// A server with the subjects, and who made them.
struct World {
    rig: Rig,
    server: Volserver,
    admin: Client,
    inside: Subject,
    outside: Subject,
    missing: Subject,
}

const SUBJECTS: [(&str, &str, u128); 2] = [("acme", "node-1", 7), ("rival", "node-2", 8)];

impl World {
    async fn new() -> Self {
        let rig = Rig::new();
        Self::make_volumes(&rig).await;
        let server = rig.start("required");
        let mut admin = rig.connect(&server, "admin", &["volnode:*"]).await;
        let mut subjects = Vec::new();
        for (tenant, node, freeze_id) in SUBJECTS {
            let mut subject = Subject::named(tenant, node, freeze_id);
            let registration = v1::RegisterNodeRequest { node_id: node.to_owned(), ..Default::default() };
            admin.register_node(registration).await.unwrap();
            let attached = admin.attach_volume(attach_request(&subject.of("db"), node, false)).await.unwrap();
            subject.attachment_id = attached.into_inner().attachment.unwrap().attachment_id;
            admin.create_grant(grant(&subject.of("db"), node)).await.unwrap();
            let request = v1::GetVolumeRequest { name: subject.of("db"), ..Default::default() };
            subject.volume_uid = admin.get_volume(request).await.unwrap().into_inner().volume_uid;
            let request = v1::GetSnapshotRequest {
                volume_name: subject.of("db"),
                name: "s".to_owned(),
                ..Default::default()
            };
            subject.snapshot_uid = admin.get_snapshot(request).await.unwrap().into_inner().snapshot_uid;
            // So it is not deleted.
            let snapshot = format!("{}@s", subject.of("db"));
            admin.attach_volume(attach_request(&snapshot, node, false)).await.unwrap();
            let quota = Some(v1::TenantQuota::default());
            admin.set_tenant(v1::SetTenantRequest { name: tenant.to_owned(), quota }).await.unwrap();
            subjects.push(subject);
        }
        let [inside, outside] = subjects.try_into().unwrap();
        let missing = Subject::named("nobody", "node-0", 9);
        Self { rig, server, admin, inside, outside, missing }
    }

    /// Volumes by the server; and their snapshots by its catalog, because not every file system has any.
    async fn make_volumes(rig: &Rig) {
        let server = rig.start("required");
        let mut admin = rig.connect(&server, "maker", &["volnode:manage"]).await;
        for name in ["acme+db", "acme+free", "rival+db", "rival+free", "lonely"] {
            let is_protected = name.ends_with("db");
            admin
                .create_volume(v1::CreateVolumeRequest { is_protected, ..create_request(name) })
                .await
                .unwrap();
        }
        assert_eq!(server.stop(Signal::TERM).code(), Some(0));
        let catalog = Catalog::open(&rig.data_dir()).unwrap();
        for (tenant, _, freeze_id) in SUBJECTS {
            let volume = catalog.volume_by_name(&format!("{tenant}+db")).unwrap().unwrap();
            let (group_uid, new) = (Uuid::new_v4(), NewSnapshot { snapshot_uid: Uuid::new_v4(), volume });
            catalog.begin_snapshots("s", group_uid, Some(Uuid::from_u128(freeze_id)), &[new]).unwrap();
            catalog.finish_snapshots(group_uid).unwrap();
        }
    }

    /// What calls take away is there before each.
    async fn prepare(&mut self, call: Call) {
        for subject in [self.inside.clone(), self.outside.clone()] {
            let free = subject.of("free");
            match call {
                Call::DetachVolume => {
                    self.admin.attach_volume(attach_request(&free, subject.node, false)).await.unwrap();
                }
                Call::DeleteGrant => {
                    self.admin.create_grant(grant(&free, subject.node)).await.unwrap();
                }
                _ => {}
            }
        }
    }

    /// How many attachments and grants of the other tenant's there are.
    async fn outside_is_whole(&mut self) -> (usize, usize) {
        let volume_name = self.outside.of("free");
        let request = v1::ListAttachmentsRequest { volume_name: volume_name.clone(), ..Default::default() };
        let attachments = self.admin.list_attachments(request).await.unwrap().into_inner().attachments;
        let request = v1::ListGrantsRequest { volume_name, ..Default::default() };
        (attachments.len(), self.admin.list_grants(request).await.unwrap().into_inner().grants.len())
    }
}

fn grant(volume_name: &str, node_id: &str) -> v1::CreateGrantRequest {
    let (volume_name, node_id) = (volume_name.to_owned(), node_id.to_owned());
    v1::CreateGrantRequest { volume_name, node_id, ..Default::default() }
}

fn text<T: Debug>(answer: Result<Response<T>, Status>) -> Result<String, Status> {
    answer.map(|answer| format!("{:?}", answer.into_inner()))
}

/// All that a stream has; of a watch up to SYNCED.
async fn watched(client: &mut Client, volume_name: String) -> Result<String, Status> {
    let request = v1::WatchRequest { volume_name, ..Default::default() };
    let mut events = client.watch(request).await?.into_inner();
    let mut told = String::new();
    while let Some(event) = events.message().await? {
        if event.change() == v1::WatchChange::Synced {
            break;
        }
        told.push_str(&format!("{:?}", event.object));
    }
    Ok(told)
}

/// Makes the call about the subject, in a way that may be repeated.
async fn ask(client: &mut Client, call: Call, of: &Subject) -> Result<String, Status> {
    let db = of.of("db");
    match call {
        Call::GetServerInfo => text(client.get_server_info(v1::GetServerInfoRequest {}).await),
        Call::CreateVolume => text(client.create_volume(create_request(&of.of("new"))).await),
        Call::GetVolume => {
            text(client.get_volume(v1::GetVolumeRequest { name: db, ..Default::default() }).await)
        }
        Call::ListVolumes => text(client.list_volumes(v1::ListVolumesRequest::default()).await),
        Call::UpdateVolume => {
            text(client.update_volume(v1::UpdateVolumeRequest { name: db, ..Default::default() }).await)
        }
        Call::RenameVolume => text(
            client
                .rename_volume(v1::RenameVolumeRequest {
                    name: db.clone(),
                    new_name: db,
                    ..Default::default()
                })
                .await,
        ),
        Call::SetVolumeLimits => text(
            client
                .set_volume_limits(v1::SetVolumeLimitsRequest {
                    name: db,
                    limits: None,
                    ..Default::default()
                })
                .await,
        ),
        Call::SetVolumeContent => {
            let request = v1::SetVolumeContentRequest {
                name: db,
                attachment_id: of.attachment_id.clone(),
                content: v1::VolumeContent::Unspecified.into(),
            };
            text(client.set_volume_content(request).await)
        }
        // It is protected.
        Call::DeleteVolume => text(
            client
                .delete_volume(v1::DeleteVolumeRequest {
                    name: db,
                    keep_snapshots: false,
                    ..Default::default()
                })
                .await,
        ),
        Call::ResizeVolume => {
            let request = v1::ResizeVolumeRequest { name: db, capacity_bytes: 1 << 20, ..Default::default() };
            text(client.resize_volume(request).await)
        }
        other => ask_of_nodes(client, other, of).await,
    }
}

/// The same of what is attached and granted, and of nodes.
async fn ask_of_nodes(client: &mut Client, call: Call, of: &Subject) -> Result<String, Status> {
    let (db, free, node_id) = (of.of("db"), of.of("free"), of.node.to_owned());
    match call {
        Call::AttachVolume => text(client.attach_volume(attach_request(&db, of.node, false)).await),
        Call::DetachVolume => {
            let request =
                v1::DetachVolumeRequest { volume_name: free, node_id, ..v1::DetachVolumeRequest::default() };
            text(client.detach_volume(request).await)
        }
        Call::ListAttachments => text(client.list_attachments(v1::ListAttachmentsRequest::default()).await),
        Call::CreateGrant => text(client.create_grant(grant(&db, of.node)).await),
        Call::DeleteGrant => text(
            client
                .delete_grant(v1::DeleteGrantRequest { volume_name: free, node_id, ..Default::default() })
                .await,
        ),
        Call::ListGrants => text(client.list_grants(v1::ListGrantsRequest::default()).await),
        Call::RegisterNode => {
            text(client.register_node(v1::RegisterNodeRequest { node_id, ..Default::default() }).await)
        }
        Call::Heartbeat => {
            text(client.heartbeat(v1::HeartbeatRequest { node_id, ..Default::default() }).await)
        }
        Call::GetNode => text(client.get_node(v1::GetNodeRequest { node_id }).await),
        Call::ListNodes => text(client.list_nodes(v1::ListNodesRequest::default()).await),
        // Something is attached to it.
        Call::DeleteNode => {
            text(client.delete_node(v1::DeleteNodeRequest { node_id, ..Default::default() }).await)
        }
        other => ask_of_snapshots(client, other, of).await,
    }
}

/// The same of snapshots, and of streams.
async fn ask_of_snapshots(client: &mut Client, call: Call, of: &Subject) -> Result<String, Status> {
    let (db, s) = (of.of("db"), "s".to_owned());
    match call {
        Call::CreateSnapshot => {
            let request = v1::CreateSnapshotRequest { volume_names: vec![db], name: s, ..Default::default() };
            text(client.create_snapshot(request).await)
        }
        Call::MarkSnapshotsFrozen => {
            let freeze_id = of.freeze_id.to_string();
            text(client.mark_snapshots_frozen(v1::MarkSnapshotsFrozenRequest { freeze_id }).await)
        }
        Call::GetSnapshot => {
            let request = v1::GetSnapshotRequest { volume_name: db, name: s, ..Default::default() };
            text(client.get_snapshot(request).await)
        }
        Call::ListSnapshots => text(client.list_snapshots(v1::ListSnapshotsRequest::default()).await),
        // It is attached.
        Call::DeleteSnapshot => {
            let request = v1::DeleteSnapshotRequest { volume_name: db, name: s, ..Default::default() };
            text(client.delete_snapshot(request).await)
        }
        Call::RestoreVolume => {
            let request =
                v1::RestoreVolumeRequest { volume_name: db, snapshot_name: s, ..Default::default() };
            text(client.restore_volume(request).await)
        }
        // Smaller than its source.
        Call::CloneVolume => {
            let request = v1::CloneVolumeRequest {
                name: of.of("clone"),
                source_volume_name: db,
                source_snapshot_name: s,
                capacity_bytes: 4096,
                ..Default::default()
            };
            text(client.clone_volume(request).await)
        }
        // Behind its end.
        Call::DiffSnapshots => {
            let side = v1::DiffSide { volume_name: db, snapshot_name: s, snapshot_uid: String::new() };
            let request = v1::DiffSnapshotsRequest { base: None, target: Some(side), offset_bytes: 1 << 30 };
            let mut parts = client.diff_snapshots(request).await?.into_inner();
            parts.message().await.map(|part| format!("{part:?}"))
        }
        Call::Watch => watched(client, String::new()).await,
        other => ask_of_the_rest(client, other, of).await,
    }
}

/// The same of operations and tenants.
async fn ask_of_the_rest(client: &mut Client, call: Call, of: &Subject) -> Result<String, Status> {
    let operation_id = Uuid::nil().to_string();
    match call {
        Call::GetOperation => text(client.get_operation(v1::GetOperationRequest { operation_id }).await),
        Call::ListOperations => text(client.list_operations(v1::ListOperationsRequest {}).await),
        Call::CancelOperation => {
            text(client.cancel_operation(v1::CancelOperationRequest { operation_id }).await)
        }
        Call::SetTenant => {
            let quota = Some(v1::TenantQuota::default());
            text(client.set_tenant(v1::SetTenantRequest { name: of.tenant.to_owned(), quota }).await)
        }
        Call::GetTenant => text(client.get_tenant(v1::GetTenantRequest { name: of.tenant.to_owned() }).await),
        Call::ListTenants => text(client.list_tenants(v1::ListTenantsRequest::default()).await),
        // Something is in its name space.
        Call::DeleteTenant => {
            text(client.delete_tenant(v1::DeleteTenantRequest { name: of.tenant.to_owned() }).await)
        }
        other => panic!("nobody asks {other:?}"),
    }
}

/// Lists and streams: they are not about one thing.
fn lists(call: Call) -> bool {
    matches!(
        call,
        Call::ListVolumes
            | Call::ListAttachments
            | Call::ListGrants
            | Call::ListNodes
            | Call::ListSnapshots
            | Call::ListTenants
            | Call::Watch
    )
}

/// What makes something by a name that the caller chooses.
fn makes_by_name(call: Call) -> bool {
    matches!(call, Call::CreateVolume | Call::RenameVolume | Call::CloneVolume)
}

/// There are no operations here.
fn is_about_operations(call: Call) -> bool {
    matches!(call, Call::GetOperation | Call::CancelOperation | Call::ListOperations)
}

/// Asks about a node's attachments as a node does, by its name.
async fn ask_as_node(client: &mut Client, call: Call, of: &Subject) -> Result<String, Status> {
    let node_id = of.node.to_owned();
    match call {
        Call::ListAttachments => {
            text(client.list_attachments(v1::ListAttachmentsRequest { node_id, ..Default::default() }).await)
        }
        Call::ListGrants => {
            text(client.list_grants(v1::ListGrantsRequest { node_id, ..Default::default() }).await)
        }
        _ => ask(client, call, of).await,
    }
}

fn uri(holder: Holder) -> String {
    holder.uri().replace("/T/", "/acme/").replace("/N", "/node-1").replace("/V", "/lonely")
}

fn forbids(answer: &Result<String, Status>) -> bool {
    answer.as_ref().is_err_and(is_forbidden)
}

/// An answer as its caller sees it, but for names.
fn seen(of: &Subject, answer: &Result<String, Status>) -> String {
    match answer {
        Ok(answer) => of.unnamed(answer),
        Err(status) => of.unnamed(&format!("{:?} {}", status.code(), status.message())),
    }
}

#[tokio::test]
async fn every_call_by_every_holder() {
    let mut world = World::new().await;
    let (inside, outside, missing) = (world.inside.clone(), world.outside.clone(), world.missing.clone());
    for (number, holder) in Holder::ALL.into_iter().enumerate() {
        let uri = uri(holder);
        let mut client = world.rig.connect(&world.server, &format!("holder-{number}"), &[&uri]).await;
        for call in Call::ALL.iter().copied() {
            world.prepare(call).await;
            let what = format!("{call:?} by {uri}");
            match holder.may(call) {
                Allowed::No => {
                    for of in [&inside, &outside, &missing] {
                        let answer = ask_as_node(&mut client, call, of).await;
                        assert!(forbids(&answer), "{what}: {answer:?}");
                    }
                }
                Allowed::Yes => {
                    for of in [&inside, &outside] {
                        let answer = ask(&mut client, call, of).await;
                        is_answered(&what, call, &answer);
                    }
                }
                Allowed::ForNode => {
                    let answer = ask_as_node(&mut client, call, &inside).await;
                    is_answered(&what, call, &answer);
                    let answer = ask_as_node(&mut client, call, &outside).await;
                    assert!(forbids(&answer), "{what}: {answer:?}");
                }
                Allowed::InTenant => {
                    let of_others = ask(&mut client, call, &outside).await;
                    let of_nobody = ask(&mut client, call, &missing).await;
                    let own = ask(&mut client, call, &inside).await;
                    is_answered(&what, call, &own);
                    let told = format!("{own:?}");
                    assert!(!told.contains("rival") && !told.contains("lonely"), "{what}: {told}");
                    assert!(!told.contains("node-2"), "{what}: {told}");
                    if lists(call) {
                        assert!(
                            told.contains(if call == Call::ListNodes { "node-1" } else { "acme" }),
                            "{what}: {told}"
                        );
                    } else if makes_by_name(call) {
                        assert!(
                            forbids(&of_others) && forbids(&of_nobody),
                            "{what}: {of_others:?} {of_nobody:?}"
                        );
                    } else {
                        assert_eq!(seen(&outside, &of_others), seen(&missing, &of_nobody), "{what}");
                        assert!(
                            is_about_operations(call) || seen(&inside, &own) != seen(&missing, &of_nobody),
                            "{what}: {own:?}"
                        );
                    }
                    let left = world.outside_is_whole().await;
                    let expected =
                        (usize::from(call == Call::DetachVolume), usize::from(call == Call::DeleteGrant));
                    assert!(left.0 >= expected.0 && left.1 >= expected.1, "{what}: {left:?}");
                }
            }
        }
    }
}

/// What may be asked is answered, and not as if it were not there.
fn is_answered(what: &str, call: Call, answer: &Result<String, Status>) {
    let Err(status) = answer else { return };
    assert_ne!(status.code(), Code::PermissionDenied, "{what}: {status:?}");
    assert!(status.code() != Code::NotFound || is_about_operations(call), "{what}: {status:?}");
}

/// Whatever it is called by.
#[tokio::test]
async fn what_is_outside_is_not_there_by_uid_either() {
    let world = World::new().await;
    let uris = ["volnode:tenant/acme/manage", "volnode:tenant/acme/attach", "volnode:tenant/acme/read"];
    let mut client = world.rig.connect(&world.server, "tenant", &uris).await;
    let by_uid = |subject: &Subject| format!("uid:{}", subject.volume_uid);
    for (of, is_there) in [(&world.inside, true), (&world.outside, false), (&world.missing, false)] {
        let name = by_uid(of);
        let node_id = of.node.to_owned();
        let volume =
            client.get_volume(v1::GetVolumeRequest { name: name.clone(), ..Default::default() }).await;
        let content = v1::SetVolumeContentRequest {
            name: name.clone(),
            attachment_id: of.attachment_id.clone(),
            ..Default::default()
        };
        let content = client.set_volume_content(content).await;
        let attached = client.attach_volume(attach_request(&name, of.node, false)).await;
        let forced = client.attach_volume(attach_request(&name, of.node, true)).await;
        let snapshot = format!("@{}", of.snapshot_uid);
        let snapshot_attached = client.attach_volume(attach_request(&snapshot, of.node, false)).await;
        let found = v1::GetSnapshotRequest { snapshot_uid: of.snapshot_uid.clone(), ..Default::default() };
        let found = client.get_snapshot(found).await;
        let renamed = v1::RenameVolumeRequest {
            name: name.clone(),
            new_name: world.inside.of("db"),
            ..Default::default()
        };
        let renamed = client.rename_volume(renamed).await;
        let watched_by_name = watched(&mut client, of.of("db")).await;
        for (call, answer) in [
            ("GetVolume", text(volume)),
            ("SetVolumeContent", text(content)),
            ("AttachVolume", text(attached)),
            ("AttachVolume by force", text(forced)),
            ("AttachVolume of the snapshot", text(snapshot_attached)),
            ("GetSnapshot", text(found)),
            ("RenameVolume", text(renamed)),
            ("Watch", watched_by_name),
        ] {
            match answer {
                Ok(answer) => assert!(is_there, "{call} of {}: {answer}", of.tenant),
                Err(status) => assert!(!is_there && status.code() == Code::NotFound, "{call}: {status:?}"),
            }
        }
        // Of a uid that is gone there may be changes to tell.
        let told = watched(&mut client, name.clone()).await.unwrap();
        assert_eq!(told.contains("acme+db"), is_there, "{told}");
        assert!(!told.contains("rival"), "{told}");
        let detach =
            v1::DetachVolumeRequest { attachment_id: of.attachment_id.clone(), ..Default::default() };
        assert_eq!(client.detach_volume(detach).await.unwrap().into_inner().existed, is_there, "{of:?}");
        let listed = v1::ListAttachmentsRequest { node_id, ..Default::default() };
        let listed = client.list_attachments(listed).await.unwrap().into_inner().attachments;
        assert_eq!(listed.is_empty(), !is_there, "{listed:?}");
        let pages = v1::ListSnapshotsRequest { volume_name: name, ..Default::default() };
        let pages = client.list_snapshots(pages).await.unwrap().into_inner().snapshots;
        assert_eq!(pages.len(), usize::from(is_there));
    }
}

/// A role is no other: who attaches does not take by force, and what is on the server's own paths is no tenant's.
#[tokio::test]
async fn a_role_has_its_bounds() {
    let mut world = World::new().await;
    let db = world.inside.of("db");
    let mut attacher = world.rig.connect(&world.server, "attacher", &["volnode:tenant/acme/attach"]).await;
    assert!(is_forbidden(&attacher.attach_volume(attach_request(&db, "node-9", true)).await.unwrap_err()));
    let mut manager = world.rig.connect(&world.server, "manager", &["volnode:tenant/acme/manage"]).await;
    let adopt = v1::CreateVolumeRequest {
        name: "acme+disk".to_owned(),
        adopt_path: "/dev/null".to_owned(),
        ..Default::default()
    };
    assert!(is_forbidden(&manager.create_volume(adopt).await.unwrap_err()));
    // A volume stays where it was made, whoever asks.
    for new_name in ["plain-db", "rival+db2"] {
        let rename = v1::RenameVolumeRequest {
            name: world.inside.of("free"),
            new_name: new_name.to_owned(),
            ..Default::default()
        };
        let refused = world.admin.rename_volume(rename.clone()).await.unwrap_err();
        assert_eq!(tls_rig::reason_of(&refused), proto::error_reason::TENANT_FIXED, "{refused:?}");
        assert!(is_forbidden(&manager.rename_volume(rename).await.unwrap_err()));
    }
    let rename = v1::RenameVolumeRequest {
        name: world.inside.of("free"),
        new_name: world.inside.of("freed"),
        ..Default::default()
    };
    assert_eq!(manager.rename_volume(rename).await.unwrap().into_inner().name, "acme+freed");

    // What is granted only binds who speaks for the node, and not who may attach in the name space.
    let uris = ["volnode:granted/node-5", "volnode:tenant/acme/attach"];
    let mut both = world.rig.connect(&world.server, "both", &uris).await;
    both.attach_volume(attach_request("acme+freed", "node-5", false)).await.unwrap();
    let refused = both.attach_volume(attach_request("lonely", "node-5", false)).await.unwrap_err();
    assert_eq!(tls_rig::reason_of(&refused), proto::error_reason::VOLUME_NOT_GRANTED, "{refused:?}");
    assert!(!is_forbidden(&refused));
    let refused = both.attach_volume(attach_request("lonely", "node-6", false)).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused:?}");
}

/// By the id of a call nobody finds out what another tenant has called by it, and nobody is kept from his own.
#[tokio::test]
async fn the_id_of_a_call_is_its_callers_own() {
    let mut world = World::new().await;
    let of = async |name: &str, uri: &str| world.rig.connect(&world.server, name, &[uri]).await;
    let mut acme = of("acme-1", "volnode:tenant/acme/manage").await;
    let mut acme_again = of("acme-2", "volnode:tenant/acme/manage").await;
    let mut reader = of("acme-3", "volnode:tenant/acme/read").await;
    let mut rival = of("rival", "volnode:tenant/rival/manage").await;
    let request_id = Uuid::from_u128(70).to_string();
    let create =
        |name: &str| v1::CreateVolumeRequest { request_id: request_id.clone(), ..create_request(name) };
    let first = rival.create_volume(create("rival+one")).await.unwrap().into_inner();

    // The very same call, and another one by the id.
    assert!(is_forbidden(&acme.create_volume(create("rival+one")).await.unwrap_err()));
    let own = acme.create_volume(create("acme+one")).await.unwrap().into_inner();
    assert_eq!(own.name, "acme+one");
    let by_all = world.admin.create_volume(create("one")).await.unwrap().into_inner();
    assert_eq!(by_all.name, "one");
    for name in ["acme+one", "rival+one"] {
        let gone = v1::DeleteVolumeRequest { name: name.to_owned(), ..Default::default() };
        assert!(world.admin.delete_volume(gone).await.unwrap().into_inner().existed);
    }
    // Each has its own first answer again, by whichever certificate of the same rights; whatever has become of it.
    assert_eq!(rival.create_volume(create("rival+one")).await.unwrap().into_inner(), first);
    assert_eq!(acme_again.create_volume(create("acme+one")).await.unwrap().into_inner(), own);
    assert!(is_forbidden(&reader.create_volume(create("acme+one")).await.unwrap_err()));
    let reused = acme.create_volume(create("acme+two")).await.unwrap_err();
    assert_eq!(tls_rig::reason_of(&reused), proto::error_reason::REQUEST_ID_REUSED, "{reused:?}");
}

/// The same of calls about what is there, whose answers are kept, and of such whose answers are made anew.
#[tokio::test]
async fn what_was_answered_to_one_is_not_told_to_another() {
    let mut world = World::new().await;
    let mut acme = world.rig.connect(&world.server, "acme", &["volnode:tenant/acme/manage"]).await;
    let mut rival = world.rig.connect(&world.server, "rival", &["volnode:tenant/rival/manage"]).await;
    let long = (0..30).map(|n| (format!("{n:0>60}"), "v".repeat(60))).collect();
    let short = [("a".to_owned(), "b".to_owned())].into();
    for (number, labels) in [(80, short), (81, long)] {
        let request = v1::UpdateVolumeRequest {
            name: format!("uid:{}", world.outside.volume_uid),
            labels,
            request_id: Uuid::from_u128(number).to_string(),
            ..Default::default()
        };
        let told = rival.update_volume(request.clone()).await.unwrap().into_inner();
        assert!(number == 80 || prost::Message::encoded_len(&told) > 4096, "too short to be made anew");
        assert_eq!(rival.update_volume(request.clone()).await.unwrap().into_inner().etag, told.etag);
        let refused = acme.update_volume(request.clone()).await.unwrap_err();
        let fresh = v1::UpdateVolumeRequest { request_id: Uuid::new_v4().to_string(), ..request };
        let unknown = acme.update_volume(fresh).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::NotFound, unknown.message()));
    }
    let end_grant = v1::DeleteGrantRequest {
        volume_name: world.outside.of("db"),
        node_id: world.outside.node.to_owned(),
        request_id: Uuid::from_u128(82).to_string(),
    };
    assert!(world.admin.delete_grant(end_grant.clone()).await.unwrap().into_inner().existed);
    assert!(world.admin.delete_grant(end_grant.clone()).await.unwrap().into_inner().existed, "again");
    assert!(!acme.delete_grant(end_grant.clone()).await.unwrap().into_inner().existed);
    assert!(!rival.delete_grant(end_grant).await.unwrap().into_inner().existed, "another's id");
}

/// Behind SYNCED as before it.
#[tokio::test]
async fn a_tenant_hears_of_its_own_grants() {
    let mut world = World::new().await;
    let mut acme = world.rig.connect(&world.server, "acme", &["volnode:tenant/acme/read"]).await;
    let request = v1::WatchRequest { kinds: vec![v1::WatchedKind::Grant.into()], ..Default::default() };
    let mut events = acme.watch(request).await.unwrap().into_inner();
    let mut next = async || loop {
        let event = events.message().await.unwrap().unwrap();
        match (event.change(), event.object) {
            (v1::WatchChange::Synced, _) => return (v1::WatchChange::Synced, String::new(), String::new()),
            (change, Some(v1::watch_event::Object::Grant(grant))) => {
                return (change, grant.volume_name, grant.node_id);
            }
            (change, other) => assert_eq!((change, &other), (v1::WatchChange::Bookmark, &None)),
        }
    };
    let told = |change, name: &str, node: &str| (change, name.to_owned(), node.to_owned());
    assert_eq!(next().await, told(v1::WatchChange::Present, "acme+db", "node-1"));
    assert_eq!(next().await, told(v1::WatchChange::Synced, "", ""));
    for name in ["rival+free", "lonely", "acme+free"] {
        world.admin.create_grant(grant(name, "node-7")).await.unwrap();
    }
    assert_eq!(next().await, told(v1::WatchChange::Created, "acme+free", "node-7"));
    for name in ["rival+free", "lonely", "acme+free"] {
        let request = v1::DeleteGrantRequest {
            volume_name: name.to_owned(),
            node_id: "node-7".to_owned(),
            ..Default::default()
        };
        world.admin.delete_grant(request).await.unwrap();
    }
    assert_eq!(next().await, told(v1::WatchChange::Deleted, "acme+free", "node-7"));
}
