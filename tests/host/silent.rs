//! Connections that say nothing, in any number, on each of the server's ports: who speaks keeps the time that a call and a read take.
//!
//! Owns the crowd, which connects to one port and is silent, or stops in the middle of what it has begun. The same calls and reads are
//! timed without it and beside it. `VOLNODE_SILENT=10000` gives the figures of `docs/reliability.md`.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use proto::v1::WriteCache;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testlab::management_api::ManagementApi;
use testlab::nbd_client::Client;
use testlab::volserver::Volserver;

use super::programs;

const EXPORT: &str = "vol";
/// Of one crowd, where the environment says nothing.
const SILENT: usize = 1000;
/// Of each kind, one after the other.
const SAMPLES: usize = 200;
/// Beside a crowd a call may take so many times as long as without.
const RATIO_MAX: f64 = 2.0;
/// A scheduler's whim, which is no crowd's.
const NOISE: Duration = Duration::from_millis(2);
/// Until the server has taken in, or turned away, who has connected.
const SETTLING: Duration = Duration::from_millis(500);
/// On a machine that others use an attempt may be of no use.
const ATTEMPTS: usize = 8;

/// A beginning of HTTP/2 that is not gone on with.
const HALF_A_CALL: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

struct Server {
    volserver: Volserver,
    data_socket: PathBuf,
    management_socket: PathBuf,
}

impl Server {
    fn start(directory: &Path) -> Self {
        let (data_socket, management_socket) = (directory.join("nbd.sock"), directory.join("api.sock"));
        let mut command = Command::new(programs::directory().join("volserver"));
        command.arg("--listen").arg(format!("unix:{}", data_socket.display()));
        command.arg("--management").arg(format!("unix:{}", management_socket.display()));
        command.args(["--threads", "2", "--memory-max", "2G", "--log", "error"]);
        Self { volserver: Volserver::start(&mut command, directory).unwrap(), data_socket, management_socket }
    }
}

/// Where a crowd connects.
#[derive(Debug, Clone, Copy)]
enum Port {
    NbdTcp,
    NbdUnix,
    ManagementTcp,
    ManagementUnix,
}

/// Connections to one port, from so many addresses; every other one has begun something.
fn crowd(server: &Server, port: Port, silent: usize, addresses: usize) -> Vec<Box<dyn Write>> {
    let tcp = |to: SocketAddr, number: usize| -> Box<dyn Write> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        let source = SocketAddr::from(([127, 0, 1, (number % addresses) as u8 + 1], 0));
        socket.bind(&source.into()).unwrap();
        socket.connect(&to.into()).unwrap();
        Box::new(TcpStream::from(socket))
    };
    let unix = |to: &Path| -> Box<dyn Write> { Box::new(UnixStream::connect(to).unwrap()) };
    (0..silent)
        .map(|number| {
            let mut connection = match port {
                Port::NbdTcp => tcp(server.volserver.data, number),
                Port::ManagementTcp => tcp(server.volserver.management, number),
                Port::NbdUnix => unix(&server.data_socket),
                Port::ManagementUnix => unix(&server.management_socket),
            };
            if number % 2 == 1 {
                let begun: &[u8] = match port {
                    Port::NbdTcp | Port::NbdUnix => &[0, 0],
                    Port::ManagementTcp | Port::ManagementUnix => HALF_A_CALL,
                };
                // It may have been turned away already.
                let _ = connection.write_all(begun);
            }
            connection
        })
        .collect()
}

/// How long ninety-nine of a hundred take at most.
fn p99(mut act: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..SAMPLES)
        .map(|_| {
            let began = Instant::now();
            act();
            began.elapsed()
        })
        .collect();
    times.sort();
    times[SAMPLES * 99 / 100]
}

#[test]
fn callers_that_say_nothing_cost_the_others_no_time_on_any_port() {
    let _alone = super::measuring();
    let silent = std::env::var("VOLNODE_SILENT").map_or(SILENT, |text| text.parse().unwrap());
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let silent = limit.maximum.map_or(silent, |most| silent.min(most as usize / 3));
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let server = Server::start(directory.path());
    let mut api = ManagementApi::connect(&server.volserver.management_uri()).unwrap();
    api.create_volume(EXPORT, 64 << 20, WriteCache::On).unwrap();
    let mut nbd = Client::open(server.volserver.data, EXPORT).unwrap();
    let mut measured = || {
        let call = p99(|| drop(api.volume(EXPORT).unwrap()));
        let read = p99(|| drop(nbd.read(4096, 4096).unwrap()));
        [call, read]
    };
    let crowds = [
        (Port::ManagementTcp, 1),
        (Port::ManagementTcp, 100),
        (Port::ManagementUnix, 1),
        (Port::NbdTcp, 1),
        (Port::NbdTcp, 100),
        (Port::NbdUnix, 1),
    ];
    for (port, addresses) in crowds {
        let mut told = String::new();
        let is_unharmed = (0..ATTEMPTS).any(|_| {
            let without = measured();
            let beside = {
                let _crowd = crowd(&server, port, silent, addresses);
                // They are there, whether the server keeps them or not; that they come is another load.
                std::thread::sleep(SETTLING);
                measured()
            };
            told = format!(
                "{port:?}, {silent} silent from {addresses}: GetVolume p99 {:?} -> {:?}, 4k read p99 {:?} -> {:?}",
                without[0], beside[0], without[1], beside[1]
            );
            println!("{told}");
            without.iter().zip(beside).all(|(without, beside)| beside <= without.mul_f64(RATIO_MAX).max(*without + NOISE))
        });
        assert!(is_unharmed, "{told}");
    }
}
