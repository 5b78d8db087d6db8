//! What to print when a test hangs: the kernel stacks of the tasks that cannot be killed or do not move.
//!
//! Called by the harness, in the process whose test hung. It reads `/proc` and asks the kernel by sysrq-w; it
//! stops nothing and changes nothing. Sources: `Documentation/filesystems/proc.rst` (3.x `/proc/<pid>/stack`),
//! `Documentation/admin-guide/sysrq.rst` (`w`: dump tasks in uninterruptible sleep).

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// The state letter in `/proc/<pid>/stat` of a task in uninterruptible sleep.
const UNINTERRUPTIBLE: &str = "D";

/// A report of every task in uninterruptible sleep and of the tasks of processes whose command name starts
/// with one of `also` (our own daemons, whatever their state), with kernel stacks where the kernel shows them.
pub fn describe(also: &[&str]) -> String {
    let mut report = String::new();
    for process in entries_named_by_number(Path::new("/proc")) {
        for task in entries_named_by_number(&process.join("task")) {
            let name = first_line(&task.join("comm"));
            let state = task_state(&task);
            let wanted = state == UNINTERRUPTIBLE || also.iter().any(|prefix| name.starts_with(prefix));
            if wanted {
                let id = task.file_name().map(|id| id.to_string_lossy().into_owned()).unwrap_or_default();
                let stack =
                    fs::read_to_string(task.join("stack")).unwrap_or_else(|error| format!("({error})\n"));
                // A report that cannot be written to a string does not exist; the result is always Ok.
                let _ = writeln!(report, "task {id} {name} state {state}\n{stack}");
            }
        }
    }
    report
}

/// Asks the kernel to log every blocked task, on the console too. It lands in a VM's console log.
pub fn log_blocked_tasks() {
    // First everything down to debug messages is let through to the console: the stacks are of level info.
    for request in ["8", "w"] {
        if let Err(error) = fs::write("/proc/sysrq-trigger", request) {
            eprintln!("sysrq-{request}: {error}");
        }
    }
}

/// The subdirectories of a `/proc` directory that stand for a task.
fn entries_named_by_number(directory: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
        .map(|entry| entry.path())
        .collect()
}

/// The state letter: the field after the command name, which is in parentheses and may hold anything.
fn task_state(task: &Path) -> String {
    let stat = fs::read_to_string(task.join("stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default();
    after_name.split(' ').next().unwrap_or_default().to_owned()
}

fn first_line(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::describe;

    #[test]
    fn the_tasks_of_a_named_process_are_described() {
        let name = super::first_line(std::path::Path::new("/proc/self/comm"));
        let report = describe(&[&name]);
        assert!(report.contains(&format!(" {name} state ")), "no task of {name} in:\n{report}");
    }
}
