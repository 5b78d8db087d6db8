//! `create`, `list`, `show`, `resize`, `delete`: the storage server's volumes.

use std::collections::HashMap;

use proto::v1;
use proto::v1::management_client::ManagementClient;
use serde_json::json;
use tonic::transport::Channel;

use crate::cli::{Backend, CreateArgs, Switch};
use crate::connect::{self, ServerAddress, call};
use crate::failure::Failure;
use crate::grants;
use crate::once::once;
use crate::report::{
    self, Report, Tables, backend_word, content_word, disk_bytes, header_bytes, or_dash, properties, tables,
    volume_json, write_cache_word,
};
use crate::settings::{self, IfEtag};
use crate::size::human_size;
use crate::snapshots::utc;

/// Of a volume for which none is asked.
const BLOCK_SIZE_BYTES: u32 = 4096;
/// The most that the server gives in one page.
const PAGE_SIZE: u32 = 1000;

pub(crate) async fn create(server: &ServerAddress, args: CreateArgs) -> Result<Report, Failure> {
    let size = args.size.map(|size| size.saturating_add(header_bytes(args.encrypted)));
    let request = v1::CreateVolumeRequest {
        labels: args.labels.into_iter().collect(),
        description: args.description,
        is_protected: args.protect,
        is_shared: args.shared,
        is_encrypted: args.encrypted,
        limits: Some(args.limits.applied_to(v1::VolumeLimits::default())),
        ..new_volume(args.name, size, args.block_size, args.backend, args.adopt, args.write_cache)
    };
    let volume = once(&connect::server(server).await?, request, |mut client, request| async move {
        client.create_volume(request).await
    })
    .await?;
    let text = format!("volume {} of {}\n", volume.name, human_size(disk_bytes(&volume)));
    Ok(Report::new(text, volume_json(&volume)).with_note(notes_on_new(&volume)))
}

/// A request for a volume of which nothing is set beside what it is for good.
pub(crate) fn new_volume(
    name: String,
    size: Option<u64>,
    block_size: Option<u32>,
    backend: Backend,
    adopt: Option<String>,
    write_cache: Switch,
) -> v1::CreateVolumeRequest {
    v1::CreateVolumeRequest {
        name,
        capacity_bytes: size.unwrap_or_default(),
        // 0 is that of what is adopted.
        block_size_bytes: block_size.unwrap_or(if adopt.is_some() { 0 } else { BLOCK_SIZE_BYTES }),
        backend: match (&adopt, backend) {
            (Some(_), _) => v1::Backend::Device,
            (None, Backend::File) => v1::Backend::File,
            (None, Backend::Memory) => v1::Backend::Memory,
            (None, Backend::Lvm) => v1::Backend::Lvm,
        }
        .into(),
        adopt_path: adopt.unwrap_or_default(),
        write_cache: match write_cache {
            Switch::On => v1::WriteCache::On,
            Switch::Off => v1::WriteCache::Off,
        }
        .into(),
        ..Default::default()
    }
}

/// What is to be known of a volume that was made just now, a line each.
pub(crate) fn notes_on_new(volume: &v1::Volume) -> String {
    let mut notes = problem(volume);
    if !volume.adopted_path.is_empty() && volume.adopted_identity.is_empty() {
        notes.push_str(
            "warning: it has no WWID, serial, UUID or PARTUUID; after a restart it is found by its path and size alone\n",
        );
    }
    notes
}

/// Why what a volume adopted cannot be served, a line; empty where it can.
fn problem(volume: &v1::Volume) -> String {
    if volume.adopted_problem.is_empty() {
        String::new()
    } else {
        format!("warning: {}\n", volume.adopted_problem)
    }
}

pub(crate) async fn resize(
    server: &ServerAddress,
    name: String,
    size: u64,
    only: IfEtag,
) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    let found = call(client.get_volume(v1::GetVolumeRequest { name, ..Default::default() })).await?;
    let request = v1::ResizeVolumeRequest {
        name: found.name,
        capacity_bytes: size.saturating_add(header_bytes(found.is_encrypted)),
        etag: only.etag,
        ..Default::default()
    };
    let volume =
        once(&client, request, |mut client, request| async move { client.resize_volume(request).await })
            .await?;
    let text = format!("volume {} of {}\n", volume.name, human_size(disk_bytes(&volume)));
    Ok(Report::new(text, volume_json(&volume)))
}

pub(crate) async fn list(server: &ServerAddress, labels: Vec<(String, String)>) -> Result<Report, Failure> {
    let labels: HashMap<String, String> = labels.into_iter().collect();
    let mut client = connect::server(server).await?;
    let mut volumes: Vec<v1::Volume> = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = v1::ListVolumesRequest { page_size: PAGE_SIZE, page_token, labels: labels.clone() };
        let page = call(client.list_volumes(request)).await?;
        volumes.extend(page.volumes);
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    let tables = volume_tables(&volumes);
    Ok(Report::of_tables(tables, volumes.iter().map(volume_json).collect()))
}

fn volume_tables(volumes: &[v1::Volume]) -> Tables {
    let rows = volumes.iter().map(|volume| {
        let row = [
            volume.name.clone(),
            human_size(disk_bytes(volume)),
            human_size(volume.allocated_bytes),
            volume.block_size_bytes.to_string(),
            backend_word(volume.backend()).to_owned(),
            write_cache_word(volume.write_cache()).to_owned(),
            volume.snapshot_count.to_string(),
            report::nodes_of(&volume.attachments),
        ];
        let marks = [
            (volume.is_protected, "protected"),
            (volume.is_read_only, "read-only"),
            (volume.is_shared, "shared"),
            (volume.is_encrypted, "encrypted"),
        ];
        let marks: Vec<&str> =
            marks.into_iter().filter_map(|(is_set, word)| is_set.then_some(word)).collect();
        let further = [
            volume.volume_uid.clone(),
            utc(volume.created_at_ms),
            content_word(volume.content()).replace('_', "-"),
            or_dash(&marks.join(",")),
            or_dash(&volume.source_uid),
            or_dash(&settings::limit_words(&volume.limits.unwrap_or_default()).join(", ")),
            or_dash(&settings::label_words(&volume.labels)),
            or_dash(&volume.description.replace('\n', " ")),
        ];
        (row, further)
    });
    tables(
        ["NAME", "SIZE", "USED", "BLOCK", "BACKEND", "WRITE-CACHE", "SNAPSHOTS", "ATTACHED-TO"],
        ["UID", "CREATED", "CONTENT", "MARKS", "CLONE-OF", "LIMITS", "LABELS", "DESCRIPTION"],
        rows,
    )
}

pub(crate) async fn show(server: &ServerAddress, name: String) -> Result<Report, Failure> {
    let request = v1::GetVolumeRequest { name, with_exclusive_bytes: true };
    let mut client = connect::server(server).await?;
    let volume = call(client.get_volume(request)).await?;
    let attached_snapshots = match volume.snapshot_count {
        0 => Vec::new(),
        _ => attached_snapshots(&mut client, &volume.name).await?,
    };
    let mut rows = vec![
        ("name", volume.name.clone()),
        ("volume uid", volume.volume_uid.clone()),
        ("size", format!("{} ({} bytes)", human_size(disk_bytes(&volume)), disk_bytes(&volume))),
        ("used", human_size(volume.allocated_bytes)),
        ("exclusive", volume.exclusive_bytes.map_or_else(|| "-".to_owned(), human_size)),
        ("block size", volume.block_size_bytes.to_string()),
        ("backend", backend_word(volume.backend()).to_owned()),
        ("write cache", write_cache_word(volume.write_cache()).to_owned()),
        ("incarnation", volume.storage_incarnation.clone()),
        ("snapshots", volume.snapshot_count.to_string()),
    ];
    for attached in attached_snapshots {
        rows.push(("attached snapshot", attached));
    }
    if !volume.source_uid.is_empty() {
        rows.push(("clone of", volume.source_uid.clone()));
    }
    if !volume.adopted_path.is_empty() {
        let identity = if volume.adopted_identity.is_empty() {
            "none (found by path and size)".to_owned()
        } else {
            volume.adopted_identity.clone()
        };
        rows.extend([("adopted", volume.adopted_path.clone()), ("identity", identity)]);
    }
    for grant in &volume.grants {
        rows.push(("granted to", grants::holder(grant)));
    }
    rows.extend(settings::rows(&volume));
    let mut text = properties(rows.clone());
    rows.push(("created", utc(volume.created_at_ms)));
    if !volume.initialising_attachment_id.is_empty() {
        rows.push(("initialised by", volume.initialising_attachment_id.clone()));
    }
    let mut wide = properties(rows);
    if !volume.attachments.is_empty() {
        let attachments = report::attachment_tables(&volume.attachments);
        text += &format!("\n{}", attachments.text);
        wide += &format!("\n{}", attachments.wide);
    }
    let mut json = volume_json(&volume);
    json["exclusive_bytes"] = volume.exclusive_bytes.into();
    Ok(Report::new(text, json).with_wide(wide).with_note(problem(&volume)))
}

/// The snapshots of a volume that are disks somewhere, each with its nodes.
async fn attached_snapshots(
    client: &mut ManagementClient<Channel>,
    volume_name: &str,
) -> Result<Vec<String>, Failure> {
    let (mut found, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListSnapshotsRequest {
            volume_name: volume_name.to_owned(),
            page_size: PAGE_SIZE,
            page_token,
            ..Default::default()
        };
        let page = call(client.list_snapshots(request)).await?;
        let attached = page.snapshots.iter().filter(|snapshot| !snapshot.attachments.is_empty());
        found.extend(attached.map(|one| format!("{}, to {}", one.name, report::nodes_of(&one.attachments))));
        if page.next_page_token.is_empty() {
            return Ok(found);
        }
        page_token = page.next_page_token;
    }
}

pub(crate) async fn delete(
    server: &ServerAddress,
    name: String,
    keep_snapshots: bool,
    only: IfEtag,
) -> Result<Report, Failure> {
    let (asked, etag) = (name.clone(), only.etag);
    let request = v1::DeleteVolumeRequest { name: asked, keep_snapshots, etag, ..Default::default() };
    let client = connect::server(server).await?;
    let deleted =
        once(&client, request, |mut client, request| async move { client.delete_volume(request).await })
            .await?;
    let existed = deleted.existed;
    let text = if existed { format!("deleted {name}\n") } else { format!("there is no volume {name}\n") };
    Ok(Report::new(text, json!({ "name": name, "existed": existed })))
}
