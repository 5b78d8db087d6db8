//! TLS: foreign clients over it, clients that must be refused, and what a certificate allows.
//!
//! Which way the records take (kernel or relay) depends on the machine; `tls_in_the_kernel` of the VM tests says where it
//! has to be the kernel. Here both ways are asked for, and both have to work.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::tls::certificates::client_config;
use ::tls::stream::{Records, TlsStream};
use ::tls::test_authority::{Authority, Issued};
use proto::nbd::transmission::CommandFlags;
use proto::nbd::{OPTION_MAGIC, OPTION_REPLY_MAGIC, option, reply};
use server::catalog::{AttachmentRecord, VolumeRecord};
use server::limits::Limits;
use server::tls::{ServerTls, TlsFiles};

use super::foreign::{PYTHON, PYTHON_OPTIONS, has_python_module, have, image, python};
use super::support::{
    CLOSE_LIMIT, HANDSHAKE_TIMEOUT, Server, TempDir, export_name, run, skip_without_tool, tool, wait_until,
};

const MIB: usize = 1 << 20;
const LIMIT: Duration = CLOSE_LIMIT;

/// A server that requires TLS and client certificates, and the authority of both.
struct Rig {
    server: Server,
    tls: Arc<ServerTls>,
    authority: Authority,
    files: Issued,
    dir: TempDir,
}

impl Rig {
    fn start() -> Self {
        Self::start_with(true, true, Records::Auto)
    }

    fn start_with(is_required: bool, checks_clients: bool, records: Records) -> Self {
        let timeout = Limits::default().handshake_timeout;
        Self::start_with_timeout(is_required, checks_clients, records, timeout)
    }

    fn start_with_timeout(
        is_required: bool,
        checks_clients: bool,
        records: Records,
        handshake_timeout: Duration,
    ) -> Self {
        let dir = TempDir::new();
        let authority = Authority::new();
        let files = authority.issue(&dir.0.join("server"), &[]);
        let client_authority = checks_clients.then(|| files.authority());
        let tls_files = TlsFiles { pair: files.pair(), client_authority };
        let tls = Arc::new(ServerTls::new(tls_files, is_required, records).unwrap());
        let server = Server::start_with(|config| {
            config.tls = Arc::clone(&tls);
            config.export_by_name = true;
            config.limits.handshake_timeout = handshake_timeout;
        });
        Self { server, tls, authority, files, dir }
    }

    /// A client's certificate, for what the URIs say.
    fn client(&self, name: &str, uris: &[&str]) -> Issued {
        self.authority.issue(&self.dir.0.join(name), uris)
    }

    fn uri(&self, client: &Issued, name: &str) -> String {
        let folder = client.folder().display();
        format!("nbds://{}/{name}?tls-certificates={folder}", self.server.address())
    }

    fn volume(&self, name: &str) -> (VolumeRecord, AttachmentRecord) {
        let volume = self.server.create(name, 20 * MIB as u64);
        let attachment = self.server.attach(&volume, false);
        (volume, attachment)
    }

    /// A connection past STARTTLS, with its greeting and flags done.
    fn starttls(&self) -> TcpStream {
        let mut stream = self.greeted();
        stream.write_all(&option_bytes(option::STARTTLS, &[])).unwrap();
        assert_eq!(reply_to(&mut stream, option::STARTTLS), reply::ACK);
        stream
    }

    fn greeted(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.server.address()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        stream
    }

    /// A TLS handshake with this certificate: what the server says to the first option behind it.
    fn handshake(&self, client: Option<&Issued>) -> Result<u32, String> {
        self.first_reply(client, option::STARTTLS, &[])
    }

    /// The type of the first reply to an option that comes right behind a TLS handshake with this certificate.
    fn first_reply(&self, client: Option<&Issued>, number: u32, data: &[u8]) -> Result<u32, String> {
        let pair = client.map(Issued::pair);
        let config = Arc::new(client_config(&self.files.authority(), pair.as_ref()).unwrap());
        let deadline = Instant::now() + LIMIT;
        let name = "localhost".try_into().unwrap();
        let mut stream =
            TlsStream::connect(self.starttls(), config, name, deadline).map_err(|error| error.to_string())?;
        let says = |error: ::tls::stream::StreamError| error.to_string();
        stream.write_all(&option_bytes(number, data), deadline).map_err(says)?;
        let mut answer = [0; 20];
        let received = stream.read(&mut answer, deadline).map_err(says)?;
        assert_eq!(received, 20, "the text comes in the same record, behind the header");
        Ok(u32::from_be_bytes([answer[12], answer[13], answer[14], answer[15]]))
    }
}

fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn reply_to(stream: &mut TcpStream, number: u32) -> u32 {
    let mut header = [0; 20];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[..8], OPTION_REPLY_MAGIC.to_be_bytes());
    assert_eq!(header[8..12], number.to_be_bytes());
    let field = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let mut text = vec![0; field(16) as usize];
    stream.read_exact(&mut text).unwrap();
    field(12)
}

fn is_closed(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn fails(program: &str, arguments: &[&str]) -> String {
    let output = tool(program).args(arguments).output().unwrap();
    assert!(!output.status.success(), "{program} {arguments:?} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn libnbd_copies_both_ways_over_tls() {
    if !have(&["nbdinfo", "nbdcopy"]) {
        return;
    }
    for records in [Records::Auto, Records::UserSpace] {
        let rig = Rig::start_with(true, true, records);
        let image = image(&rig.dir, 20 * MIB);
        rig.server.create("vol", 20 * MIB as u64);
        let uri = rig.uri(&rig.client("client", &["volnode:volume/vol"]), "vol");
        let told = run("nbdinfo", &["--json", &uri]);
        assert!(told.contains("\"TLS\": true") && told.contains("\"export-size\": 20971520"), "{told}");
        run("nbdcopy", &["--connections=4", "--requests=64", "--flush", &image, &uri]);
        let back = rig.dir.0.join("back");
        run("nbdcopy", &["--connections=4", &uri, back.to_str().unwrap()]);
        assert!(std::fs::read(&image).unwrap() == std::fs::read(back).unwrap(), "{records:?}");
    }
}

#[test]
fn libnbd_pipelines_over_tls() {
    if !has_python_module() {
        return;
    }
    let rig = Rig::start();
    let (_, attachment) = rig.volume("vol");
    let client = rig.client("client", &["volnode:node/node-a"]);
    let script = "\
import nbd, sys
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(sys.argv[1])
assert h.get_tls_negotiated()
buffers = [nbd.Buffer.from_bytearray(bytearray([n]) * 65536) for n in range(1, 101)]
cookies = [h.aio_pwrite(b, n * 65536, flags=nbd.CMD_FLAG_FUA if n % 9 == 0 else 0) for n, b in enumerate(buffers)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
h.flush()
for n in range(100):
    assert h.pread(65536, n * 65536) == bytes([n + 1]) * 65536, n
big = bytes(range(256)) * 32768
h.pwrite(big, 8192)
assert h.pread(len(big), 8192) == big
h.shutdown()
";
    python(script, &rig.uri(&client, &export_name(&attachment, 1, 0)));
}

#[test]
fn qemu_reads_writes_and_compares_over_tls() {
    if !have(&["qemu-img", "qemu-io"]) {
        return;
    }
    let rig = Rig::start();
    let image = image(&rig.dir, 20 * MIB);
    rig.server.create("vol", 20 * MIB as u64);
    let client = rig.client("client", &["volnode:*"]);
    let creds =
        format!("tls-creds-x509,id=tls0,dir={},endpoint=client,verify-peer=on", client.folder().display());
    let port = rig.server.address().port();
    let target = format!(
        "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port},export=vol,tls-creds=tls0"
    );
    let object = ["--object", &creds, "--image-opts"];
    run(
        "qemu-img",
        &[&["convert", "--object", &creds, "-n", "--target-image-opts", "-f", "raw"][..], &[&image, &target]]
            .concat(),
    );
    let source = format!("driver=raw,file.driver=file,file.filename={image}");
    run("qemu-img", &[&["compare"][..], &object, &[&source, &target]].concat());
    let commands = [
        "write -P 0x33 2M 4M",
        "aio_write -P 0x44 8M 8M",
        "aio_flush",
        "read -P 0x33 2M 4M",
        "read -P 0x44 8M 8M",
    ];
    let mut arguments = object.to_vec();
    commands.iter().for_each(|command| arguments.extend(["-c", *command]));
    arguments.push(&target);
    let out = run("qemu-io", &arguments);
    assert!(!out.contains("Pattern verification failed") && !out.contains("failed:"), "{out}");
}

#[test]
fn nbdkit_s_client_plugin_passes_through_tls() {
    if !have(&["nbdkit", "nbdcopy"]) {
        return;
    }
    if !tool("nbdkit").args(["nbd", "--dump-plugin"]).output().unwrap().status.success() {
        return skip_without_tool("nbdkit's plugin nbd is not installed");
    }
    let rig = Rig::start();
    let image = image(&rig.dir, 20 * MIB);
    rig.server.create("vol", 20 * MIB as u64);
    let client = rig.client("client", &["volnode:volume/vol"]);
    let port = rig.server.address().port();
    let back = rig.dir.0.join("back");
    // nbdkit serves what it gets from us on a socket of its own, for as long as the command runs.
    let command = format!("nbdcopy --flush {image} \"$uri\" && nbdcopy \"$uri\" {}", back.display());
    let certificates = format!("tls-certificates={}", client.folder().display());
    let arguments = [
        "-U",
        "-",
        "nbd",
        "hostname=127.0.0.1",
        &format!("port={port}"),
        "export=vol",
        "tls=require",
        &certificates,
        "--run",
        &command,
    ];
    run("nbdkit", &arguments);
    assert!(std::fs::read(&image).unwrap() == std::fs::read(back).unwrap());
}

#[test]
fn plaintext_is_refused_where_tls_is_required() {
    let rig = Rig::start();
    let (_, attachment) = rig.volume("vol");
    let refused = rig.server.address();
    let error = super::client::Client::open(refused, &export_name(&attachment, 1, 0)).err().unwrap();
    assert!(error.to_string().contains("requires TLS"), "{error}");
    for number in [option::LIST, option::INFO, option::STRUCTURED_REPLY, 99] {
        assert_eq!(
            {
                let mut stream = rig.greeted();
                stream.write_all(&option_bytes(number, b"\0\0\0\x03vol\0\0")).unwrap();
                reply_to(&mut stream, number)
            },
            reply::ERR_TLS_REQD
        );
    }
    let mut stream = rig.greeted();
    stream.write_all(&option_bytes(option::EXPORT_NAME, b"vol")).unwrap();
    assert!(is_closed(&mut stream));
    if have(&["nbdinfo"]) {
        let said = fails("nbdinfo", &[&format!("nbd://{refused}/vol")]);
        assert!(said.contains("Operation not supported"), "{said}");
    }
}

#[test]
fn plaintext_and_tls_are_both_served_where_tls_is_allowed() {
    let rig = Rig::start_with(false, false, Records::Auto);
    let (_, attachment) = rig.volume("vol");
    let mut client = rig.server.open(&attachment, 1, 0);
    client.write(0, &[7; 512]).unwrap();
    client.call(proto::nbd::transmission::Command::Flush, CommandFlags::NONE, 0, 0, &[]).unwrap();
    assert_eq!(
        rig.handshake(None),
        Ok(reply::ERR_INVALID),
        "a second STARTTLS is invalid, so the first was taken"
    );
}

#[test]
fn starttls_is_refused_where_there_is_no_tls() {
    let server = Server::start();
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(&option_bytes(option::STARTTLS, &[])).unwrap();
    assert_eq!(reply_to(&mut stream, option::STARTTLS), reply::ERR_POLICY);
}

#[test]
fn clients_without_a_good_certificate_are_refused() {
    let rig = Rig::start();
    let good = rig.client("good", &["volnode:*"]);
    assert_eq!(rig.handshake(Some(&good)), Ok(reply::ERR_INVALID));
    let foreign = Authority::new().issue(&rig.dir.0.join("foreign"), &["volnode:*"]);
    let expired = rig.authority.issue_expired(&rig.dir.0.join("expired"), &["volnode:*"]);
    for (client, told) in [
        (None, "asks for a certificate"),
        (Some(&foreign), "does not trust the authority that issued our certificate"),
        (Some(&expired), "our certificate has expired"),
    ] {
        let refused = rig.handshake(client).unwrap_err();
        assert!(refused.contains(told), "{told}: {refused}");
    }
    // The server is none the worse for it.
    assert_eq!(rig.handshake(Some(&good)), Ok(reply::ERR_INVALID));
}

#[test]
fn an_authority_of_the_server_that_the_client_does_not_know_is_refused_by_the_client() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let rig = Rig::start();
    rig.volume("vol");
    let foreign = Authority::new().issue(&rig.dir.0.join("foreign"), &[]);
    let said = fails("nbdinfo", &[&rig.uri(&foreign, "vol")]);
    assert!(said.contains("tls") || said.contains("TLS"), "{said}");
}

#[test]
fn bytes_that_come_behind_starttls_end_the_connection() {
    let rig = Rig::start();
    let mut stream = rig.greeted();
    // What a man in the middle would add: an option that the server would take for the client's own.
    let bytes = [option_bytes(option::STARTTLS, &[]), option_bytes(option::EXPORT_NAME, b"vol")].concat();
    stream.write_all(&bytes).unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.is_empty(), "nothing is acknowledged: {rest:?}");
}

#[test]
fn a_tls_handshake_has_a_time_limit() {
    let rig = Rig::start_with_timeout(true, true, Records::Auto, HANDSHAKE_TIMEOUT);
    let began = Instant::now();
    let mut silent = rig.starttls();
    let mut dribbling = rig.starttls();
    // The header of a record, then a byte now and then.
    dribbling.write_all(&[22, 3, 1, 2, 0]).unwrap();
    let mut slow = dribbling.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        while slow.write_all(&[1]).is_ok() && began.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    assert!(is_closed(&mut silent) && is_closed(&mut dribbling));
    // Before the one that dribbles has had enough.
    assert!(began.elapsed() < LIMIT, "{:?}", began.elapsed());
    writer.join().unwrap();
}

#[test]
fn what_is_no_tls_behind_starttls_ends_the_connection() {
    let rig = Rig::start();
    let mut stream = rig.starttls();
    stream.write_all(&option_bytes(option::GO, b"\0\0\0\x03vol\0\0")).unwrap();
    assert!(is_closed(&mut stream));
}

#[test]
fn a_certificate_opens_the_volumes_it_names_and_no_others() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let rig = Rig::start();
    let (_, mine) = rig.volume("mine");
    let (_, other) = rig.volume("other");
    let holder = rig.client("holder", &["volnode:volume/mine"]);
    let size = |client: &Issued, name: &str| run("nbdinfo", &["--size", &rig.uri(client, name)]);
    const NOT_THERE: u32 = reply::ERR_UNKNOWN;
    const FORBIDDEN: u32 = reply::ERR_POLICY;
    let refused = |client: &Issued, name: &str| {
        // That it fails, every version of libnbd says; why, not all.
        fails("nbdinfo", &["--size", &rig.uri(client, name)]);
        let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
        rig.first_reply(Some(client), option::GO, &data).unwrap()
    };
    assert_eq!(size(&holder, "mine").trim(), "20971520");
    assert_eq!(size(&holder, &export_name(&mine, 1, 0)).trim(), "20971520");
    // By name it looks as if it did not exist; with the attachment's secret the reason is told.
    assert_eq!(refused(&holder, "other"), NOT_THERE);
    assert_eq!(refused(&holder, &export_name(&other, 1, 0)), FORBIDDEN);
    let listed = run("nbdinfo", &["--list", "--json", &rig.uri(&holder, "")]);
    assert!(listed.contains("\"mine\"") && !listed.contains("\"other\""), "{listed}");

    // The attachments are of node-a.
    let node = rig.client("node", &["volnode:node/node-a"]);
    assert_eq!(size(&node, &export_name(&other, 2, 0)).trim(), "20971520");
    assert_eq!(refused(&node, "other"), NOT_THERE);
    let elsewhere = rig.client("elsewhere", &["volnode:node/node-b"]);
    assert_eq!(refused(&elsewhere, &export_name(&mine, 2, 0)), FORBIDDEN);

    // Made for something else altogether.
    let nobody = rig.client("nobody", &["https://example.org/"]);
    assert_eq!(refused(&nobody, "mine"), NOT_THERE);
}

#[test]
fn a_tenant_opens_what_is_in_its_name_space_and_nothing_else() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let rig = Rig::start();
    let (_, own) = rig.volume("acme+db");
    let (_, others) = rig.volume("rival+db");
    rig.volume("db");
    rig.server.create("acme+free", MIB as u64);
    let size = |client: &Issued, name: &str| run("nbdinfo", &["--size", &rig.uri(client, name)]);
    let refused = |client: &Issued, name: &str| {
        let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
        rig.first_reply(Some(client), option::GO, &data).unwrap()
    };
    for (number, uri) in ["volnode:tenant/acme/attach", "volnode:tenant/acme/*"].into_iter().enumerate() {
        let tenant = rig.client(&format!("tenant-{number}"), &[uri]);
        assert_eq!(size(&tenant, "acme+free").trim(), "1048576");
        assert_eq!(size(&tenant, &export_name(&own, number as u64 + 1, 0)).trim(), "20971520");
        for outside in ["rival+db", "db", "acme", "acme+none", "rival+none", ""] {
            assert_eq!(refused(&tenant, outside), reply::ERR_UNKNOWN, "{outside}");
        }
        assert_eq!(refused(&tenant, &export_name(&others, 1, 0)), reply::ERR_POLICY);
        let listed = run("nbdinfo", &["--list", "--json", &rig.uri(&tenant, "")]);
        assert!(listed.contains("\"acme+free\"") && listed.contains("\"acme+db\""), "{listed}");
        assert!(!listed.contains("rival") && !listed.contains("\"db\""), "{listed}");
    }
    // Who manages or looks opens nothing.
    for (number, role) in ["manage", "read"].into_iter().enumerate() {
        let client = rig.client(&format!("role-{number}"), &[&format!("volnode:tenant/acme/{role}")]);
        assert_eq!(refused(&client, "acme+free"), reply::ERR_UNKNOWN, "{role}");
        assert_eq!(refused(&client, &export_name(&own, 9, 0)), reply::ERR_POLICY, "{role}");
    }
}

#[test]
fn new_certificates_are_taken_and_connections_stay() {
    if !has_python_module() {
        return;
    }
    let mut rig = Rig::start();
    let (_, attachment) = rig.volume("vol");
    let client = rig.client("client", &["volnode:*"]);
    let uri = rig.uri(&client, &export_name(&attachment, 1, 0));
    let script = "\
import nbd, os, sys, time
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(sys.argv[1])
h.pwrite(b'x' * 4096, 0)
open(sys.argv[2] + '.ready', 'w').close()
while not os.path.exists(sys.argv[2]): time.sleep(0.02)
h.flush()
assert h.pread(4096, 0) == b'x' * 4096
";
    let go = rig.dir.0.join("go");
    let mut session = tool(PYTHON).args(PYTHON_OPTIONS).args(["-c", script, &uri]).arg(&go).spawn().unwrap();
    wait_until("the session writes", || go.with_extension("ready").exists());

    // Of no use: the old ones stay.
    let certificate: PathBuf = rig.files.pair().certificate;
    let old = std::fs::read(&certificate).unwrap();
    std::fs::write(&certificate, "no certificate").unwrap();
    assert!(rig.tls.reload().is_err());
    std::fs::write(&certificate, old).unwrap();
    assert_eq!(rig.handshake(Some(&client)), Ok(reply::ERR_INVALID));

    // Another authority altogether: who trusts the old one is refused, who trusts the new one is served.
    rig.authority = Authority::new();
    rig.files = rig.authority.issue(&rig.dir.0.join("server"), &[]);
    rig.tls.reload().unwrap();
    let old_client = rig.handshake(Some(&client));
    assert!(old_client.is_err(), "{old_client:?}");
    let new_client = rig.client("new-client", &["volnode:*"]);
    assert_eq!(rig.handshake(Some(&new_client)), Ok(reply::ERR_INVALID));

    // The session from before goes on.
    std::fs::write(&go, "").unwrap();
    assert!(session.wait().unwrap().success());
}
