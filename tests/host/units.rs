//! The systemd units of `deploy/`: systemd takes every line of them, and every stop is bounded.

use std::fs;
use std::path::Path;
use std::process::Command;

use testlab::harness::LAB_VARIABLE;
use testlab::unit_file::{INSTALLED_PROGRAMS, UnitFile};

use crate::programs;

const UNITS: [&str; 5] = [
    "volclient.service",
    "volnode-attach@.service",
    "volnode-shutdown.service",
    "volnode-stall-limit.service",
    "volserver.service",
];

/// Additions to units, with the unit and the name that each gets there.
const DROP_INS: [(&str, &str, &str); 2] = [
    ("volserver-adopt.conf", "volserver.service", "adopt.conf"),
    ("volserver-lvm.conf", "volserver.service", "lvm.conf"),
];

/// What systemd complains of in units with the programs at `programs`; empty if it takes them.
fn complaints(programs: &Path, change: impl Fn(&str) -> String) -> String {
    let directory = tempfile::tempdir().unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).env("LC_ALL", "C.UTF-8").env_remove("LANGUAGE");
    for name in UNITS {
        let text = UnitFile::read(name)
            .unwrap()
            .text()
            .replace(INSTALLED_PROGRAMS, &format!("{}/", programs.display()));
        let path = directory.path().join(name);
        fs::write(&path, change(&text)).unwrap();
        verify.arg(path);
    }
    for (name, unit, installed) in DROP_INS {
        let text = fs::read_to_string(UnitFile::directory().join(name)).unwrap();
        let additions = directory.path().join(format!("{unit}.d"));
        fs::create_dir_all(&additions).unwrap();
        fs::write(additions.join(installed), change(&text)).unwrap();
    }
    let output = verify.output().expect("systemd-analyze (Debian package systemd)");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // Units of this machine's own are not ours to mend.
    let is_ours =
        |line: &&str| UNITS.iter().any(|name| line.contains(name) || line.contains(&format!("{name}.d")));
    let ours: Vec<&str> = said.lines().filter(is_ours).collect();
    assert!(output.status.success() || !ours.is_empty(), "{said}");
    ours.join("\n")
}

#[test]
fn systemd_takes_every_line_of_the_units() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        assert!(
            std::env::var_os(LAB_VARIABLE).is_none(),
            "the lab installs systemd-analyze, yet it is missing"
        );
        println!("SKIP no systemd-analyze (Debian package systemd)");
        return;
    }
    let programs = programs::directory();
    assert_eq!(complaints(&programs, str::to_owned), "");
    let broken = complaints(&programs, |text| text.replace("TimeoutStopSec=", "TimeoutStopSeconds="));
    assert!(
        broken.contains("TimeoutStopSeconds"),
        "a line that systemd does not know went unnoticed: {broken}"
    );
}

#[test]
fn the_additions_to_units_are_read_and_give_devices_and_nothing_else() {
    let (name, unit, installed) = DROP_INS[0];
    let text = fs::read_to_string(UnitFile::directory().join(name)).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let expected = [
        "[Service]",
        "SupplementaryGroups=disk",
        "PrivateDevices=no",
        "DevicePolicy=closed",
        "DeviceAllow=block-* rw",
    ];
    assert_eq!(lines, expected, "{name}");
    // LVM's takes more, and nothing but what LVM needs.
    let lvm = fs::read_to_string(UnitFile::directory().join(DROP_INS[1].0)).unwrap();
    let after = "After=lvm2-monitor.service blk-availability.service";
    for line in ["User=root", "DevicePolicy=closed", "DeviceAllow=/dev/mapper/control rw", after] {
        assert!(lvm.lines().any(|found| found == line), "{line}");
    }
    for taken in ["NoNewPrivileges", "ProtectSystem", "ProtectHome", "MemoryDenyWriteExecute"] {
        assert!(!lvm.contains(taken), "{taken} is not LVM's to change");
    }
    // What it takes back has to be there.
    assert!(UnitFile::read(unit).unwrap().text().lines().any(|line| line == "PrivateDevices=yes"));
    assert!(text.contains(&format!("/etc/systemd/system/{unit}.d/{installed}")));
    let mut found: Vec<String> = fs::read_dir(UnitFile::directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".conf") && !name.ends_with(".sysusers.conf"))
        .collect();
    found.sort();
    assert_eq!(found, DROP_INS.map(|(name, ..)| name));
    if Command::new("systemd-analyze").arg("--version").output().is_ok() {
        let broken =
            complaints(&programs::directory(), |text| text.replace("DeviceAllow=", "DevicesAllowed="));
        assert!(
            broken.contains("DevicesAllowed"),
            "a line that systemd does not know went unnoticed: {broken}"
        );
    }
}

/// By its instance's name, which a file may replace: so the variable is set before the files are read.
#[test]
fn what_is_attached_is_detached_and_may_be_told_by_a_file() {
    let unit = UnitFile::read("volnode-attach@.service").unwrap();
    for instance in ["vol-123", r"nbd:--storage\x2d1-disk"] {
        let words = |key: &str| unit.words(key, instance).unwrap().concat();
        assert!(words("ExecStart").starts_with(&["/usr/local/bin/volctl".into(), "attach".into()]));
        assert!(words("ExecStart").contains(&instance.to_owned()));
        assert_eq!(words("ExecStop"), ["/usr/local/bin/volctl", "detach", instance]);
    }
    let line = |text: &str| unit.text().lines().position(|line| line.starts_with(text)).unwrap();
    assert!(
        line("Environment=VOLNODE_ATTACH_TARGET=%i") < line("EnvironmentFile=-/etc/volnode/attach/%i.env")
    );
}

#[test]
fn no_daemon_is_limited_by_a_count_of_threads() {
    // The others run one command each.
    for name in ["volclient.service", "volserver.service"] {
        let unit = UnitFile::read(name).unwrap();
        let limits: Vec<&str> = unit.text().lines().filter(|line| line.starts_with("TasksMax=")).collect();
        assert_eq!(limits, ["TasksMax=infinity"], "{name}");
    }
}

#[test]
fn every_unit_is_tested_and_bounds_its_stop() {
    let mut found: Vec<String> = fs::read_dir(UnitFile::directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".service"))
        .collect();
    found.sort();
    assert_eq!(found, UNITS);
    for name in UNITS {
        UnitFile::read(name).unwrap().timeout_stop().unwrap();
    }
}
