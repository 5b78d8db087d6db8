//! An apt configuration of the lab's own: other suites than the machine's, the machine's mirror and keys.
//!
//! Nothing of the machine's configuration is changed: sources, package lists and downloads live in a directory
//! of the lab's cache. The mirror's address comes from the machine's own sources (classic `.list` files and
//! deb822 `.sources` files, `sources.list(5)`), so a machine behind a local mirror keeps using it. Packages are
//! always checked against Debian's archive keys; there is no way to switch that off here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::tool;

/// Debian's archive keys, of every release the installed `debian-archive-keyring` knows.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Package lists of a suite are up to 10 MB.
const UPDATE_DEADLINE: Duration = Duration::from_secs(180);

/// The largest thing ever fetched is a kernel with its modules, some 120 MB.
const DOWNLOAD_DEADLINE: Duration = Duration::from_secs(900);

/// Installing the tools is some 100 MB of packages.
const INSTALL_DEADLINE: Duration = Duration::from_secs(900);

/// Seconds apt waits for a silent server, so that a machine without network fails soon.
const OFFLINE_OPTIONS: [&str; 3] =
    ["Acquire::http::Timeout=20", "Acquire::https::Timeout=20", "Acquire::Retries=2"];

/// Which apt configuration a command uses.
pub(crate) struct Apt {
    /// `name=value` options, each given as `-o`.
    options: Vec<String>,
}

impl Apt {
    /// The machine's own configuration.
    pub(crate) fn of_this_machine() -> Self {
        Self { options: OFFLINE_OPTIONS.map(str::to_owned).to_vec() }
    }

    /// A configuration whose only sources are `suites` of the Debian mirror at `mirror`, kept in `directory`.
    /// With `own_status` no package counts as installed, which is what looking at another release needs.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub(crate) fn with_suites(
        directory: &Path,
        mirror: &str,
        suites: &[String],
        own_status: bool,
    ) -> Result<Self> {
        let lists = directory.join("lists");
        let cache = directory.join("cache");
        fs::create_dir_all(lists.join("partial")).context("creating apt's list directory")?;
        fs::create_dir_all(cache.join("archives/partial")).context("creating apt's cache directory")?;
        let sources = directory.join("sources.list");
        let lines: String =
            suites.iter().map(|suite| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n")).collect();
        fs::write(&sources, lines).context("writing apt's sources")?;
        let mut options = OFFLINE_OPTIONS.map(str::to_owned).to_vec();
        options.extend([
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "Dir::Etc::Preferences=/dev/null".to_owned(),
            "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", lists.display()),
            format!("Dir::Cache={}", cache.display()),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ]);
        if own_status {
            let status = directory.join("status");
            fs::write(&status, "").context("writing apt's status file")?;
            options.push(format!("Dir::State::status={}", status.display()));
        }
        Ok(Self { options })
    }

    /// Fetches the package lists.
    ///
    /// # Errors
    /// The mirror cannot be reached, or its signature does not verify with the installed keys.
    pub(crate) fn update(&self) -> Result<()> {
        let mut command = self.command("apt-get");
        // Without this a list that cannot be fetched is only a warning.
        command.args(["-o", "APT::Update::Error-Mode=any", "update"]);
        tool::output(&mut command, UPDATE_DEADLINE).map(drop)
    }

    /// Installs packages, without recommended ones, taking all it can from `release` if one is given. Takes away none: what
    /// the machine has is its user's.
    ///
    /// # Errors
    /// Whatever stopped apt-get: no root rights, unknown packages, broken dependencies or ones that only removing others
    /// would mend, no network.
    pub(crate) fn install(&self, packages: &[&str], release: Option<&str>) -> Result<()> {
        let mut command = self.command("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command.args(["install", "--yes", "--no-install-recommends", "--no-remove"]);
        if let Some(release) = release {
            command.arg("--target-release").arg(release);
        }
        command.args(packages);
        tool::output(&mut command, INSTALL_DEADLINE).map(drop)
    }

    /// The names of the packages `package` depends on, itself included, over all levels.
    pub(crate) fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let mut command = self.command("apt-cache");
        command.args(["depends", "--recurse"]);
        for relation in ["recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"] {
            command.arg(format!("--no-{relation}"));
        }
        let listing = tool::output(command.arg(package), UPDATE_DEADLINE)?;
        let listing = String::from_utf8_lossy(&listing);
        // Names stand at the start of a line; their relations are indented below them.
        Ok(listing.lines().filter(|line| !line.starts_with([' ', '<'])).map(str::to_owned).collect())
    }

    /// The newest version of `package` these sources have.
    pub(crate) fn newest_version(&self, package: &str) -> Result<String> {
        let mut command = self.command("apt-cache");
        let shown = tool::output(command.args(["show", "--no-all-versions", package]), UPDATE_DEADLINE)?;
        String::from_utf8_lossy(&shown)
            .lines()
            .find_map(|line| line.strip_prefix("Version: "))
            .map(str::to_owned)
            .with_context(|| format!("the Debian mirror has no package {package}"))
    }

    /// Downloads packages into `directory` and returns the `.deb` files.
    pub(crate) fn download(&self, packages: &[String], directory: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(directory).context("creating the download directory")?;
        let mut command = self.command("apt-get");
        command.current_dir(directory).arg("download").args(packages);
        tool::output(&mut command, DOWNLOAD_DEADLINE)?;
        let mut files = Vec::new();
        for entry in fs::read_dir(directory)? {
            files.push(entry?.path());
        }
        files.retain(|file| file.extension().is_some_and(|extension| extension == "deb"));
        ensure!(files.len() == packages.len(), "asked for {packages:?}, got {files:?}");
        Ok(files)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = tool::command(program);
        // apt's messages are parsed by nobody but shown to the user: one language, no terminal tricks.
        command.env("LC_ALL", "C.UTF-8").arg("-q");
        for option in &self.options {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// The code name of the Debian release this machine runs (`bookworm`).
///
/// # Errors
/// This is not Debian.
pub(crate) fn debian_code_name() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let field = |name: &str| {
        let line = release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.map(|value| value.trim_matches('"').to_owned())
    };
    match (field("ID").as_deref(), field("VERSION_CODENAME")) {
        (Some("debian"), Some(code_name)) => Ok(code_name),
        (Some("debian"), None) => Ok("sid".to_owned()),
        (other, _) => bail!("this is {}, not Debian", other.unwrap_or("an unknown system")),
    }
}

/// The address of the Debian mirror this machine uses.
///
/// # Errors
/// `/etc/apt` names no archive that holds the `main` component of a Debian release.
pub(crate) fn debian_mirror() -> Result<String> {
    let code_name = debian_code_name()?;
    let mut archives = Vec::new();
    for file in source_files(Path::new("/etc/apt")) {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let deb822 = file.extension().is_some_and(|extension| extension == "sources");
        archives.extend(if deb822 { archives_of_deb822(&text) } else { archives_of_list(&text) });
    }
    let main = archives.iter().filter(|archive| archive.components.iter().any(|name| name == "main"));
    main.filter(|archive| archive.suites.iter().any(|suite| *suite == code_name || is_moving_suite(suite)))
        .map(|archive| archive.uri.trim_end_matches('/').to_owned())
        .next()
        .with_context(|| {
            format!("no source in /etc/apt has the suite {code_name}: which mirror may be used?")
        })
}

/// One archive of a source file.
#[derive(Debug, PartialEq)]
struct Archive {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
}

/// Suites whose name moves from release to release, all on the same mirror as the named ones.
fn is_moving_suite(suite: &str) -> bool {
    matches!(suite, "stable" | "oldstable" | "testing" | "unstable" | "sid")
}

/// apt reads `sources.list` and then every `*.list` and `*.sources` of `sources.list.d`, in order of name.
fn source_files(etc_apt: &Path) -> Vec<PathBuf> {
    let mut parts: Vec<PathBuf> = fs::read_dir(etc_apt.join("sources.list.d"))
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    parts.retain(|path| {
        path.extension().is_some_and(|extension| extension == "list" || extension == "sources")
    });
    parts.sort();
    std::iter::once(etc_apt.join("sources.list")).chain(parts).collect()
}

/// `deb [options] uri suite component…`, one archive a line.
fn archives_of_list(text: &str) -> Vec<Archive> {
    text.lines().filter_map(archive_of_list_line).collect()
}

fn archive_of_list_line(line: &str) -> Option<Archive> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let rest = match rest.strip_prefix('[') {
        Some(options) => options.split_once(']')?.1,
        None => rest,
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Archive { uri: words.next()?, suites: vec![words.next()?], components: words.collect() })
}

/// Stanzas of `Field: value`, with continuation lines that start with a blank.
fn archives_of_deb822(text: &str) -> Vec<Archive> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).flat_map(archives_of_stanza).collect()
}

fn archives_of_stanza(lines: &[&str]) -> Vec<Archive> {
    let mut fields: Vec<(String, Vec<String>)> = Vec::new();
    for line in lines {
        let (name, values) = match line.split_once(':') {
            Some((name, values)) if !line.starts_with([' ', '\t']) => (Some(name), values),
            _ => (None, *line),
        };
        if let Some(name) = name {
            fields.push((name.trim().to_ascii_lowercase(), Vec::new()));
        }
        if let Some((_, collected)) = fields.last_mut() {
            collected.extend(values.split_whitespace().map(str::to_owned));
        }
    }
    let values = |name: &str| {
        fields.iter().find(|(field, _)| field == name).map(|(_, values)| values.clone()).unwrap_or_default()
    };
    let disabled = values("enabled").first().is_some_and(|value| value == "no");
    if disabled || !values("types").iter().any(|kind| kind == "deb") {
        return Vec::new();
    }
    let archive = |uri| Archive { uri, suites: values("suites"), components: values("components") };
    values("uris").into_iter().map(archive).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(uri: &str, suites: &[&str], components: &[&str]) -> Archive {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Archive { uri: uri.to_owned(), suites: owned(suites), components: owned(components) }
    }

    #[test]
    fn classic_lines_are_read_with_and_without_options() {
        let text = "# deb http://old.example/debian bookworm main\n\
                    deb http://a.example/debian bookworm main contrib # local\n\
                    deb-src http://a.example/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] https://b.example/debian/ bookworm-updates main\n";
        let expected = [
            archive("http://a.example/debian", &["bookworm"], &["main", "contrib"]),
            archive("https://b.example/debian/", &["bookworm-updates"], &["main"]),
        ];
        assert_eq!(archives_of_list(text), expected);
    }

    #[test]
    fn deb822_stanzas_are_read_with_comments_continuations_and_disabled_ones() {
        let text = "Types: deb\n# a comment\nURIs: http://a.example/debian\nSuites: bookworm\n bookworm-updates\n\
                    Components: main\nSigned-By: /k.gpg\n\nTypes: deb\nEnabled: no\nURIs: http://off.example\n\
                    Suites: x\nComponents: main\n\nTypes: deb-src\nURIs: http://src.example\nSuites: y\n";
        let expected = [archive("http://a.example/debian", &["bookworm", "bookworm-updates"], &["main"])];
        assert_eq!(archives_of_deb822(text), expected);
    }
}
