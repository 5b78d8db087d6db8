//! Tenants: what each may have, held against all who ask at once; and what the audit log has of a tenant's calls.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

mod tls_rig;
mod unit_filter;
mod volserver;

use proto::error_reason as reason;
use proto::v1;
use proto::v1::management_client::ManagementClient;
use rustix::process::Signal;
use server::catalog::{Catalog, CatalogError, NewSnapshot};
use tls_rig::{Rig, is_forbidden, reason_of};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;
use volserver::{Volserver, attach_request, create_request};

type Client = ManagementClient<Channel>;

const MIB: u64 = 1 << 20;

async fn set(client: &mut Client, name: &str, quota: v1::TenantQuota) -> v1::Tenant {
    let request = v1::SetTenantRequest { name: name.to_owned(), quota: Some(quota) };
    client.set_tenant(request).await.unwrap().into_inner()
}

async fn get(client: &mut Client, name: &str) -> Result<v1::Tenant, Status> {
    Ok(client.get_tenant(v1::GetTenantRequest { name: name.to_owned() }).await?.into_inner())
}

async fn delete(client: &mut Client, name: &str) -> Result<bool, Status> {
    Ok(client.delete_tenant(v1::DeleteTenantRequest { name: name.to_owned() }).await?.into_inner().existed)
}

/// The quota that a refusal names, what is used of it, and what there may be.
fn quota_of(refused: &Status) -> (String, String, String) {
    assert_eq!(
        (refused.code(), reason_of(refused).as_str()),
        (Code::ResourceExhausted, reason::TENANT_QUOTA),
        "{refused:?}"
    );
    let metadata = refused.get_details_error_info().unwrap().metadata;
    let of = |key: &str| metadata[key].clone();
    (of("quota"), of("used"), of("limit"))
}

fn told(quota: &str, used: u64, limit: u64) -> (String, String, String) {
    (quota.to_owned(), used.to_string(), limit.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_fifty_who_ask_at_once_as_many_get_a_volume_as_may() {
    const ASKED: usize = 50;
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    for (tenant, quota, limited, may) in [
        ("count", v1::TenantQuota { max_volumes: Some(10), ..Default::default() }, "max_volumes", 10),
        ("bytes", v1::TenantQuota { max_bytes: Some(7 * MIB + 4096), ..Default::default() }, "max_bytes", 7),
    ] {
        set(&mut client, tenant, quota).await;
        let mut asked = Vec::new();
        for number in 0..ASKED {
            let mut client = server.client().await;
            let request = create_request(&format!("{tenant}+vol-{number}"));
            asked.push(tokio::spawn(async move { client.create_volume(request).await }));
        }
        let (mut made, mut refused) = (0, 0);
        for one in asked {
            match one.await.unwrap() {
                Ok(_) => made += 1,
                Err(status) => {
                    assert_eq!(quota_of(&status).0, limited);
                    refused += 1;
                }
            }
        }
        assert_eq!((made, refused), (may, ASKED - may), "{tenant}");
        let has = get(&mut client, tenant).await.unwrap();
        assert_eq!((has.volumes, has.capacity_bytes), (may as u64, may as u64 * MIB));
    }
    // Nobody else is held to it.
    client.create_volume(create_request("vol-1")).await.unwrap();
    client.create_volume(create_request("free+vol-1")).await.unwrap();
}

#[tokio::test]
async fn what_would_be_too_much_is_refused_and_the_quota_named() {
    let dir = tempfile::tempdir().unwrap();
    let server = Volserver::start(&dir.path().join("data"));
    let mut client = server.client().await;
    let quota = v1::TenantQuota { max_volumes: Some(2), max_bytes: Some(3 * MIB), max_snapshots: Some(0) };
    let made = set(&mut client, "acme", quota).await;
    assert_eq!((made.volumes, made.capacity_bytes, made.snapshots, made.quota), (0, 0, 0, Some(quota)));
    client.create_volume(create_request("acme+a")).await.unwrap();
    // One that is there needs no room.
    client.create_volume(create_request("acme+a")).await.unwrap();
    let resize = |name: &str, capacity_bytes| {
        let (mut client, name) = (client.clone(), name.to_owned());
        async move {
            client.resize_volume(v1::ResizeVolumeRequest { name, capacity_bytes, ..Default::default() }).await
        }
    };
    let refused = resize("acme+a", 3 * MIB + 4096).await.unwrap_err();
    assert_eq!(quota_of(&refused), told("max_bytes", MIB, 3 * MIB));
    assert!(refused.message().contains("the tenant acme has 1048576 of at most 3145728"), "{refused:?}");
    resize("acme+a", 2 * MIB).await.unwrap();
    client.create_volume(create_request("acme+b")).await.unwrap();
    let refused = client.create_volume(create_request("acme+c")).await.unwrap_err();
    assert_eq!(quota_of(&refused), told("max_volumes", 2, 2));
    let next = refused.get_details_error_info().unwrap().metadata["next"].clone();
    assert!(next.contains("volctl tenant set acme --max-volumes"), "{next}");

    // Less than there is takes nothing away; more lets go on.
    set(&mut client, "acme", v1::TenantQuota { max_volumes: Some(0), ..Default::default() }).await;
    assert_eq!(get(&mut client, "acme").await.unwrap().volumes, 2);
    let refused = client.create_volume(create_request("acme+c")).await.unwrap_err();
    assert_eq!(quota_of(&refused), told("max_volumes", 2, 0));
    set(&mut client, "acme", v1::TenantQuota { max_volumes: Some(3), ..Default::default() }).await;
    client.create_volume(create_request("acme+c")).await.unwrap();

    let refused = delete(&mut client, "acme").await.unwrap_err();
    assert_eq!(reason_of(&refused), reason::TENANT_NOT_EMPTY, "{refused:?}");
    for name in ["acme+a", "acme+b", "acme+c"] {
        client
            .delete_volume(v1::DeleteVolumeRequest {
                name: name.to_owned(),
                keep_snapshots: false,
                ..Default::default()
            })
            .await
            .unwrap();
    }
    assert!(delete(&mut client, "acme").await.unwrap());
    assert!(!delete(&mut client, "acme").await.unwrap());
    assert_eq!(reason_of(&get(&mut client, "acme").await.unwrap_err()), reason::TENANT_NOT_FOUND);
}

#[tokio::test]
async fn tenants_are_listed_by_their_quotas_and_their_volumes() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    for name in ["c", "a"] {
        set(&mut client, name, v1::TenantQuota { max_volumes: Some(5), ..Default::default() }).await;
    }
    client.create_volume(create_request("b+vol-1")).await.unwrap();
    client.create_volume(create_request("vol-1")).await.unwrap();
    let (mut listed, mut page_token) = (Vec::new(), String::new());
    loop {
        let page = client
            .list_tenants(v1::ListTenantsRequest { page_size: 2, page_token })
            .await
            .unwrap()
            .into_inner();
        listed.extend(
            page.tenants.into_iter().map(|tenant| (tenant.name, tenant.volumes, tenant.created_at_ms > 0)),
        );
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    let expected = [("a", 0, true), ("b", 1, false), ("c", 0, true)];
    assert_eq!(listed, expected.map(|(name, volumes, is_set)| (name.to_owned(), volumes, is_set)));
    for off in ["", "a+b", "a/b", "-a", &"x".repeat(64)] {
        let refused = get(&mut client, off).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{off}");
    }
    let hostile = v1::ListTenantsRequest { page_token: "1.tenants.x.a".to_owned(), ..Default::default() };
    assert_eq!(client.list_tenants(hostile).await.unwrap_err().code(), Code::InvalidArgument);

    // They are as they were after a restart.
    assert_eq!(server.stop(Signal::TERM).code(), Some(0));
    let server = Volserver::start(&data_dir);
    let mut client = server.client().await;
    assert_eq!(get(&mut client, "a").await.unwrap().quota.unwrap().max_volumes, Some(5));
    assert_eq!(get(&mut client, "b").await.unwrap().volumes, 1);
}

/// Snapshots by the catalog alone: not every file system has any. Those whose volume is gone are still the tenant's.
#[test]
fn snapshots_count_also_when_their_volume_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let new = |name: &str| server::catalog::NewVolume {
        name: name.to_owned(),
        capacity_bytes: MIB,
        block_size_bytes: 4096,
        backend: server::catalog::BackendKind::File,
        write_cache_on: true,
        settings: server::catalog::VolumeSettings::default(),
    };
    let quota = server::catalog::Quota { max_snapshots: Some(2), ..Default::default() };
    catalog.set_tenant("acme", &quota).unwrap();
    let volume = catalog.begin_creating(&new("acme+a")).unwrap();
    catalog.finish_creating(volume.volume_uid).unwrap();
    let take = |name: &str| {
        let new = [NewSnapshot { snapshot_uid: Uuid::new_v4(), volume: volume.clone() }];
        catalog.begin_snapshots(name, Uuid::new_v4(), None, &new).map(|()| new[0].snapshot_uid)
    };
    let first = take("s1").unwrap();
    take("s2").unwrap();
    let refused = take("s3").unwrap_err();
    assert!(matches!(refused, CatalogError::Quota(ref reached) if reached.used == 2), "{refused}");
    catalog.begin_deleting(volume.volume_uid).unwrap();
    catalog.forget_volume(volume.volume_uid).unwrap();
    let has = catalog.tenant("acme").unwrap().unwrap().usage;
    assert_eq!((has.volumes, has.bytes, has.snapshots), (0, 0, 2));
    drop(catalog);
    // Opening it keeps what it knows of the volume, until nothing is left of it.
    let catalog = Catalog::open(dir.path()).unwrap();
    assert_eq!(catalog.tenant("acme").unwrap().unwrap().usage.snapshots, 2);
    let (kept, _) = catalog.snapshot_in_any_state(first).unwrap().unwrap();
    assert_eq!((kept.volume_name.as_str(), kept.tenant.as_str()), ("", "acme"));
}

#[tokio::test]
async fn every_call_of_a_tenant_has_a_line_and_none_has_a_secret() {
    let rig = Rig::new();
    let path = rig.dir.path().join("audit.jsonl");
    let mut command = rig.command("required");
    command.arg("--audit-log").arg(&path);
    let server = Volserver::start_with(command, &rig.dir.path().join("log"));
    let mut tenant = rig.connect(&server, "tenant", &["volnode:tenant/acme/*"]).await;
    tenant.create_volume(create_request("acme+db")).await.unwrap();
    assert!(is_forbidden(&tenant.create_volume(create_request("rival+db")).await.unwrap_err()));
    tenant
        .get_volume(v1::GetVolumeRequest { name: "rival+db".to_owned(), ..Default::default() })
        .await
        .unwrap_err();
    let attached =
        tenant.attach_volume(attach_request("acme+db", "node-1", false)).await.unwrap().into_inner();
    tenant.list_volumes(v1::ListVolumesRequest::default()).await.unwrap();
    tenant.watch(v1::WatchRequest::default()).await.unwrap();
    tenant.list_nodes(v1::ListNodesRequest::default()).await.unwrap();
    assert!(is_forbidden(
        &tenant
            .delete_node(v1::DeleteNodeRequest { node_id: "node-1".to_owned(), ..Default::default() })
            .await
            .unwrap_err()
    ));
    tenant.get_tenant(v1::GetTenantRequest { name: "acme".to_owned() }).await.unwrap();
    assert_eq!(server.stop(Signal::TERM).code(), Some(0));

    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<String> = lines
        .iter()
        .map(|line| {
            assert_eq!(line["tenants"], serde_json::json!(["acme"]), "{line}");
            assert_eq!(line["caller"]["certificate_names"], serde_json::json!(["volnode:tenant/acme/*"]));
            let of = |field: &str| line[field].as_str().unwrap_or_default();
            format!("{} {}{}: {}", of("call"), of("name"), of("volume_name"), of("code"))
        })
        .collect();
    assert_eq!(
        told,
        [
            "CreateVolume acme+db: OK",
            "CreateVolume rival+db: PERMISSION_DENIED",
            "GetVolume rival+db: NOT_FOUND",
            "AttachVolume acme+db: OK",
            "ListVolumes : OK",
            "Watch : OK",
            "ListNodes : OK",
            "DeleteNode : PERMISSION_DENIED",
            "GetTenant acme: OK",
        ]
    );
    assert!(!attached.secret.is_empty() && !text.contains(&attached.secret));
}
