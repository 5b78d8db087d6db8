//! A short soak: some seconds of what `cargo lab soak` does for hours.

use std::time::Duration;

use anyhow::Result;
use testlab::harness::{Env, Test};
use testlab::{seed, soak};

pub(crate) const TESTS: &[Test] =
    &[Test::new("soak::half_a_minute_of_faults_loses_nothing", half_a_minute).within(400)];

fn half_a_minute(env: &Env) -> Result<()> {
    let report = soak::run(env, seed::choose()?, Duration::from_secs(30), None)?;
    println!("{report}");
    Ok(())
}
