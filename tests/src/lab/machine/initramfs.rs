//! The guest's first stage: a small initramfs with busybox, the few modules needed to reach this machine's root
//! over 9p, and a script that mounts it and hands over to the second stage (`guest/second_stage.sh`).
//!
//! Built anew for each boot (a tenth of a second), because it depends on the kernel only. Modules are found by
//! the kernel's own index, `modules.dep(5)` and `modules.builtin`.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::kernels::Kernel;
use crate::lab::tool;

/// What the first stage needs before it can reach the other modules: PCI, 9p over virtio, overlay, the ports
/// over which output leaves the guest, the scratch disk, and the network card.
const MODULES: [&str; 7] =
    ["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console", "virtio_blk", "e1000"];

/// Runs as process 1 of the initramfs.
const FIRST_STAGE: &str = include_str!("guest/first_stage.sh");

/// Packing a few megabytes.
const PACK_DEADLINE: Duration = Duration::from_secs(60);

/// Builds the initramfs of `kernel` in `directory` and returns its file.
///
/// # Errors
/// busybox or a module is missing, or cpio fails.
pub(crate) fn build(kernel: &Kernel, directory: &Path) -> Result<PathBuf> {
    let root = directory.join("initramfs");
    for name in ["bin", "modules", "proc", "sys", "dev", "lower", "upper", "newroot"] {
        fs::create_dir_all(root.join(name)).context("creating the initramfs tree")?;
    }
    let busybox = tool::find("busybox").context("there is no busybox")?;
    fs::copy(busybox, root.join("bin/busybox")).context("copying busybox")?;
    let init = root.join("init");
    fs::write(&init, FIRST_STAGE).context("writing the first stage")?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))
        .context("making the first stage executable")?;
    let mut order = String::new();
    for (index, module) in modules_in_load_order(kernel)?.iter().enumerate() {
        let name = format!("{index:02}.ko");
        fs::write(root.join("modules").join(&name), decompressed(module)?).context("writing a module")?;
        order.push_str(&name);
        order.push('\n');
    }
    fs::write(root.join("modules/order"), order).context("writing the module order")?;
    let image = directory.join("initramfs.cpio");
    pack(&root, &image)?;
    fs::remove_dir_all(&root).context("removing the initramfs tree")?;
    Ok(image)
}

/// The files of [`MODULES`] and of everything they depend on, dependencies first.
fn modules_in_load_order(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let tree = kernel.modules.join(&kernel.release);
    let index = fs::read_to_string(tree.join("modules.dep")).context("reading modules.dep")?;
    let builtin = fs::read_to_string(tree.join("modules.builtin")).context("reading modules.builtin")?;
    Ok(load_order(&index, &builtin, &MODULES)?.into_iter().map(|file| tree.join(file)).collect())
}

/// Resolves module names with a `modules.dep`, leaving out what is built in.
fn load_order(index: &str, builtin: &str, names: &[&str]) -> Result<Vec<String>> {
    let lines = index.lines().filter_map(|line| line.split_once(':'));
    let by_name: HashMap<String, (&str, &str)> =
        lines.map(|(file, needs)| (module_name(file), (file, needs))).collect();
    let mut order: Vec<String> = Vec::new();
    for name in names {
        let Some((file, needs)) = by_name.get(*name) else {
            ensure!(
                builtin.lines().any(|file| module_name(file) == *name),
                "this kernel has no module {name}"
            );
            continue;
        };
        // modules.dep lists what is needed in the reverse of the order in which it must be loaded.
        for wanted in needs.split_whitespace().rev().chain(std::iter::once(*file)) {
            if !order.iter().any(|present| present == wanted) {
                order.push(wanted.to_owned());
            }
        }
    }
    Ok(order)
}

/// `kernel/fs/9p/9p.ko.xz` → `9p`; the kernel takes `-` and `_` in a module's name for the same.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

/// The module's bytes, whatever it is compressed with: busybox cannot load compressed ones.
fn decompressed(module: &Path) -> Result<Vec<u8>> {
    let program = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(module).with_context(|| format!("reading {}", module.display())),
    };
    tool::output(tool::command(program).arg("-dc").arg(module), PACK_DEADLINE)
}

/// Packs a directory as the newc archive the kernel unpacks; uncompressed, for there is nothing to save.
fn pack(root: &Path, image: &Path) -> Result<()> {
    let list = tool::output(Command::new("find").current_dir(root).arg("."), PACK_DEADLINE)?;
    let names = image.with_extension("names");
    fs::write(&names, list).context("writing the list of files")?;
    let mut cpio = tool::command("cpio");
    cpio.current_dir(root).args(["--quiet", "-o", "-H", "newc", "--owner=0:0"]);
    cpio.stdin(fs::File::open(&names)?).stdout(fs::File::create(image)?).stderr(Stdio::inherit());
    let mut child = cpio.spawn().context("cannot run cpio")?;
    let status = tool::wait(&mut child, PACK_DEADLINE).context("cpio")?;
    ensure!(status.success(), "cpio: {status}");
    fs::remove_file(&names).context("removing the list of files")
}

#[cfg(test)]
mod tests {
    use super::load_order;

    const INDEX: &str = "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz\n\
                         kernel/net/9p/9pnet.ko.xz:\nkernel/fs/netfs/netfs.ko.xz:\n\
                         kernel/drivers/virtio/virtio-pci.ko.zst:\n";

    #[test]
    fn dependencies_load_before_what_needs_them_and_once_only() {
        let order = load_order(INDEX, "", &["9pnet", "9p"]).unwrap();
        let expected = ["kernel/net/9p/9pnet.ko.xz", "kernel/fs/netfs/netfs.ko.xz", "kernel/fs/9p/9p.ko.xz"];
        assert_eq!(order, expected);
    }

    #[test]
    fn a_dash_in_a_file_name_is_an_underscore_in_a_module_name() {
        assert_eq!(
            load_order(INDEX, "", &["virtio_pci"]).unwrap(),
            ["kernel/drivers/virtio/virtio-pci.ko.zst"]
        );
    }

    #[test]
    fn a_builtin_is_left_out_and_an_unknown_module_is_an_error() {
        assert!(load_order(INDEX, "kernel/fs/overlayfs/overlay.ko\n", &["overlay"]).unwrap().is_empty());
        assert!(load_order(INDEX, "", &["overlay"]).is_err());
    }
}
