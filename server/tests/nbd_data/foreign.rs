//! Foreign clients on our server: libnbd's and QEMU's.

use server::catalog::BackendKind;

use super::support::{Random, Server, TempDir, is_installed, run, skip_without_tool, tool};

pub(crate) const MIB: usize = 1 << 20;

pub(crate) fn have(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs.iter().filter(|program| !is_installed(program)).collect();
    if !missing.is_empty() {
        skip_without_tool(&format!("not installed: {missing:?}"));
    }
    missing.is_empty()
}

/// The distribution's own Python: python3-libnbd is a module of that one.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// Isolated: neither the user's own modules nor those of `PYTHONPATH`.
pub(crate) const PYTHON_OPTIONS: [&str; 1] = ["-I"];

/// Runs a script with the URI as its argument.
pub(crate) fn python(script: &str, uri: &str) {
    run(PYTHON, &[&PYTHON_OPTIONS[..], &["-c", script, uri]].concat());
}

pub(crate) fn has_python_module() -> bool {
    let imported = tool(PYTHON).args(PYTHON_OPTIONS).args(["-c", "import nbd"]).output();
    let has_module = imported.is_ok_and(|output| output.status.success());
    if !has_module {
        skip_without_tool("python3-libnbd is not installed");
    }
    has_module
}

/// An image with data, holes and an odd end.
pub(crate) fn image(dir: &TempDir, bytes: usize) -> String {
    let mut data = vec![0; bytes];
    let mut random = Random::new(7);
    for start in (0..bytes).step_by(3 * MIB) {
        let end = (start + MIB + 4096).min(bytes);
        random.fill(&mut data[start..end]);
    }
    let path = dir.0.join("image");
    std::fs::write(&path, data).unwrap();
    path.to_str().unwrap().into()
}

#[test]
fn nbdinfo_tells_what_was_announced() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let server = Server::start_with(|config| config.export_by_name = true);
    let volume = server.create("vol", 8 << 20);
    let attachment = server.attach(&volume, false);
    let told = run("nbdinfo", &["--json", &server.uri(&attachment, 1, 0)]);
    for word in [
        "\"export-size\": 8388608",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_fua\": true",
        "volnode/1",
    ] {
        assert!(told.contains(word), "{word} is not in {told}");
    }
    assert_eq!(run("nbdinfo", &["--size", &server.uri(&attachment, 1, 0)]).trim(), "8388608");
    let listed = run("nbdinfo", &["--list", "--json", &format!("nbd://{}", server.address())]);
    assert!(listed.contains("\"export-name\": \"vol\""), "{listed}");
    assert!(!listed.contains(attachment.secret.expose()), "attachments are not listed");
}

#[test]
fn nbdcopy_copies_both_ways() {
    if !have(&["nbdcopy"]) {
        return;
    }
    let server = Server::start();
    let dir = TempDir::new();
    let image = image(&dir, 20 * MIB);
    for backend in [BackendKind::File, BackendKind::Memory] {
        let volume = server.create_with(backend.as_str(), 20 * MIB as u64, |new| new.backend = backend);
        let attachment = server.attach(&volume, false);
        // One connection: a second one with the same name would take over its slot.
        run("nbdcopy", &["--connections=1", "--flush", &image, &server.uri(&attachment, 1, 0)]);
        let back = dir.0.join("back");
        run("nbdcopy", &["--connections=1", &server.uri(&attachment, 2, 0), back.to_str().unwrap()]);
        assert!(std::fs::read(&image).unwrap() == std::fs::read(back).unwrap(), "{backend:?}");
        let allocated = server.data.allocated_bytes(&volume);
        assert!(allocated < 12 * MIB as u64, "{backend:?}: holes stay holes: {allocated}");
    }
}

#[test]
fn nbdcopy_uses_several_connections_by_name() {
    if !have(&["nbdcopy"]) {
        return;
    }
    let server = Server::start_with(|config| config.export_by_name = true);
    let dir = TempDir::new();
    let image = image(&dir, 20 * MIB);
    server.create("vol", 20 * MIB as u64);
    let uri = format!("nbd://{}/vol", server.address());
    run("nbdcopy", &["--connections=4", "--requests=64", "--flush", &image, &uri]);
    let back = dir.0.join("back");
    run("nbdcopy", &["--connections=4", &uri, back.to_str().unwrap()]);
    assert!(std::fs::read(&image).unwrap() == std::fs::read(back).unwrap());
}

#[test]
fn qemu_img_reads_and_compares() {
    if !have(&["qemu-img"]) {
        return;
    }
    let server = Server::start();
    let dir = TempDir::new();
    let image = image(&dir, 20 * MIB);
    let volume = server.create("vol", 20 * MIB as u64);
    let attachment = server.attach(&volume, false);
    let told = run("qemu-img", &["info", &server.uri(&attachment, 1, 0)]);
    assert!(told.contains("20 MiB"), "{told}");
    let target = server.uri(&attachment, 1, 0);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &image, &target]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &server.uri(&attachment, 1, 0)]);
}

#[test]
fn qemu_io_patterns_are_found_again() {
    if !have(&["qemu-io"]) {
        return;
    }
    let server = Server::start();
    let volume = server.create("vol", 64 << 20);
    let attachment = server.attach(&volume, false);
    let commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 -f 1M 64k",
        "aio_write -P 0x33 2M 4M",
        "aio_write -P 0x44 8M 32M",
        "aio_flush",
        "read -P 0x11 0 1M",
        "read -P 0x22 1M 64k",
        "read -P 0x33 2M 4M",
        "read -P 0x44 8M 32M",
        "write -z -u 0 512k",
        "read -P 0 0 512k",
        "read -P 0x11 512k 512k",
        "write -z 512k 256k",
        "read -P 0 512k 256k",
        "discard 2M 4M",
        "read -P 0 2M 4M",
        "write -P 0x55 777 3333",
        "read -P 0x55 777 3333",
        "flush",
    ];
    let uri = server.uri(&attachment, 1, 0);
    let mut arguments = vec!["-f", "raw"];
    for command in &commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let out = run("qemu-io", &arguments);
    assert!(!out.contains("Pattern verification failed") && !out.contains("failed:"), "{out}");
}

#[test]
fn libnbd_pipelines_through_python() {
    if !has_python_module() {
        return;
    }
    let server = Server::start();
    let volume = server.create("vol", 16 << 20);
    let attachment = server.attach(&volume, false);
    let script = "\
import nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
assert h.get_size() == 16 << 20
buffers = [nbd.Buffer.from_bytearray(bytearray([n]) * 65536) for n in range(1, 101)]
cookies = [h.aio_pwrite(b, n * 65536, flags=nbd.CMD_FLAG_FUA if n % 9 == 0 else 0) for n, b in enumerate(buffers)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
h.flush()
for n in range(100):
    assert h.pread(65536, n * 65536) == bytes([n + 1]) * 65536, n
try:
    h.pread(4096, 16 << 20)
    sys.exit('a read past the end succeeded')
except nbd.Error as e:
    assert e.errno == 'EINVAL', e
h.zero(65536, 0)
h.trim(65536, 65536)
assert h.pread(131072, 0) == bytes(131072)
h.shutdown()
";
    python(script, &server.uri(&attachment, 1, 0));
}
