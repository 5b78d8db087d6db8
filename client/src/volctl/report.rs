//! What a command has to say: as text for people and as JSON for programs.
//!
//! The JSON field names are those of the volnode.v1 messages; sizes are bytes, times milliseconds since the Unix epoch,
//! enumerations lower-case words (`file`, `single_node_writer`, `live`). They are stable: fields may be added, none is
//! renamed or removed.

pub(crate) use client::node::attachment_record::state_word;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use proto::v1;
use serde_json::{Value, json};

use crate::exit_code::ExitCode;

/// The result of a command that did what it could.
#[derive(Debug)]
pub(crate) struct Report {
    /// Ends with a line feed, or is empty.
    pub(crate) text: String,
    pub(crate) json: Value,
    pub(crate) exit_code: ExitCode,
    /// For people, on stderr; ends with a line feed, or is empty.
    pub(crate) note: String,
    /// It was printed already, piece by piece.
    pub(crate) is_printed: bool,
}

impl Report {
    /// A success.
    pub(crate) fn new(text: impl Into<String>, json: Value) -> Self {
        Self { text: text.into(), json, exit_code: ExitCode::Done, note: String::new(), is_printed: false }
    }

    /// The same, with something that is to be known besides.
    pub(crate) fn with_note(self, note: String) -> Self {
        Self { note, ..self }
    }

    /// The same, of which nothing is left to print.
    pub(crate) fn printed(self) -> Self {
        Self { is_printed: true, ..self }
    }
}

/// A table without lines; nothing at all where there are no rows, but for the header.
pub(crate) fn table<const COLUMNS: usize>(
    header: [&str; COLUMNS],
    rows: impl IntoIterator<Item = [String; COLUMNS]>,
) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header);
    table.add_rows(rows);
    lines_of(&mut table)
}

/// One property to a line.
pub(crate) fn properties(rows: impl IntoIterator<Item = (&'static str, String)>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.add_rows(rows.into_iter().map(|(name, value)| [format!("{name}:"), value]));
    lines_of(&mut table)
}

fn lines_of(table: &mut Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Who has a volume or a snapshot.
pub(crate) fn attachment_table(attachments: &[v1::Attachment]) -> String {
    let rows = attachments.iter().map(|attachment| {
        [
            attachment.attachment_id.clone(),
            attachment.node_id.clone(),
            access_mode_word(attachment.access_mode()).to_owned(),
            attachment.connections.to_string(),
        ]
    });
    table(["ATTACHMENT", "NODE", "ACCESS", "CONNECTIONS"], rows)
}

/// The nodes that have it, with commas between them.
pub(crate) fn nodes_of(attachments: &[v1::Attachment]) -> String {
    let nodes: Vec<&str> = attachments.iter().map(|one| one.node_id.as_str()).collect();
    if nodes.is_empty() { "-".to_owned() } else { nodes.join(",") }
}

/// A volume, with its attachments.
pub(crate) fn volume_json(volume: &v1::Volume) -> Value {
    json!({
        "name": volume.name,
        "volume_uid": volume.volume_uid,
        "capacity_bytes": volume.capacity_bytes,
        "block_size_bytes": volume.block_size_bytes,
        "backend": backend_word(volume.backend()),
        "write_cache": write_cache_word(volume.write_cache()),
        "allocated_bytes": volume.allocated_bytes,
        "storage_incarnation": volume.storage_incarnation,
        "created_at_ms": volume.created_at_ms,
        "adopted_path": volume.adopted_path,
        "adopted_identity": volume.adopted_identity,
        "adopted_problem": volume.adopted_problem,
        "attachments": volume.attachments.iter().map(attachment_json).collect::<Vec<_>>(),
        "labels": volume.labels,
        "description": volume.description,
        "is_protected": volume.is_protected,
        "is_read_only": volume.is_read_only,
        "content": content_word(volume.content()),
        "initialising_attachment_id": volume.initialising_attachment_id,
        "limits": limits_json(&volume.limits.unwrap_or_default()),
        "throttled_ms": volume.throttled_ms,
        "snapshot_count": volume.snapshot_count,
        "source_uid": volume.source_uid,
        "is_shared": volume.is_shared,
    })
}

/// The limits of a volume.
pub(crate) fn limits_json(limits: &v1::VolumeLimits) -> Value {
    json!({
        "read_iops": limits.read_iops,
        "write_iops": limits.write_iops,
        "read_bytes_per_second": limits.read_bytes_per_second,
        "write_bytes_per_second": limits.write_bytes_per_second,
        "burst_seconds": limits.burst_seconds,
    })
}

/// `never_written`, `initialising` or `written`.
pub(crate) fn content_word(content: v1::VolumeContent) -> &'static str {
    match content {
        v1::VolumeContent::Unspecified => "unknown",
        v1::VolumeContent::NeverWritten => "never_written",
        v1::VolumeContent::Initialising => "initialising",
        v1::VolumeContent::Written => "written",
    }
}

/// The server's record of an attachment.
pub(crate) fn attachment_json(attachment: &v1::Attachment) -> Value {
    json!({
        "attachment_id": attachment.attachment_id,
        "volume_name": attachment.volume_name,
        "volume_uid": attachment.volume_uid,
        "node_id": attachment.node_id,
        "access_mode": access_mode_word(attachment.access_mode()),
        "generation": attachment.generation,
        "session_epoch": attachment.session_epoch,
        "connections": attachment.connections,
        "created_at_ms": attachment.created_at_ms,
        "snapshot_uid": attachment.snapshot_uid,
    })
}

/// A disk of this machine.
pub(crate) fn node_attachment_json(attachment: &v1::NodeAttachment) -> Value {
    json!({
        "attachment_id": attachment.attachment_id,
        "target": attachment.target,
        "device_path": attachment.device_path,
        "device_link": attachment.device_link,
        "capacity_bytes": attachment.capacity_bytes,
        "block_size_bytes": attachment.block_size_bytes,
        "read_only": attachment.read_only,
        "state": state_word(attachment.state()),
        "state_reason": attachment.state_reason,
        "state_since_ms": attachment.state_since_ms,
        "data_path": attachment.data_path,
        "data_path_reason": attachment.data_path_reason,
        "nr_hw_queues": attachment.nr_hw_queues,
        "nr_connections": attachment.nr_connections,
        "queue_depth": attachment.queue_depth,
        "busy_poll_us": attachment.busy_poll_us,
        "send_zc": attachment.send_zc,
        "send_zc_mode": send_zc_word(attachment.send_zc_mode()),
        "server_address": attachment.server_address,
        "encryption": attachment.encryption,
        "pid": attachment.pid,
        "session_epoch": attachment.session_epoch,
        "on_stall": stall_word(attachment.on_stall()),
        "stall_fail_after_ms": attachment.stall_fail_after_ms,
        "reconnects": attachment.reconnects,
        "program_version": attachment.program_version,
        "tail_bytes": attachment.tail_bytes,
    })
}

/// `auto`, `on` or `off`.
fn send_zc_word(mode: v1::SendZcMode) -> &'static str {
    match mode {
        v1::SendZcMode::Unspecified => "unknown",
        v1::SendZcMode::Auto => "auto",
        v1::SendZcMode::On => "on",
        v1::SendZcMode::Off => "off",
    }
}

/// `wait` or `fail`.
fn stall_word(action: v1::StallAction) -> &'static str {
    match action {
        v1::StallAction::Unspecified => "unknown",
        v1::StallAction::Wait => "wait",
        v1::StallAction::Fail => "fail",
    }
}

/// `file`, `memory`, `device` or `lvm`.
pub(crate) fn backend_word(backend: v1::Backend) -> &'static str {
    match backend {
        v1::Backend::Unspecified => "unknown",
        v1::Backend::File => "file",
        v1::Backend::Memory => "memory",
        v1::Backend::Device => "device",
        v1::Backend::Lvm => "lvm",
    }
}

/// `on` or `off`.
pub(crate) fn write_cache_word(write_cache: v1::WriteCache) -> &'static str {
    match write_cache {
        v1::WriteCache::Unspecified => "unknown",
        v1::WriteCache::On => "on",
        v1::WriteCache::Off => "off",
    }
}

/// `single_node_writer`, `single_node_reader_only`, `multi_node_reader_only` or `multi_node_multi_writer`.
pub(crate) fn access_mode_word(access_mode: v1::AccessMode) -> &'static str {
    match access_mode {
        v1::AccessMode::Unspecified => "unknown",
        v1::AccessMode::SingleNodeWriter => "single_node_writer",
        v1::AccessMode::SingleNodeReaderOnly => "single_node_reader_only",
        v1::AccessMode::MultiNodeReaderOnly => "multi_node_reader_only",
        v1::AccessMode::MultiNodeMultiWriter => "multi_node_multi_writer",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_no_lines_and_no_trailing_blanks() {
        let text = table(["NAME", "SIZE"], [["vol-123".into(), "2G".into()], ["b".into(), String::new()]]);
        assert_eq!(text, "NAME     SIZE\nvol-123  2G\nb\n");
    }

    #[test]
    fn json_names_are_those_of_the_api() {
        let volume =
            v1::Volume { name: "vol-1".into(), backend: v1::Backend::File.into(), ..Default::default() };
        let json = volume_json(&volume);
        assert_eq!((json["name"].as_str(), json["backend"].as_str()), (Some("vol-1"), Some("file")));
        assert_eq!(json["capacity_bytes"], 0);
    }
}
