//! `docs/api.md` as a reader follows it: its files are written, its commands run, and what they say is compared with what it shows.
//!
//! Addresses are the test's own; values that are another one each time are compared by their names alone.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use testlab::volserver::Volserver;

use super::images::Mounted;
use super::programs;

/// A fenced block: the words behind its fence, and its lines.
fn blocks(text: &str) -> Vec<(&str, String)> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(words) = line.strip_prefix("```") {
            let inside = lines.by_ref().take_while(|line| *line != "```");
            blocks.push((words, inside.map(|line| format!("{line}\n")).collect()));
        }
    }
    blocks
}

/// Each command of a block, with what it is to print.
fn commands(block: &str) -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    for line in block.lines() {
        match (line.strip_prefix("$ "), commands.last_mut()) {
            (Some(command), _) => commands.push((command.to_owned(), String::new())),
            (None, Some((_, output))) => output.push_str(&format!("{line}\n")),
            (None, None) => panic!("output before a command: {line}"),
        }
    }
    commands
}

/// Without the values that each run has its own of.
fn without_own_values(output: &str) -> String {
    let own = ["\"volumeUid\": ", "\"storageIncarnation\": ", "\"createdAtMs\": ", "\"etag\": "];
    let line = |line: &str| {
        let name = own.iter().find_map(|name| line.find(name).map(|start| &line[..start + name.len()]));
        format!("{}\n", name.unwrap_or(line))
    };
    output.lines().map(line).collect()
}

/// Runs a script by bash in `directory`; what it said.
fn run(directory: &Path, script: &str) -> String {
    let path = format!("{}:{}", directory.join("bin").display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script]).current_dir(directory).env("PATH", path);
    // A proxy is for others than this machine; some libraries ask it all the same.
    for variable in ["http_proxy", "https_proxy", "all_proxy", "grpc_proxy"] {
        command.env_remove(variable).env_remove(variable.to_uppercase());
    }
    let output = command.output().unwrap();
    let (stdout, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    // The last shown command ends with an error, which its pipe has.
    assert!(output.status.success() || script.contains("2>&1 |"), "{script}: {stdout}{stderr}");
    stdout
}

/// Makes the certificates of the page on TLS, by its own commands.
pub(crate) fn certificates(directory: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let page = fs::read_to_string(root.join("docs/tls.md")).unwrap();
    let certificates = blocks(&page).into_iter().find(|(words, _)| *words == "sh").unwrap().1;
    run(directory, &format!("{{ {certificates} }} 2> openssl.log || {{ cat openssl.log; exit 1; }}"));
}

#[test]
fn every_command_of_the_api_page_prints_what_it_shows() {
    let missing = ["grpcurl", "/usr/bin/protoc", "grpc_python_plugin"]
        .into_iter()
        .find(|program| !super::images::is_there(program));
    let has_grpc = Path::new("/usr/lib/python3/dist-packages/grpc/__init__.py").exists();
    if let Some(program) = missing.or((!has_grpc).then_some("python3-grpcio")) {
        let is_promised = std::env::var_os("VOLNODE_LAB_TOOLS").is_some_and(|value| value == "1");
        assert!(!is_promised, "cannot run: no {program}");
        return println!("SKIP no {program}, which `cargo lab test` installs");
    }
    let Some(mounted) = Mounted::new() else { return };
    let directory = tempfile::tempdir_in(mounted.path()).unwrap();
    let here = directory.path();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    symlink(root.join("proto"), here.join("proto")).unwrap();
    fs::create_dir(here.join("bin")).unwrap();
    // Debian's, as its packages belong together, whatever else comes first here.
    for program in ["python3", "protoc"] {
        symlink(Path::new("/usr/bin").join(program), here.join("bin").join(program)).unwrap();
    }
    certificates(here);
    let socket = here.join("m.sock");
    let mut volserver = Command::new(programs::directory().join("volserver"));
    volserver.args(["--threads", "1", "--memory-max", "2G", "--log", "error", "--tls", "required"]);
    for (option, file) in [
        ("--tls-cert", "server-cert.pem"),
        ("--tls-key", "server-key.pem"),
        ("--tls-client-ca", "ca-cert.pem"),
    ] {
        volserver.arg(option).arg(here.join(file));
    }
    volserver.arg("--management").arg(format!("unix:{}", socket.display()));
    let server = Volserver::start(&mut volserver, here).unwrap();

    let page = fs::read_to_string(root.join("docs/api.md")).unwrap();
    let mut ran = 0;
    for (words, block) in blocks(&page) {
        match words.split_once(' ').unwrap_or((words, "")) {
            ("python", file) if !file.is_empty() => fs::write(here.join(file), block).unwrap(),
            ("console", "") => {
                for (command, shown) in commands(&block) {
                    let own = command
                        .replace(
                            "unix:///run/volserver/management.sock",
                            &format!("unix://{}", socket.display()),
                        )
                        .replace("localhost:10810", &format!("localhost:{}", server.management.port()));
                    let printed = run(here, &own);
                    assert_eq!(without_own_values(&printed), without_own_values(&shown), "{command}");
                    ran += 1;
                }
            }
            _ => {}
        }
    }
    assert_eq!(ran, 12, "commands");
}

#[test]
fn blocks_and_commands_are_found() {
    let page = "a\n```console\n$ one\n1\n2\n$ two\n```\n```python x.py\nimport x\n```\n";
    let found = blocks(page);
    assert_eq!(found.iter().map(|(words, _)| *words).collect::<Vec<_>>(), ["console", "python x.py"]);
    let commands = commands(&found[0].1);
    assert_eq!(commands, [("one".to_owned(), "1\n2\n".to_owned()), ("two".to_owned(), String::new())]);
    assert_eq!(
        without_own_values("  \"volumeUid\": \"x\",\n"),
        without_own_values("  \"volumeUid\": \"y\",\n")
    );
}
