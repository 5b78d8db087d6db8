//! What volserver can be told, on its command line or in its environment.
//!
//! Owns the options, their defaults and their rules; the one rule that needs more than one option is that an address
//! beyond loopback needs TLS, or `--insecure`. Opens and starts nothing. Called by `main.rs`.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Parser, ValueEnum};
use proto::nbd::PAYLOAD_BYTES_MAX_DEFAULT;

use tls::certificates::Pair;
use tls::stream::Records;

use crate::backend::device::Adoptable;
use crate::backend::file::CacheMode;
use crate::backend::lvm::PoolName;
use crate::data::address::DataAddress;
use crate::limits::{Limits, STATUS_REPLY_BYTES_MAX};
use crate::tls::TlsFiles;
use crate::volume::Faults;

const EXIT_CODES: &str = "\
Exit codes:
  0  stopped by SIGTERM or SIGINT, everything ended in order
  1  failed unexpectedly
  2  bad options or certificates, an address that needs TLS or --insecure, or too little --memory-max or open files (ulimit -n)
  3  the data directory, its catalog or the runtime directory cannot be used
  4  an address cannot be listened on
  5  stopped, but connections or their I/O did not end in time
  8  no space left on the file system of the data directory";

/// The least that `--request-max` may be: less than what clients send in one request without being asked to would only cost
/// them time.
const REQUEST_BYTES_LEAST: u32 = 64 << 10;
const _: () = assert!(REQUEST_BYTES_LEAST >= STATUS_REPLY_BYTES_MAX, "extents are sent in one chunk");

/// Of the management API's socket in the runtime directory.
const MANAGEMENT_SOCKET_NAME: &str = "management.sock";
const MANAGEMENT_PORT: u16 = 10810;
/// Whose members may manage, where the server runs as root.
const DEFAULT_GROUP: &str = "volnode";

/// Of the options that bound what clients can take.
const LIMITS: &str = "Limits";

/// A storage server: keeps volumes, serves them over NBD, and is managed over gRPC.
#[derive(Debug, Clone, Parser)]
#[command(name = "volserver", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Config {
    /// Where the catalog and the volumes are kept; made if missing
    #[arg(long, env = "VOLSERVER_DATA_DIR", value_name = "DIR")]
    pub data_dir: PathBuf,

    /// Where is kept what has to survive this process and not the machine, such as that writes were lost
    /// [default: the service manager's, or /run/volserver]
    #[arg(long, env = "VOLSERVER_RUNTIME_DIR", value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,

    /// Where NBD clients connect; may be given more than once, or separated by commas. 0.0.0.0 is every address of this machine,
    /// and `[::]` those of IPv6 as well, where 0.0.0.0 has not the same port
    #[arg(
        long,
        env = "VOLSERVER_LISTEN",
        value_name = "ADDR:PORT|unix:PATH",
        default_value = "127.0.0.1:10809",
        value_delimiter = ','
    )]
    pub listen: Vec<DataAddress>,

    /// Where the gRPC management API listens; as --listen. On TCP it needs --tls, or --insecure
    /// [default: unix:management.sock in the runtime directory, and 127.0.0.1:10810 with --tls required and --tls-client-ca]
    #[arg(long, env = "VOLSERVER_MANAGEMENT", value_name = "unix:PATH|ADDR:PORT", value_delimiter = ',')]
    pub management: Vec<DataAddress>,

    /// Whose members may manage volumes through the management API's Unix socket, as root may [default: the server's own
    /// group, or `volnode` where it runs as root]
    #[arg(long, env = "VOLSERVER_MANAGEMENT_GROUP", value_name = "NAME|GID")]
    pub management_group: Option<String>,

    /// Threads that serve connections [default: one for each processor]
    #[arg(long, env = "VOLSERVER_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// Whether volumes go through this machine's page cache
    #[arg(long, env = "VOLSERVER_CACHE", value_enum, value_name = "MODE", default_value = "none")]
    pub cache: Cache,

    /// Also let any NBD client open a volume by its plain name (writing only while it is not attached)
    #[arg(long, env = "VOLSERVER_EXPORT_BY_NAME", value_parser = BoolishValueParser::new())]
    pub export_by_name: bool,

    /// Block devices and raw files that may become volumes as they are (`volctl create --adopt`): directories that they are below, or
    /// themselves; may be given more than once, or separated by commas
    #[arg(long, env = "VOLSERVER_ADOPT_ALLOW", value_name = "PATH", value_delimiter = ',', value_parser = absolute_path)]
    pub adopt_allow: Vec<PathBuf>,

    /// A thin pool of LVM (lvmthin(7)) that volumes may be in (`volctl create --backend lvm`); it is set to give an error when it is
    /// full. For this volserver has to run as root: deploy/volserver-lvm.conf
    #[arg(long, env = "VOLSERVER_LVM", value_name = "VG/THINPOOL")]
    pub lvm: Option<PoolName>,

    /// Whether NBD clients and the management API use TLS
    #[arg(long, env = "VOLSERVER_TLS", value_enum, value_name = "MODE", default_value = "off")]
    pub tls: TlsMode,

    /// The server's certificate, with the chain below its authority (PEM); read again at SIGHUP, as are the next two
    #[arg(
        long,
        env = "VOLSERVER_TLS_CERT",
        value_name = "FILE",
        required_if_eq_any([("tls", "allowed"), ("tls", "required")])
    )]
    pub tls_cert: Option<PathBuf>,

    /// The certificate's private key (PEM)
    #[arg(
        long,
        env = "VOLSERVER_TLS_KEY",
        value_name = "FILE",
        required_if_eq_any([("tls", "allowed"), ("tls", "required")])
    )]
    pub tls_key: Option<PathBuf>,

    /// Ask clients for a certificate of this authority (PEM); its names say what they may open and manage
    #[arg(long, env = "VOLSERVER_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,

    /// Who encrypts and decrypts
    #[arg(long, env = "VOLSERVER_TLS_RECORDS", value_enum, value_name = "WHO", default_value = "auto")]
    pub tls_records: TlsRecords,

    /// Allow addresses beyond loopback although something there is not encrypted or asks for no password, and a management API
    /// on TCP without TLS
    #[arg(long, env = "VOLSERVER_INSECURE", value_parser = BoolishValueParser::new())]
    pub insecure: bool,

    /// Where clients are told to connect, if not where --listen says (behind NAT); with a wildcard address they are told the one at
    /// which they reach the management API, or loopback at its Unix socket
    #[arg(long, env = "VOLSERVER_ADVERTISE", value_name = "HOST:PORT", value_delimiter = ',', value_parser = host_and_port)]
    pub advertise: Vec<String>,

    /// Connections at once; beyond that a few (16, of one address 4) are greeted and told of the limit when they open an export, and
    /// more are closed as they come
    #[arg(long, env = "VOLSERVER_CONNECTIONS_MAX", value_name = "N", default_value_t = Limits::default().connections_max,
          value_parser = clap::value_parser!(u32).range(1..=65536), help_heading = LIMITS)]
    pub connections_max: u32,

    /// Connections at once from one address (with IPv6: from one /64)
    #[arg(long, env = "VOLSERVER_CONNECTIONS_PER_ADDRESS_MAX", value_name = "N",
          default_value_t = Limits::default().connections_per_address_max,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub connections_per_address_max: u32,

    /// Seconds that a handshake may take; an open may have to wait up to 40 of them for a former connection's I/O
    #[arg(long, env = "VOLSERVER_HANDSHAKE_TIMEOUT", value_name = "SECONDS", default_value_t = 60,
          value_parser = clap::value_parser!(u32).range(1..=3600), help_heading = LIMITS)]
    pub handshake_timeout: u32,

    /// Options that one handshake may ask for
    #[arg(long, env = "VOLSERVER_HANDSHAKE_OPTIONS_MAX", value_name = "N",
          default_value_t = Limits::default().handshake_options_max,
          value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = LIMITS)]
    pub handshake_options_max: u32,

    /// Longest read and write, from 64K to 32M; announced to clients as the maximum block size
    #[arg(long, env = "VOLSERVER_REQUEST_MAX", value_name = "SIZE", default_value = "32M", value_parser = request_bytes,
          help_heading = LIMITS)]
    pub request_max: u32,

    /// Memory for buffers and connections [default: as much as is of use, at most half of what
    /// this machine has, or a control group allows (MemoryMax=)]
    #[arg(long, env = "VOLSERVER_MEMORY_MAX", value_name = "SIZE", value_parser = size_bytes, help_heading = LIMITS)]
    pub memory_max: Option<u64>,

    /// Seconds that a client may stand still with buffers that others wait for, before it is disconnected
    #[arg(long, env = "VOLSERVER_STALL_TIMEOUT", value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u32).range(1..=3600), help_heading = LIMITS)]
    pub stall_timeout: u32,

    /// Percent of the data directory's file system that have to be free for a new snapshot or clone: what is written to their
    /// volumes afterwards takes space [default: 5, and at least 1 GiB, of small ones at most 10 percent]
    #[arg(long, env = "VOLSERVER_SNAPSHOT_RESERVE", value_name = "PERCENT",
          value_parser = clap::value_parser!(u8).range(0..=90), help_heading = LIMITS)]
    pub snapshot_reserve: Option<u8>,

    /// Where each call of the management API is written down, as a line of JSON: who, from where, what, and how it ended; appended to,
    /// and opened anew at SIGHUP
    #[arg(long, env = "VOLSERVER_AUDIT_LOG", value_name = "FILE")]
    pub audit_log: Option<PathBuf>,

    /// What to log on stderr: error, warn, info, debug or trace; or a filter such as server::lifecycle=debug
    #[arg(long, env = "VOLSERVER_LOG", value_name = "LEVEL", default_value = "info")]
    pub log: String,

    /// Makes the server fail on purpose; for tests of the tests
    #[arg(long, env = "VOLSERVER_FAULT", value_name = "FAULT", hide = true)]
    pub fault: Option<Faults>,
}

/// Values of `--cache`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Past the page cache (O_DIRECT), where the file system can
    None,
    /// Through the page cache
    Writeback,
}

impl From<Cache> for CacheMode {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::None => Self::Auto,
            Cache::Writeback => Self::Buffered,
        }
    }
}

/// Values of `--tls`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TlsMode {
    /// Nobody does
    Off,
    /// Who wants to
    Allowed,
    /// Everybody does
    Required,
}

/// Values of `--tls-records`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TlsRecords {
    /// The kernel where it can (kTLS), else a thread for each connection
    Auto,
    /// A thread for each connection
    UserSpace,
}

impl From<TlsRecords> for Records {
    fn from(records: TlsRecords) -> Self {
        match records {
            TlsRecords::Auto => Self::Auto,
            TlsRecords::UserSpace => Self::UserSpace,
        }
    }
}

impl Config {
    /// Whether TLS tells of every caller on TCP who it is.
    pub fn tells_who_calls(&self) -> bool {
        self.tls == TlsMode::Required && self.tls_client_ca.is_some()
    }

    /// The addresses that other machines can reach, and that are not protected: NBD needs encryption there (what may be
    /// opened, the names' secrets say), the API also has to know who calls.
    pub fn exposed(&self) -> impl Iterator<Item = SocketAddr> {
        let is_encrypted = self.tls == TlsMode::Required;
        let is_protected = self.tells_who_calls();
        let data = self.listen.iter().filter_map(DataAddress::tcp).filter(move |_| !is_encrypted);
        let management = self.management.iter().filter_map(DataAddress::tcp).filter(move |_| !is_protected);
        data.chain(management).filter(|address| !address.ip().to_canonical().is_loopback())
    }

    /// The management API's addresses where every user of this machine may do everything.
    pub fn open_to_local_users(&self) -> impl Iterator<Item = SocketAddr> {
        let is_open = self.tls == TlsMode::Off;
        self.management.iter().filter_map(DataAddress::tcp).filter(move |_| is_open)
    }

    /// Where the management API listens: as told, else on a socket in the runtime directory, or in the data directory where there is
    /// none; and where TLS tells who calls, on loopback as well.
    pub fn management_addresses(&self, runtime_dir: Option<&Path>) -> Vec<DataAddress> {
        if !self.management.is_empty() {
            return self.management.clone();
        }
        let path = runtime_dir.unwrap_or(&self.data_dir).join(MANAGEMENT_SOCKET_NAME);
        let socket = DataAddress::Unix(std::path::absolute(&path).unwrap_or(path));
        let port = self.tells_who_calls().then(|| SocketAddr::from(([127, 0, 0, 1], MANAGEMENT_PORT)).into());
        std::iter::once(socket).chain(port).collect()
    }

    /// The group of the management API's Unix sockets.
    ///
    /// # Errors
    /// In words: there is no such group.
    pub fn management_group_id(&self) -> Result<u32, String> {
        let own = rustix::process::getegid().as_raw();
        match &self.management_group {
            Some(group) => match group.parse() {
                Ok(group_id) => Ok(group_id),
                Err(_) => {
                    group_id(group).ok_or_else(|| format!("--management-group: there is no group {group}"))
                }
            },
            None if rustix::process::geteuid().is_root() => Ok(group_id(DEFAULT_GROUP).unwrap_or(own)),
            None => Ok(own),
        }
    }

    /// Where to keep what has to survive this process; the first place that can be written to. `None`: there is none.
    pub fn runtime_dir(&self) -> Option<PathBuf> {
        if let Some(dir) = &self.runtime_dir {
            // One that cannot be made is told by who needs it.
            make_runtime_dir(dir, true);
            return Some(dir.clone());
        }
        let from_env =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let candidates = [
            // systemd's RuntimeDirectory=
            from_env("RUNTIME_DIRECTORY"),
            Some(PathBuf::from("/run/volserver")),
            from_env("XDG_RUNTIME_DIR").map(|dir| dir.join("volserver")),
        ];
        candidates.into_iter().flatten().find(|dir| {
            make_runtime_dir(dir, false);
            dir.is_dir() && rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok()
        })
    }

    /// The files of TLS, where there is TLS.
    pub fn tls_files(&self) -> Option<TlsFiles> {
        if self.tls == TlsMode::Off {
            return None;
        }
        let (certificate, key) = self.tls_cert.clone().zip(self.tls_key.clone())?;
        let pair = Pair { certificate, key };
        Some(TlsFiles { pair, client_authority: self.tls_client_ca.clone() })
    }

    /// What may be adopted.
    pub fn adoptable(&self) -> Adoptable {
        Adoptable {
            allowed: self.adopt_allow.clone(),
            data_dir: self.data_dir.clone(),
            ..Adoptable::default()
        }
    }

    /// What clients can take at most.
    pub fn limits(&self) -> Limits {
        Limits {
            connections_max: self.connections_max,
            connections_per_address_max: self.connections_per_address_max,
            handshake_timeout: Duration::from_secs(self.handshake_timeout.into()),
            handshake_options_max: self.handshake_options_max,
            request_bytes_max: self.request_max,
            memory_bytes_max: self.memory_max,
            stall_timeout: Duration::from_secs(self.stall_timeout.into()),
            ..Limits::default()
        }
    }
}

/// A path that means the same whatever the working directory is, in parts that all are names.
fn absolute_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let is_plain = |part: std::path::Component<'_>| {
        matches!(part, std::path::Component::RootDir | std::path::Component::Normal(_))
    };
    if path.is_absolute() && path.components().all(is_plain) {
        return Ok(path);
    }
    Err("must be an absolute path without \"..\"".to_owned())
}

/// Makes the directory where it is missing, and lets the socket's group get there, whatever the umask is.
fn make_runtime_dir(dir: &Path, with_parents: bool) {
    let mut builder = std::fs::DirBuilder::new();
    if !dir.is_dir() && builder.recursive(with_parents).create(dir).is_ok() {
        let _ = std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755));
    }
}

/// A group of `/etc/group`.
fn group_id(name: &str) -> Option<u32> {
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    let mut fields =
        groups.lines().map(|line| line.split(':')).find(|fields| fields.clone().next() == Some(name))?;
    fields.nth(2)?.parse().ok()
}

/// Takes a number of bytes, or of KiB, MiB, GiB or TiB with `K`, `M`, `G` or `T` behind it.
fn size_bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((end, 'K')) => (&text[..end], 10),
        Some((end, 'M')) => (&text[..end], 20),
        Some((end, 'G')) => (&text[..end], 30),
        Some((end, 'T')) => (&text[..end], 40),
        _ => (text, 0),
    };
    let number = digits.parse::<u64>().map_err(|_| format!("{text:?} is not a size, such as 512M or 2G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too much"))
}

/// Takes a size that clients can be told as the maximum block size.
fn request_bytes(text: &str) -> Result<u32, String> {
    let bytes = size_bytes(text)?;
    let bounds = u64::from(REQUEST_BYTES_LEAST)..=u64::from(PAYLOAD_BYTES_MAX_DEFAULT);
    let is_power_of_two = bytes.is_power_of_two();
    let fits = u32::try_from(bytes).ok().filter(|_| bounds.contains(&bytes) && is_power_of_two);
    fits.ok_or_else(|| format!("{text:?} is not a power of two from 64K to 32M"))
}

/// Takes `host:port` with a host that is a name, an IPv4 address or an IPv6 address in brackets.
fn host_and_port(text: &str) -> Result<String, String> {
    let wrong =
        || format!("{text:?} is not HOST:PORT, such as storage-1.example:10809 or [2001:db8::1]:10809");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let is_port = port.parse::<u16>().is_ok_and(|port| port != 0);
    let in_brackets = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
    let is_plain =
        !host.is_empty() && !host.contains([':', '[', ']']) && host.bytes().all(|b| b.is_ascii_graphic());
    if is_port && (in_brackets || is_plain) { Ok(text.to_owned()) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the arguments alone say: nothing of the environment that the tests run in.
    fn parse(args: &[&str]) -> Result<Config, clap::Error> {
        let command =
            <Config as clap::CommandFactory>::command().mut_args(|argument| argument.env(None::<&str>));
        let matches = command.try_get_matches_from(["volserver", "--data-dir", "/d"].iter().chain(args))?;
        <Config as clap::FromArgMatches>::from_arg_matches(&matches)
    }

    #[test]
    fn the_definition_is_sound() {
        <Config as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn nothing_is_open_to_others_by_default() {
        let config = parse(&[]).unwrap();
        assert_eq!(config.listen, ["127.0.0.1:10809".parse().unwrap()]);
        assert_eq!(config.exposed().count() + config.open_to_local_users().count(), 0);
        let management = config.management_addresses(Some(Path::new("/run/volserver")));
        assert_eq!(management, ["unix:/run/volserver/management.sock".parse().unwrap()]);
        assert_eq!(config.management_addresses(None), ["unix:/d/management.sock".parse().unwrap()]);
        let tls = ["--tls", "required", "--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "a"];
        let with_port = parse(&tls).unwrap().management_addresses(None);
        assert_eq!(with_port[1], "127.0.0.1:10810".parse().unwrap());
        assert_eq!(config.tls_files(), None);
        assert!(!config.export_by_name && !config.insecure);
    }

    #[test]
    fn what_may_be_adopted_is_named_by_whole_paths() {
        assert!(parse(&[]).unwrap().adopt_allow.is_empty());
        let config = parse(&["--adopt-allow", "/dev/sdb,/srv/images/", "--adopt-allow", "/dev/vg0"]).unwrap();
        let allowed = config.adoptable().allowed;
        assert_eq!(allowed, ["/dev/sdb", "/srv/images", "/dev/vg0"].map(PathBuf::from));
        for bad in ["dev/sdb", "/dev/../etc", "", "./images"] {
            assert!(parse(&["--adopt-allow", bad]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_address_is_looked_at() {
        let beyond =
            |args: &[&str]| parse(args).unwrap().exposed().map(|a| a.to_string()).collect::<Vec<_>>();
        assert_eq!(beyond(&["--listen", "[::1]:1,0.0.0.0:2"]), ["0.0.0.0:2"]);
        assert_eq!(beyond(&["--listen", "127.0.0.1:1", "--listen", "[::]:2"]), ["[::]:2"]);
        assert_eq!(beyond(&["--management", "192.0.2.1:2"]), ["192.0.2.1:2"]);
        assert_eq!(beyond(&["--listen", "[::ffff:127.0.0.1]:1,127.8.9.1:2"]), [""; 0]);
        assert_eq!(beyond(&["--listen", "unix:/run/nbd.sock"]), [""; 0]);
    }

    #[test]
    fn tls_protects_what_other_machines_reach() {
        let exposed = |args: &[&str]| {
            let all =
                ["--listen", "0.0.0.0:1", "--management", "0.0.0.0:2", "--tls-cert", "c", "--tls-key", "k"];
            parse(&[&all[..], args].concat()).unwrap().exposed().map(|a| a.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(exposed(&[]), ["0.0.0.0:1", "0.0.0.0:2"]);
        assert_eq!(exposed(&["--tls", "allowed", "--tls-client-ca", "a"]), ["0.0.0.0:1", "0.0.0.0:2"]);
        assert_eq!(exposed(&["--tls", "required"]), ["0.0.0.0:2"]);
        assert_eq!(exposed(&["--tls", "required", "--tls-client-ca", "a"]), [""; 0]);
    }

    #[test]
    fn a_management_port_is_for_local_users_too() {
        let open = |args: &[&str]| parse(args).unwrap().open_to_local_users().count();
        assert_eq!(open(&["--management", "127.0.0.1:1,unix:/run/m.sock,[::1]:2"]), 2);
        assert_eq!(
            open(&["--management", "127.0.0.1:1", "--tls", "allowed", "--tls-cert", "c", "--tls-key", "k"]),
            0
        );
        assert_eq!(open(&["--management", "unix:/run/m.sock"]), 0);
    }

    #[test]
    fn tls_needs_a_certificate_and_its_key() {
        for mode in ["allowed", "required"] {
            assert!(parse(&["--tls", mode]).is_err());
            assert!(parse(&["--tls", mode, "--tls-cert", "c"]).is_err());
            let config = parse(&["--tls", mode, "--tls-cert", "c", "--tls-key", "k"]).unwrap();
            let files = config.tls_files().unwrap();
            assert_eq!((files.pair.certificate, files.client_authority), ("c".into(), None));
        }
    }

    #[test]
    fn advertised_addresses_name_a_host_and_a_port() {
        for good in ["storage-1.example:10809", "192.0.2.1:1", "[2001:db8::1]:10809"] {
            assert_eq!(host_and_port(good).as_deref(), Ok(good));
        }
        for bad in
            ["storage-1", "storage-1:", ":1", "storage-1:0", "2001:db8::1:10809", "[]:1", "a b:1", "a:65536"]
        {
            assert!(host_and_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn unset_limits_are_the_data_sides_own() {
        assert_eq!(parse(&[]).unwrap().limits(), Limits::default());
    }

    #[test]
    fn limits_are_taken_to_their_borders_and_not_beyond() {
        for (option, good, bad) in [
            ("--connections-max", ["1", "65536"], ["0", "65537"]),
            ("--connections-per-address-max", ["1", "4294967295"], ["0", "-1"]),
            ("--handshake-timeout", ["1", "3600"], ["0", "3601"]),
            ("--handshake-options-max", ["1", "4096"], ["0", "4097"]),
            ("--request-max", ["64K", "32M"], ["32K", "64M"]),
            ("--memory-max", ["0", "16777215T"], ["16777216T", "a lot"]),
            ("--stall-timeout", ["1", "3600"], ["0", "3601"]),
            ("--snapshot-reserve", ["0", "90"], ["-1", "91"]),
        ] {
            for value in good {
                assert!(parse(&[option, value]).is_ok(), "{option} {value}");
            }
            for value in bad {
                assert!(parse(&[option, value]).is_err(), "{option} {value}");
            }
        }
        let limits = parse(&["--request-max", "1M", "--memory-max", "3G"]).unwrap().limits();
        assert_eq!((limits.request_bytes_max, limits.memory_bytes_max), (1 << 20, Some(3 << 30)));
        assert!(parse(&["--request-max", "96K"]).is_err(), "not a power of two");
    }
}
