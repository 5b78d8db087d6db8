//! The bench in small, so that the long one does not fail when somebody wants its numbers.
//!
//! It runs the program that `cargo lab bench` runs in its VM, which makes every peer's device and proves that it stores what it
//! is given. Only in a VM: it loads drivers and configures the kernel's NVMe target.

use anyhow::{Result, ensure};
use testlab::harness::{Env, Lacking, Test};
use testlab::kernel_series::KernelSeries;
use testlab::shell::run;

pub(crate) const TESTS: &[Test] =
    // The other series has no `fused` data path to measure.
    &[Test::new("bench::every_subject_stores_and_is_measured", every_subject_is_measured)
            .on(&[KernelSeries::V7])
            .within(300)];

/// One of each subject.
const SAMPLES: usize = 8;

fn every_subject_is_measured(env: &Env) -> Result<()> {
    if !env.in_vm {
        return Err(Lacking("a kernel that is ours to configure".to_owned()).into());
    }
    let lab = env.program("lab").display().to_string();
    let programs = env.programs.display().to_string();
    let stdout = run(&lab, &["guest-bench", &programs, "--quick"])?;
    let mut samples = 0;
    for line in stdout.lines().filter_map(|line| line.strip_prefix("bench-sample ")) {
        let sample: serde_json::Value = serde_json::from_str(line)?;
        let positive =
            |pointer: &str| sample.pointer(pointer).and_then(serde_json::Value::as_f64) > Some(0.0);
        for pointer in ["/iops", "/mib_per_s", "/latency_us/0", "/cpu/client", "/cpu/server", "/cpu/total"] {
            ensure!(positive(pointer), "{pointer} is not positive in {line}");
        }
        samples += 1;
    }
    ensure!(samples == SAMPLES, "{samples} samples of {SAMPLES}:\n{stdout}");
    Ok(())
}
