//! What a command has to say: as text for people, also a longer one, and as a value for programs.
//!
//! The JSON field names are those of the volnode.v1 messages; sizes are bytes, times milliseconds since the Unix epoch,
//! enumerations lower-case words (`file`, `single_node_writer`, `live`). They are stable: fields may be added, none is
//! renamed or removed.

use std::io::{self, Write as _};

pub(crate) use client::contract::state_word::state_word;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use proto::passphrase::LUKS_HEADER_BYTES;
use proto::v1;
use serde_json::{Value, json};

use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::output::OutputFormat;

/// The result of a command that did what it could.
#[derive(Debug)]
pub(crate) struct Report {
    /// Ends with a line feed, or is empty.
    pub(crate) text: String,
    /// The same with more in it, if there is more.
    pub(crate) wide: Option<String>,
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
        let (text, note) = (text.into(), String::new());
        Self { text, wide: None, json, exit_code: ExitCode::Done, note, is_printed: false }
    }

    /// A success that is told by a table.
    pub(crate) fn of_tables(tables: Tables, json: Value) -> Self {
        Self::new(tables.text, json).with_wide(tables.wide)
    }

    /// The same, with a text for those who want to read more.
    pub(crate) fn with_wide(self, wide: String) -> Self {
        Self { wide: Some(wide), ..self }
    }

    /// The same, with something that is to be known besides.
    pub(crate) fn with_note(self, note: String) -> Self {
        Self { note, ..self }
    }

    /// The same, of which nothing is left to print.
    pub(crate) fn printed(self) -> Self {
        Self { is_printed: true, ..self }
    }

    /// The note on stderr and the result on stdout. A reader that stops reading is no error.
    ///
    /// # Errors
    /// Nothing can be written.
    pub(crate) fn print(&self, output: OutputFormat) -> Result<(), Failure> {
        if self.is_printed {
            return Ok(());
        }
        // Whoever closed stderr does not want to know.
        io::stderr().write_all(self.note.as_bytes()).ok();
        let text = match output {
            OutputFormat::Table => self.text.clone(),
            OutputFormat::Wide => self.wide.as_ref().unwrap_or(&self.text).clone(),
            OutputFormat::Json | OutputFormat::Yaml => output.whole(&self.json)?,
        };
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::other(format!("cannot write the result: {error}")))
            }
            _ => Ok(()),
        }
    }
}

/// A table, and the same with further columns.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tables {
    pub(crate) text: String,
    pub(crate) wide: String,
}

/// A table as [`table`] has it, with columns that only the wide one has.
pub(crate) fn tables<const COLUMNS: usize, const FURTHER: usize>(
    header: [&str; COLUMNS],
    further: [&str; FURTHER],
    rows: impl IntoIterator<Item = ([String; COLUMNS], [String; FURTHER])>,
) -> Tables {
    let mut wide = Table::new();
    wide.load_style(NOTHING).set_header(header.into_iter().chain(further));
    let mut narrow_rows = Vec::new();
    for (row, rest) in rows {
        wide.add_row(row.iter().chain(&rest));
        narrow_rows.push(row);
    }
    Tables { text: table(header, narrow_rows), wide: lines_of(&mut wide) }
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
pub(crate) fn attachment_tables(attachments: &[v1::Attachment]) -> Tables {
    let rows = attachments.iter().map(|attachment| {
        let row = [
            attachment.attachment_id.clone(),
            attachment.node_id.clone(),
            access_mode_word(attachment.access_mode()).to_owned(),
            attachment.connections.to_string(),
        ];
        let (generation, epoch) = (attachment.generation.to_string(), attachment.session_epoch.to_string());
        (row, [generation, epoch, or_dash(&attachment.boot_id)])
    });
    tables(["ATTACHMENT", "NODE", "ACCESS", "CONNECTIONS"], ["GENERATION", "EPOCH", "BOOT"], rows)
}

/// What stands in a table where there is nothing.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// The nodes that have it, with commas between them.
pub(crate) fn nodes_of(attachments: &[v1::Attachment]) -> String {
    let nodes: Vec<&str> = attachments.iter().map(|one| one.node_id.as_str()).collect();
    if nodes.is_empty() { "-".to_owned() } else { nodes.join(",") }
}

/// How large a volume's disk is: of an encrypted one without the header, as it was asked for.
pub(crate) fn disk_bytes(volume: &v1::Volume) -> u64 {
    volume.capacity_bytes.saturating_sub(header_bytes(volume.is_encrypted))
}

/// What a volume has more than its disk, in bytes.
pub(crate) fn header_bytes(is_encrypted: bool) -> u64 {
    if is_encrypted { LUKS_HEADER_BYTES } else { 0 }
}

/// A volume, with its attachments: what a watch tells of it, and how it is just now.
pub(crate) fn volume_json(volume: &v1::Volume) -> Value {
    let mut json = watched_volume_json(&as_watched(volume));
    json["allocated_bytes"] = volume.allocated_bytes.into();
    json["storage_incarnation"] = volume.storage_incarnation.clone().into();
    json["adopted_path"] = volume.adopted_path.clone().into();
    json["adopted_identity"] = volume.adopted_identity.clone().into();
    json["adopted_problem"] = volume.adopted_problem.clone().into();
    json["attachments"] = volume.attachments.iter().map(attachment_json).collect();
    json["grants"] = volume.grants.iter().map(grant_json).collect();
    json["throttled_ms"] = volume.throttled_ms.into();
    json["snapshot_count"] = volume.snapshot_count.into();
    json["etag"] = volume.etag.clone().into();
    json
}

/// What a watch tells of a volume.
pub(crate) fn watched_volume_json(volume: &v1::WatchedVolume) -> Value {
    json!({
        "name": volume.name,
        "volume_uid": volume.volume_uid,
        "capacity_bytes": volume.capacity_bytes,
        "block_size_bytes": volume.block_size_bytes,
        "backend": backend_word(volume.backend()),
        "write_cache": write_cache_word(volume.write_cache()),
        "created_at_ms": volume.created_at_ms,
        "labels": volume.labels,
        "description": volume.description,
        "is_protected": volume.is_protected,
        "is_read_only": volume.is_read_only,
        "is_shared": volume.is_shared,
        "is_encrypted": volume.is_encrypted,
        "content": content_word(volume.content()),
        "initialising_attachment_id": volume.initialising_attachment_id,
        "limits": limits_json(&volume.limits.unwrap_or_default()),
        "source_uid": volume.source_uid,
    })
}

/// A grant.
pub(crate) fn grant_json(grant: &v1::Grant) -> Value {
    json!({
        "volume_name": grant.volume_name,
        "volume_uid": grant.volume_uid,
        "node_id": grant.node_id,
        "read_only": grant.read_only,
        "created_at_ms": grant.created_at_ms,
    })
}

fn as_watched(volume: &v1::Volume) -> v1::WatchedVolume {
    v1::WatchedVolume {
        name: volume.name.clone(),
        volume_uid: volume.volume_uid.clone(),
        capacity_bytes: volume.capacity_bytes,
        block_size_bytes: volume.block_size_bytes,
        backend: volume.backend,
        write_cache: volume.write_cache,
        created_at_ms: volume.created_at_ms,
        labels: volume.labels.clone(),
        description: volume.description.clone(),
        is_protected: volume.is_protected,
        is_read_only: volume.is_read_only,
        is_shared: volume.is_shared,
        is_encrypted: volume.is_encrypted,
        content: volume.content,
        initialising_attachment_id: volume.initialising_attachment_id.clone(),
        limits: volume.limits,
        source_uid: volume.source_uid.clone(),
    }
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
        "only_if_granted": attachment.only_if_granted,
        "is_encrypted": attachment.is_encrypted,
        "clear_device_path": attachment.clear_device_path,
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
pub(crate) fn stall_word(action: v1::StallAction) -> &'static str {
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

    #[test]
    fn a_wide_table_has_the_narrow_one_as_its_beginning() {
        let row = |name: &str, uid: &str| ([name.to_owned(), "2G".to_owned()], [uid.to_owned()]);
        let Tables { text, wide } = tables(["NAME", "SIZE"], ["UID"], [row("vol-123", "u1"), row("b", "-")]);
        assert_eq!(text, "NAME     SIZE\nvol-123  2G\nb        2G\n");
        assert_eq!(wide, "NAME     SIZE  UID\nvol-123  2G    u1\nb        2G    -\n");
    }

    #[test]
    fn a_watch_tells_a_part_of_what_a_volume_is_by_the_same_names() {
        let labels = [("app".to_owned(), "shop".to_owned())].into();
        let volume = v1::Volume {
            name: "v".into(),
            capacity_bytes: 7,
            labels,
            is_shared: true,
            adopted_path: "/dev/sdb".into(),
            throttled_ms: 3,
            ..Default::default()
        };
        let (all, watched) = (volume_json(&volume), watched_volume_json(&as_watched(&volume)));
        let watched = watched.as_object().unwrap();
        assert!(watched.iter().all(|(name, value)| all[name] == *value), "{all}");
        assert_eq!(
            (watched["is_shared"].as_bool(), watched["labels"]["app"].as_str()),
            (Some(true), Some("shop"))
        );
        assert!(!watched.contains_key("adopted_path"), "a watch does not tell it");
        assert_eq!((&all["adopted_path"], &all["throttled_ms"]), (&"/dev/sdb".into(), &3.into()));
    }
}
