//! The commands and options of volctl.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::duration::parse_duration;
use crate::exit_code::EXIT_CODES_HELP;
use crate::image::{ExportArgs, ImageProgramArgs, ImportArgs};
use crate::output::OutputFormat;
use crate::passphrase::{ChangeArgs, PassphraseArgs};
use crate::settings::{IfEtag, LimitArgs, SetArgs, parse_label, parse_label_filter};
use crate::size::parse_size;
use crate::tenant_args::TenantCommand;
use crate::watch::WatchArgs;

/// Manage network volumes, and attach them to this machine as local disks.
#[derive(Debug, Parser)]
#[command(name = "volctl", version, max_term_width = 100, after_help = EXIT_CODES_HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Management API of the storage server: unix:/path, http://host:port or https://host:port (port 10810 if left out)
    #[arg(
        long,
        global = true,
        env = "VOLNODE_SERVER",
        default_value = client::api_channel::DEFAULT_URI,
        value_name = "URI"
    )]
    pub(crate) server: String,
    /// Authority of the server's certificate (PEM): needed for https://
    #[arg(long, global = true, env = "VOLNODE_TLS_CA", value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Your certificate (PEM), for a server that asks for one
    #[arg(long, global = true, env = "VOLNODE_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, global = true, env = "VOLNODE_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Socket of this machine's node daemon, `volclient serve`
    #[arg(
        long,
        global = true,
        env = "VOLNODE_SOCKET",
        default_value = "/run/volnode/volclient.sock",
        value_name = "PATH"
    )]
    pub(crate) socket: PathBuf,
    /// How to print the result; JSON and YAML have the field names of the volnode.v1 API, bytes and milliseconds
    #[arg(long, global = true, value_enum, default_value_t = OutputFormat::Table, value_name = "FORMAT")]
    pub(crate) output: OutputFormat,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a volume, or find that it is there with the same properties
    Create(CreateArgs),
    /// Make and change volumes until they are as a file declares them; deletes nothing, and a second time changes nothing
    ///
    /// The file is YAML: a list of volumes, or a document for each. `name` and what `create`, `clone`, `set` and `limit` take: `size`,
    /// `block_size`, `backend`, `write_cache`, `adopt`, `source` (VOLUME, VOLUME@SNAPSHOT or @UID: a clone), `labels` (KEY: VALUE, or
    /// KEY: ~ to take it away), `description`, `protected`, `read_only`, `shared`, `encrypted`, and `limits` with `read_iops`, `write_iops`,
    /// `read_bandwidth`, `write_bandwidth` and `burst`. What is left out stays as it is; of a new volume it is as `create` has it.
    ///
    /// Where something is declared that cannot be changed (a smaller size, another block size), nothing is changed at all. What
    /// fails on the way ends it: what was done is told, and the next time goes on from there.
    Apply(ApplyArgs),
    /// List all volumes
    List {
        /// Only those that have this label, as KEY=VALUE or KEY; may be given several times
        #[arg(long = "label", value_name = "LABEL", value_parser = parse_label_filter)]
        labels: Vec<(String, String)>,
    },
    /// Show one volume and its attachments
    Show {
        /// The volume's name
        name: String,
    },
    /// Change a volume's labels, description, protection or read-only mark, while it is in use, too
    Set(SetArgs),
    /// Give a volume another name, while nobody has it
    Rename {
        /// Its name, or uid:UUID
        name: String,
        /// The new one
        new_name: String,
        #[command(flatten)]
        only: IfEtag,
    },
    /// Limit the requests and bytes per second that all users of a volume have together, while it is in use, too
    ///
    /// What is left out stays as it is. Connections have equal shares.
    Limit {
        /// The volume's name
        name: String,
        #[command(flatten)]
        limits: LimitArgs,
        #[command(flatten)]
        only: IfEtag,
    },
    /// Make a volume larger, while it is in use, too; one that has the size is a success
    Resize {
        /// The volume's name
        name: String,
        /// New capacity, as for create; of an encrypted volume without its header
        #[arg(long, value_parser = parse_size)]
        size: u64,
        #[command(flatten)]
        only: IfEtag,
    },
    /// Delete a volume and its data; one that is not there is a success
    Delete {
        /// The volume's name
        name: String,
        /// Keep its snapshots, which are named by their uid (@UID) from then on; without this a volume with snapshots stays
        #[arg(long)]
        keep_snapshots: bool,
        #[command(flatten)]
        only: IfEtag,
    },
    /// Take, list, delete and go back to snapshots of volumes
    Snapshot {
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Make a volume with the bytes of another at this instant, or of a snapshot
    Clone(CloneArgs),
    /// Tell which bytes of a snapshot, or of a volume at this instant, may be others than a snapshot's
    Diff {
        /// What is compared with: VOLUME@SNAPSHOT, or @UID for a snapshot by its uid
        #[arg(value_name = "SNAPSHOT")]
        base: String,
        /// What has changed: VOLUME@SNAPSHOT, @UID, or a volume's name
        #[arg(value_name = "SNAPSHOT|VOLUME")]
        target: String,
    },
    /// Copy an image into a volume: a file, an NBD export or stdin; an import that was interrupted goes on when it is repeated
    Import(ImportArgs),
    /// Copy a volume or a snapshot into an image's file, or to an NBD export; one that was interrupted goes on as well
    Export(ExportArgs),
    /// Becomes another program, with less rights: for volctl's own use
    #[command(name = client::image::qemu::SANDBOX_COMMAND, hide = true)]
    ImageProgram(ImageProgramArgs),
    /// See and cancel what goes on behind snapshots, clones and restores
    Operation {
        #[command(subcommand)]
        command: OperationCommand,
    },
    /// See and forget the machines that have registered at the storage server
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// Say which node may attach which volume, apart from the attach: who asks for a grant (`attach --only-if-granted`, Kubernetes) gets
    /// nothing without one
    Grant {
        #[command(subcommand)]
        command: GrantCommand,
    },
    /// Limit how much each tenant may have, whose volumes are called TENANT+NAME
    Tenant {
        #[command(subcommand)]
        command: TenantCommand,
    },
    /// Make a volume, a snapshot, or an export of any NBD server, a local disk; prints its path
    Attach(AttachArgs),
    /// Change the passphrase of an encrypted volume that is attached to this machine, while it is in use, too
    ///
    /// Snapshots and clones that there are keep the one that they have.
    Passphrase(ChangeArgs),
    /// Take a local disk away; what is not attached is a success
    #[command(group = clap::ArgGroup::new("which").required(true).args(["target", "all"]))]
    Detach {
        /// What was attached: a volume's name, a snapshot or an NBD URI; or /dev/ublkbN, its stable name, or the attachment's id
        target: Option<String>,
        /// Every disk that is attached to this machine, all at once
        #[arg(long)]
        all: bool,
        /// Take it away whoever has it open: their I/O fails, and what was not flushed may be lost
        #[arg(long)]
        force: bool,
    },
    /// Change what I/O does while the storage server cannot be reached, during an outage, too
    #[command(mut_arg("on_stall", |on_stall| on_stall.required(true)))]
    #[command(group = clap::ArgGroup::new("which").required(true).args(["target", "all"]))]
    Policy {
        /// As for detach
        target: Option<String>,
        /// Every disk that is attached to this machine, all at once
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        stall: StallArgs,
    },
    /// Replace a disk's device process by the program that is installed now; I/O waits meanwhile
    #[command(group = clap::ArgGroup::new("which").required(true).args(["target", "all"]))]
    Upgrade {
        /// As for detach
        target: Option<String>,
        /// Every disk that is attached to this machine, one after another
        #[arg(long)]
        all: bool,
    },
    /// List the disks that are attached to this machine
    Attachments,
    /// Tell what happens to the disks that are attached to this machine, a line each; first what there is
    Events {
        /// Go on until interrupted, instead of ending with what there is
        #[arg(long)]
        follow: bool,
    },
    /// Tell what happens to volumes, attachments, snapshots, nodes and grants of the storage server, a line each, until interrupted
    ///
    /// It begins with what there is; with --resume behind the event that had the token (--output json shows it), also over restarts of
    /// the server. Changes are kept for 7 days, and at most 100,000 of them.
    Watch(WatchArgs),
    /// Print the versions of volctl, the storage server and the node daemon
    Version,
    /// Check that this machine can attach volumes, and say what to do where it cannot
    Doctor,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Take a snapshot of one or more volumes, all at one instant, while they are in use
    Create {
        /// The volumes' names, with commas between them
        #[arg(value_name = "VOLUME[,VOLUME…]", value_delimiter = ',', required = true, num_args = 1)]
        volumes: Vec<String>,
        /// The snapshot's name, of each: 1 to 64 letters, digits, '-', '_' and '.', beginning with a letter or digit
        name: String,
        /// Freeze the file systems that are mounted of the volumes meanwhile, here or where they are attached, so that all that was written is in it
        ///
        /// What is dirty is written first; then nobody writes to them for a moment, 10 s at most. If they were not frozen all the time,
        /// the snapshots are deleted.
        #[arg(long)]
        freeze: bool,
    },
    /// List the snapshots of all volumes, or of one
    List {
        /// The volume's name
        volume: Option<String>,
    },
    /// Show one snapshot
    Show {
        /// The volume's name; or @UID for a snapshot by its uid
        #[arg(value_name = "VOLUME|@UID")]
        volume: String,
        /// The snapshot's name
        name: Option<String>,
    },
    /// Delete a snapshot; one that is not there is a success, and one that is being made is cancelled
    Delete {
        /// The volume's name; or @UID for a snapshot by its uid
        #[arg(value_name = "VOLUME|@UID")]
        volume: String,
        /// The snapshot's name
        name: Option<String>,
    },
    /// Give a volume that is not attached the bytes of one of its snapshots: what was written since is lost
    Restore {
        /// The volume's name
        volume: String,
        /// The snapshot's name
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List what goes on, and what has ended within the last hour; the latest first
    List,
    /// Show one
    Show {
        /// Its id
        #[arg(value_name = "ID")]
        operation_id: String,
    },
    /// Have one end and undo what it did; one that has succeeded already is an error
    Cancel {
        /// Its id
        #[arg(value_name = "ID")]
        operation_id: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// List all of them; those of which nothing was heard for a minute are marked as silent
    List,
    /// Show one, with its disks and what is wrong there
    Show {
        /// Its name, as `volclient serve --node-id` has it
        #[arg(value_name = "NODE")]
        node_id: String,
    },
    /// Forget one that is gone; one that is not there is a success, and one whose node daemon runs registers itself again
    Delete {
        /// Its name
        #[arg(value_name = "NODE")]
        node_id: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum GrantCommand {
    /// Let a node attach a volume; one that may already is a success
    ///
    /// Several nodes may have one volume if all of them only read, or if it was made with --shared and all of them write.
    Create {
        /// The volume's name, or uid:UUID
        volume: String,
        /// The node's name, as `volctl node list` has it
        #[arg(value_name = "NODE")]
        node_id: String,
        /// It may not write
        #[arg(long)]
        read_only: bool,
        /// Also to a node that has not registered at the storage server
        #[arg(long)]
        unregistered: bool,
    },
    /// Take a grant away, and the volume from the node: its I/O has ended, and fails from then on, when this returns
    ///
    /// A grant that is not there is a success; what the node has attached without one is ended all the same.
    Delete {
        /// The volume's name, or uid:UUID
        volume: String,
        /// The node's name
        #[arg(value_name = "NODE")]
        node_id: String,
    },
    /// List the grants of all volumes, or of one
    List {
        /// The volume's name, or uid:UUID
        volume: Option<String>,
        /// Only those of this node
        #[arg(long = "node", value_name = "NODE")]
        node_id: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// Where the volumes are declared; - is stdin
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Tell what would be changed, and change nothing; ends with exit code 10 where there is something
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// What to clone: a volume's name, VOLUME@SNAPSHOT, or @UID for a snapshot by its uid
    #[arg(value_name = "SOURCE[@SNAPSHOT]")]
    pub(crate) source: String,
    /// The new volume's name, as for create
    #[arg(value_name = "NEW")]
    pub(crate) name: String,
    /// Capacity, as for create; not less than the source's [default: the source's]
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// 1 to 128 letters, digits, '-', '_' and '.', beginning with a letter or digit; not ending like a partition's (-part1)
    pub(crate) name: String,
    /// Capacity: bytes, or with K, M, G or T (powers of 1024; KiB, MiB ... mean the same), such as 2G
    #[arg(long, value_parser = parse_size, required_unless_present = "adopt")]
    pub(crate) size: Option<u64>,
    /// Logical block size in bytes: 4096; or 512, which disk images (cloud images, ISOs) are made for [default: 4096; of what is
    /// adopted its own, of a file 512]
    #[arg(long, value_name = "BYTES")]
    pub(crate) block_size: Option<u32>,
    /// Where the data is kept
    #[arg(long, value_enum, default_value_t = Backend::File)]
    pub(crate) backend: Backend,
    /// Serve an existing block device or raw file of the storage server as it is: nothing formats, resizes or deletes it. An absolute
    /// path without symbolic links, below what volserver --adopt-allow names
    #[arg(long, value_name = "PATH", conflicts_with_all = ["size", "backend"])]
    pub(crate) adopt: Option<String>,
    /// off: every write is durable before it is acknowledged
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub(crate) write_cache: Switch,
    /// A label, as KEY=VALUE; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    pub(crate) labels: Vec<(String, String)>,
    /// What it is for, in at most 1024 bytes
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) description: String,
    /// Refuse to delete or restore it, until `volctl set NAME --no-protect`
    #[arg(long)]
    pub(crate) protect: bool,
    /// Allow several machines to WRITE TO IT AT ONCE (volctl attach --access multi-writer): NOTHING KEEPS THEM APART
    ///
    /// AN EXT4, XFS OR BTRFS THAT TWO MACHINES HAVE MOUNTED IS DESTROYED. For cluster file systems and live migration, whose software
    /// sees to it who writes what.
    #[arg(long)]
    pub(crate) shared: bool,
    /// Have whoever attaches it encrypt what is written (LUKS): attach asks for a passphrase
    ///
    /// The first attach makes the header with its passphrase. The header takes 16 MiB more than --size on the storage server.
    #[arg(long, conflicts_with_all = ["shared", "adopt"])]
    pub(crate) encrypted: bool,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// A sparse file on the storage server
    File,
    /// Memory of the storage server; gone with its process
    Memory,
    /// A thin logical volume in the storage server's LVM pool (volserver --lvm)
    Lvm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// A volume's name; a snapshot, read-only, as VOLUME@SNAPSHOT or @UID; or nbd://host:port/export for any NBD server (port 10809 if left out; nbds:// for TLS), or
    /// nbd+unix:///export?socket=/path for one on this machine; also as systemd-escape writes such a URI
    pub(crate) target: String,
    /// How data moves between the kernel and the network; auto takes the best that this kernel proves it can do
    #[arg(long, value_enum, default_value_t = DataPathArg::Auto)]
    pub(crate) data_path: DataPathArg,
    /// Attach without the right to write; the same as --access reader
    #[arg(long, conflicts_with = "access")]
    pub(crate) read_only: bool,
    /// What this machine may do with a volume, and whether others may have it too [default: writer; of a snapshot always multi-reader]
    #[arg(long, value_enum, value_name = "ACCESS")]
    pub(crate) access: Option<Access>,
    /// Hardware queues [default: one for each CPU, up to 4]
    ///
    /// Each has a thread, which stays on the CPUs whose requests the queue gets. The default is 1 where the server does
    /// not allow several connections to one export; asking for more is an error there. More than there are CPUs is as many
    /// as there are. Four keep a network busy that a single TCP connection does not fill; each queue costs an idle disk
    /// a thread, a ring (some 100 KiB) and a connection.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) queues: Option<u32>,
    /// TCP connections of the whole attachment, at least one for each queue [default: as many as queues]
    ///
    /// Queue i has connections i, i+N, i+2N and so on of N queues: a multiple of N gives each the same number. More than
    /// one for a queue helps where a single TCP connection is slower than the network; it costs instructions.
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) connections: Option<u32>,
    /// Requests in flight on each queue [default: 128]
    ///
    /// More wait in the block layer. A data path that copies keeps a buffer of up to 1 MiB for each that was ever in
    /// flight; fused keeps none.
    #[arg(long, value_name = "D", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) queue_depth: Option<u32>,
    /// For so long after its last event a queue's thread looks for the next without sleeping, at most 10000 [default: 0]
    ///
    /// Spares a wake-up in each answer's latency where a processor is free for each queue; takes that processor's time
    /// while requests come, and nothing while none do.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0, hide_default_value = true)]
    pub(crate) busy_poll: u32,
    /// Whether large writes leave from the requests' own pages (SEND_ZC) [default: auto; on if the option stands alone]
    ///
    /// Spares the client's one copy of their data where the network card can fetch it by itself. A connection on which the
    /// kernel copies it all the same, as on loopback, goes back to the usual way after the first one. Never with TLS.
    #[arg(
        long,
        value_enum,
        value_name = "WHEN",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = SendZcArg::Auto,
        default_missing_value = "on",
        hide_default_value = true
    )]
    pub(crate) send_zc: SendZcArg,
    /// Take the volume from the node that holds it; that node's I/O fails from then on
    #[arg(long)]
    pub(crate) force: bool,
    /// Only if the volume is granted to this node (volctl grant); what was attached so is not attached anew without a grant either
    #[arg(long)]
    pub(crate) only_if_granted: bool,
    #[command(flatten)]
    pub(crate) passphrase: PassphraseArgs,
    #[command(flatten)]
    pub(crate) stall: StallArgs,
    /// While the storage server cannot be reached, or takes this machine's former boot for alive, go on trying for so long, such as
    /// 30s or 2m
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub(crate) retry_for: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Access {
    /// Reads and writes, alone
    Writer,
    /// Reads, alone
    Reader,
    /// Reads, with other machines that do so as well; nobody writes meanwhile
    MultiReader,
    /// Reads and writes, WITH OTHER MACHINES THAT WRITE AS WELL; only of a volume that was made with --shared
    MultiWriter,
}

impl AttachArgs {
    /// Whether writes are refused.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only || matches!(self.access, Some(Access::Reader | Access::MultiReader))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SendZcArg {
    /// From 128 KiB on, where it costs less
    Auto,
    /// From more than 8 KiB on
    On,
    /// Never
    Off,
}

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct StallArgs {
    /// What I/O does while the storage server cannot be reached; it works again when the server is back
    ///
    /// [default for attach: wait]
    #[arg(long, value_enum, value_name = "ACTION")]
    pub(crate) on_stall: Option<OnStall>,
    /// With fail: how long an outage may last before I/O fails, such as 500ms, 30s or 2m
    ///
    /// [default: 30s]
    #[arg(long, value_parser = parse_duration, value_name = "DURATION", requires = "on_stall")]
    pub(crate) after: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnStall {
    /// It waits, however long it takes
    Wait,
    /// It gets EIO
    Fail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DataPathArg {
    /// The best usable one
    Auto,
    /// The request's own pages are the socket's buffer (Linux 7.2)
    Fused,
    /// The request's own pages, by READ_FIXED and WRITE_FIXED on the socket (Linux 6.16)
    FixedRw,
    /// The request's own pages, registered by two more commands for each request (Linux 6.15)
    Registered,
    /// Through a buffer of the device process, which copies by pread and pwrite (Linux 6.5)
    UserCopy,
    /// Through a buffer of the device process, which the driver copies (Linux 6.0)
    Mapped,
}

impl DataPathArg {
    /// As in the node API.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fused => "fused",
            Self::FixedRw => "fixed-rw",
            Self::Registered => "registered",
            Self::UserCopy => "user-copy",
            Self::Mapped => "mapped",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_policy_has_to_say_what_is_to_be_done() {
        assert!(Cli::try_parse_from(["volctl", "policy", "vol-1"]).is_err());
        assert!(Cli::try_parse_from(["volctl", "policy", "vol-1", "--on-stall", "wait"]).is_ok());
        assert!(Cli::try_parse_from(["volctl", "policy", "--all", "--on-stall", "wait"]).is_ok());
        assert!(Cli::try_parse_from(["volctl", "policy", "--on-stall", "wait"]).is_err(), "of which?");
        assert!(Cli::try_parse_from(["volctl", "detach", "--all", "vol-1"]).is_err(), "one or all?");
        assert!(Cli::try_parse_from(["volctl", "attach", "vol-1"]).is_ok());
        let after_alone = ["volctl", "attach", "vol-1", "--after", "3s"];
        assert!(Cli::try_parse_from(after_alone).is_err(), "after what?");
    }

    #[test]
    fn the_value_of_send_zc_comes_after_an_equals_sign_only() {
        let send_zc = |words: &[&str]| {
            let words = [&["volctl", "attach"], words].concat();
            match Cli::try_parse_from(words).unwrap().command {
                Command::Attach(args) => (args.target, args.send_zc),
                other => panic!("{other:?}"),
            }
        };
        let target = || "auto".to_owned();
        assert_eq!(send_zc(&["auto"]), (target(), SendZcArg::Auto));
        // As before there were values, what follows is the target, whatever its name.
        assert_eq!(send_zc(&["--send-zc", "auto"]), (target(), SendZcArg::On));
        assert_eq!(send_zc(&["auto", "--send-zc"]), (target(), SendZcArg::On));
        assert_eq!(send_zc(&["--send-zc=off", "auto"]), (target(), SendZcArg::Off));
        assert_eq!(send_zc(&["--send-zc=auto", "auto"]), (target(), SendZcArg::Auto));
        assert!(Cli::try_parse_from(["volctl", "attach", "auto", "--send-zc", "off"]).is_err());
        assert!(Cli::try_parse_from(["volctl", "attach", "auto", "--send-zc=yes"]).is_err());
    }

    #[test]
    fn global_options_may_follow_the_command() {
        let cli =
            Cli::try_parse_from(["volctl", "list", "--output", "json", "--server", "http://h:1"]).unwrap();
        assert_eq!((cli.output, cli.server.as_str()), (OutputFormat::Json, "http://h:1"));
    }
}
