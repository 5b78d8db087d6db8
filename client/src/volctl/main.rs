//! volctl: the command line of volnode.

fn main() {}
