//! `cargo lab`: the test VM, its demo and every test.
//!
//! Reads the command line and hands over to `lab/` (the machine and what runs in it), `demo` (what the demo shows)
//! and `cost_guest` (what is measured), both run inside the machine. Exit codes: `run` and `shell` pass on the
//! command's; 125 means that the lab itself failed; `test` and `demo` end with 1 if anything failed.

mod commands;
mod cost_guest;
mod demo;
mod kubernetes;
mod lab;
mod scale_guest;
mod zero_copy_guest;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use kubernetes::KubernetesOptions;
use lab::machine::boots::BootsOptions;
use lab::machine::vm::{ByteCopies, Processors};
use lab::measure::bench_api::BenchApiOptions;
use lab::measure::cost::CostOptions;
use lab::run::fresh::FreshOptions;
use lab::run::fuzz::FuzzOptions;
use lab::run::soak::SoakOptions;
use lab::run::test_run::TestOptions;
use testlab::kernel_series::KernelSeries;

/// Exit code of `run` and `shell` when the machine failed rather than the command (as `timeout(1)` and docker do).
const LAB_FAILED: u8 = 125;

#[derive(Parser)]
#[command(
    name = "cargo lab",
    about = "The test VM: QEMU without KVM, Debian's kernels, this machine's files"
)]
struct CommandLine {
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Subcommand)]
enum LabCommand {
    /// A file system on a network disk, from nothing to a checked copy of it
    Demo(Machine),
    /// Run every test: on this machine, and in the VM on every kernel
    Test(TestOptions),
    /// Boot the VM many times, and count how often it came up
    Boots(BootsOptions),
    /// Boot the VM under systemd with our units, and shut it down with and without a network
    Systemd {
        /// The kernel to boot
        #[arg(long, value_enum, default_value = "7")]
        kernel: KernelSeries,
    },
    /// An interactive prompt in the VM (Ctrl-D ends it)
    Shell {
        /// The kernel to boot
        #[arg(long, value_enum, default_value = "7")]
        kernel: KernelSeries,
    },
    /// Run one command in the VM; its exit code is passed on
    Run {
        #[command(flatten)]
        machine: Machine,
        /// Seconds after which the machine is killed
        #[arg(long, default_value_t = 3600)]
        deadline_seconds: u64,
        /// One processor whose clock counts instructions, the machine of `cost`
        #[arg(long, hide = true, conflicts_with = "host")]
        counted: bool,
        /// The command and its arguments
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
    /// Instructions per I/O of the whole system, beside the kernel's own clients and the floor
    Cost(CostOptions),
    /// The storage server's speed, latency, CPU time and memory beside its peers', on this machine's own kernel
    BenchServer {
        /// Only see that everything works: some seconds, the lab's own build, numbers that mean nothing
        #[arg(long)]
        quick: bool,
        /// Also update the tables in docs/performance.md
        #[arg(long, conflicts_with = "quick")]
        write: bool,
        /// Where the servers keep their files meanwhile, some 4 GiB
        #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
        directory: PathBuf,
    },
    /// What each call of the management API takes with 10,000 volumes and as many snapshots, and what the server holds in memory
    BenchApi {
        /// Only see that everything works: some hundred volumes, the lab's own build, numbers that mean nothing
        #[arg(long)]
        quick: bool,
        /// Also update the table in docs/performance.md
        #[arg(long, conflicts_with = "quick")]
        write: bool,
        /// Another volserver than one that is built for it
        #[arg(long, value_name = "FILE", conflicts_with = "write")]
        server: Option<PathBuf>,
        /// Where the server keeps its files meanwhile, some 2 GiB: on XFS or btrfs, for snapshots
        #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
        directory: PathBuf,
    },
    /// Install, fetch and build all that the demo and the tests need, and run nothing
    Setup,
    /// Make the images of deploy/kubernetes, of the release's programs and what they run, without a registry
    Images {
        /// Where the archives go [default: images in the target directory]
        #[arg(long, value_name = "DIR")]
        directory: Option<PathBuf>,
    },
    /// Prove on a bare Debian, made for it, that both commands of the README set themselves up and the host's tests pass
    Fresh(FreshOptions),
    /// Look for inputs that break the parsers which face the network
    Fuzz(FuzzOptions),
    /// Kill, cut and upgrade at random under load, and believe nothing of what comes back
    Soak(SoakOptions),
    /// A real Kubernetes with our chart: pods move, nodes die, programs are killed, and no byte is wrong
    Kubernetes(KubernetesOptions),
    /// What an idle attachment costs, and an I/O beside up to 64 others
    Scale {
        /// Also update the tables in docs/performance.md
        #[arg(long)]
        write: bool,
    },
    /// What a large WRITE costs a client's machine whose card fetches data, copied and sent from the request's own pages
    ZeroCopy {
        /// Also update the table in docs/performance.md
        #[arg(long)]
        write: bool,
    },
    /// What `demo` runs inside the VM
    #[command(hide = true)]
    GuestDemo,
    /// What `cost` runs inside the VM
    #[command(hide = true)]
    GuestCost {
        /// The directory of the product's programs
        programs: PathBuf,
        /// What to measure, JSON
        plan: String,
    },
    /// What `scale` runs inside the VM
    #[command(hide = true)]
    GuestScale {
        /// What to measure
        part: scale_guest::Part,
        /// The directory of the product's programs
        programs: PathBuf,
    },
    /// What `zero-copy` runs inside the VM
    #[command(hide = true)]
    GuestZeroCopy {
        /// The directory of the product's programs
        programs: PathBuf,
    },
    /// What `soak` runs inside the VM
    #[command(hide = true)]
    GuestSoak(commands::GuestSoak),
}

/// Where to run.
#[derive(Args)]
struct Machine {
    /// The kernel to boot
    #[arg(long, value_enum, default_value = "7")]
    kernel: KernelSeries,
    /// Use this machine's own kernel and ublk driver instead of a VM
    #[arg(long, conflicts_with = "kernel")]
    host: bool,
}

impl Machine {
    /// The kernel to boot, or none for this machine's own.
    fn series(&self) -> Option<KernelSeries> {
        (!self.host).then_some(self.kernel)
    }
}

fn main() -> ExitCode {
    let command_line = CommandLine::parse();
    let result = lab::interrupt::install().and_then(|()| match command_line.command {
        LabCommand::Demo(machine) => commands::demo(machine.series()),
        LabCommand::Test(options) => commands::test(&options),
        LabCommand::Boots(options) => commands::boots(&options),
        LabCommand::Systemd { kernel } => commands::systemd(kernel),
        LabCommand::Shell { kernel } => commands::shell(kernel),
        LabCommand::Run { machine, deadline_seconds, counted, command } => {
            let processors = if counted { Processors::Counted(ByteCopies::None) } else { Processors::Two };
            commands::run(machine.series(), processors, deadline_seconds, command)
        }
        LabCommand::Cost(options) => commands::cost(&options),
        LabCommand::BenchServer { quick, write, directory } => {
            commands::bench_server(quick, write, &directory)
        }
        LabCommand::BenchApi { quick, write, server, directory } => {
            let (server, directory) = (server.as_deref(), directory.as_path());
            commands::bench_api(BenchApiOptions { quick, write, server, directory })
        }
        LabCommand::Soak(options) => commands::soak(&options),
        LabCommand::GuestSoak(guest) => commands::guest_soak(&guest),
        LabCommand::Setup => commands::setup(),
        LabCommand::Images { directory } => commands::images(directory),
        LabCommand::Fresh(options) => commands::fresh(&options),
        LabCommand::Fuzz(options) => commands::fuzz(&options),
        LabCommand::Kubernetes(options) => commands::kubernetes(&options),
        LabCommand::Scale { write } => commands::scale(write),
        LabCommand::GuestScale { part, programs } => scale_guest::run(part, &programs).map(|()| 0),
        LabCommand::ZeroCopy { write } => commands::zero_copy(write),
        LabCommand::GuestZeroCopy { programs } => zero_copy_guest::run(&programs).map(|()| 0),
        LabCommand::GuestDemo => demo::run().map(|()| 0),
        LabCommand::GuestCost { programs, plan } => cost_guest::run(&programs, &plan).map(|()| 0),
    });
    match result {
        Ok(exit_code) => ExitCode::from(exit_code),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(LAB_FAILED)
        }
    }
}
