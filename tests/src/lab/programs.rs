//! Building the workspace's programs: all with the lab's profile, or those that are measured with a profile of their own.
//!
//! Called before anything runs; [`BuildBeside`] while something does. What the tests need beside that builds `run/host_tests.rs`.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::progress;
use super::tool::{self, Running};
use super::workspace::{PROFILE, Workspace};

/// A build of everything from nothing on two slow cores.
const ALL_DEADLINE: Duration = Duration::from_secs(45 * 60);

/// The product from nothing with link-time optimisation, on two slow cores that others use, too.
const MEASURED_DEADLINE: Duration = Duration::from_secs(30 * 60);

/// Builds every program of the workspace with the lab's profile.
///
/// # Errors
/// They do not build, or not in time; cargo has said why.
pub(crate) fn build_all(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--profile", PROFILE, "--workspace", "--bins"]);
    let (status, _) = progress::cargo(&mut cargo, "compiling the programs", Stdio::null(), ALL_DEADLINE)?;
    ensure!(status.success(), "the workspace does not build");
    Ok(())
}

/// The product's programs.
const PRODUCT: [&str; 3] = ["volserver", "volclient", "volctl"];

/// Builds the product with a profile.
///
/// # Errors
/// As [`build`].
pub(crate) fn build_product(workspace: &Workspace, profile: &str) -> Result<()> {
    build(workspace, profile, &PRODUCT)
}

/// Builds programs of the workspace with a profile.
///
/// # Errors
/// They do not build, or not in time; cargo has said why.
pub(crate) fn build(workspace: &Workspace, profile: &str, programs: &[&str]) -> Result<()> {
    let what = format!("compiling {} (profile {profile})", programs.join(", "));
    let mut cargo = build_command(workspace, profile, programs);
    let (status, _) = progress::cargo(&mut cargo, &what, Stdio::null(), MEASURED_DEADLINE)?;
    ensure!(status.success(), "the programs do not build");
    Ok(())
}

fn build_command(workspace: &Workspace, profile: &str, programs: &[&str]) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--profile", profile, "--workspace"]);
    cargo.args(programs.iter().flat_map(|program| ["--bin", program])).stdin(Stdio::null());
    cargo
}

/// A build beside other work, from the processor time that leaves over. [`build`] then has little to do; it also
/// says what went wrong.
pub(crate) struct BuildBeside(Running);

impl BuildBeside {
    /// Begins as [`build`] would.
    ///
    /// # Errors
    /// cargo cannot be run.
    pub(crate) fn start(workspace: &Workspace, profile: &str, programs: &[&str]) -> Result<Self> {
        let cargo = build_command(workspace, profile, programs);
        let mut nice = tool::command("setpriv");
        nice.args(["--pdeathsig", "KILL", "--", "nice", "-n", "19"]).arg(cargo.get_program());
        nice.args(cargo.get_args())
            .arg("--quiet")
            .current_dir(&workspace.root)
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        for (name, _) in cargo.get_envs().filter(|(_, value)| value.is_none()) {
            nice.env_remove(name);
        }
        Ok(Self(Running(nice.spawn().context("cannot run cargo beside the tests")?)))
    }

    /// Waits for its end, whatever that is.
    ///
    /// # Errors
    /// It does not end in time.
    pub(crate) fn finish(mut self) -> Result<()> {
        tool::wait(&mut self.0.0, MEASURED_DEADLINE).context("cargo build beside the tests").map(drop)
    }
}
