//! `grant …`: which node may attach which volume.

use proto::v1;
use serde_json::json;

use crate::cli::GrantCommand;
use crate::connect::{self, ServerAddress, call};
use crate::failure::Failure;
use crate::once::once;
use crate::report::{Report, grant_json, tables};
use crate::snapshots::utc;

/// The most that the server gives in one page.
const PAGE_SIZE: u32 = 1000;

pub(crate) async fn grant(server: &ServerAddress, command: GrantCommand) -> Result<Report, Failure> {
    match command {
        GrantCommand::Create { volume, node_id, read_only, unregistered } => {
            let node_must_be_registered = !unregistered;
            let request = v1::CreateGrantRequest {
                volume_name: volume,
                node_id,
                read_only,
                node_must_be_registered,
                ..Default::default()
            };
            let grant = once(&connect::server(server).await?, request, |mut client, request| async move {
                client.create_grant(request).await
            })
            .await?;
            let text = format!("{} is granted to {}\n", grant.volume_name, holder(&grant));
            Ok(Report::new(text, grant_json(&grant)))
        }
        GrantCommand::Delete { volume, node_id } => delete(server, volume, node_id).await,
        GrantCommand::List { volume, node_id } => {
            list(server, volume.unwrap_or_default(), node_id.unwrap_or_default()).await
        }
    }
}

async fn delete(server: &ServerAddress, volume: String, node_id: String) -> Result<Report, Failure> {
    let request = v1::DeleteGrantRequest {
        volume_name: volume.clone(),
        node_id: node_id.clone(),
        ..Default::default()
    };
    let ended = once(&connect::server(server).await?, request, |mut client, request| async move {
        client.delete_grant(request).await
    })
    .await?;
    let what = match (ended.existed, ended.was_attached) {
        (true, true) => "is no longer granted to, and was taken from,",
        (true, false) => "is no longer granted to",
        (false, true) => "was not granted to, and was taken from,",
        (false, false) => "is not granted to",
    };
    let json = json!({
        "volume_name": volume,
        "node_id": node_id,
        "existed": ended.existed,
        "was_attached": ended.was_attached,
    });
    Ok(Report::new(format!("{volume} {what} {node_id}\n"), json))
}

async fn list(server: &ServerAddress, volume_name: String, node_id: String) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    let (mut grants, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListGrantsRequest {
            volume_name: volume_name.clone(),
            node_id: node_id.clone(),
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = call(client.list_grants(request)).await?;
        grants.extend(page.grants);
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    let rows = grants.iter().map(|grant| {
        let access = access(grant).to_owned();
        let row = [grant.volume_name.clone(), grant.node_id.clone(), access, utc(grant.created_at_ms)];
        (row, [grant.volume_uid.clone()])
    });
    let tables = tables(["VOLUME", "NODE", "ACCESS", "SINCE"], ["UID"], rows);
    Ok(Report::of_tables(tables, grants.iter().map(grant_json).collect()))
}

/// The node, and what it may do.
pub(crate) fn holder(grant: &v1::Grant) -> String {
    format!("{} ({})", grant.node_id, access(grant))
}

fn access(grant: &v1::Grant) -> &'static str {
    if grant.read_only { "read-only" } else { "read-write" }
}
