//! `export`: a volume's or snapshot's bytes become an image.
//!
//! A file has another name until it is whole. A snapshot is exported by way of a clone, which takes no space, and is there for no longer
//! than the export needs it; its name says whose it is, so that an export that was interrupted finds it again.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use client::image::copy::{Pass, copy, verify};
use client::image::format::Format;
use client::image::journal::{JOURNAL_VERSION, Journal, JournalHead};
use client::image::overlay::Readable;
use client::image::qemu::{self, QemuNbd, Serving};
use client::image::store::Store;
use client::node::target::NbdUri;
use proto::error_reason as reason;
use proto::nbd::block_status::ALLOCATION_CONTEXT;
use proto::v1;
use serde_json::json;

use super::import::delete;
use super::places::{PartFile, check_writable, nbd_uri, open_uri};
use super::progress::Progress;
use super::since::{Completed, Copied, Since, check_image_name};
use super::volumes::{Attached, Server, machine_id};
use super::{
    ExportArgs, Returning, copy_failure, lost_behind_a_copy, qemu_failure, short_hash, state_directory,
    through_losses,
};
use crate::connect::ServerAddress;
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::report::Report;
use crate::size::human_size;
use crate::snapshots;

/// How often a snapshot's clone is made, where others take it away.
const CLONE_ATTEMPTS: u32 = 5;

pub(crate) async fn export(address: &ServerAddress, args: ExportArgs) -> Result<Report, Failure> {
    through_losses(async || export_once(address, &args).await).await
}

async fn export_once(address: &ServerAddress, args: &ExportArgs) -> Result<Report, Failure> {
    let uri = nbd_uri(&args.destination)?;
    check_since(args, uri.as_ref())?;
    let format = format_of(args, uri.as_ref())?;
    let destination = match &uri {
        Some(uri) => Destination::Uri(uri.clone()),
        None => Destination::File(PartFile::place(Path::new(&args.destination), args.force)?),
    };
    let mut server = Server::connect(address).await?;
    if !args.source.contains('@') {
        let volume = server.volume(&args.source).await?;
        let export = Export { args, volume, destination: &destination, format, since: None };
        return export.run(&mut server, address).await;
    }
    let mut attempts_left = CLONE_ATTEMPTS;
    loop {
        attempts_left -= 1;
        let exported = async {
            let volume = snapshots::temporary_clone(&mut server.client, &args.source).await?;
            let name = volume.name.clone();
            let mut clones = vec![name];
            let report = async {
                let since = match &args.since {
                    Some(since) => Some(Since::begin(&mut server, args, since, &volume).await?),
                    None => None,
                };
                clones.extend(since.as_ref().map(|since| since.clone.name.clone()));
                let export = Export { args, volume, destination: &destination, format, since };
                export.run(&mut server, address).await
            };
            let report = report.await;
            let mut deleted = Ok(());
            for name in &clones {
                deleted = deleted.and(delete_clone(&mut server, name).await);
            }
            match (&report, deleted) {
                (Ok(_), Err(failure)) => Err(failure),
                // What the export failed for is told.
                _ => report,
            }
        };
        match exported.await {
            // Another export of that snapshot has ended, and deleted it.
            Err(failure) if failure.reason == reason::VOLUME_NOT_FOUND && attempts_left > 0 => {}
            exported => return exported,
        }
    }
}

/// Deletes a snapshot's clone, unless it is attached: another export reads it, or one that was begun needs it to go on.
async fn delete_clone(server: &mut Server<'_>, name: &str) -> Result<(), Failure> {
    let deleted = match server.volume(name).await {
        Ok(volume) if !volume.attachments.is_empty() => return Ok(()),
        Ok(_) => delete(server, name).await,
        Err(failure) => Err(failure),
    };
    let is_anothers = |failure: &Failure| {
        let theirs = [reason::VOLUME_NOT_FOUND, reason::VOLUME_ATTACHED, reason::VOLUME_OPEN];
        theirs.contains(&failure.reason.as_str())
    };
    match deleted {
        Err(failure) if is_anothers(&failure) => Ok(()),
        Err(failure) => Err(Failure {
            what: format!("the image is whole, but clone {name} cannot be deleted: {}", failure.what),
            next: format!("delete it: volctl import --drop {name}"),
            ..failure
        }),
        Ok(()) => Ok(()),
    }
}

/// Whether what is asked for can be a difference.
fn check_since(args: &ExportArgs, uri: Option<&NbdUri>) -> Result<(), Failure> {
    let Some(image_name) = args.base_image.as_ref().filter(|_| args.since.is_some()) else { return Ok(()) };
    let usage = |what: &str, next: &str| Err(Failure::new(ExitCode::Usage, what, next));
    if uri.is_some() {
        return usage("an NBD export holds no difference", "export it to a file");
    }
    if args.format.is_some_and(|format| Format::from(format) != Format::Qcow2) {
        return usage("only a qcow2 holds a difference", "leave --format out, or say --format qcow2");
    }
    if !args.source.contains('@') {
        let next = format!("take one (volctl snapshot create {} NAME) and export that", args.source);
        return usage("a difference is one between two snapshots", &next);
    }
    check_image_name(image_name)
}

fn format_of(args: &ExportArgs, uri: Option<&NbdUri>) -> Result<Format, Failure> {
    let said = args.format.map(Format::from);
    match uri {
        Some(_) if said.is_some_and(|said| said != Format::Raw) => {
            let next = "an export is a disk already: leave --format out";
            Err(Failure::new(ExitCode::Usage, "--format is for files", next))
        }
        Some(_) => Ok(Format::Raw),
        None if args.since.is_some() => Ok(Format::Qcow2),
        None => Ok(said.or_else(|| Format::of_name(&args.destination)).unwrap_or(Format::Raw)),
    }
}

enum Destination {
    File(PartFile),
    Uri(NbdUri),
}

struct Export<'a> {
    args: &'a ExportArgs,
    volume: v1::Volume,
    destination: &'a Destination,
    format: Format,
    since: Option<Since>,
}

impl Export<'_> {
    async fn run(&self, server: &mut Server<'_>, address: &ServerAddress) -> Result<Report, Failure> {
        let begun = Instant::now();
        let location = self.location()?;
        let directory = state_directory()?;
        let identity = format!("{}{}", self.volume.volume_uid, self.since_identity());
        let copy_id = short_hash(&[&machine_id(), &directory.to_string_lossy(), &identity, &location]);
        let mut journal = Journal::open(&match self.destination {
            Destination::File(part) => part.journal(),
            Destination::Uri(_) => {
                directory.join(format!("export-{}-{copy_id}.journal", self.volume.volume_uid))
            }
        })?;
        let is_known = journal.head().is_some();
        let attached = match server.attach(&self.volume, &copy_id, v1::AccessMode::MultiNodeReaderOnly).await
        {
            Ok(attached) => attached,
            Err(failure) => return Err(self.not_begun(journal, is_known, failure)),
        };
        let (store, server_of_image) = match self.prepare(&attached, &mut journal, address).await {
            Ok(prepared) => prepared,
            Err(failure) => {
                if !attached.existed {
                    // What the export failed for is told.
                    let _ = server.detach(&attached.attachment_id).await;
                }
                return Err(self.not_begun(journal, is_known, failure));
            }
        };
        let size_bytes = self.volume.capacity_bytes;
        let resumed_bytes = (journal.chunks() * client::image::CHUNK_BYTES).min(size_bytes);
        let go_on = self.go_on();
        let work = async {
            self.copy(&attached, &store, &mut journal, &go_on).await?;
            store.close().await;
            if let Some(server) = server_of_image {
                server.finish().map_err(|error| qemu_failure(&error))?;
            }
            let (Some(since), Destination::File(part)) = (&self.since, self.destination) else {
                return Ok(None);
            };
            let (copy_id, journal, go_on) = (copy_id.as_str(), &journal, go_on.as_str());
            let is_verified = !self.args.no_verify;
            let copied = Copied { copy_id, part, journal, size_bytes, is_verified, go_on };
            since.complete(server, &copied).await.map(Some)
        };
        let completed = tokio::select! {
            completed = work => completed,
            _ = tokio::signal::ctrl_c() => Err(Failure::new(ExitCode::Other, "interrupted", go_on.clone())),
        };
        let completed = completed?;
        let attachment_id = attached.close().await;
        // As long as the image does not have its name the command can be repeated: nothing stays attached for a file that is there.
        server.detach(&attachment_id).await.map_err(lost_behind_a_copy)?;
        if let Destination::File(part) = self.destination {
            part.finish()?;
        }
        let is_whole = self.since.is_none() || !self.args.no_verify;
        let digest = is_whole.then(|| journal.digest());
        journal.remove()?;
        Ok(self.report(&location, digest, completed, resumed_bytes, begun))
    }

    fn since_identity(&self) -> String {
        self.since.as_ref().map(Since::identity).unwrap_or_default()
    }

    /// What to do where it was interrupted.
    fn go_on(&self) -> String {
        let drop = |name: &str| format!("volctl import --drop {name}");
        let base = self.since.as_ref().map(|since| format!(", and {}", drop(&since.clone.name)));
        format!(
            "repeat the command: it goes on where it stopped; or give it up: {}{}",
            drop(&self.volume.name),
            base.unwrap_or_default()
        )
    }

    /// Leaves nothing of an export that has not begun, and as it is what an earlier run has left.
    fn not_begun(&self, journal: Journal, is_known: bool, failure: Failure) -> Failure {
        if !is_known {
            // What the export failed for is told.
            let _ = journal.remove();
            if let Destination::File(part) = self.destination {
                part.remove_if_new();
            }
        }
        failure
    }

    fn location(&self) -> Result<String, Failure> {
        match self.destination {
            Destination::Uri(uri) => Ok(uri.to_string()),
            Destination::File(part) => part.location(),
        }
    }

    /// Opens the destination, and finds out whether the copy goes on or begins.
    async fn prepare(
        &self,
        attached: &Attached,
        journal: &mut Journal,
        address: &ServerAddress,
    ) -> Result<(Store, Option<QemuNbd>), Failure> {
        let size_bytes = self.volume.capacity_bytes;
        let (identity, opened) = match self.destination {
            Destination::File(part) => {
                part.open(journal.head().is_some())?;
                (part.identity()?, None)
            }
            Destination::Uri(uri) => {
                let client = open_uri(uri, address.tls_files.as_ref()).await?;
                check_writable(uri, &client, size_bytes)?;
                (format!("{uri} {}", client.export.size_bytes), Some(Store::Nbd(Box::new(client))))
            }
        };
        let head = JournalHead {
            format_version: JOURNAL_VERSION,
            source: format!(
                "volume {} attachment {}{}{}",
                self.volume.volume_uid,
                attached.attachment_id,
                self.since_identity(),
                // What was not read has no digest: a run that reads all does not go on where such a one stopped.
                if self.since.is_some() && self.args.no_verify { " unread" } else { "" }
            ),
            destination: format!("{identity} {}", self.format),
            size_bytes,
            was_zero: matches!(self.destination, Destination::File(_)),
        };
        let is_begun = match self.destination {
            Destination::File(part) => part.is_begun(self.format, size_bytes)?,
            Destination::Uri(_) => true,
        };
        let goes_on = is_begun && journal.head() == Some(&head);
        if let (Destination::Uri(uri), Some(store)) = (self.destination, &opened)
            && !goes_on
            && !self.args.force
            && !super::is_all_zeroes(store, size_bytes).await?
        {
            let what = format!("{uri} has other bytes than zeroes");
            return Err(Failure::new(ExitCode::AlreadyExists, what, "overwrite them: --force"));
        }
        if let (Destination::File(part), false) = (self.destination, goes_on) {
            // Ours from now on, and nothing that a run could go on with: what is copied is lost before the journal knows.
            journal.begin(JournalHead { destination: String::new(), ..head.clone() })?;
            match self.format {
                Format::Raw => part.clear(size_bytes)?,
                format => qemu::make_empty(part.file()?, part.target(), format, size_bytes)
                    .map_err(|error| qemu_failure(&error))?,
            }
        }
        let (store, server) = match (opened, self.destination) {
            (Some(store), _) => (store, None),
            (None, Destination::File(part)) if self.format != Format::Raw => {
                let (path, file, context) = (part.path.as_path(), part.file()?, ALLOCATION_CONTEXT);
                let serving = Serving {
                    path,
                    file,
                    format: self.format,
                    writes: true,
                    is_trusted: false,
                    // What names a base already was whole but for its name.
                    is_alone: self.since.is_some(),
                    context,
                };
                if goes_on && self.format == Format::Qcow2 {
                    qemu::give_back_leaks(&serving).map_err(|error| qemu_failure(&error))?;
                }
                let (server, client) = qemu::serve(&serving).await.map_err(|error| qemu_failure(&error))?;
                (Store::Nbd(Box::new(client)), Some(server))
            }
            (None, Destination::File(part)) => (Store::File(Arc::clone(part.file()?)), None),
            (None, Destination::Uri(uri)) => return Err(Failure::other(format!("{uri} was not opened"))),
        };
        if !goes_on {
            journal.begin(head)?;
        }
        Ok((store, server))
    }

    async fn copy(
        &self,
        attached: &Attached,
        store: &Store,
        journal: &mut Journal,
        go_on: &str,
    ) -> Result<(), Failure> {
        let size_bytes = self.volume.capacity_bytes;
        let is_uri = matches!(self.destination, Destination::Uri(_));
        let failed = |error| copy_failure(error, go_on, Returning { source: true, destination: is_uri });
        let changes = self.since.as_ref().map(|since| &since.changes);
        let pass = Pass {
            from: Readable::Store(&attached.store),
            to: Some(store),
            is_zero: journal.head().is_some_and(|head| head.was_zero),
            size_bytes,
            checkpoint_bytes: self.args.checkpoint_bytes,
            changes,
            reads_all: changes.is_none() || !self.args.no_verify,
        };
        {
            let progress =
                Progress::new("copying", size_bytes, journal.chunks() * client::image::CHUNK_BYTES);
            let at = |done| progress.at(done);
            copy(&pass, journal, &at).await.map_err(failed)?;
        }
        if !self.args.no_verify && changes.is_none() {
            let progress = Progress::new("verifying", size_bytes, 0);
            let at = |done| progress.at(done);
            verify(Readable::Store(store), size_bytes, journal, &at).await.map_err(failed)?;
        }
        Ok(())
    }

    fn report(
        &self,
        location: &str,
        digest: Option<String>,
        completed: Option<Completed>,
        resumed_bytes: u64,
        begun: Instant,
    ) -> Report {
        let (name, is_verified) = (&self.args.source, !self.args.no_verify);
        let seconds = begun.elapsed().as_secs_f64();
        let verified = if is_verified { "verified" } else { "not verified" };
        let size_bytes = self.volume.capacity_bytes;
        let resumed = match resumed_bytes {
            0 => String::new(),
            bytes => format!(", {} of them by an earlier run", human_size(bytes)),
        };
        let since = match (&completed, &self.args.since) {
            (Some(completed), Some(since)) => {
                format!(" since {since}: {} of", human_size(completed.own_bytes))
            }
            _ => ":".to_owned(),
        };
        let digest_text = digest.as_ref().map(|digest| format!(", digest {digest}")).unwrap_or_default();
        let text = format!(
            "exported {name} to {location}{since} {}{resumed}, in {seconds:.1} s; {verified}{digest_text}\n",
            human_size(size_bytes),
        );
        let mut json = json!({
            "source": name,
            "destination": location,
            "format": self.format.as_str(),
            "size_bytes": size_bytes,
            "resumed_bytes": resumed_bytes,
            "digest": digest,
            "verified": is_verified,
            "elapsed_ms": (seconds * 1000.0) as u64,
        });
        if let Some(Completed { own_bytes, base_digest }) = completed {
            json["since"] = json!(self.args.since);
            json["base_image"] = json!(self.args.base_image);
            json["difference_bytes"] = json!(own_bytes);
            json["base_digest"] = json!(base_digest);
        }
        Report::new(text, json)
    }
}
