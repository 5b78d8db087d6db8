//! `node …`: the machines that have registered at the storage server, and when they were heard of.

use std::time::Duration;

use client::contract::now_ms;
use proto::v1;
use proto::v1::management_client::ManagementClient;
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::cli::NodeCommand;
use crate::connect::{self, ServerAddress, call};
use crate::failure::Failure;
use crate::once::once;
use crate::report::{Report, or_dash, properties, table, tables};
use crate::settings::label_words;
use crate::snapshots::utc;

/// Nodes in one page: each may have 24 KiB of labels, and a message takes 4 MiB.
const PAGE_SIZE: u32 = 100;
/// A node of which nothing was heard for so long is marked: it lives for as long as six heartbeats are not missing.
const SILENT_AFTER: Duration = Duration::from_secs(60);

pub(crate) async fn node(server: &ServerAddress, command: NodeCommand) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    match command {
        NodeCommand::List => list(&mut client).await,
        NodeCommand::Show { node_id } => {
            let node = call(client.get_node(v1::GetNodeRequest { node_id })).await?;
            Ok(shown(&node, now_ms()))
        }
        NodeCommand::Delete { node_id } => {
            let request = v1::DeleteNodeRequest { node_id: node_id.clone(), ..Default::default() };
            let existed =
                once(
                    &client,
                    request,
                    |mut client, request| async move { client.delete_node(request).await },
                )
                .await?
                .existed;
            let text = if existed {
                format!("deleted {node_id}\n")
            } else {
                format!("there is no node {node_id}\n")
            };
            Ok(Report::new(text, json!({ "node_id": node_id, "existed": existed })))
        }
    }
}

async fn list(client: &mut ManagementClient<Channel>) -> Result<Report, Failure> {
    let (mut nodes, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListNodesRequest { page_size: PAGE_SIZE, page_token };
        let page = call(client.list_nodes(request)).await?;
        nodes.extend(page.nodes);
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    let now_ms = now_ms();
    let rows = nodes.iter().map(|node| {
        let row = [
            node.node_id.clone(),
            or_dash(&node.boot_id),
            or_dash(&node.version),
            last_seen(node, now_ms),
            disk_count(node),
            max_volumes(node),
            or_dash(&label_words(&node.labels)),
        ];
        let seen = if node.last_seen_at_ms == 0 { "-".to_owned() } else { utc(node.last_seen_at_ms) };
        (row, [utc(node.registered_at_ms), seen])
    });
    let columns = ["NAME", "BOOT", "VERSION", "LAST-SEEN", "DISKS", "MAX-VOLUMES", "LABELS"];
    let tables = tables(columns, ["REGISTERED", "SEEN-AT"], rows);
    Ok(Report::of_tables(tables, nodes.iter().map(|node| node_json(node, now_ms)).collect()))
}

fn shown(node: &v1::RegisteredNode, now_ms: i64) -> Report {
    let rows = [
        ("name", node.node_id.clone()),
        ("boot", or_dash(&node.boot_id)),
        ("version", or_dash(&node.version)),
        ("registered", utc(node.registered_at_ms)),
        ("last seen", last_seen(node, now_ms)),
        ("disks", disk_count(node)),
        ("max volumes", max_volumes(node)),
        ("labels", or_dash(&label_words(&node.labels))),
    ];
    let mut text = properties(rows);
    if !node.disks.is_empty() {
        let rows = node.disks.iter().map(|disk| {
            let since = if disk.state_since_ms == 0 { "-".to_owned() } else { utc(disk.state_since_ms) };
            [disk.attachment_id.clone(), disk.state.clone(), since, or_dash(&disk.state_reason)]
        });
        text.push('\n');
        text.push_str(&table(["ATTACHMENT", "STATE", "SINCE", "WHY"], rows));
    }
    if !node.conditions.is_empty() {
        let rows = node
            .conditions
            .iter()
            .map(|condition| [condition.severity.clone(), condition.id.clone(), condition.text.clone()]);
        text.push('\n');
        text.push_str(&table(["SEVERITY", "WRONG", "WHAT TO DO"], rows));
    }
    let mut json = node_json(node, now_ms);
    json["disks"] = node.disks.iter().map(disk_json).collect();
    json["conditions"] = node.conditions.iter().map(condition_json).collect();
    Report::new(text, json)
}

/// How long ago it was heard of: as the server says, or else by the clock here. `None`: not since the server started.
fn age_ms(node: &v1::RegisteredNode, now_ms: i64) -> Option<u64> {
    let by_clock_here = || u64::try_from(now_ms.saturating_sub(node.last_seen_at_ms)).unwrap_or(0);
    (node.last_seen_at_ms != 0).then(|| node.last_seen_age_ms.unwrap_or_else(by_clock_here))
}

fn is_silent(age_ms: Option<u64>) -> bool {
    age_ms.is_none_or(|age_ms| Duration::from_millis(age_ms) >= SILENT_AFTER)
}

/// How long ago that was, and a mark where it is too long.
fn last_seen(node: &v1::RegisteredNode, now_ms: i64) -> String {
    let age_ms = age_ms(node, now_ms);
    let ago = match age_ms {
        None => "not since the server started".to_owned(),
        Some(age_ms) => format!("{} ago", age(age_ms / 1000)),
    };
    if is_silent(age_ms) { format!("{ago} (silent)") } else { ago }
}

fn disk_count(node: &v1::RegisteredNode) -> String {
    node.disk_count.map_or_else(|| "-".to_owned(), |count| count.to_string())
}

/// A dash: no limit is known.
fn max_volumes(node: &v1::RegisteredNode) -> String {
    if node.max_volumes == 0 { "-".to_owned() } else { node.max_volumes.to_string() }
}

/// In the largest unit of which there is one.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A node, without what is not in a list.
fn node_json(node: &v1::RegisteredNode, now_ms: i64) -> Value {
    let age_ms = age_ms(node, now_ms);
    json!({
        "node_id": node.node_id,
        "boot_id": node.boot_id,
        "version": node.version,
        "labels": node.labels,
        "registered_at_ms": node.registered_at_ms,
        "last_seen_at_ms": node.last_seen_at_ms,
        "last_seen_age_ms": age_ms,
        "is_silent": is_silent(age_ms),
        "disk_count": node.disk_count,
        "max_volumes": (node.max_volumes != 0).then_some(node.max_volumes),
    })
}

fn disk_json(disk: &v1::NodeDisk) -> Value {
    json!({
        "attachment_id": disk.attachment_id,
        "state": disk.state,
        "state_reason": disk.state_reason,
        "state_since_ms": disk.state_since_ms,
    })
}

fn condition_json(condition: &v1::NodeCondition) -> Value {
    json!({ "id": condition.id, "severity": condition.severity, "text": condition.text })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_772_366_399_000;

    fn seen(last_seen_at_ms: i64, last_seen_age_ms: impl Into<Option<u64>>) -> v1::RegisteredNode {
        let last_seen_age_ms = last_seen_age_ms.into();
        v1::RegisteredNode { last_seen_at_ms, last_seen_age_ms, ..Default::default() }
    }

    #[test]
    fn a_node_is_marked_after_a_minute_and_where_it_was_never_heard_of() {
        for (node, told) in [
            (seen(1, 0), "0s ago"),
            (seen(1, 59_999), "59s ago"),
            (seen(1, 60_000), "1m ago (silent)"),
            (seen(1, 7_200_000), "2h ago (silent)"),
            (seen(1, 200_000_000), "2d ago (silent)"),
            (seen(0, 0), "not since the server started (silent)"),
            (seen(0, None), "not since the server started (silent)"),
            // A server that does not say.
            (seen(NOW_MS - 59_999, None), "59s ago"),
            (seen(NOW_MS - 60_000, None), "1m ago (silent)"),
            // By a clock that is ahead of the one here.
            (seen(NOW_MS + 60_000, None), "0s ago"),
        ] {
            assert_eq!(last_seen(&node, NOW_MS), told);
            assert_eq!(node_json(&node, NOW_MS)["is_silent"], told.ends_with("(silent)"));
        }
    }

    #[test]
    fn what_a_server_does_not_say_is_no_number() {
        let node = seen(NOW_MS - 1_000, None);
        let json = node_json(&node, NOW_MS);
        assert_eq!((&json["disk_count"], &json["last_seen_age_ms"]), (&Value::Null, &1_000.into()));
        assert_eq!(disk_count(&node), "-");
        let never = node_json(&seen(0, None), NOW_MS);
        assert_eq!(never["last_seen_age_ms"], Value::Null);
        let none = v1::RegisteredNode { disk_count: Some(0), ..node };
        assert_eq!((disk_count(&none).as_str(), &node_json(&none, NOW_MS)["disk_count"]), ("0", &0.into()));
    }
}
