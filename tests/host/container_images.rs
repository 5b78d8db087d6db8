//! The images that `cargo lab images` makes: the archive is what containerd and Docker read, what is in it runs with nothing else around, and
//! nothing is missing that volcsi runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use testlab::image_contents::{IMAGES, image};
use testlab::oci_image::Entry;

use super::images::is_there;
use super::programs;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The files of an archive.
fn files(archive: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(File::open(archive).unwrap());
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (entry.path().unwrap().display().to_string(), bytes)
    });
    entries.collect()
}

/// The blob that is described, with its digest and size checked by another program than the one that wrote them.
fn blob<'a>(files: &'a BTreeMap<String, Vec<u8>>, described: &Value) -> &'a [u8] {
    let digest = described["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
    let bytes = &files[&format!("blobs/sha256/{digest}")];
    assert_eq!(described["size"], bytes.len());
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let output = Command::new("sha256sum").arg(file.path()).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().starts_with(digest));
    bytes
}

/// Makes the image, reads it as a container runtime does, and unpacks its root into a directory.
fn unpacked(program: &str, directory: &Path) -> PathBuf {
    let archive = directory.join(format!("{program}.tar"));
    let image = image(program, &programs::directory()).unwrap();
    image.write(&archive).unwrap();
    let files = files(&archive);
    let json = |name: &str| -> Value { serde_json::from_slice(&files[name]).unwrap() };
    assert_eq!(json("oci-layout")["imageLayoutVersion"], "1.0.0");
    let index = json("index.json");
    let described = &index["manifests"][0];
    let name = format!("volnode/{program}:{}", env!("CARGO_PKG_VERSION"));
    assert_eq!(described["annotations"]["io.containerd.image.name"], format!("docker.io/{name}"));
    let manifest: Value = serde_json::from_slice(blob(&files, described)).unwrap();
    let config: Value = serde_json::from_slice(blob(&files, &manifest["config"])).unwrap();
    let layer = blob(&files, &manifest["layers"][0]);
    assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
    assert_eq!(config["config"]["Entrypoint"][0], format!("/usr/local/bin/{program}"));
    let for_docker = &json("manifest.json")[0];
    assert_eq!(for_docker["RepoTags"][0], name);
    for path in [&for_docker["Config"], &for_docker["Layers"][0]] {
        assert!(files.contains_key(path.as_str().unwrap()));
    }
    let values = fs::read_to_string(root().join("deploy/kubernetes/volnode/values.yaml")).unwrap();
    assert!(values.contains(&format!("  {program}: {name}\n")), "the chart has another name than {name}");
    let unpacked = directory.join(program);
    let mut layer = tar::Archive::new(layer);
    layer.set_preserve_permissions(true);
    layer.unpack(&unpacked).unwrap();
    unpacked
}

/// Runs a program with the image as its root.
fn inside(image: &Path, words: &[&str]) -> Output {
    let mut chroot = Command::new("chroot");
    chroot
        .arg(image)
        .args(words)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin")
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Whether what goes into an image is on this machine; the lab has installed it.
fn can_be_made() -> bool {
    let is_it = ["chroot", "ldd", "sha256sum", "blkid", "mkfs.ext4", "mkfs.xfs"].into_iter().all(is_there);
    let is_promised = std::env::var_os("VOLNODE_LAB_TOOLS").is_some_and(|value| value == "1");
    assert!(is_it || !is_promised, "cannot run");
    is_it
}

#[test]
fn what_is_in_an_image_runs_with_nothing_else() {
    if !can_be_made() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let images = IMAGES.map(|program| (program, unpacked(program, directory.path())));
    if !rustix::process::geteuid().is_root() {
        return println!("SKIP another root is for root alone");
    }
    for (program, image) in &images {
        let output = inside(image, &[program, "--version"]);
        assert_eq!(said(&output), format!("{program} {}\n", env!("CARGO_PKG_VERSION")));
    }
    let volcsi = &images[0].1;
    for (words, begins) in [
        (["mkfs.ext4", "-V"], "mke2fs 1."),
        (["e2fsck", "-V"], "e2fsck 1."),
        (["resize2fs", "-h"], "resize2fs 1."),
        (["mkfs.xfs", "-V"], "mkfs.xfs version "),
        (["xfs_growfs", "-V"], "xfs_growfs version "),
        (["blkid", "-V"], "blkid from util-linux"),
    ] {
        // Some print a word about an option that they have not, and all their version.
        let output = inside(volcsi, &words);
        assert!(said(&output).contains(begins), "{words:?}: {}", said(&output));
    }
    // And they work.
    for (make, found, bytes) in
        [("mkfs.ext4", "TYPE=ext4", 16_u64 << 20), ("mkfs.xfs", "TYPE=xfs", 512 << 20)]
    {
        File::create(volcsi.join("tmp/disk")).unwrap().set_len(bytes).unwrap();
        let output = inside(volcsi, &[make, "-q", "/tmp/disk"]);
        assert!(output.status.success(), "{make}: {}", said(&output));
        let output = inside(volcsi, &["blkid", "--probe", "--output", "export", "/tmp/disk"]);
        assert!(said(&output).lines().any(|line| line == found), "{}", said(&output));
        if make == "mkfs.ext4" {
            assert!(inside(volcsi, &["e2fsck", "-p", "/tmp/disk"]).status.success());
        }
    }
}

#[test]
fn the_same_files_make_the_same_image() {
    if !can_be_made() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let one = image("volserver", &programs::directory()).unwrap();
    let archives = ["one.tar", "other.tar"].map(|name| directory.path().join(name));
    for archive in &archives {
        one.write(archive).unwrap();
    }
    assert!(fs::read(&archives[0]).unwrap() == fs::read(&archives[1]).unwrap());
    let more = image("volcsi", &programs::directory()).unwrap().entries;
    assert!(more.len() > one.entries.len());
    assert!(more.values().all(|entry| !matches!(entry, Entry::Copy(_, mode) if mode & 0o022 != 0)));
}

/// The programs that the CSI plugin names where it starts one.
fn started_by_volcsi() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root().join("client/src/csi")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]").next().unwrap();
            if path.ends_with("tests.rs") {
                continue;
            }
            for start in ["Command::new(\"", "on_device(\""] {
                let names = text.split(start).skip(1);
                found.extend(names.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
            }
        }
    }
    found
}

#[test]
fn what_volcsi_runs_is_in_its_image() {
    if !can_be_made() {
        return;
    }
    let entries = image("volcsi", &programs::directory()).unwrap().entries;
    let started = started_by_volcsi();
    assert!(started.contains("blkid") && started.contains("e2fsck"), "{started:?}");
    let file_systems = ["mkfs.ext4", "mkfs.xfs"].map(str::to_owned);
    for program in started.into_iter().chain(file_systems) {
        let path = format!("usr/sbin/{program}");
        assert!(entries.contains_key(&path), "no {program}: see image_contents.rs of tests/src");
    }
}
