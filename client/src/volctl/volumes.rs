//! `create`, `list`, `show`, `resize`, `delete`: the storage server's volumes.

use proto::v1;
use serde_json::json;

use crate::cli::{Backend, CreateArgs, Switch};
use crate::connect::{self, ServerAddress, call};
use crate::failure::Failure;
use crate::report::{self, Report, backend_word, properties, table, volume_json, write_cache_word};
use crate::size::human_size;

/// The most that the server gives in one page.
const PAGE_SIZE: u32 = 1000;

pub(crate) async fn create(server: &ServerAddress, args: CreateArgs) -> Result<Report, Failure> {
    let request = v1::CreateVolumeRequest {
        name: args.name,
        capacity_bytes: args.size,
        block_size_bytes: args.block_size,
        backend: match args.backend {
            Backend::File => v1::Backend::File,
            Backend::Memory => v1::Backend::Memory,
        }
        .into(),
        write_cache: match args.write_cache {
            Switch::On => v1::WriteCache::On,
            Switch::Off => v1::WriteCache::Off,
        }
        .into(),
    };
    let volume = call(connect::server(server).await?.create_volume(request)).await?;
    let text = format!("volume {} of {}\n", volume.name, human_size(volume.capacity_bytes));
    Ok(Report::new(text, volume_json(&volume)))
}

pub(crate) async fn resize(server: &ServerAddress, name: String, size: u64) -> Result<Report, Failure> {
    let request = v1::ResizeVolumeRequest { name, capacity_bytes: size };
    let volume = call(connect::server(server).await?.resize_volume(request)).await?;
    let text = format!("volume {} of {}\n", volume.name, human_size(volume.capacity_bytes));
    Ok(Report::new(text, volume_json(&volume)))
}

pub(crate) async fn list(server: &ServerAddress) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    let mut volumes: Vec<v1::Volume> = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = v1::ListVolumesRequest { page_size: PAGE_SIZE, page_token };
        let page = call(client.list_volumes(request)).await?;
        volumes.extend(page.volumes);
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    let rows = volumes.iter().map(|volume| {
        let nodes: Vec<&str> = volume.attachments.iter().map(|one| one.node_id.as_str()).collect();
        [
            volume.name.clone(),
            human_size(volume.capacity_bytes),
            human_size(volume.allocated_bytes),
            volume.block_size_bytes.to_string(),
            backend_word(volume.backend()).to_owned(),
            write_cache_word(volume.write_cache()).to_owned(),
            if nodes.is_empty() { "-".to_owned() } else { nodes.join(",") },
        ]
    });
    let text = table(["NAME", "SIZE", "USED", "BLOCK", "BACKEND", "WRITE-CACHE", "ATTACHED-TO"], rows);
    Ok(Report::new(text, volumes.iter().map(volume_json).collect()))
}

pub(crate) async fn show(server: &ServerAddress, name: String) -> Result<Report, Failure> {
    let request = v1::GetVolumeRequest { name };
    let volume = call(connect::server(server).await?.get_volume(request)).await?;
    let mut text = properties([
        ("name", volume.name.clone()),
        ("volume uid", volume.volume_uid.clone()),
        ("size", format!("{} ({} bytes)", human_size(volume.capacity_bytes), volume.capacity_bytes)),
        ("used", human_size(volume.allocated_bytes)),
        ("block size", volume.block_size_bytes.to_string()),
        ("backend", backend_word(volume.backend()).to_owned()),
        ("write cache", write_cache_word(volume.write_cache()).to_owned()),
        ("incarnation", volume.storage_incarnation.clone()),
    ]);
    if !volume.attachments.is_empty() {
        let rows = volume.attachments.iter().map(|attachment| {
            [
                attachment.attachment_id.clone(),
                attachment.node_id.clone(),
                report::access_mode_word(attachment.access_mode()).to_owned(),
                attachment.connections.to_string(),
            ]
        });
        text.push('\n');
        text.push_str(&table(["ATTACHMENT", "NODE", "ACCESS", "CONNECTIONS"], rows));
    }
    Ok(Report::new(text, volume_json(&volume)))
}

pub(crate) async fn delete(server: &ServerAddress, name: String) -> Result<Report, Failure> {
    let request = v1::DeleteVolumeRequest { name: name.clone() };
    let existed = call(connect::server(server).await?.delete_volume(request)).await?.existed;
    let text = if existed { format!("deleted {name}\n") } else { format!("there is no volume {name}\n") };
    Ok(Report::new(text, json!({ "name": name, "existed": existed })))
}
