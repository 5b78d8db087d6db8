//! `watch`: what happens to volumes, attachments, snapshots, nodes and grants of the storage server, printed as it happens.
//!
//! As JSON each event is an object in a line of its own (as YAML a document), with the token behind which `--resume` goes on. For people there are no tokens;
//! they are told the last one when the connection is lost, with the options that they gave.

use clap::{Args, ValueEnum};
use client::api_channel::DEFAULT_URI;
use proto::v1;
use proto::v1::WatchChange as Change;
use proto::v1::watch_event::Object;
use serde_json::{Value, json};

use crate::connect::{self, ServerAddress, call, next};
use crate::events::print;
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::output::OutputFormat;
use crate::report::{Report, access_mode_word, content_word, watched_volume_json};
use crate::settings::limit_words;
use crate::size::human_size;

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// Only of these, with commas between them [default: all]
    #[arg(long = "kind", value_enum, value_name = "KIND[,KIND…]", value_delimiter = ',')]
    kinds: Vec<Kind>,
    /// Only of this volume, its snapshots and grants, and who has attached it or them: its name, or uid:UUID
    #[arg(long, value_name = "VOLUME", default_value = "", hide_default_value = true)]
    volume: String,
    /// Go on behind the event that had this token, instead of beginning with what there is
    #[arg(long, value_name = "TOKEN", default_value = "", hide_default_value = true)]
    resume: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Volume,
    Attachment,
    Snapshot,
    Node,
    Grant,
}

impl Kind {
    fn in_api(self) -> v1::WatchedKind {
        match self {
            Self::Volume => v1::WatchedKind::Volume,
            Self::Attachment => v1::WatchedKind::Attachment,
            Self::Snapshot => v1::WatchedKind::Snapshot,
            Self::Node => v1::WatchedKind::Node,
            Self::Grant => v1::WatchedKind::Grant,
        }
    }
}

/// One line for each event, until it is interrupted or nobody reads.
pub(crate) async fn watch(
    server: &ServerAddress,
    args: WatchArgs,
    output: OutputFormat,
) -> Result<Report, Failure> {
    let again = Again(said_again(server, &args, output));
    let request = v1::WatchRequest {
        kinds: args.kinds.into_iter().map(|kind| kind.in_api().into()).collect(),
        volume_name: args.volume,
        resume_token: args.resume.clone(),
    };
    let mut stream = call(connect::server(server).await?.watch(request)).await?;
    let mut token = args.resume;
    loop {
        // The server says something twice a minute.
        match next(stream.message()).await {
            Ok(Some(event)) => {
                if let Some(line) = line(&event, output)?
                    && !print(&line)?
                {
                    return Ok(Report::new("", json!([])).printed());
                }
                if !event.resume_token.is_empty() {
                    token = event.resume_token;
                }
            }
            Ok(None) => return Err(again.behind(&token, Failure::other("the server ended the watch"))),
            Err(failure) => return Err(again.behind(&token, failure)),
        }
    }
}

/// The options of a watch, as they are typed to have the same one.
struct Again(String);

impl Again {
    /// The failure with what to do next: to go on, where that can be done.
    fn behind(&self, token: &str, failure: Failure) -> Failure {
        if token.is_empty() || matches!(failure.exit_code, ExitCode::Usage | ExitCode::NotFound) {
            return failure;
        }
        Failure { next: format!("go on where it ended: volctl watch{} --resume {token}", self.0), ..failure }
    }
}

/// The options but for `--resume`, each with a space before it; none that says what is the case without it.
fn said_again(server: &ServerAddress, args: &WatchArgs, output: OutputFormat) -> String {
    let mut options = Vec::new();
    if server.uri != DEFAULT_URI {
        options.push(("server", server.uri.clone()));
    }
    if let Some(files) = &server.tls_files {
        options.push(("tls-ca", files.ca.display().to_string()));
        if let Some(pair) = &files.pair {
            options.push(("tls-cert", pair.cert.display().to_string()));
            options.push(("tls-key", pair.key.display().to_string()));
        }
    }
    if output != OutputFormat::Table {
        options.push(("output", output.word()));
    }
    let words = args.kinds.iter().filter_map(ValueEnum::to_possible_value);
    let kinds: Vec<String> = words.map(|word| word.get_name().to_owned()).collect();
    if !kinds.is_empty() {
        options.push(("kind", kinds.join(",")));
    }
    if !args.volume.is_empty() {
        options.push(("volume", args.volume.clone()));
    }
    options.into_iter().map(|(name, value)| format!(" --{name} {}", in_shell(&value))).collect()
}

/// A word as a shell takes it for one.
fn in_shell(word: &str) -> String {
    let is_plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:,@%+=".contains(c));
    if is_plain { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// What is printed of an event; `None`: nothing, for people.
fn line(event: &v1::WatchEvent, output: OutputFormat) -> Result<Option<String>, Failure> {
    let object = event.object.as_ref();
    if output.is_for_people() {
        return Ok(object.map(|object| {
            let (kind, word) = (kind_word(object), change_word(event.change()));
            format!("{} {kind} {} {word}{}", event.time_ms, name_of(object), details(object))
        }));
    }
    let (kind, told) =
        object.map_or((Value::Null, Value::Null), |object| (kind_word(object).into(), object_json(object)));
    let told = json!({
        "resume_token": event.resume_token,
        "time_ms": event.time_ms,
        "change": change_word(event.change()),
        "kind": kind,
        "object": told,
    });
    output.piece(&told).map(Some)
}

fn change_word(change: Change) -> &'static str {
    match change {
        Change::Unspecified => "unknown",
        Change::Present => "present",
        Change::Synced => "synced",
        Change::Created => "created",
        Change::Updated => "updated",
        Change::Deleted => "deleted",
        Change::Bookmark => "bookmark",
    }
}

fn kind_word(object: &Object) -> &'static str {
    match object {
        Object::Volume(_) => "volume",
        Object::Attachment(_) => "attachment",
        Object::Snapshot(_) => "snapshot",
        Object::Node(_) => "node",
        Object::Grant(_) => "grant",
    }
}

fn name_of(object: &Object) -> String {
    match object {
        Object::Volume(volume) => volume.name.clone(),
        Object::Attachment(attachment) => attachment.volume_name.clone(),
        Object::Snapshot(snapshot) if snapshot.volume_name.is_empty() => {
            format!("@{}", snapshot.snapshot_uid)
        }
        Object::Snapshot(snapshot) => format!("{}@{}", snapshot.volume_name, snapshot.name),
        Object::Node(node) => node.node_id.clone(),
        Object::Grant(grant) => grant.volume_name.clone(),
    }
}

fn details(object: &Object) -> String {
    match object {
        Object::Volume(volume) => {
            let marks = [(volume.is_protected, "protected"), (volume.is_read_only, "read-only")];
            let content = content_word(volume.content()).replace('_', "-");
            let mut told = vec![human_size(volume.capacity_bytes), content];
            told.extend(marks.into_iter().filter(|(is_set, _)| *is_set).map(|(_, word)| word.to_owned()));
            told.extend(limit_words(&volume.limits.unwrap_or_default()));
            format!(": {}", told.join(", "))
        }
        Object::Attachment(attachment) => {
            format!(": {}, {}", attachment.node_id, access_mode_word(attachment.access_mode()))
        }
        Object::Snapshot(snapshot) => {
            let frozen = if snapshot.frozen { ", frozen" } else { "" };
            format!(": {}{frozen}", human_size(snapshot.capacity_bytes))
        }
        Object::Node(node) if node.version.is_empty() => String::new(),
        Object::Node(node) => format!(": version {}", node.version),
        Object::Grant(grant) => {
            let mode = if grant.read_only { "read-only" } else { "to read and write" };
            format!(": {}, {mode}", grant.node_id)
        }
    }
}

fn object_json(object: &Object) -> Value {
    match object {
        Object::Volume(volume) => watched_volume_json(volume),
        Object::Attachment(attachment) => json!({
            "attachment_id": attachment.attachment_id,
            "volume_name": attachment.volume_name,
            "volume_uid": attachment.volume_uid,
            "node_id": attachment.node_id,
            "access_mode": access_mode_word(attachment.access_mode()),
            "generation": attachment.generation,
            "created_at_ms": attachment.created_at_ms,
            "boot_id": attachment.boot_id,
            "snapshot_uid": attachment.snapshot_uid,
        }),
        Object::Snapshot(snapshot) => json!({
            "name": snapshot.name,
            "snapshot_uid": snapshot.snapshot_uid,
            "volume_name": snapshot.volume_name,
            "volume_uid": snapshot.volume_uid,
            "capacity_bytes": snapshot.capacity_bytes,
            "block_size_bytes": snapshot.block_size_bytes,
            "created_at_ms": snapshot.created_at_ms,
            "group_uid": snapshot.group_uid,
            "content": content_word(snapshot.content()),
            "frozen": snapshot.frozen,
            "is_encrypted": snapshot.is_encrypted,
            "freeze_id": snapshot.freeze_id,
        }),
        Object::Node(node) => json!({
            "node_id": node.node_id,
            "boot_id": node.boot_id,
            "version": node.version,
            "labels": node.labels,
            "registered_at_ms": node.registered_at_ms,
        }),
        Object::Grant(grant) => json!({
            "volume_name": grant.volume_name,
            "volume_uid": grant.volume_uid,
            "node_id": grant.node_id,
            "read_only": grant.read_only,
            "created_at_ms": grant.created_at_ms,
        }),
    }
}

#[cfg(test)]
mod tests {
    use client::tls_spec::{CertificateAndKey, ClientFiles};

    use super::*;

    fn event(change: Change, object: Option<Object>) -> v1::WatchEvent {
        v1::WatchEvent { resume_token: "t".to_owned(), time_ms: 7, change: change.into(), object }
    }

    #[test]
    fn people_read_what_happened_and_to_what() {
        let line = |change, object| line(&event(change, object), OutputFormat::Table).unwrap();
        let volume = v1::WatchedVolume {
            name: "vol-1".to_owned(),
            capacity_bytes: 1 << 30,
            content: v1::VolumeContent::Written.into(),
            is_protected: true,
            limits: Some(v1::VolumeLimits { read_iops: 5, ..Default::default() }),
            ..Default::default()
        };
        let told = line(Change::Updated, Some(Object::Volume(volume)));
        assert_eq!(told.as_deref(), Some("7 volume vol-1 updated: 1G, written, protected, 5 reads/s"));
        let snapshot =
            v1::WatchedSnapshot { snapshot_uid: "u".to_owned(), name: "s".to_owned(), ..Default::default() };
        let told = line(Change::Deleted, Some(Object::Snapshot(snapshot)));
        assert_eq!(told.as_deref(), Some("7 snapshot @u deleted: 0"));
        let (volume_name, node_id) = ("vol-1".to_owned(), "n".to_owned());
        let grant = v1::WatchedGrant { volume_name, node_id, read_only: true, ..Default::default() };
        let told = line(Change::Created, Some(Object::Grant(grant)));
        assert_eq!(told.as_deref(), Some("7 grant vol-1 created: n, read-only"));
        assert_eq!(line(Change::Bookmark, None), None);
    }

    #[test]
    fn programs_read_every_event_with_its_token() {
        let line = |change, object| line(&event(change, object), OutputFormat::Json).unwrap().unwrap();
        let node = v1::WatchedNode { node_id: "n".to_owned(), ..Default::default() };
        let json: Value = serde_json::from_str(&line(Change::Created, Some(Object::Node(node)))).unwrap();
        assert_eq!(
            (&json["resume_token"], &json["change"], &json["kind"]),
            (&"t".into(), &"created".into(), &"node".into())
        );
        assert_eq!(json["object"]["node_id"], "n");
        let json: Value = serde_json::from_str(&line(Change::Synced, None)).unwrap();
        assert_eq!(
            (&json["change"], &json["kind"], &json["object"]),
            (&"synced".into(), &Value::Null, &Value::Null)
        );
    }

    #[test]
    fn who_was_cut_off_is_told_how_to_go_on_and_who_was_refused_is_not() {
        let lost = || Failure::new(ExitCode::Unreachable, "lost", "repeat");
        let again = Again(String::new());
        assert_eq!(again.behind("t", lost()).next, "go on where it ended: volctl watch --resume t");
        assert_eq!(again.behind("", lost()).next, "repeat");
        let too_old = Failure::new(ExitCode::Usage, "too old", "watch anew without a token");
        assert_eq!(again.behind("t", too_old).next, "watch anew without a token");
    }

    #[test]
    fn who_goes_on_watches_the_same_at_the_same_server() {
        let pair = CertificateAndKey { cert: "/c".into(), key: "/my keys/k".into() };
        let mut server = ServerAddress {
            uri: "https://host:1".to_owned(),
            tls_files: Some(ClientFiles { ca: "/ca".into(), pair: Some(pair) }),
        };
        let (kinds, volume) = (vec![Kind::Volume, Kind::Node], "v".to_owned());
        let mut args = WatchArgs { kinds, volume, resume: "old".to_owned() };
        assert_eq!(
            said_again(&server, &args, OutputFormat::Json),
            " --server https://host:1 --tls-ca /ca --tls-cert /c --tls-key '/my keys/k' --output json --kind volume,node --volume v"
        );
        server = ServerAddress { uri: DEFAULT_URI.to_owned(), tls_files: None };
        args = WatchArgs { kinds: Vec::new(), volume: String::new(), ..args };
        assert_eq!(said_again(&server, &args, OutputFormat::Table), "");
        assert_eq!(in_shell("it's"), r"'it'\''s'");
    }
}
