//! Which part of the kernel workers' time is the NVMe client's and which the target's.
//!
//! Called by `bench_guest` for runs of their own, because the same `kworker` threads serve both: the two functions that do
//! the work are timed by the function-graph tracer, with only these two traced. Every value is a share; what it is a
//! share of is measured without the tracer. Source: Linux 7.3 `Documentation/trace/ftrace.rst`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const TRACING: &str = "/sys/kernel/tracing";

/// Does the client's sending and receiving (`drivers/nvme/host/tcp.c`).
const CLIENT: &str = "nvme_tcp_io_work";

/// Does the target's, and there its disk's I/O (`drivers/nvme/target/tcp.c`).
const TARGET: &str = "nvmet_tcp_io_work";

/// Runs `work` while both are timed; gives the client's share of their time, 0 to 1.
///
/// # Errors
/// `work` failed, or the tracer cannot be used or saw nothing.
pub(super) fn client_share(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let filter = format!("{CLIENT} {TARGET}");
    // Time asleep or preempted is not theirs; the name of the function is wanted at its end, too.
    let settings = [
        ("current_tracer", "nop"),
        ("set_ftrace_filter", filter.as_str()),
        ("current_tracer", "function_graph"),
        ("trace_options", "nosleep-time"),
        ("trace_options", "funcgraph-tail"),
        ("trace", ""),
        ("tracing_on", "1"),
    ];
    for (file, value) in settings {
        set(file, value)?;
    }
    let worked = work();
    set("tracing_on", "0")?;
    let trace = fs::read_to_string(Path::new(TRACING).join("trace")).context("the trace")?;
    for (file, value) in
        [("trace_options", "sleep-time"), ("current_tracer", "nop"), ("set_ftrace_filter", "")]
    {
        set(file, value)?;
    }
    worked?;
    share(&trace)
}

fn set(file: &str, value: &str) -> Result<()> {
    fs::write(Path::new(TRACING).join(file), value).with_context(|| format!("tracing: {value:?} to {file}"))
}

fn share(trace: &str) -> Result<f64> {
    let mut client_us = 0.0;
    let mut target_us = 0.0;
    for line in trace.lines() {
        let Some(duration_us) = duration_us(line) else { continue };
        if line.contains(CLIENT) {
            client_us += duration_us;
        } else if line.contains(TARGET) {
            target_us += duration_us;
        }
    }
    ensure!(
        client_us > 0.0 && target_us > 0.0,
        "traced {client_us} µs of the client, {target_us} of the target"
    );
    Ok(client_us / (client_us + target_us))
}

/// The duration of a function that ended in this line: the number before `us`.
fn duration_us(line: &str) -> Option<f64> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let unit = words.iter().position(|&word| word == "us")?;
    words.get(unit.checked_sub(1)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# CPU  DURATION                  FUNCTION CALLS
 0) ! 400.000 us  |  nvmet_tcp_io_work [nvmet_tcp]();
 1) + 50.500 us   |  nvme_tcp_io_work [nvme_tcp]();
 0)               |  nvme_tcp_io_work [nvme_tcp]() {
 ------------------------------------------
 0) kworker-10 => kworker-12
 ------------------------------------------
 0) ! 149.500 us  |  } /* nvme_tcp_io_work [nvme_tcp] */
";

    #[test]
    fn a_function_is_counted_once_whether_or_not_it_was_interrupted() {
        assert_eq!(share(TRACE).unwrap(), 1.0 / 3.0);
    }

    #[test]
    fn a_trace_without_one_side_is_an_error() {
        assert!(share(" 0) ! 400.000 us  |  nvmet_tcp_io_work [nvmet_tcp]();\n").is_err());
    }
}
