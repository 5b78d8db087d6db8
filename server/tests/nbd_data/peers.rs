//! Every program that speaks NBD on each backend, over TCP and over a Unix socket, by the volume's plain name.
//!
//! What a peer is given here it uses as it sees fit: libnbd and its tools negotiate structured replies and
//! `base:allocation`, QEMU extended headers, fio and nbd-client neither.

use std::path::Path;

use server::backend::file::CacheMode;
use server::catalog::{BackendKind, VolumeRecord};
use server::data::address::DataAddress;

use super::foreign::{MIB, has_python_module, have, image, python};
use super::support::{Server, TempDir, is_in_lab, run, skip_without_tool, tool};

const SIZE_BYTES: u64 = 20 << 20;

/// One way to reach a volume.
struct Export<'a> {
    server: &'a Server,
    volume: VolumeRecord,
    uri: String,
    /// What makes it different from the others, for messages.
    name: String,
}

/// Starts a server for each cache mode, and calls `test` with a new volume for each backend and each kind of socket.
fn each_export(test: impl Fn(&Export<'_>)) {
    for cache in [CacheMode::Auto, CacheMode::Buffered] {
        // Not below TMPDIR, which may be too long for a socket's name.
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let socket = dir.path().join("nbd.sock");
        let server = Server::start_with(|config| {
            config.export_by_name = true;
            config.cache = cache;
            config.listen.push(DataAddress::Unix(socket.clone()));
        });
        for backend in [BackendKind::File, BackendKind::Memory] {
            for over in ["tcp", "unix"] {
                let name = format!("{}-{over}", backend.as_str());
                let volume = server.create_with(&name, SIZE_BYTES, |new| new.backend = backend);
                let uri = match over {
                    "tcp" => format!("nbd://{}/{name}", server.address()),
                    _ => unix_uri(&name, &socket),
                };
                test(&Export { server: &server, volume, uri, name: format!("{name} {cache:?}") });
            }
        }
    }
}

fn unix_uri(name: &str, socket: &Path) -> String {
    format!("nbd+unix:///{name}?socket={}", socket.display())
}

#[test]
fn nbdinfo_sees_what_is_offered_everywhere() {
    if !have(&["nbdinfo"]) {
        return;
    }
    each_export(|export| {
        let told = run("nbdinfo", &["--json", &export.uri]);
        for word in [
            "\"protocol\": \"newstyle-fixed\"",
            "\"structured\": true",
            "\"export-size\": 20971520",
            "base:allocation",
            "\"can_cache\": true",
            "\"can_df\": true",
            "\"can_fast_zero\": true",
            "\"can_flush\": true",
            "\"can_fua\": true",
            "\"can_multi_conn\": true",
            "\"can_trim\": true",
            "\"can_zero\": true",
            "\"is_read_only\": false",
            "\"block_size_maximum\": 33554432",
        ] {
            assert!(told.contains(word), "{}: {word} is not in {told}", export.name);
        }
    });
}

#[test]
fn nbdinfo_lists_every_export_with_its_description() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let server = Server::start_with(|config| config.export_by_name = true);
    for name in ["one", "two", "three"] {
        server.create(name, SIZE_BYTES);
    }
    let listed = run("nbdinfo", &["--list", "--json", &format!("nbd://{}", server.address())]);
    for name in ["one", "two", "three"] {
        assert!(listed.contains(&format!("\"export-name\": \"{name}\"")), "{listed}");
    }
    assert_eq!(listed.matches("\"description\": \"volnode/1 ").count(), 3, "{listed}");
}

#[test]
fn nbdcopy_keeps_every_byte_and_every_hole() {
    if !have(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let dir = TempDir::new();
    let image = image(&dir, SIZE_BYTES as usize);
    each_export(|export| {
        run("nbdcopy", &["--connections=4", "--requests=32", "--flush", &image, &export.uri]);
        let back = dir.0.join("back");
        run("nbdcopy", &["--connections=4", &export.uri, back.to_str().unwrap()]);
        assert!(std::fs::read(&image).unwrap() == std::fs::read(&back).unwrap(), "{}", export.name);
        let allocated = export.server.data.allocated_bytes(&export.volume);
        assert!(allocated < 18 * MIB as u64, "{}: {allocated} bytes are allocated", export.name);
        let map = run("nbdinfo", &["--map", "--totals", &export.uri]);
        assert!(map.contains("hole,zero") && map.contains("data"), "{}: {map}", export.name);
        std::fs::remove_file(back).unwrap();
    });
}

/// What libnbd is asked for, and what it has to answer.
const LIBNBD_SCRIPT: &str = "\
import nbd, sys, errno
uri = sys.argv[1]

h = nbd.NBD()
h.set_strict_mode(nbd.STRICT_MASK)
h.set_opt_mode(True)
h.add_meta_context('base:allocation')
h.connect_uri(uri)
assert h.get_protocol() == 'newstyle-fixed'
assert h.get_structured_replies_negotiated()
listed = []
h.clear_meta_contexts()
h.opt_list_meta_context(lambda name: listed.append(name))
assert listed == ['base:allocation'], listed
h.add_meta_context('base:')
listed.clear()
h.opt_list_meta_context(lambda name: listed.append(name))
assert listed == ['base:allocation'], listed
h.clear_meta_contexts()
h.add_meta_context('x-other:thing')
listed.clear()
h.opt_list_meta_context(lambda name: listed.append(name))
assert listed == [], listed
h.clear_meta_contexts()
h.add_meta_context('base:allocation')
h.opt_info()
flags = (h.can_df(), h.can_cache(), h.can_fast_zero(), h.is_read_only())
h.opt_go()
assert flags == (h.can_df(), h.can_cache(), h.can_fast_zero(), h.is_read_only()) == (True, True, True, False)
assert h.can_meta_context('base:allocation')
unit = h.get_block_size(nbd.SIZE_MINIMUM)
assert 4096 % unit == 0
size = h.get_size()

data = bytes(range(256)) * 256
h.pwrite(data, 65536, nbd.CMD_FLAG_FUA)
chunks = []
def chunk(buf, offset, status, error):
    chunks.append((bytes(buf), offset, status, error.value))
assert h.pread_structured(65536, 65536, chunk, nbd.CMD_FLAG_DF) == data
assert chunks == [(data, 65536, nbd.READ_DATA, 0)], chunks[0][1:]
large = h.pread_structured(8 << 20, 0, lambda *args: 0)
assert large[65536:131072] == data and not any(large[131072:])

extents = []
def extent(context, offset, entries, error):
    extents.append((context, offset, list(entries)))
h.block_status(size, 0, extent)
(context, offset, entries), = extents
assert context == 'base:allocation' and offset == 0 and sum(entries[::2]) <= size, extents
assert 0 in entries[1::2] and 3 in entries[1::2], extents
extents.clear()
h.block_status(size, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert len(extents[0][2]) == 2 and 0 < extents[0][2][0] <= size, extents

h.cache(65536, 0)
h.zero(65536, 65536, nbd.CMD_FLAG_FAST_ZERO)
assert not any(h.pread(65536, 65536))
h.pwrite(data, 65536)
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert not any(h.pread(65536, 65536))
h.trim(65536, 65536)
h.flush()

h.set_strict_mode(0)
def refused(what, wanted, call):
    try:
        call()
    except nbd.Error as e:
        assert e.errnum == wanted, (what, e)
    else:
        sys.exit(what + ' was not refused')
refused('read past the end', errno.EINVAL, lambda: h.pread(4096, size))
refused('write past the end', errno.ENOSPC, lambda: h.pwrite(data, size))
refused('zero past the end', errno.ENOSPC, lambda: h.zero(4096, size))
refused('trim past the end', errno.EINVAL, lambda: h.trim(4096, size))
refused('cache past the end', errno.EINVAL, lambda: h.cache(4096, size))
refused('status past the end', errno.EINVAL, lambda: h.block_status(4096, size, extent))
refused('empty read', errno.EINVAL, lambda: h.pread(0, 0))
refused('flag of another command', errno.EINVAL, lambda: h.trim(4096, 0, nbd.CMD_FLAG_REQ_ONE))
refused('unknown flag', errno.EINVAL, lambda: h.cache(4096, 0, 0x8000))
if unit > 1:
    refused('unaligned read', errno.EINVAL, lambda: h.pread(unit, 1))
assert h.pread(4096, 0) == bytes(4096)
h.shutdown()

# Clients that want less.
for structured, handshake_flags in [(False, 3), (False, 1), (True, 1), (False, 0)]:
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.set_handshake_flags(handshake_flags)
    h.connect_uri(uri)
    assert h.get_size() == size
    assert h.get_structured_replies_negotiated() == structured
    assert h.can_df() == structured
    h.pwrite(data, 0)
    assert h.pread(65536, 0) == data
    h.shutdown()
";

#[test]
fn libnbd_finds_nothing_to_object_to() {
    if !has_python_module() {
        return;
    }
    each_export(|export| python(LIBNBD_SCRIPT, &export.uri));
}

#[test]
fn qemu_img_converts_maps_and_compares() {
    if !have(&["qemu-img"]) {
        return;
    }
    let dir = TempDir::new();
    let image = image(&dir, SIZE_BYTES as usize);
    each_export(|export| {
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &image, &export.uri]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &export.uri]);
        let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &export.uri]);
        assert!(map.contains("\"zero\": true") && map.contains("\"zero\": false"), "{}: {map}", export.name);
        let back = dir.0.join("back");
        run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &export.uri, back.to_str().unwrap()]);
        assert!(std::fs::read(&image).unwrap() == std::fs::read(back).unwrap(), "{}", export.name);
    });
}

#[test]
fn qemu_uses_extended_headers_and_large_effects() {
    if !have(&["qemu-io"]) {
        return;
    }
    let has_extended_headers = qemu_has_extended_headers();
    let server = Server::start_with(|config| config.export_by_name = true);
    for backend in [BackendKind::File, BackendKind::Memory] {
        server.create_with(backend.as_str(), 16 << 30, |new| new.backend = backend);
        let uri = format!("nbd://{}/{}", server.address(), backend.as_str());
        let out = tool("qemu-io")
            .args(["-f", "raw", "-T", "nbd_send_request"])
            .args(["-c", "write -P 0x5a 5G 1M", "-c", "write -z -u -n 0 8G", "-c", "read -P 0 5G 1M"])
            .args(["-c", "write -P 0x5a 9G 64k", "-c", "discard 8G 1G", "-c", "map", &uri])
            .output()
            .unwrap();
        let text =
            format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{text}");
        assert!(!text.contains("failed"), "{text}");
        let requests: Vec<Sent> = text.lines().filter_map(Sent::parse).collect();
        if has_extended_headers {
            // Lengths that only extended headers can say.
            let zeroes = Sent { kind: WRITE_ZEROES, flags: FAST_ZERO_AND_NO_HOLE, length_bytes: 8 << 30 };
            assert!(requests.contains(&zeroes), "{zeroes:?} is not in {text}");
            let status = Sent { kind: BLOCK_STATUS, flags: 0, length_bytes: 16 << 30 };
            assert!(
                requests.iter().any(|sent| Sent { flags: 0, ..*sent } == status),
                "{status:?} is not in {text}"
            );
        } else {
            // The same effects in pieces that 32 bits can say, and the map by structured replies.
            assert!(requests.iter().all(|sent| sent.length_bytes < 4 << 30), "{text}");
            let zeroes = requests.iter().filter(|sent| sent.kind == WRITE_ZEROES);
            assert_eq!(zeroes.map(|sent| sent.length_bytes).sum::<u64>(), 8 << 30, "{text}");
            assert!(requests.iter().any(|sent| sent.kind == BLOCK_STATUS), "{text}");
        }
    }
}

const WRITE_ZEROES: u64 = 6;
const BLOCK_STATUS: u64 = 7;
const FAST_ZERO_AND_NO_HOLE: u64 = 0x11;

/// What QEMU's trace tells of a request that it sends.
#[derive(Debug, PartialEq, Eq)]
struct Sent {
    kind: u64,
    flags: u64,
    length_bytes: u64,
}

impl Sent {
    /// A line of the trace event `nbd_send_request`; newer versions say `cookie` where older ones say `handle`, and the latter
    /// `from` and `len` in any case.
    fn parse(line: &str) -> Option<Self> {
        let (_, fields) = line.split_once("nbd_send_request")?;
        let number = |name: &str| {
            let (_, rest) = fields.split_once(&format!(".{name} = "))?;
            let text = rest.split([',', ' ', '}']).next()?;
            match text.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16).ok(),
                None => text.parse().ok(),
            }
        };
        Some(Self { kind: number("type")?, flags: number("flags")?, length_bytes: number("len")? })
    }
}

/// Since QEMU 9.1 its client asks for extended headers. The lab promises such a one; an older one of this machine's own shows
/// what it can.
fn qemu_has_extended_headers() -> bool {
    const WANTED: (u32, u32) = (9, 1);
    let told = run("qemu-io", &["--version"]);
    let mut numbers = told
        .split_once("version ")
        .map(|(_, rest)| {
            rest.split(|character: char| !character.is_ascii_digit()).map_while(|word| word.parse().ok())
        })
        .unwrap_or_else(|| panic!("qemu-io does not tell its version: {told}"));
    let found = (numbers.next().unwrap(), numbers.next().unwrap());
    if found >= WANTED {
        return true;
    }
    let why = format!("extended headers need QEMU {}.{}, found {}.{}", WANTED.0, WANTED.1, found.0, found.1);
    assert!(!is_in_lab(), "{why}");
    println!("{why}: tried with 32-bit lengths and structured replies");
    false
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !have(&["fio"]) {
        return;
    }
    // Made without libnbd it is another program.
    if !run("fio", &["--enghelp"]).lines().any(|line| line.trim() == "nbd") {
        return skip_without_tool("this fio does not speak NBD");
    }
    each_export(|export| {
        let uri = format!("--uri={}", export.uri);
        let common = [
            "--name=v",
            "--ioengine=nbd",
            &uri,
            "--size=16M",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--iodepth=16",
        ];
        let random = ["--rw=randwrite", "--bssplit=4k/60:16k/20:64k/20", "--do_verify=1", "--verify_fatal=1"];
        run("fio", &[&common[..], &random].concat());
    });
}

#[test]
fn nbdkit_passes_everything_on() {
    if !have(&["nbdkit", "nbdcopy", "nbdinfo"]) {
        return;
    }
    if !tool("nbdkit").args(["nbd", "--dump-plugin"]).output().unwrap().status.success() {
        return skip_without_tool("nbdkit's plugin nbd is not installed");
    }
    let dir = TempDir::new();
    let image = image(&dir, SIZE_BYTES as usize);
    each_export(|export| {
        let plugin = format!("uri={}", export.uri);
        let back = dir.0.join("back");
        let commands = format!(
            "nbdcopy --flush {image} \"$uri\" && nbdcopy \"$uri\" {} && nbdinfo --map --totals \"$uri\"",
            back.display()
        );
        let told = run("nbdkit", &["-U", "-", "nbd", &plugin, "--run", &commands]);
        assert!(std::fs::read(&image).unwrap() == std::fs::read(back).unwrap(), "{}", export.name);
        assert!(told.contains("hole,zero"), "{}: {told}", export.name);
    });
}
