//! `export --since`: what an image of a difference takes besides what every export does.
//!
//! Order: the server tells which ranges changed, and only those are copied (`export.rs`). Then the image is read as an import would read it, above
//! the base's own bytes, and compared with what was copied: so a change that nobody told of is found as well. Its header says
//! at last which base it needs, by name for QEMU and by digest for an import.

use std::sync::Arc;

use client::image::changes::Changes;
use client::image::copy::{base_digest, verify};
use client::image::format::{self, Format};
use client::image::journal::Journal;
use client::image::overlay::{Overlay, Readable};
use client::image::qcow2_header::{self, DIFFERENCE_VERSION, Difference};
use client::image::qemu::{self, Serving};
use client::image::store::Store;
use proto::v1;

use super::places::PartFile;
use super::progress::Progress;
use super::volumes::Server;
use super::{ExportArgs, Returning, copy_failure, qemu_failure};
use crate::connect::{self, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::snapshots;

/// The base of a difference, and where it differs.
#[derive(Debug)]
pub(super) struct Since {
    /// A volume with the base's bytes, as long as the export needs it.
    pub(super) clone: v1::Volume,
    /// In whole clusters.
    pub(super) changes: Changes,
    /// As the user calls the base.
    name: String,
    image_name: String,
    image_format: Format,
}

/// A difference that is copied, and says nothing of its base yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copied<'a> {
    pub(super) copy_id: &'a str,
    pub(super) part: &'a PartFile,
    pub(super) journal: &'a Journal,
    /// Of the target.
    pub(super) size_bytes: u64,
    pub(super) is_verified: bool,
    /// What to do where it fails.
    pub(super) go_on: &'a str,
}

/// What is told of a difference that is whole.
#[derive(Debug)]
pub(super) struct Completed {
    /// What the image has of its own.
    pub(super) own_bytes: u64,
    /// `None`: nothing was read back.
    pub(super) base_digest: Option<String>,
}

/// The base as it is named behind `--since`: a bare name is one of the same volume.
pub(super) fn base_name(source: &str, since: &str) -> Result<String, Failure> {
    if since.contains('@') {
        return Ok(since.to_owned());
    }
    match source.split_once('@') {
        Some((volume, _)) if !volume.is_empty() => Ok(format!("{volume}@{since}")),
        _ => Err(Failure::new(
            ExitCode::Usage,
            format!("which volume's snapshot {since}?"),
            "name it: --since VOLUME@SNAPSHOT, or @UID",
        )),
    }
}

/// The name of a base's image, as QEMU is to look for it: a path that is no protocol to it, and leads to the same place wherever the images
/// are moved together.
pub(super) fn check_image_name(name: &str) -> Result<(), Failure> {
    let what = if name.is_empty() || name.starts_with('/') {
        "is no path from the image's folder"
    } else if name.split('/').next().is_some_and(|first| first.contains(':')) {
        "would be a protocol to QEMU, for the : in it"
    } else if name.len() > qcow2_header::BACKING_NAME_BYTES_MAX {
        "is longer than a qcow2 can hold"
    } else {
        return Ok(());
    };
    let next = "give a relative path: --base-image monday.qcow2, or ./a:b";
    Err(Failure::new(ExitCode::Usage, format!("--base-image {name:?} {what}"), next))
}

impl Since {
    /// Makes a clone of the base, and asks what has changed up to a snapshot, of which `target` is a clone.
    pub(super) async fn begin(
        server: &mut Server<'_>,
        args: &ExportArgs,
        since: &str,
        target: &v1::Volume,
    ) -> Result<Self, Failure> {
        let name = base_name(&args.source, since)?;
        let image_name = args.base_image.clone().unwrap_or_default();
        let said = args.base_format.map(Format::from);
        let image_format = said.or_else(|| Format::of_name(&image_name)).unwrap_or(Format::Raw);
        let snapshot = snapshots::find(&mut server.client, &name).await?;
        if snapshot.snapshot_uid == target.source_uid {
            let what = format!("{} and {name} are one snapshot", args.source);
            return Err(Failure::new(ExitCode::Usage, what, "name an earlier one: --since"));
        }
        let size_bytes = target.capacity_bytes;
        if snapshot.capacity_bytes > size_bytes {
            let what = format!(
                "{name} is larger than {}, and qemu-img would not read its end as it is",
                args.source
            );
            return Err(Failure::new(ExitCode::Usage, what, "export the whole: leave --since out"));
        }
        let changes =
            changes(server, &snapshot.snapshot_uid, &target.source_uid).await?.in_clusters(size_bytes);
        let clone = snapshots::temporary_clone(&mut server.client, &name).await?;
        Ok(Self { clone, changes, name, image_name, image_format })
    }

    /// Compares base and image with what was copied, unless that is not wanted, and writes into the header what the base is.
    pub(super) async fn complete(
        &self,
        server: &mut Server<'_>,
        copied: &Copied<'_>,
    ) -> Result<Completed, Failure> {
        let Copied { copy_id, part, journal, size_bytes, is_verified, go_on } = *copied;
        let failed = |error| qemu_failure(&error);
        let (path, file, format) = (part.path.as_path(), part.file()?, Format::Qcow2);
        let context = proto::nbd::block_status::ALLOCATION_CONTEXT;
        // Our own: it is read with our rights.
        let serving =
            Serving { path, file, format, writes: true, is_trusted: false, is_alone: true, context };
        let own = qemu::own_bytes(&serving).await.map_err(failed)?;
        let mut completed = Completed { own_bytes: own.total_bytes(), base_digest: None };
        // Of the two that are read here the base is a server's.
        let base_returns = Returning { source: true, destination: true };
        if is_verified {
            let access = v1::AccessMode::MultiNodeReaderOnly;
            let base = server.attach(&self.clone, copy_id, access).await?;
            let (qemu, client) = qemu::serve(&serving).await.map_err(failed)?;
            let above = Arc::new(Store::Nbd(Box::new(client)));
            let overlay = Overlay::new(Arc::clone(&base.store), self.clone.capacity_bytes, above, own);
            {
                let progress = Progress::new("verifying", size_bytes, 0);
                let at = |done| progress.at(done);
                let verified = verify(Readable::Overlay(&overlay), size_bytes, journal, &at).await;
                verified.map_err(|error| copy_failure(error, go_on, base_returns))?;
            }
            let digest = base_digest(&overlay, journal.pieces(), size_bytes).await;
            completed.base_digest = Some(digest.map_err(|error| copy_failure(error, go_on, base_returns))?);
            overlay.close().await;
            qemu.finish().map_err(failed)?;
            let attachment_id = base.close().await;
            server.detach(&attachment_id).await?;
        }
        let difference = Difference {
            format_version: DIFFERENCE_VERSION,
            base: self.name.clone(),
            base_digest: completed.base_digest.clone(),
            digest: is_verified.then(|| journal.digest()),
        };
        let begin = part.read_begin(format::LOOK_BYTES)?;
        let begin = qcow2_header::with_base(&begin, &self.image_name, self.image_format, &difference)?;
        part.write_begin(&begin)?;
        Ok(completed)
    }

    /// How much of the target is copied, for what is said.
    pub(super) fn identity(&self) -> String {
        format!(" since {}", self.clone.source_uid)
    }
}

/// What the server tells of two snapshots.
async fn changes(server: &mut Server<'_>, base_uid: &str, target_uid: &str) -> Result<Changes, Failure> {
    let side = |uid: &str| Some(v1::DiffSide { snapshot_uid: uid.to_owned(), ..Default::default() });
    let request =
        v1::DiffSnapshotsRequest { base: side(base_uid), target: side(target_uid), offset_bytes: 0 };
    let mut stream = call(server.client.diff_snapshots(request)).await?;
    let mut changes = Changes::default();
    let broken = |what: &str| {
        let next = "repeat the command; see the server's log if it happens again";
        Failure::new(ExitCode::Other, format!("the server {what}"), next)
    };
    while let Some(part) = connect::next(stream.message()).await? {
        for range in part.ranges {
            let end = range.offset_bytes.saturating_add(range.length_bytes);
            if !changes.push(range.offset_bytes..end) {
                return Err(broken("does not tell changes in their order"));
            }
        }
        if part.total.is_some() {
            return Ok(changes);
        }
    }
    Err(broken("ended the comparison before its end"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_named_by_its_snapshot_alone_or_with_its_volume() {
        assert_eq!(base_name("web@tuesday", "monday").unwrap(), "web@monday");
        assert_eq!(base_name("web@tuesday", "db@monday").unwrap(), "db@monday");
        assert_eq!(base_name("@7", "@6").unwrap(), "@6");
        assert_eq!(base_name("@7", "monday").unwrap_err().exit_code, ExitCode::Usage);
    }

    #[test]
    fn the_name_of_a_bases_image_is_a_path_to_qemu() {
        for good in ["monday.qcow2", "../a/b.img", "./a:b", "a/b:c"] {
            check_image_name(good).unwrap();
        }
        let long = "x".repeat(1024);
        for bad in ["", "/images/monday.qcow2", "nbd:localhost:1", "json:{}", &long] {
            assert_eq!(check_image_name(bad).unwrap_err().exit_code, ExitCode::Usage, "{bad}");
        }
    }
}
