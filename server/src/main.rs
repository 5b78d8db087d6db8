//! volserver: the storage node.

fn main() {}
