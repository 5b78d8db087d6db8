//! The tests that need ublk: every one of them, by module. Run by `cargo lab test` inside the VM.
//!
//! To add one, write a function in its module and a line in the module's `TESTS`. The harness
//! (`testlab::harness`) gives each test a directory, a deadline and a machine in the state it found it in.

mod smoke;

use std::process::ExitCode;

fn main() -> ExitCode {
    let modules: [&[testlab::harness::Test]; 1] = [smoke::TESTS];
    testlab::harness::main(&modules.concat())
}
