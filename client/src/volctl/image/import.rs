//! `import`: an image becomes the content of a volume.
//!
//! Order: the image is judged (format, size, partition table) before anything is asked of the server; the volume is attached before its
//! content is judged, so that it does not change any more; the journal is begun before the first byte is written. From then on
//! whatever ends the run leaves the attachment and the journal for the next one.

use std::sync::Arc;
use std::time::Instant;

use client::image::copy::{CopyError, Pass, copy, digest_of, verify};
use client::image::format::Format;
use client::image::journal::{JOURNAL_VERSION, Journal, JournalHead};
use client::image::overlay::{Overlay, Readable};
use client::image::partition_table::{self, PartitionTable};
use proto::error_reason as reason;
use proto::v1;
use serde_json::json;

use super::places::{OwnBytes, STDIN, Source};
use super::progress::Progress;
use super::volumes::{Attached, NODE_PREFIX, Server, machine_id};
use super::{
    ImportArgs, Returning, copy_failure, lost_behind_a_copy, short_hash, state_directory, through_losses,
};
use crate::connect::ServerAddress;
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::once::once;
use crate::report::Report;
use crate::size::human_size;
use crate::snapshots::{Named, clone_to_its_end, is_temporary_clone};

/// Capacities are multiples of this.
const CAPACITY_UNIT_BYTES: u64 = 4096;
/// Of a volume for an image without a partition table.
const DEFAULT_BLOCK_BYTES: u32 = 4096;

pub(crate) async fn import(server: &ServerAddress, args: ImportArgs) -> Result<Report, Failure> {
    if let Some(name) = &args.drop {
        return give_up(server, name).await;
    }
    if args.source.as_deref() == Some(STDIN) {
        // What has been read of it does not come again.
        return import_once(server, &args).await;
    }
    through_losses(async || import_once(server, &args).await).await
}

async fn import_once(server: &ServerAddress, args: &ImportArgs) -> Result<Report, Failure> {
    let (Some(text), Some(name)) = (&args.source, &args.volume) else {
        return Err(Failure::new(ExitCode::Usage, "import what, and into which volume?", ""));
    };
    if (text.contains("://") || text == STDIN) && (args.apply || args.base.is_some()) {
        let next = "give the image's file, or leave --apply and --base out";
        return Err(Failure::new(ExitCode::Usage, "only a file holds a difference", next));
    }
    let mut client = Server::connect(server).await?;
    let size_bytes = match (text.as_str(), args.create, args.size) {
        (STDIN, true, None) => {
            let next = "give the volume's: --size";
            return Err(Failure::new(ExitCode::Usage, "a pipe does not tell its size", next));
        }
        (STDIN, true, Some(size_bytes)) => size_bytes,
        (STDIN, false, _) => client.volume(name).await?.capacity_bytes,
        _ => 0,
    };
    let source = Source::open(args, text, size_bytes, server.tls_files.as_ref()).await?;
    let mut server = client;
    if let Some(base) = &args.base {
        return import_onto_clone(&mut server, args, &source, base, name).await;
    }
    // Where an image begins says nothing if that is its base's.
    let table = if source.difference.is_some() { None } else { look_for_partitions(&source).await? };
    let volume = if args.create {
        make_volume(&mut server, args, name, &source, table).await?
    } else {
        server.volume(name).await?
    };
    check_fit(args, &source, &volume, table)?;
    Import { args, source: &source, volume }.run(&mut server).await
}

/// `--base`: the volume is made as a clone, unless an earlier run has made it, and does not stay where the base is the wrong one.
async fn import_onto_clone(
    server: &mut Server<'_>,
    args: &ImportArgs,
    source: &Source,
    base: &str,
    name: &str,
) -> Result<Report, Failure> {
    let named = Named::of_source(base.to_owned())?
        .unwrap_or_else(|volume_name| Named { volume_name, ..Named::default() });
    let is_new = match server.volume(name).await {
        Ok(_) => false,
        Err(failure) if failure.reason == reason::VOLUME_NOT_FOUND => true,
        Err(failure) => return Err(failure),
    };
    let request = v1::CloneVolumeRequest {
        name: name.to_owned(),
        source_volume_name: named.volume_name,
        source_snapshot_name: named.name,
        source_snapshot_uid: named.snapshot_uid,
        capacity_bytes: source.size_bytes.next_multiple_of(CAPACITY_UNIT_BYTES),
        ..Default::default()
    };
    let volume = clone_to_its_end(&mut server.client, request).await?;
    let imported = async {
        check_fit(args, source, &volume, None)?;
        Import { args, source, volume }.run(server).await
    };
    match imported.await {
        Err(failure) if is_new && failure.exit_code == ExitCode::Precondition => {
            // What it failed for is told. What was begun is attached, and stays.
            let _ = delete(server, name).await;
            Err(failure)
        }
        imported => imported,
    }
}

async fn look_for_partitions(source: &Source) -> Result<Option<PartitionTable>, Failure> {
    if source.size_bytes == 0 {
        return Err(Failure::new(ExitCode::Usage, format!("{} is empty", source.location), "give an image"));
    }
    let begin =
        source.begin().await.map_err(|error| Failure::other(format!("{}: {error}", source.location)))?;
    Ok(partition_table::find(&begin, source.size_bytes))
}

async fn make_volume(
    server: &mut Server<'_>,
    args: &ImportArgs,
    name: &str,
    source: &Source,
    table: Option<PartitionTable>,
) -> Result<v1::Volume, Failure> {
    let of_table = table.map_or(DEFAULT_BLOCK_BYTES, |table| table.sector_bytes);
    let wanted = v1::Volume {
        name: name.to_owned(),
        capacity_bytes: args.size.unwrap_or_else(|| source.size_bytes.next_multiple_of(CAPACITY_UNIT_BYTES)),
        block_size_bytes: args.block_size.unwrap_or(of_table),
        ..Default::default()
    };
    // Before it is made.
    check_fit(args, source, &wanted, table)?;
    let request = v1::CreateVolumeRequest {
        name: wanted.name,
        capacity_bytes: wanted.capacity_bytes,
        block_size_bytes: wanted.block_size_bytes,
        ..Default::default()
    };
    once(&server.client, request, |mut client, request| async move { client.create_volume(request).await })
        .await
}

/// Whether the image can be a volume like this.
fn check_fit(
    args: &ImportArgs,
    source: &Source,
    volume: &v1::Volume,
    table: Option<PartitionTable>,
) -> Result<(), Failure> {
    let name = &volume.name;
    if source.size_bytes > volume.capacity_bytes {
        let (image, there) = (source.size_bytes, volume.capacity_bytes);
        let what = format!("the image has {image} bytes, and volume {name} only {there}");
        let size = image.next_multiple_of(CAPACITY_UNIT_BYTES);
        let next = match args.create {
            true => format!("leave --size out, or give {size} at least"),
            false => format!("make it larger: volctl resize {name} --size {size}"),
        };
        return Err(Failure::new(ExitCode::Usage, what, next));
    }
    if let Some(table) = table.filter(|table| table.sector_bytes != volume.block_size_bytes) {
        let PartitionTable { kind, sector_bytes } = table;
        let what = format!(
            "the image has a {kind} for sectors of {sector_bytes} bytes, and volume {name} has blocks of {}: its partitions would not be found",
            volume.block_size_bytes
        );
        if !args.ignore_sector_size {
            let next = format!(
                "import it into a volume that was made with --block-size {sector_bytes}, as --create makes it; \
                 or, if that does not matter, --ignore-sector-size"
            );
            return Err(Failure::new(ExitCode::Precondition, what, next));
        }
    }
    if volume.is_read_only {
        let next = format!("volctl set {name} --no-read-only");
        return Err(Failure::new(ExitCode::Precondition, format!("volume {name} is read-only"), next));
    }
    Ok(())
}

fn check_protected(volume: &v1::Volume) -> Result<(), Failure> {
    let name = &volume.name;
    if volume.is_protected {
        let next = format!("volctl set {name} --no-protect");
        return Err(Failure::new(ExitCode::Precondition, format!("volume {name} is protected"), next));
    }
    Ok(())
}

struct Import<'a> {
    args: &'a ImportArgs,
    source: &'a Source,
    volume: v1::Volume,
}

impl Import<'_> {
    async fn run(self, server: &mut Server<'_>) -> Result<Report, Failure> {
        let begun = Instant::now();
        let directory = state_directory()?;
        let location = &self.source.location;
        let copy_id =
            short_hash(&[&machine_id(), &directory.to_string_lossy(), &self.volume.volume_uid, location]);
        let path = directory.join(format!("import-{}-{copy_id}.journal", self.volume.volume_uid));
        let mut journal = Journal::open(&path)?;
        let attached = server.attach(&self.volume, &copy_id, v1::AccessMode::SingleNodeWriter).await;
        let attached = match attached {
            Ok(attached) => attached,
            Err(failure) if journal.head().is_none() => {
                journal.remove()?;
                return Err(failure);
            }
            Err(failure) => return Err(failure),
        };
        let is_there = match self.prepare(server, &attached, &mut journal).await {
            Ok(is_there) => is_there,
            Err(failure) => {
                // Nothing was begun; what an earlier run has begun stays.
                if !attached.existed {
                    // What the import failed for is told.
                    let _ = server.detach(&attached.attachment_id).await;
                    journal.remove()?;
                }
                return Err(failure);
            }
        };
        let resumed_bytes = (journal.chunks() * client::image::CHUNK_BYTES).min(self.source.size_bytes);
        let go_on = format!(
            "repeat the command: it goes on where it stopped; or give it up: volctl import --drop {}",
            self.volume.name
        );
        let copied = tokio::select! {
            copied = self.copy_unless(is_there, &attached, &mut journal, &go_on) => copied,
            _ = tokio::signal::ctrl_c() => Err(Failure::new(ExitCode::Other, "interrupted", go_on)),
        };
        let digest = copied?;
        let attachment_id = attached.close().await;
        server.detach(&attachment_id).await.map_err(lost_behind_a_copy)?;
        journal.remove()?;
        Ok(self.report(digest.as_deref(), resumed_bytes, begun))
    }

    async fn copy_unless(
        &self,
        is_there: Option<String>,
        attached: &Attached,
        journal: &mut Journal,
        go_on: &str,
    ) -> Result<Option<String>, Failure> {
        match is_there {
            Some(digest) => Ok(Some(digest)),
            None => self.copy(attached, journal, go_on).await,
        }
    }

    fn returning(&self) -> Returning {
        Returning { source: self.source.is_remote(), destination: true }
    }

    /// Finds out whether the copy goes on or begins, and whether it may. Gives a digest where the volume has it all already.
    async fn prepare(
        &self,
        server: &mut Server<'_>,
        attached: &Attached,
        journal: &mut Journal,
    ) -> Result<Option<String>, Failure> {
        // As it is now that nobody else writes to it.
        let volume = server.volume(&self.volume.name).await?;
        let is_forgetful = volume.backend() == v1::Backend::Memory;
        let incarnation = if is_forgetful { volume.storage_incarnation.as_str() } else { "" };
        let destination =
            format!("volume {} attachment {} {incarnation}", volume.volume_uid, attached.attachment_id);
        let head = JournalHead {
            format_version: JOURNAL_VERSION,
            source: self.source.identity.clone(),
            destination,
            size_bytes: self.source.size_bytes,
            was_zero: volume.content() == v1::VolumeContent::NeverWritten,
        };
        let same =
            |before: &&JournalHead| JournalHead { was_zero: head.was_zero, ..(*before).clone() } == head;
        if journal.head().filter(same).is_some() {
            return Ok(None);
        }
        if let Some(own) = &self.source.difference {
            let is_there = self.check_base(own, &volume, attached).await?;
            if is_there.is_none() {
                journal.begin(head)?;
            }
            return Ok(is_there);
        }
        // What an import of ours has begun is nobody's data.
        let is_ours =
            attached.existed && journal.head().is_some_and(|before| before.destination == head.destination);
        if !head.was_zero && !is_ours {
            self.check_overwrite(&volume)?;
        }
        journal.begin(head)?;
        Ok(None)
    }

    /// Whether the volume has what a difference lies above. Gives a digest where it has the whole.
    async fn check_base(
        &self,
        own: &OwnBytes,
        volume: &v1::Volume,
        attached: &Attached,
    ) -> Result<Option<String>, Failure> {
        check_protected(volume)?;
        if self.args.unchecked_base {
            return Ok(None);
        }
        let refused = |what: String, next: &str| Err(Failure::new(ExitCode::Precondition, what, next));
        let (name, location) = (&volume.name, &self.source.location);
        let said = own.said.as_ref().and_then(|said| Some((said, said.base_digest.as_ref()?)));
        let Some((said, base_digest)) = said else {
            let what = format!("{location} does not say what its base has to be");
            return refused(what, "if volume and image surely belong together: --unchecked-base");
        };
        let size_bytes = self.source.size_bytes;
        let failed = |error: CopyError| copy_failure(error, "repeat the command", self.returning());
        let found = {
            let progress = Progress::new("checking the base", size_bytes, 0);
            let at = |done| progress.at(done);
            digest_of(Readable::Store(&attached.store), size_bytes, &at).await.map_err(failed)?
        };
        if said.digest.as_ref() == Some(&found) {
            return Ok(Some(found));
        }
        let behind = size_bytes.next_multiple_of(attached.store.block_bytes());
        let is_base = found == *base_digest
            && (behind >= volume.capacity_bytes
                || super::is_all_zeroes_from(&attached.store, behind, volume.capacity_bytes).await?);
        if is_base {
            return Ok(None);
        }
        let what =
            format!("volume {name} does not have the content of {}, which is the image's base", said.base);
        refused(
            what,
            "apply it to a volume that has; or, where an import of this very image was interrupted elsewhere, \
             --unchecked-base: the whole is compared at the end",
        )
    }

    fn check_overwrite(&self, volume: &v1::Volume) -> Result<(), Failure> {
        let name = &volume.name;
        if !self.args.overwrite {
            let what = format!("volume {name} was written to, and would be overwritten");
            let next = "import into a new volume (--create), or overwrite it: --overwrite";
            return Err(Failure::new(ExitCode::Precondition, what, next));
        }
        check_protected(volume)
    }

    /// Gives the digest of the whole, where all of it was read.
    async fn copy(
        &self,
        attached: &Attached,
        journal: &mut Journal,
        go_on: &str,
    ) -> Result<Option<String>, Failure> {
        let (source, size_bytes, store) = (self.source, self.source.size_bytes, &attached.store);
        let was_zero = journal.head().is_some_and(|head| head.was_zero);
        let failed = |error| copy_failure(error, go_on, self.returning());
        let difference = source.difference.as_ref().map(|own| {
            let (base, above) = (Arc::clone(store), Arc::clone(&source.store));
            let overlay = Overlay::new(base, self.volume.capacity_bytes, above, own.changes.clone());
            (overlay, own.changes.in_clusters(size_bytes))
        });
        {
            let progress =
                Progress::new("copying", size_bytes, journal.chunks() * client::image::CHUNK_BYTES);
            let at = |done| progress.at(done);
            let pass = Pass {
                from: match &difference {
                    Some((overlay, _)) => Readable::Overlay(overlay),
                    None => Readable::Store(&source.store),
                },
                to: Some(store),
                is_zero: was_zero,
                size_bytes,
                checkpoint_bytes: self.args.checkpoint_bytes,
                changes: difference.as_ref().map(|(_, changes)| changes),
                reads_all: difference.is_none(),
            };
            copy(&pass, journal, &at).await.map_err(failed)?;
        }
        source.check_unchanged()?;
        source.check_end().await?;
        if difference.is_none() && !was_zero {
            self.clear_behind(attached).await.map_err(failed)?;
        }
        if self.args.no_verify {
            return Ok(difference.is_none().then(|| journal.digest()));
        }
        let found = {
            let progress = Progress::new("verifying", size_bytes, 0);
            let at = |done| progress.at(done);
            verify(Readable::Store(store), size_bytes, journal, &at).await.map_err(failed)?
        };
        self.check_whole(&found)?;
        Ok(Some(found))
    }

    /// Nothing of what was there before is left behind the image.
    async fn clear_behind(&self, attached: &Attached) -> Result<(), CopyError> {
        let (store, end) = (&attached.store, self.volume.capacity_bytes);
        let behind = self.source.size_bytes.next_multiple_of(store.block_bytes());
        if behind >= end {
            return Ok(());
        }
        let cleared = match store.zero(behind, end - behind).await {
            Ok(()) => store.flush().await,
            Err(error) => Err(error),
        };
        cleared.map_err(CopyError::Destination)
    }

    /// Whether base and difference have become what the image says that they are together.
    fn check_whole(&self, found: &str) -> Result<(), Failure> {
        let said = self.source.difference.as_ref().and_then(|own| own.said.as_ref()?.digest.as_ref());
        match said {
            Some(digest) if digest != found => {
                let what = format!(
                    "volume {} is not what the image was made of: its digest is {found}, and should be {digest}",
                    self.volume.name
                );
                let next = format!(
                    "it had another content than the image's base: give the import up (volctl import --drop {}), and restore the volume from a snapshot",
                    self.volume.name
                );
                Err(Failure::new(ExitCode::Precondition, what, next))
            }
            _ => Ok(()),
        }
    }

    fn report(&self, digest: Option<&str>, resumed_bytes: u64, begun: Instant) -> Report {
        let (source, name, is_verified) = (self.source, &self.volume.name, !self.args.no_verify);
        let seconds = begun.elapsed().as_secs_f64();
        let verified = if is_verified { "verified" } else { "not verified" };
        let resumed = match resumed_bytes {
            0 => String::new(),
            bytes => format!(", {} of them by an earlier run", human_size(bytes)),
        };
        let own_bytes = source.difference.as_ref().map(|own| own.changes.total_bytes());
        let how = match own_bytes {
            Some(own_bytes) => format!("applied {} to {name}: {} of", source.location, human_size(own_bytes)),
            None => format!("imported {} into {name}:", source.location),
        };
        let digest_text = digest.map(|digest| format!(", digest {digest}")).unwrap_or_default();
        let text = format!(
            "{how} {}{resumed}, in {seconds:.1} s; {verified}{digest_text}\n",
            human_size(source.size_bytes),
        );
        let mut json = json!({
            "volume": name,
            "volume_uid": self.volume.volume_uid,
            "source": source.location,
            "format": Format::as_str(source.format),
            "size_bytes": source.size_bytes,
            "resumed_bytes": resumed_bytes,
            "digest": digest,
            "verified": is_verified,
            "elapsed_ms": (seconds * 1000.0) as u64,
        });
        if let Some(own_bytes) = own_bytes {
            json["difference_bytes"] = json!(own_bytes);
        }
        Report::new(text, json)
    }
}

/// Deletes what an export of a snapshot has made.
pub(super) async fn delete(server: &mut Server<'_>, name: &str) -> Result<(), Failure> {
    let request =
        v1::DeleteVolumeRequest { name: name.to_owned(), keep_snapshots: false, ..Default::default() };
    once(&server.client, request, |mut client, request| async move { client.delete_volume(request).await })
        .await?;
    Ok(())
}

/// `--drop`: ends what copies that were interrupted have left of a volume, on whichever machine.
async fn give_up(server: &ServerAddress, name: &str) -> Result<Report, Failure> {
    let mut server = Server::connect(server).await?;
    let volume = server.volume(name).await?;
    let ours = volume.attachments.iter().filter(|attachment| attachment.node_id.starts_with(NODE_PREFIX));
    let mut dropped = Vec::new();
    for attachment in ours {
        server.detach(&attachment.attachment_id).await?;
        dropped.push(attachment.node_id.clone());
    }
    let prefix = format!("import-{}-", volume.volume_uid);
    let entries = std::fs::read_dir(state_directory()?);
    let entries =
        entries.map_err(|error| Failure::other(format!("cannot read the state directory: {error}")))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            Journal::open(&entry.path())?.remove()?;
        }
    }
    if is_temporary_clone(&volume) {
        delete(&mut server, name).await?;
    }
    let text = match dropped.len() {
        0 => format!("no import or export has {name} attached\n"),
        _ => format!("detached {name} from {}\n", dropped.join(", ")),
    };
    Ok(Report::new(text, json!({ "volume": name, "dropped": dropped })))
}
