//! A thousand connections, of which nine hundred are idle or hostile: the other hundred keep their speed, and the server its
//! memory limit.
//!
//! Owns the crowd: what each of its kinds does after it has connected, which is to stand still with as much of the server as it
//! can get. The load of the others is the generator's. What they keep of their speed is told by a second server without a crowd,
//! measured by turns with the first, because the machine's speed is not the same from second to second.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use proto::nbd::transmission::{Command as NbdCommand, CommandFlags, REQUEST_BYTES, Request};
use proto::v1::WriteCache;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testlab::harness::LAB_VARIABLE;
use testlab::management_api::ManagementApi;
use testlab::nbd_client::Client;
use testlab::nbd_load::{Load, Operation, Order, run, verify};
use testlab::process_resources::Family;
use testlab::socket_memory;
use testlab::volserver::Volserver;

use super::programs;

const EXPORT: &str = "vol";
const VOLUME_BYTES: u64 = 64 << 20;

/// What the server is told with `--memory-max`, and so what it and the kernel's sockets may hold, but for itself.
const MEMORY_MAX_MIB: u64 = 1024;
/// The program, its catalog and its threads' stacks: what the limit does not cover. Some 20 MiB without assertions.
const PROGRAM_MIB: u64 = 48;

/// Of each kind.
const CROWD_OF_A_KIND: usize = 150;
/// Those that behave.
const LOAD_CONNECTIONS: u32 = 100;

/// Connections of this process or of a server, and what else it has open.
const OPEN_FILES: u64 = 1600;

/// What the others keep of their speed, at least.
const KEPT_SHARE_MIN: f64 = 0.9;
/// So often each server is measured in one attempt, by turns; of the ratios the middle one counts.
const PAIRS: usize = 9;
/// On a machine that others use an attempt may be of no use.
const ATTEMPTS: usize = 10;

/// How a member of the crowd stands still.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Connected, and not a byte sent.
    SilentBeforeHandshake,
    /// The export is open, and nothing is asked for.
    IdleAfterHandshake,
    /// Small READs are asked for until the server takes no more, and no reply is read.
    ReadsNoSmallReply,
    /// The same with large ones.
    ReadsNoLargeReply,
    /// Half a request's header was sent, and a WRITE of which half the payload was sent comes before it.
    HalfARequest,
    /// Its side is closed, with READs in flight of which no reply is read.
    HalfClosed,
}

const KINDS: [Kind; 6] = [
    Kind::SilentBeforeHandshake,
    Kind::IdleAfterHandshake,
    Kind::ReadsNoSmallReply,
    Kind::ReadsNoLargeReply,
    Kind::HalfARequest,
    Kind::HalfClosed,
];

/// A server of its own, with two threads: what each sets aside comes out of the limit, however many processors there are.
fn start_server(directory: &Path) -> Volserver {
    let mut command = Command::new(programs::directory().join("volserver"));
    command.args(["--cache", "writeback", "--log", "error", "--threads", "2", "--memory-max"]);
    let server = Volserver::start(command.arg(format!("{MEMORY_MAX_MIB}M")), directory).unwrap();
    let mut api = ManagementApi::connect(&server.management_uri()).unwrap();
    api.create_volume(EXPORT, VOLUME_BYTES, WriteCache::On).unwrap();
    server
}

/// Connects from an address of its own, so that the crowd is not turned away for being one address.
fn connect(source: [u8; 4], server: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((source, 0)).into()).unwrap();
    // Little room for replies, so that they wait at the server.
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&server.into()).unwrap();
    let stream: TcpStream = socket.into();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

fn request(command: NbdCommand, number: u64, length_bytes: u64) -> [u8; REQUEST_BYTES] {
    let offset_bytes = number * length_bytes % VOLUME_BYTES;
    Request { flags: CommandFlags::NONE, command, cookie: number, offset_bytes, length_bytes }.encode()
}

/// Asks for more than the sockets hold, as far as the server takes it.
fn flood(stream: &mut TcpStream, requests: u64, length_bytes: u64) {
    let bytes: Vec<u8> =
        (0..requests).flat_map(|number| request(NbdCommand::Read, number, length_bytes)).collect();
    stream.set_nonblocking(true).unwrap();
    // What the server does not take is not asked for.
    let _ = stream.write(&bytes);
    stream.set_nonblocking(false).unwrap();
}

fn member(kind: Kind, number: usize, server: SocketAddr) -> TcpStream {
    let mut stream = connect([127, 0, 0, 2 + (number % 4) as u8], server);
    if !matches!(kind, Kind::SilentBeforeHandshake) {
        stream = Client::open_on(stream, EXPORT).unwrap().stream;
    }
    match kind {
        Kind::SilentBeforeHandshake | Kind::IdleAfterHandshake => {}
        Kind::ReadsNoSmallReply => flood(&mut stream, 40_000, 4 << 10),
        Kind::ReadsNoLargeReply => flood(&mut stream, 200, 64 << 10),
        Kind::HalfARequest => {
            let write = request(NbdCommand::Write, 0, 8 << 10);
            stream.write_all(&[&write[..], &[1; 4 << 10]].concat()).unwrap();
        }
        Kind::HalfClosed => {
            flood(&mut stream, 40_000, 4 << 10);
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
    }
    stream
}

/// A server with a verified volume, and the load of those that behave.
fn loaded_server(directory: &Path) -> (Volserver, Load) {
    std::fs::create_dir(directory).unwrap();
    let server = start_server(directory);
    let load = Load {
        address: server.data,
        export: EXPORT.into(),
        connections: LOAD_CONNECTIONS,
        depth: 4,
        operation: Operation::Read,
        order: Order::Random,
        block_bytes: 4096,
        warm_up: Duration::from_millis(50),
        runtime: Duration::from_millis(200),
    };
    verify(&Load { connections: 4, block_bytes: 64 << 10, ..load.clone() }, VOLUME_BYTES, 1).unwrap();
    (server, load)
}

/// I/Os per second; none where one of the connections got nothing.
fn speed(load: &Load) -> f64 {
    let outcome = run(load).unwrap();
    if outcome.ios_of_slowest_connection == 0 {
        println!("one of them starves: {outcome:?}");
        return 0.0;
    }
    outcome.iops()
}

/// What this machine, or this user, lacks.
fn lacking() -> Option<String> {
    if Command::new("ss").arg("-V").output().is_err() {
        return Some("no ss (Debian package iproute2) to tell the sockets' memory".to_owned());
    }
    // The server's own limit is inherited: it raises the soft one by itself.
    let limit = getrlimit(Resource::Nofile);
    let maximum = limit.maximum.map(|maximum| maximum.max(OPEN_FILES));
    // Beyond its maximum only root gets it; nothing in this process minds a higher one.
    let wanted = [Rlimit { current: maximum, maximum }, Rlimit { current: limit.maximum, ..limit }];
    let _ = wanted.into_iter().any(|wanted| setrlimit(Resource::Nofile, wanted).is_ok());
    let allowed = getrlimit(Resource::Nofile).current?;
    (allowed < OPEN_FILES).then(|| format!("{allowed} open files are allowed, and {OPEN_FILES} are needed"))
}

#[test]
fn a_hundred_keep_their_speed_beside_nine_hundred_that_stand_still() {
    let _alone = super::measuring();
    if let Some(why) = lacking() {
        assert!(std::env::var_os(LAB_VARIABLE).is_none(), "{why}");
        println!("SKIP {why}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (_quiet, alone) = loaded_server(&directory.path().join("quiet"));
    let (crowded, beside) = loaded_server(&directory.path().join("crowded"));
    let crowd: Vec<TcpStream> = (0..CROWD_OF_A_KIND * KINDS.len())
        .map(|number| member(KINDS[number % KINDS.len()], number, crowded.data))
        .collect();
    let mut shares = Vec::new();
    for _ in 0..ATTEMPTS {
        let share = |_| {
            let (beside, alone) = (speed(&beside), speed(&alone));
            if alone > 0.0 { beside / alone } else { 0.0 }
        };
        let mut of_attempt: Vec<f64> = (0..PAIRS).map(share).collect();
        of_attempt.sort_by(f64::total_cmp);
        let share = of_attempt[PAIRS / 2];
        let own_mib = Family { pid: crowded.pid() }.peak_kib().unwrap() >> 10;
        let sockets_mib = socket_memory::kernel_bytes(crowded.data.port()).unwrap() >> 20;
        println!(
            "beside {} they keep {share:.2} of their speed; at most {own_mib} MiB, and {sockets_mib} MiB in sockets",
            crowd.len()
        );
        let total_mib = own_mib + sockets_mib;
        assert!(total_mib <= MEMORY_MAX_MIB + PROGRAM_MIB, "{total_mib} MiB of {MEMORY_MAX_MIB}");
        if share >= KEPT_SHARE_MIN {
            return;
        }
        shares.push(share);
    }
    panic!("of their speed they keep {shares:.2?}");
}
