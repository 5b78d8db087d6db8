//! An image for containers, as an archive that containerd and Docker load: one layer, no base.
//!
//! Owns the format. The same files make the same bytes: no time, no owner but root. Never: decides what is in an image; that does
//! `image_contents`. Source: the OCI image format and layout, version 1.1; and Docker's `manifest.json`, which `docker load` reads.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use ring::digest::{Context, SHA256};
use serde_json::{Value, json};

/// What is read and written at once, in bytes.
const BUFFER_BYTES: usize = 1 << 16;

/// Something in the image's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A directory with this mode.
    Directory(u32),
    /// A copy of a file of this machine, with this mode.
    Copy(PathBuf, u32),
    /// A file with these words, for all to read.
    Words(String),
    /// A symbolic link to this path.
    Link(String),
}

/// An image.
#[derive(Debug, Clone)]
pub struct Image {
    /// Such as `volnode/volcsi:0.1.0`.
    pub name: String,
    /// The program that it runs unless it is told another.
    pub entry_point: String,
    /// What is in it, by paths without a slash before them. Their directories need not be named.
    pub entries: BTreeMap<String, Entry>,
}

/// A blob: what it is called, and its size in bytes.
struct Blob {
    digest: String,
    bytes: u64,
}

impl Blob {
    fn of(bytes: &[u8]) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(bytes);
        Self { digest: hexadecimal(context), bytes: bytes.len() as u64 }
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.digest)
    }

    fn described(&self, kind: &str) -> Value {
        let media_type = format!("application/vnd.oci.image.{kind}");
        json!({"mediaType": media_type, "digest": format!("sha256:{}", self.digest), "size": self.bytes})
    }
}

impl Image {
    /// Writes the archive.
    ///
    /// # Errors
    /// A file cannot be read, or the archive not written.
    pub fn write(&self, archive: &Path) -> Result<()> {
        let directory = archive.parent().filter(|parent| !parent.as_os_str().is_empty());
        let mut layer =
            tempfile::tempfile_in(directory.unwrap_or(Path::new("."))).context("a temporary file")?;
        self.write_layer(&mut layer).with_context(|| self.name.clone())?;
        let layer_blob = blob_of(&mut layer)?;
        let config = serde_json::to_vec(&self.config(&layer_blob))?;
        let config_blob = Blob::of(&config);
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config_blob.described("config.v1+json"),
            "layers": [layer_blob.described("layer.v1.tar")],
        }))?;
        let manifest_blob = Blob::of(&manifest);
        let index = self.index(&manifest_blob);
        let for_docker = json!([{
            "Config": config_blob.path(), "RepoTags": [self.name], "Layers": [layer_blob.path()],
        }]);
        let out = File::create(archive).with_context(|| archive.display().to_string())?;
        let mut tar = tar::Builder::new(out);
        append(&mut tar, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        append(&mut tar, "index.json", 0o644, &serde_json::to_vec(&index)?)?;
        append(&mut tar, "manifest.json", 0o644, &serde_json::to_vec(&for_docker)?)?;
        append(&mut tar, &config_blob.path(), 0o644, &config)?;
        append(&mut tar, &manifest_blob.path(), 0o644, &manifest)?;
        layer.rewind()?;
        tar.append_data(
            &mut header(tar::EntryType::Regular, 0o644, layer_blob.bytes),
            layer_blob.path(),
            layer,
        )?;
        tar.into_inner()?.sync_all().with_context(|| archive.display().to_string())
    }

    fn index(&self, manifest: &Blob) -> Value {
        let mut described = manifest.described("manifest.v1+json");
        // By the first ctr knows the image, by the second everybody else.
        described["annotations"] = json!({
            "io.containerd.image.name": format!("docker.io/{}", self.name),
            "org.opencontainers.image.ref.name": self.name.rsplit(':').next(),
        });
        described["platform"] = json!({"architecture": architecture(), "os": "linux"});
        let media_type = "application/vnd.oci.image.index.v1+json";
        json!({"schemaVersion": 2, "mediaType": media_type, "manifests": [described]})
    }

    fn config(&self, layer: &Blob) -> Value {
        json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Entrypoint": [self.entry_point],
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", layer.digest)]},
        })
    }

    fn write_layer(&self, out: &mut File) -> Result<()> {
        let mut tar = tar::Builder::new(out);
        for (path, entry) in self.with_directories() {
            match entry {
                Entry::Directory(mode) => {
                    let mut header = header(tar::EntryType::Directory, mode, 0);
                    tar.append_data(&mut header, format!("{path}/"), io::empty())?;
                }
                Entry::Copy(from, mode) => {
                    let file = File::open(&from).with_context(|| from.display().to_string())?;
                    let mut header = header(tar::EntryType::Regular, mode, file.metadata()?.len());
                    tar.append_data(&mut header, &path, file).with_context(|| from.display().to_string())?;
                }
                Entry::Words(words) => append(&mut tar, &path, 0o644, words.as_bytes())?,
                Entry::Link(target) => {
                    tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), &path, target)?;
                }
            }
        }
        Ok(tar.finish()?)
    }

    /// With all directories that are not named.
    fn with_directories(&self) -> BTreeMap<String, Entry> {
        let mut entries = self.entries.clone();
        for path in self.entries.keys() {
            for (at, _) in path.match_indices('/') {
                entries.entry(path[..at].to_owned()).or_insert(Entry::Directory(0o755));
            }
        }
        entries
    }
}

/// In Go's words, which images have.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn header(kind: tar::EntryType, mode: u32, bytes: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(bytes);
    for set in [tar::Header::set_uid, tar::Header::set_gid, tar::Header::set_mtime] {
        set(&mut header, 0);
    }
    header
}

fn append(tar: &mut tar::Builder<impl Write>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    Ok(tar.append_data(&mut header(tar::EntryType::Regular, mode, bytes.len() as u64), path, bytes)?)
}

fn blob_of(file: &mut File) -> Result<Blob> {
    file.rewind()?;
    let (mut context, mut bytes, mut buffer) = (Context::new(&SHA256), 0, vec![0; BUFFER_BYTES]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Blob { digest: hexadecimal(context), bytes }),
            read => {
                context.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
}

fn hexadecimal(context: Context) -> String {
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
