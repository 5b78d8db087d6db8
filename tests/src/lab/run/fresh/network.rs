//! How this machine reaches Debian's mirror, the crates' registry, Go's modules and Python's packages, for a machine that has to do the same: addresses of name
//! servers, proxies, the authorities behind certificates, cargo's registries.
//!
//! All of it is read from where the programs themselves read it, and nothing else is: a fresh machine gets no other
//! setting of apt's or cargo's, no package list, no crate, and no password or token.

use std::env;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::tool;

/// Reading apt's configuration.
const APT_CONFIG_DEADLINE: Duration = Duration::from_secs(20);

/// Where Debian keeps the certificates of all authorities, in one file.
pub(super) const CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";

/// Settings of apt's that say how and whether a mirror is reached (`apt.conf(5)`), by how they begin.
const APT_SETTINGS: [&str; 5] =
    ["Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::ForceIPv", "Acquire::Retries "];

/// Variables by which programs find a proxy, in any case.
const PROXY_VARIABLES: [&str; 4] = ["http_proxy", "https_proxy", "all_proxy", "no_proxy"];

/// Variables of cargo's that say how and where a registry is reached (the Cargo book), by how they begin.
const CARGO_VARIABLES: [&str; 4] = ["CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_SOURCE_"];

/// Variables of Go's that say where modules are (`go help environment`).
const GO_VARIABLES: [&str; 6] = ["GOPROXY", "GONOPROXY", "GOSUMDB", "GONOSUMDB", "GOPRIVATE", "GOINSECURE"];

/// Variables of pip's that say where packages are (`pip help install`).
const PIP_VARIABLES: [&str; 4] = ["PIP_INDEX_URL", "PIP_PROXY", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT"];

/// The lines of `apt.conf` that a machine beside this one needs.
///
/// # Errors
/// apt-config cannot be run.
pub(super) fn apt_configuration() -> Result<String> {
    Ok(apt_settings_of(&apt_dump()?))
}

/// The variable that tells a program which proxy apt uses, if it uses one and the environment names none.
///
/// # Errors
/// apt-config cannot be run.
pub(super) fn proxy_of_apt() -> Result<Option<(&'static str, String)>> {
    if env::var_os("http_proxy").is_some() {
        return Ok(None);
    }
    Ok(proxy_in(&apt_dump()?).map(|proxy| ("http_proxy", proxy)))
}

/// The variables that programs on the fresh machine need to reach the network.
pub(super) fn environment() -> Vec<(String, String)> {
    // A variable that is not text is none of these.
    let variables = env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    variables.filter(|(name, value)| is_wanted(name) && !value.contains('\n')).collect()
}

/// The file of certificates that this machine trusts.
pub(super) fn certificates() -> PathBuf {
    let named = env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    named.filter(|file| file.is_file()).unwrap_or_else(|| PathBuf::from("/").join(CERTIFICATES))
}

/// Cargo's own configuration, if there is any.
pub(super) fn cargo_configuration() -> Option<PathBuf> {
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or(home)?;
    ["config.toml", "config"].map(|name| home.join(name)).into_iter().find(|file| file.is_file())
}

fn apt_dump() -> Result<String> {
    let dump = tool::output(tool::command("apt-config").arg("dump"), APT_CONFIG_DEADLINE);
    Ok(String::from_utf8_lossy(&dump.context("apt's configuration")?).into_owned())
}

fn apt_settings_of(dump: &str) -> String {
    let wanted = |line: &&str| APT_SETTINGS.iter().any(|start| line.starts_with(start));
    dump.lines().filter(wanted).map(|line| format!("{line}\n")).collect()
}

/// `Acquire::http::Proxy "http://…";`
fn proxy_in(dump: &str) -> Option<String> {
    let value = dump.lines().find_map(|line| line.strip_prefix("Acquire::http::Proxy \""))?;
    let value = value.strip_suffix("\";")?;
    (!value.is_empty() && value != "DIRECT").then(|| value.to_owned())
}

fn is_wanted(name: &str) -> bool {
    let is_secret = ["_TOKEN", "_SECRET_KEY", "_CREDENTIAL_PROVIDER"].iter().any(|end| name.ends_with(end));
    let of_cargo = CARGO_VARIABLES.iter().any(|start| name.starts_with(start)) && name != "CARGO_NET_OFFLINE";
    let of_a_proxy = PROXY_VARIABLES.iter().any(|variable| name.eq_ignore_ascii_case(variable));
    let of_modules = GO_VARIABLES.contains(&name) || PIP_VARIABLES.contains(&name);
    of_a_proxy || of_modules || (of_cargo && !is_secret)
}

/// Of cargo's configuration, the tables that say how registries are reached; no token, no compiler, no directory.
pub(super) fn ways_to_registries(configuration: &str) -> String {
    let mut text = String::new();
    let mut is_kept = false;
    for line in configuration.lines() {
        if let Some(table) = line.trim().strip_prefix('[') {
            let name = table.trim_start_matches('[').trim().trim_start_matches('"');
            is_kept = ["source", "registries", "registry", "http", "net"]
                .iter()
                .any(|kept| name.strip_prefix(kept).is_some_and(|rest| rest.starts_with(['.', ']', ' '])));
        }
        let key = line.split('=').next().unwrap_or_default().trim();
        if is_kept && !key.contains("token") && !key.contains("credential") {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_leads_to_the_mirror_is_taken_of_apts_settings() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::http::Proxy \"http://proxy.example:3128\";\n\
                    Acquire::Languages:: \"none\";\nAcquire::Check-Date \"false\";\nDPkg::Post-Invoke:: \"rm -f x\";\n";
        let expected =
            "Acquire::http::Proxy \"http://proxy.example:3128\";\nAcquire::Check-Date \"false\";\n";
        assert_eq!(apt_settings_of(dump), expected);
        assert_eq!(proxy_in(dump).as_deref(), Some("http://proxy.example:3128"));
        assert_eq!(proxy_in("Acquire::http::Proxy \"DIRECT\";\nAcquire::http \"\";\n"), None);
    }

    #[test]
    fn variables_that_lead_to_a_registry_are_taken_and_no_secret_with_them() {
        for name in [
            "http_proxy",
            "HTTPS_PROXY",
            "CARGO_HTTP_CAINFO",
            "CARGO_REGISTRIES_MINE_INDEX",
            "GOPROXY",
            "PIP_INDEX_URL",
        ] {
            assert!(is_wanted(name), "{name}");
        }
        for name in
            ["CARGO_REGISTRIES_MINE_TOKEN", "CARGO_NET_OFFLINE", "CARGO_HOME", "RUSTFLAGS", "LANG", "GOPATH"]
        {
            assert!(!is_wanted(name), "{name}");
        }
    }

    #[test]
    fn of_cargos_configuration_only_the_way_to_registries_is_taken() {
        let own = "[build]\nrustc-wrapper = \"x\"\n[source.crates-io]\nreplace-with = \"m\"\n[source.\"m\"]\n\
                   registry = \"sparse+https://m.example/\"\n[registry]\ntoken = \"secret\"\n[net]\nretry = 3\n[network]\na = 1\n";
        let taken = "[source.crates-io]\nreplace-with = \"m\"\n[source.\"m\"]\nregistry = \"sparse+https://m.example/\"\n\
                     [registry]\n[net]\nretry = 3\n";
        assert_eq!(ways_to_registries(own), taken);
    }
}
