//! volclient: the node daemon (`serve`) and the device processes (`device`).

fn main() {}
